"""Live migration: wire format, transports, precopy, switchover, sender and receiver."""
