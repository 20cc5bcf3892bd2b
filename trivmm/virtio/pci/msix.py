"""MSI-X (PCI 3.0 section 6.8.2): a table of vectors, each an eventfd that is routed to a message while unmasked.

A masked vector has no irqfd, nor has any while the function is no bus master: what its worker signals stays in the
eventfd, and its pending bit *is* "the eventfd is readable". Unmasking connects it again, which injects at once. So no
interrupt is lost between mask and unmask, between two hosts, or between a worker's write and anybody's bookkeeping.

Accesses come from vCPU threads, the switchover from a thread of its own. One lock orders them: it is held while the
kernel changes a route, so nothing else is ever asked for under it, and the trio thread never waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import struct
from typing import Final

import attrs

from trivmm.bus.lock import BoundedLock
from trivmm.deadlines import Deadlines
from trivmm.errors import HypervisorError
from trivmm.hypervisor.base import VmBackend
from trivmm.platform.pci.config_space import PciConfigSpace
from trivmm.state.strict import refused
from trivmm.state.virtio import MsixState

__all__ = ["MsixTable"]

logger = logging.getLogger(__name__)

ENTRY_SIZE: Final = 16
CAP_MSIX: Final = 0x11
WRITABLE: Final = b"\x00\xc0" + bytes(8)  # of the capability: enable and function mask
ENABLE: Final = 1 << 15
FUNCTION_MASK: Final = 1 << 14
MASKED: Final = 1
ENTRY: Final = struct.Struct("<QII")  # address, data, vector control
TURNS: Final = 3  # changes of a route in the kernel that a vCPU may have to wait out


@attrs.define(eq=False)
class _Vector:
    fd: int
    entry: bytearray
    token: int | None = None
    routed: tuple[int, int] | None = None


class MsixTable:
    """``live`` is False while the machine is stopped for a switchover, and on a destination before COMMIT.

    Its capability in ``config`` has the message control, which is nowhere else: see :meth:`follow`."""

    def __init__(
        self, vm: VmBackend, config: PciConfigSpace, vectors: int, table: int, pending_bits: int, deadlines: Deadlines
    ) -> None:
        """``table`` and ``pending_bits``: where the BAR has them, offset and BAR index as the capability spells it."""
        self._vm = vm
        self._config = config
        self._lock = BoundedLock("an MSI-X table", TURNS * deadlines.kernel, "kernel")
        self.refused = 0
        self.live = False
        self._vectors: list[_Vector] = []
        try:
            for _ in range(vectors):
                fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                self._vectors.append(_Vector(fd, bytearray(ENTRY.pack(0, 0, MASKED))))
        except BaseException:
            self.close()
            raise
        self._capability = config.add_capability(
            CAP_MSIX, struct.pack("<HII", vectors - 1, table, pending_bits), WRITABLE
        )

    def __len__(self) -> int:
        return len(self._vectors)

    def fd_of(self, vector: int) -> int:
        """The eventfd that a worker writes, or -1 for no vector."""
        return self._vectors[vector].fd if vector < len(self._vectors) else -1

    # --- the guest's side ------------------------------------------------------------------------------------

    @property
    def _sends(self) -> bool:
        """Enabled, its function not masked, and that a bus master."""
        control = int.from_bytes(self._config.read(self._capability + 2, 2), "little")
        return control & (ENABLE | FUNCTION_MASK) == ENABLE and self._config.bus_master

    def depends_on(self, offset: int, size: int) -> bool:
        """Whether a write there, in configuration space, may change what it sends."""
        in_control = offset < self._capability + 4 and offset + size > self._capability + 2
        return in_control or self._config.holds_command(offset, size)

    def follow(self) -> None:
        """Configuration space may say otherwise now."""
        with self._lock:
            self._sync_all()

    def read_table(self, offset: int, size: int) -> bytes:
        """Dword or qword accesses inside one entry; anything else reads all-ones."""
        index, at = divmod(offset, ENTRY_SIZE)
        if size not in (4, 8) or at % size or index >= len(self._vectors):
            return b"\xff" * size
        with self._lock:
            return bytes(self._vectors[index].entry[at : at + size])

    def write_table(self, offset: int, data: bytes) -> None:
        index, at = divmod(offset, ENTRY_SIZE)
        if len(data) not in (4, 8) or at % len(data) or index >= len(self._vectors):
            return
        vector = self._vectors[index]
        with self._lock:
            vector.entry[at : at + len(data)] = data
            vector.entry[12:16] = (vector.entry[12] & MASKED).to_bytes(4, "little")  # the rest is reserved
            self._sync(vector, self._sends)

    def read_pba(self, offset: int, size: int) -> bytes:
        if size not in (4, 8) or offset % size:
            return b"\xff" * size
        with self._lock:
            bits = sum(1 << index for index in range(len(self._vectors)) if self._pending(index))
        length = (len(self._vectors) + 63) // 64 * 8
        return bits.to_bytes(length, "little")[offset : offset + size].ljust(size, b"\0")

    def _pending(self, index: int) -> bool:
        """A connected vector is never pending: the hypervisor has taken what was there."""
        vector = self._vectors[index]
        return vector.token is None and _readable(vector.fd)

    # --- routes ----------------------------------------------------------------------------------------------

    def _sync_all(self) -> None:
        sends = self._sends
        for vector in self._vectors:
            self._sync(vector, sends)

    def _sync(self, vector: _Vector, sends: bool) -> None:
        address, data, masked = ENTRY.unpack(vector.entry)
        open_ = self.live and sends and not masked & MASKED
        wanted = (address, data) if open_ else None
        if wanted == vector.routed:
            return
        if vector.token is not None:
            self._vm.disconnect_msi(vector.token)
            vector.token, vector.routed = None, None
        if wanted is not None:
            # Taken out and written again: an eventfd that is readable when it is connected injects, but the kernel
            # leaves its count, which would look pending at the next mask.
            held = _drain(vector.fd)
            try:
                vector.token, vector.routed = self._vm.connect_msi(vector.fd, address, data), wanted
            except HypervisorError as error:  # a message that no interrupt controller takes: the guest's mistake
                self.refused += 1
                if self.refused == 1:
                    logger.warning("an MSI-X message (address %#x, data %#x) is refused: %s", address, data, error)
            if held:
                os.eventfd_write(vector.fd, 1)

    def messages(self) -> list[tuple[int, int]]:
        """(address, data) of each vector that :meth:`connect_all` would route, and that isn't yet."""
        with self._lock:
            if not self._sends:
                return []
            entries = [ENTRY.unpack(vector.entry) for vector in self._vectors if vector.routed is None]
            return [(address, data) for address, data, masked in entries if not masked & MASKED]

    def connect_all(self) -> None:
        with self._lock:
            self.live = True
            self._sync_all()

    def disconnect_all(self) -> None:
        """After this nothing injects; what workers signal shows as pending."""
        with self._lock:
            self.live = False
            self._sync_all()

    def forget_interrupts(self) -> None:
        """A virtio reset leaves the table alone (it is PCI's); interrupts of the old generation go. Without the lock:
        the kernel has taken what a connected vector had, and one that is connected this moment may give one more."""
        for vector in self._vectors:
            _drain(vector.fd)

    # --- state -----------------------------------------------------------------------------------------------

    def save(self) -> MsixState:
        """After ``disconnect_all``."""
        with self._lock:
            table = b"".join(vector.entry for vector in self._vectors)
            return MsixState(table, tuple(index for index in range(len(self._vectors)) if self._pending(index)))

    def check(self, state: MsixState, where: str) -> None:
        """:raises ProtocolError: when it is another table's, or says what no guest can have written."""
        count = len(self._vectors)
        if len(state.table) != count * ENTRY_SIZE:
            raise refused(f"{where}.table", len(state.table), f"the {count * ENTRY_SIZE} bytes of {count} vectors")
        for index, (_, _, control) in enumerate(ENTRY.iter_unpack(state.table)):
            if control & ~MASKED:
                raise refused(f"{where}.table[{index}].control", control, "0 or 1: the rest is reserved")
        for index in state.pending:
            if index >= count or state.pending.count(index) > 1:
                raise refused(f"{where}.pending", index, f"one of {count} vectors, once")

    def load(self, state: MsixState) -> None:
        """Take over what :meth:`check` has passed. Not ``live`` before and after."""
        with self._lock:
            for index, vector in enumerate(self._vectors):
                vector.entry[:] = state.table[index * ENTRY_SIZE : (index + 1) * ENTRY_SIZE]
                _drain(vector.fd)
                if index in state.pending:
                    os.eventfd_write(vector.fd, 1)

    def close(self) -> None:
        """After every worker has ended; the VM is closed next, and what is connected goes with it. Idempotent."""
        self.live = False
        vectors, self._vectors = self._vectors, []
        for vector in vectors:
            os.close(vector.fd)


def _readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _drain(fd: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        return os.eventfd_read(fd) > 0
    return False
