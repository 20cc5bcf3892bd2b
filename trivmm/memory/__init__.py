"""Guest memory: the regions of RAM, where they lie, and who wrote to them."""
