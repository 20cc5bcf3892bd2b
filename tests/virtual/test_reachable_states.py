"""Whatever a guest writes, its device can be saved, and what was saved loads: no check on loading refuses a state that
a guest can bring about. The registers, the life and the actor are the real ones; the device only remembers.
"""

from __future__ import annotations

import struct
from typing import Any

import attrs
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from trivmm.bus.space import AddressSpace
from trivmm.deadlines import Deadlines
from trivmm.nursery.activation import ActivationActor
from trivmm.platform.pci import PciBus
from trivmm.state.virtio import LifeStage
from trivmm.testing.miniboard import BareDevice
from trivmm.testing.scripted import ScriptedVm
from trivmm.testing.states import sent
from trivmm.virtio.pci import VirtioPciTransport
from trivmm.virtio.setup import VERSION_1

DEADLINES = Deadlines()
FEATURES = VERSION_1 | 0x25
STATUS = 0x14
Step = tuple[str, Any]

REGISTERS = ((0x00, 4), (0x08, 4), (0x0C, 4), (0x10, 2), (0x16, 2), (0x18, 2), (0x1A, 2), (0x1C, 2))
ADDRESSES = ((0x20, 4), (0x24, 4), (0x28, 4), (0x30, 4), (0x20, 8), (0x28, 8), (0x30, 8))
VALUES = st.integers(0, 3) | st.sampled_from([8, 16, 0x25, 64, 256, 0x1000, 0x1008, 0xFFFF, 0xFFFF_FFFF])

writes = st.tuples(
    st.just("write"),
    st.tuples(st.sampled_from([*REGISTERS, *ADDRESSES, (0x8008, 4), (0x800C, 4), (0x801C, 4)]), VALUES),
)
statuses = st.tuples(st.just("status"), st.sampled_from([0, 0, 1, 2, 3, 4, 8, 11, 15, 15, 15, 64, 128, 0xBF, 0xFF]))
driver = st.tuples(st.just("driver"), st.booleans())
config = st.tuples(
    st.just("config"),
    st.tuples(st.sampled_from([4, 0x10, 0x14]), st.sampled_from([0, 2, 4, 6, 7, 0xFFFF_FFFF, 0xC000_0000, 0x1000])),
)
hosts = st.tuples(st.sampled_from(["fail", "gate", "settle", "broken", "interrupt"]), st.booleans())
STEPS = st.lists(writes | statuses | driver | config | hosts, max_size=25)


def write(transport: VirtioPciTransport, offset: int, size: int, value: int) -> None:
    transport.bar_write(0, offset, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))


def set_up(transport: VirtioPciTransport, good: bool) -> None:
    """What a driver does, or one that takes no VERSION_1."""
    write(transport, STATUS, 1, 3)
    for select in (0, 1):
        write(transport, 0x08, 4, select)
        write(transport, 0x0C, 4, VERSION_1 >> 32 * select if good else 1)
    write(transport, STATUS, 1, 11)
    write(transport, 0x16, 2, 1)
    write(transport, 0x1C, 2, 1)
    write(transport, STATUS, 1, 15)


class Device(BareDevice):
    """Serves a chain or two whenever it is activated."""

    fails = False

    def __init__(self) -> None:
        super().__init__(queue_sizes=(256, 64), features=FEATURES)

    async def activate(self, setup: Any, handles: Any, workers: trio.Nursery) -> None:
        await trio.lowlevel.checkpoint()
        if self.fails:
            raise OSError("it can't be")
        await super().activate(setup, handles, workers)
        self.queues = tuple(
            attrs.evolve(queue, next_avail=(queue.next_avail + 2) & 0xFFFF, next_used=(queue.next_used + 2) & 0xFFFF)
            if queue.enabled
            else queue
            for queue in setup.queues
        )


async def live(steps: list[Step]) -> None:
    device, vm = Device(), ScriptedVm(())
    transport = VirtioPciTransport(device, vm, DEADLINES)
    bus = PciBus(AddressSpace("mmio"), DEADLINES)
    bus.add(transport)
    actor = ActivationActor(device, transport.state, transport.handles, DEADLINES, transport.reset_registers)
    transport.connect_interrupts()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(actor.run, nursery)
            for kind, what in [*steps, ("check", None)]:
                await take(kind, what, transport, bus, actor, device)
                if kind in ("settle", "check"):
                    await saves_and_loads(transport, bus, actor)
            nursery.cancel_scope.cancel()
    finally:
        transport.close()


async def take(
    kind: str, what: Any, transport: VirtioPciTransport, bus: PciBus, actor: ActivationActor, device: Device
) -> None:
    match kind:
        case "write":
            (offset, size), value = what
            write(transport, offset, size, value)
        case "status":
            write(transport, STATUS, 1, what)
        case "driver":
            set_up(transport, what)
        case "config":
            register, value = what
            bus.write(0, struct.pack("<I", 1 << 31 | 1 << 11 | register))
            bus.write(4, struct.pack("<I", value))
        case "fail":
            device.fails = what
        case "broken":
            actor.fail("queue 1: bad")
        case "gate":
            if what:
                actor.reopen()
            else:
                actor.close_gate()
        case "interrupt":
            transport.handles.signal_config_change()
        case _:
            await trio.testing.wait_all_tasks_blocked()


async def saves_and_loads(transport: VirtioPciTransport, bus: PciBus, actor: ActivationActor) -> None:
    await actor.quiesce()
    transport.disconnect_interrupts()
    life, saved = transport.save()
    if life.stage is LifeStage.RESETTING:  # the gate does not hold up a reset
        raise AssertionError("a reset was left half done")
    vm = ScriptedVm(())
    twin = VirtioPciTransport(transport.device, vm, DEADLINES)
    try:
        there = PciBus(AddressSpace("mmio"), DEADLINES)
        there.add(twin)
        twin.check(sent(life), sent(saved), "device")
        twin.load(sent(life), sent(saved))
        there.load(bus.save())
        assert twin.save() == (life, saved)
        twin.connect_interrupts()
    finally:
        twin.close()
    transport.connect_interrupts()
    actor.reopen()


@given(STEPS)
@settings(max_examples=200, deadline=None)
def test_every_state_that_a_guest_can_reach_saves_and_loads(steps: list[Step]) -> None:
    trio.run(live, steps, clock=trio.testing.MockClock(autojump_threshold=0))
