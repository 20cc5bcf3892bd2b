"""The soft back end: the Unicorn CPU emulator, for hosts without /dev/kvm."""
