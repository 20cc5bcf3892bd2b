"""Lifetimes and ownership: the nursery tree, vCPU tasks, the activation servicer, the ownership lease."""
