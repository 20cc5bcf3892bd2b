"""The virtio-pci transport under a driver that accesses anything, anyhow: what holds all the same.

- No access raises, and a read gives as many bytes as were asked for.
- A queue's size is a power of two up to the device's; a vector is one that there is, or none.
- What an enabled queue's registers say is settled until a reset, and so are all queues' once DRIVER_OK is set: enabled
  twice, moved or resized afterwards, it stays what it was.
- What was handed over at DRIVER_OK does not change before a reset; features are settled by FEATURES_OK.
- A vCPU is held up by nothing but a write of device_status or of the bus-master bit.
- Only the doorbells of queues that exist ring, and only by a write to the notification structure.
- An interrupt has a route only where its vector is unmasked, MSI-X is on and the function is a bus master.
- An access through the configuration window is the access that it names, or none.
"""

from __future__ import annotations

import os
import struct
from typing import Any, Final

from hypothesis import given, settings
from hypothesis import strategies as st

from trivmm.bus.space import AddressSpace
from trivmm.deadlines import Deadlines
from trivmm.platform.pci import PciBus
from trivmm.state.virtio import NO_VECTOR, LifeStage, QueueState
from trivmm.testing.miniboard import BareDevice
from trivmm.testing.scripted import ScriptedVm
from trivmm.testing.tape import Tape
from trivmm.virtio.life import DRIVER_OK, FEATURES_OK
from trivmm.virtio.pci import VirtioPciTransport
from trivmm.virtio.setup import VERSION_1

FEATURES: Final = VERSION_1 | 0x25
SIZES: Final = (256, 64)
VECTORS: Final = len(SIZES) + 1
STATUS, NOTIFY, NOTIFY_END, TABLE, BAR_SIZE = 0x14, 0x6000, 0x7000, 0x8000, 0x80000
REGISTERS: Final = (0x00, 0x04, 0x08, 0x0C, 0x10, 0x12, 0x14, 0x15, 0x16, 0x18, 0x1A, 0x1C, 0x1E, *range(0x20, 0x40, 4))
WIDTH: Final = {0x10: 2, 0x14: 1, 0x16: 2, 0x18: 2, 0x1A: 2, 0x1C: 2}
STRUCTURES: Final = (
    *(0x2000, 0x4000, NOTIFY, NOTIFY + 4, NOTIFY + 8, NOTIFY_END - 2),
    *(TABLE, TABLE + 12, TABLE + 16 * VECTORS, 0x48000, BAR_SIZE - 8),
)
VALUES: Final = (0, 1, 2, 3, 4, 8, 16, 0x25, 48, 64, 256, 512, 0x1000, 0x1008, 0xFFFF, 0xFEE0_0000, (1 << 64) - 1)
STATUSES: Final = (0, 1, 3, 11, 15, 15, 15, 4, 8, 12, 64, 128, 0xFF)


