"""The side that has the machine: rounds, the switchover, and the verdict after COMMIT."""
