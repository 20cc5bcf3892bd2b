"""virtio-rng: entropy."""
