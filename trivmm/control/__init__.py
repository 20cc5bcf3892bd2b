"""The HTTP control surface and its client."""
