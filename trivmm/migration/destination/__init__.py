"""The side that takes a machine in: the door that listens and answers, and the intake behind it."""
