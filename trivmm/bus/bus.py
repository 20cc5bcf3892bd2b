"""The bus as one vCPU sees it: where a back end serves its guest's accesses, on the vCPU's own thread.

The two address spaces are the machine's; a :class:`Bus` over them is one vCPU's, since it also remembers what that vCPU
asks for at the moment. A device that does not answer is so named to whoever waits for the vCPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import attrs

from trivmm.bus.space import AddressSpace, Effect

__all__ = ["Access", "Bus"]


@attrs.frozen
class Access:
    """An access that is being served. ``kind`` is ``read`` or ``write``, ``size`` in bytes, ``device`` the name of the
    range that holds the address (empty: nobody's), ``since`` in the bus's clock."""

    kind: str
    space: str
    address: int
    size: int
    device: str
    since: float

    def __str__(self) -> str:
        where = f"port {self.address:#x}" if self.space == "pio" else f"{self.address:#x}"
        whose = f" ({self.device})" if self.device else ""
        return f"a {self.kind} of {self.size} byte{'' if self.size == 1 else 's'} at {where}{whose}"


@attrs.define(eq=False)
class Bus:
    """Used by one vCPU's thread; :meth:`serving` by any. A string instruction is an access for each of its elements."""

    pio: AddressSpace
    mmio: AddressSpace
    clock: Callable[[], float] = time.monotonic
    # One value, written whole: a look from another thread never sees half an access. After an access whose device
    # raised it stays: the vCPU has ended, and whoever reports it wants to know where.
    _serving: tuple[AddressSpace, str, int, int, float] | None = attrs.field(default=None, init=False)

    def read_port(self, port: int, size: int, count: int = 1) -> bytes:
        """``count`` elements of ``size`` (1, 2, 4) bytes, one after the other from the same port."""
        self._serving = (self.pio, "read", port, size, self.clock())
        data = b"".join([self.pio.read(port, size) for _ in range(count)])
        self._serving = None
        return _exactly(data, size * count)

    def write_port(self, port: int, size: int, data: bytes) -> Effect:
        """``data`` holds one element of ``size`` (1, 2, 4) bytes or several, all of which are written, whatever the
        first ones ask for."""
        self._serving = (self.pio, "write", port, size, self.clock())
        if len(data) == size:
            effect = self.pio.write(port, data)
        else:
            effect = None
            for at in range(0, len(data), size):
                effect = self.pio.write(port, data[at : at + size]) or effect
        self._serving = None
        return effect

    def read_mmio(self, gpa: int, size: int) -> bytes:
        self._serving = (self.mmio, "read", gpa, size, self.clock())
        data = self.mmio.read(gpa, size)
        self._serving = None
        return _exactly(data, size)

    def write_mmio(self, gpa: int, data: bytes) -> Effect:
        self._serving = (self.mmio, "write", gpa, len(data), self.clock())
        effect = self.mmio.write(gpa, data)
        self._serving = None
        return effect

    def token(self) -> object | None:
        """What stands for the access that is being served right now, and for no other; None: none is. Any thread.

        Who has taken a range out of an address space, and seen each bus's token change after it, knows that nobody is
        in its device any more."""
        return self._serving

    def serving(self) -> Access | None:
        """What the vCPU waits for right now. Any thread."""
        serving = self._serving
        if serving is None:
            return None
        space, kind, address, size, since = serving
        found = space.find(address, size)
        return Access(kind, space.name, address, size, "" if found is None else found.name, since)


def _exactly(data: bytes, size: int) -> bytes:
    """What goes into a CPU has the length that it waits for, whatever a device made of an odd one."""
    return data if len(data) == size else data[:size].ljust(size, b"\xff")
