"""virtio-console: ``device`` is the device as its driver sees it, ``line`` what it is tied to."""

from trivmm.virtio.console.device import ConsoleDevice
from trivmm.virtio.console.line import ConsoleLine

__all__ = ["ConsoleDevice", "ConsoleLine"]
