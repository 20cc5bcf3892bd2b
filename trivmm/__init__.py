"""A virtual machine monitor for Linux/KVM on trio."""
