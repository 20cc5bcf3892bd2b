"""Live migration: what it asks of a machine (``port``), options, progress; the wire, links, pages and the two sides."""
