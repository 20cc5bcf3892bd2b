"""virtio-net, a network interface: ``config`` is what it may be, ``device`` what its driver sees, ``link`` what that is
tied to, which ``tap`` and ``passt`` open."""
