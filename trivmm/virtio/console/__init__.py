"""virtio-console: ``device`` is the device as its driver sees it, ``line`` what it is tied to."""
