"""PCI: configuration spaces, BARs, the CF8/CFC mechanism."""
