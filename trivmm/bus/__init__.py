"""The bus: address spaces of ports and MMIO, what a write may ask of its vCPU, and the barrier it may park at."""