class Guest:
    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self.vm = ScriptedVm(())
        device = BareDevice(queue_sizes=SIZES, features=FEATURES)
        self.transport = VirtioPciTransport(device, self.vm, Deadlines())
        PciBus(AddressSpace("mmio"), Deadlines()).add(self.transport)
        self.transport.connect_interrupts()
        at = self.transport.config.read(0x34, 1)[0]
        self.capabilities = []
        while at:
            self.capabilities.append(at)
            at = self.transport.config.read(at + 1, 1)[0]
        self.window = next(at for at in self.capabilities if self.transport.config.read(at + 3, 1) == b"\5")
        self.msix = self.capabilities[-1]

    # --- accesses ------------------------------------------------------------------------------------------------

    def offset(self) -> int:
        kind = self.tape.below(8)
        if kind < 5:
            return self.tape.mostly(self.tape.of(REGISTERS), range(64))
        return self.tape.of(STRUCTURES) + (self.tape.below(4) if kind == 7 else 0)

    def width(self, offset: int) -> int:
        return self.tape.mostly(WIDTH.get(offset, 4), (1, 2, 3, 4, 8))

    def value(self, offset: int, size: int) -> bytes:
        value = self.tape.of(STATUSES if offset == STATUS else VALUES)
        return (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    def set_up(self) -> None:
        """As a good driver does, so that what comes after is about a device that works."""
        for select in (0, 1):
            self.write(0x08, select.to_bytes(4, "little"))
            self.write(0x0C, (FEATURES >> 32 * select & 0xFFFF_FFFF).to_bytes(4, "little"))
        self.write(STATUS, b"\x0b")
        for index in range(len(SIZES)):
            self.write(0x16, index.to_bytes(2, "little"))
            self.write(0x18, b"\x10\0")
            for register, gpa in ((0x20, 0x1000), (0x28, 0x2000), (0x30, 0x3000)):
                self.write(register, (gpa + 0x4000 * index).to_bytes(8, "little"))
            self.write(0x1C, b"\1\0")

    def write(self, offset: int, data: bytes) -> None:
        before = self.bells()
        held = self.transport.bar_write(0, offset, data)
        assert self.bells() == before or NOTIFY <= offset < NOTIFY + 4 * len(SIZES)
        assert held is None or (offset, len(data)) == (STATUS, 1)

    def through_window(self) -> None:
        config, data = self.transport, self.offset()
        size = self.width(data)
        bar = self.tape.mostly(0, (1, 5, 255))
        data = self.tape.mostly(data, (BAR_SIZE - 1, BAR_SIZE, 0xFFFF_FFFC, 0xFFFF_FFFF))
        config.config_write(self.window + 4, bytes([bar]))
        config.config_write(self.window + 8, struct.pack("<II", data, size))
        if self.tape.below(3) == 0:
            assert len(config.config_read(self.window + 16, 4)) == 4
            return
        named = (bar, data, size) == (0, STATUS, 1)
        before, bells = self.seen(), self.bells()
        held = config.config_write(self.window + 16, self.value(data, 4))
        assert held is None or named
        if bar or size not in (1, 2, 4) or data % size or data + size > BAR_SIZE:
            assert (self.seen(), self.bells()) == (before, bells), "it names nothing"

    def config_write(self) -> None:
        offset = self.tape.of((4, 0x10, 0x14, 0x30, 0x3C, self.msix + 2, self.msix + 2, self.tape.below(256)))
        size = self.tape.of((2, 4, 1))
        if self.window - 4 < offset < self.window + 20:
            return  # through_window does it and knows what to expect
        held = self.transport.config_write(
            offset, self.value(0, size) if self.tape.below(2) else b"\x06\x80\0\0"[:size]
        )
        assert held is None or offset < 6, "only the command register"

    def vector(self) -> None:
        index = self.tape.below(VECTORS)
        for word, value in enumerate((0xFEE0_0000, 0, 0x50 + index, self.tape.below(2))):
            self.write(TABLE + 16 * index + 4 * word, value.to_bytes(4, "little"))

    def step(self) -> None:
        kind = self.tape.below(16)
        if kind < 7:
            offset = self.offset()
            self.write(offset, self.value(offset, self.width(offset)))
        elif kind < 10:
            offset = self.offset()
            size = self.width(offset)
            assert len(self.transport.bar_read(0, offset, size)) == size
        elif kind < 12:
            self.through_window()
        elif kind < 14:
            self.config_write()
        elif kind == 14:
            self.vector()
        else:
            self.set_up()

    # --- what its actor does, at once ----------------------------------------------------------------------------

    def settle(self) -> None:
        state = self.transport.state
        if state.stage is LifeStage.RESETTING:
            self.transport.reset_registers()
            state.status = 0
            state.enter(LifeStage.RESET)
        elif state.problem is not None:
            state.enter(LifeStage.NEEDS_RESET)
            state.status |= 64
            state.setup = state.problem = None
        elif state.stage is LifeStage.ACTIVATING:
            state.enter(LifeStage.ACTIVE)

    # --- what holds ----------------------------------------------------------------------------------------------

    def seen(self) -> tuple[Any, ...]:
        common = self.transport.common
        return common.acked, tuple(common.queues), common.config_vector, self.transport.state.status

    def bells(self) -> int:
        """Doorbells that have rung, in all."""
        return sum(_count(queue.doorbell) for queue in self.transport.handles.queues)

    def check(self) -> None:
        common, state = self.transport.common, self.transport.state
        for queue, most in zip(common.queues, SIZES, strict=True):
            assert 0 < queue.size <= most
            assert queue.size & (queue.size - 1) == 0
            assert queue.vector < VECTORS or queue.vector == NO_VECTOR
        assert common.config_vector < VECTORS or common.config_vector == NO_VECTOR
        assert not state.status & DRIVER_OK or state.status & FEATURES_OK or state.status == 0
        if state.setup is not None:
            assert state.setup.features == common.acked
            assert not state.setup.features & ~FEATURES
        self._check_routes()

    def _check_routes(self) -> None:
        control = int.from_bytes(self.transport.config.read(self.msix + 2, 2), "little")
        sends = control & 0xC000 == 0x8000 and self.transport.config.bus_master
        routed = {(address, data) for _, address, data in self.vm.msi.values()}
        entries = [self.transport.bar_read(0, TABLE + 16 * index, 8) for index in range(VECTORS)]
        rest = [self.transport.bar_read(0, TABLE + 16 * index + 8, 8) for index in range(VECTORS)]
        open_ = {
            (int.from_bytes(address, "little"), int.from_bytes(data[:4], "little"))
            for address, data in zip(entries, rest, strict=True)
            if not data[4] & 1
        }
        assert routed == (open_ if sends else set())


def settled(queue: QueueState) -> tuple[Any, ...]:
    """What of an enabled queue a driver can't change any more; its vector it can."""
    return queue.size, queue.enabled, queue.desc_gpa, queue.avail_gpa, queue.used_gpa


def _count(doorbell: int) -> int:
    """An eventfd's value, which stays."""
    try:
        value = os.eventfd_read(doorbell)
    except BlockingIOError:
        return 0
    os.eventfd_write(doorbell, value)
    return value


@settings(max_examples=400, deadline=None)
@given(st.binary(min_size=60, max_size=300))
def test_what_holds_whatever_a_driver_does(choices: bytes) -> None:
    tape = Tape(choices)
    guest = Guest(tape)
    transport = guest.transport
    state = transport.state
    try:
        for _ in range(60):
            if tape.over:
                break
            before = [settled(queue) for queue in transport.common.queues]
            enabled = [queue.enabled for queue in transport.common.queues]
            generation, status, acked, setup = state.generation, state.status, transport.common.acked, state.setup
            guest.step()
            if state.stage is not LifeStage.RESETTING:
                now = [settled(queue) for queue in transport.common.queues]
                for index, was in enumerate(before):
                    assert now[index] == was or not (enabled[index] or status & DRIVER_OK)
                assert transport.common.acked == acked or not status & FEATURES_OK
                assert state.setup == setup or state.generation != generation
            guest.settle()
            guest.check()
    finally:
        transport.close()
