"""What a machine is when it is saved: frozen plain data, and the one strict way to read it from a peer."""
