"""virtio-balloon: memory that the guest gives back."""
