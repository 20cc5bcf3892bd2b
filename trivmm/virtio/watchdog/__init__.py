"""virtio-watchdog: resets a guest that has stopped to say that it lives."""
