"""The virtio-pci transport as a driver sees it: registers, MSI-X, the config-access window, save and load."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from typing import Any

import attrs
import pytest

from trivmm.bus.space import AddressSpace
from trivmm.bus.ticket import Ticket
from trivmm.deadlines import Deadlines
from trivmm.errors import HypervisorError
from trivmm.platform.pci import PciBus
from trivmm.state.virtio import DeviceLifeState, LifeStage, QueueState
from trivmm.testing.miniboard import BareDevice
from trivmm.testing.scripted import ScriptedVm
from trivmm.testing.states import sent
from trivmm.virtio.pci import VirtioPciTransport
from trivmm.virtio.setup import VERSION_1

STATUS = 0x14
NOTIFY = 0x6000
TABLE = 0x8000
PBA = 0x48000


@pytest.fixture
def vm() -> ScriptedVm:
    return ScriptedVm(())


@pytest.fixture
def transport(vm: ScriptedVm) -> Iterator[VirtioPciTransport]:
    made = VirtioPciTransport(BareDevice(queue_sizes=(256, 64), features=1 << 32 | 0x25), vm, Deadlines())
    PciBus(AddressSpace("mmio"), Deadlines()).add(made)
    yield made
    made.close()


def read(transport: VirtioPciTransport, offset: int, size: int) -> int:
    return int.from_bytes(transport.bar_read(0, offset, size), "little")


def write(transport: VirtioPciTransport, offset: int, size: int, value: int) -> Any:
    return transport.bar_write(0, offset, value.to_bytes(size, "little"))


def take_features(transport: VirtioPciTransport, features: int = VERSION_1) -> None:
    for select in (0, 1):
        write(transport, 0x08, 4, select)
        write(transport, 0x0C, 4, features >> 32 * select & 0xFFFF_FFFF)


def set_up_queue(transport: VirtioPciTransport, index: int = 0, size: int = 16, vector: int = 1) -> None:
    write(transport, 0x16, 2, index)
    write(transport, 0x18, 2, size)
    write(transport, 0x1A, 2, vector)
    for register, gpa in ((0x20, 0x1000), (0x28, 0x2000), (0x30, 0x1_0000_3000)):
        write(transport, register, 4, gpa & 0xFFFF_FFFF)
        write(transport, register + 4, 4, gpa >> 32)
    write(transport, 0x1C, 2, 1)


def test_identity_and_capabilities(transport: VirtioPciTransport) -> None:
    config = transport.config
    assert struct.unpack("<HH", config.read(0, 4)) == (0x1AF4, 0x1044)
    assert config.read(8, 1) == b"\1", "revision 1: modern"
    assert config.read(0x3D, 1) == b"\0", "no interrupt pin"
    kinds = []
    at = config.read(0x34, 1)[0]
    while at:
        cap, following = config.read(at, 2)
        kinds.append((cap, config.read(at + 3, 1)[0] if cap == 9 else None))
        at = following
    assert kinds == [(9, 1), (9, 3), (9, 4), (9, 2), (9, 5), (0x11, None)], "Cloud Hypervisor's order"


def test_features_are_read_in_halves_and_settle(transport: VirtioPciTransport) -> None:
    halves = []
    for select in (0, 1, 2):
        write(transport, 0x00, 4, select)
        halves.append(read(transport, 0x04, 4))
    assert halves == [0x25, 1, 0]
    take_features(transport, VERSION_1 | 5)
    write(transport, STATUS, 1, 8)
    assert read(transport, STATUS, 1) == 8
    write(transport, 0x0C, 4, 0)
    assert transport.common.acked == VERSION_1 | 5, "settled once FEATURES_OK is set"


@pytest.mark.parametrize(("low", "high", "good"), [(0x25, 1, True), (0x25, 0, False), (0x40, 1, False), (0, 3, False)])
def test_a_legal_subset_with_version_1(transport: VirtioPciTransport, low: int, high: int, good: bool) -> None:
    take_features(transport, high << 32 | low)
    write(transport, STATUS, 1, 8)
    assert read(transport, STATUS, 1) == (8 if good else 0)


@pytest.mark.parametrize(
    ("offset", "size"), [(1, 2), (1, 4), (2, 4), (0x10, 4), (0x14, 2), (0x14, 4), (0x15, 2), (0x18, 4), (0x18, 8)]
)
def test_what_is_no_part_of_one_field_reads_all_ones(transport: VirtioPciTransport, offset: int, size: int) -> None:
    before = transport.common.save(None)
    write(transport, offset, size, 0)
    assert transport.common.save(None) == before
    assert read(transport, offset, size) == (1 << 8 * size) - 1


def test_a_field_is_read_in_parts_as_well_and_written_whole(transport: VirtioPciTransport) -> None:
    """iPXE reads 16 bits of device_feature; a device that answers all-ones offers it everything."""
    set_up_queue(transport)
    for select, features in ((0, 0x25), (1, 1)):
        write(transport, 0x00, 4, select)
        assert (read(transport, 0x04, 2), read(transport, 0x06, 2)) == (features, 0)
        assert [read(transport, 0x04 + at, 1) for at in range(4)] == list(features.to_bytes(4, "little"))
    assert [read(transport, 0x12 + at, 1) for at in range(2)] == [2, 0]
    assert (read(transport, 0x30, 2), read(transport, 0x34, 2), read(transport, 0x31, 1)) == (0x3000, 1, 0x30)
    before = transport.common.save(None)
    for offset, size in ((0x00, 1), (0x04, 2), (0x10, 1), (0x18, 1), (0x1F, 1), (0x20, 2)):
        write(transport, offset, size, 0)
    assert transport.common.save(None) == before


def test_a_queue_that_is_not_there_reads_size_0(transport: VirtioPciTransport) -> None:
    assert read(transport, 0x12, 2) == 2
    write(transport, 0x16, 2, 2)
    assert read(transport, 0x18, 2) == 0
    assert read(transport, 0x1A, 2) == 0xFFFF


def test_queue_registers_and_the_private_copy(transport: VirtioPciTransport) -> None:
    take_features(transport)
    set_up_queue(transport)
    assert read(transport, 0x30, 8) == 0x1_0000_3000, "64-bit fields are read whole too"
    ticket = write(transport, STATUS, 1, 0xF)
    assert isinstance(ticket, Ticket)
    setup = transport.state.setup
    assert setup is not None
    ((index, queue),) = setup.enabled()
    assert (index, queue.size, queue.desc_gpa, queue.used_gpa) == (0, 16, 0x1000, 0x1_0000_3000)
    write(transport, 0x20, 4, 0xBAD0)
    write(transport, 0x18, 2, 64)
    write(transport, 0x1A, 2, 2)
    assert transport.state.setup == setup, "what was handed over does not change"
    assert read(transport, 0x20, 4) == 0x1000, "a live queue's registers are settled"
    assert read(transport, 0x18, 2) == 16


@pytest.mark.parametrize("size", [0, 3, 100, 512])
def test_a_size_that_cannot_be_is_ignored(transport: VirtioPciTransport, size: int) -> None:
    write(transport, 0x18, 2, size)
    assert read(transport, 0x18, 2) == 256


def test_misaligned_rings_are_refused_at_driver_ok(transport: VirtioPciTransport) -> None:
    take_features(transport)
    write(transport, 0x20, 4, 0x1008)
    write(transport, 0x1C, 2, 1)
    assert isinstance(write(transport, STATUS, 1, 0xF), Ticket)
    assert transport.state.setup is None
    assert transport.state.problem == (
        "what the driver set up is refused: queues[0].desc_gpa is 4104, not a multiple of 16 (virtio 1.2 section 2.7)"
    )


def test_a_vector_beyond_the_table_reads_back_as_none(transport: VirtioPciTransport) -> None:
    write(transport, 0x1A, 2, 3)
    assert read(transport, 0x1A, 2) == 0xFFFF
    write(transport, 0x10, 2, 2)
    assert read(transport, 0x10, 2) == 2


def test_isr_is_read_to_clear(transport: VirtioPciTransport) -> None:
    transport.handles.signal_config_change()
    assert read(transport, 0x2000, 1) == 2
    assert read(transport, 0x2000, 1) == 0


def test_a_notification_rings_the_doorbell(transport: VirtioPciTransport, vm: ScriptedVm) -> None:
    write(transport, NOTIFY + 4, 2, 1)
    mapped = transport.config.bars[0].mapped
    assert os.eventfd_read(vm.doorbells[mapped + NOTIFY + 4]) == 1
    write(transport, NOTIFY + 8, 2, 2)  # a queue that is not there


# --- the config-access capability, section 4.1.4.9 ---------------------------------------------------------------


def window(transport: VirtioPciTransport, offset: int, length: int, bar: int = 0) -> int:
    at = transport.config.read(0x34, 1)[0]
    while transport.config.read(at + 3, 1) != b"\5":
        at = transport.config.read(at + 1, 1)[0]
    transport.config_write(at + 4, bytes([bar]))
    transport.config_write(at + 8, struct.pack("<I", offset))
    transport.config_write(at + 12, struct.pack("<I", length))
    return at + 16


def test_the_window_reads_writes_and_activates(transport: VirtioPciTransport, vm: ScriptedVm) -> None:
    data = window(transport, 0x12, 2)
    assert transport.config_read(data, 2) == b"\2\0"
    take_features(transport)
    set_up_queue(transport)
    data = window(transport, STATUS, 1)
    assert isinstance(transport.config_write(data, b"\x0f"), Ticket), "the barrier holds through the window too"
    data = window(transport, NOTIFY, 2)
    transport.config_write(data, b"\0\0")
    assert os.eventfd_read(vm.doorbells[transport.config.bars[0].mapped + NOTIFY]) == 1


@pytest.mark.parametrize(("offset", "length", "bar"), [(0x12, 3, 0), (0x13, 2, 0), (0x12, 2, 1), (0x80000, 4, 0)])
def test_a_window_that_points_nowhere(transport: VirtioPciTransport, offset: int, length: int, bar: int) -> None:
    data = window(transport, offset, length, bar)
    transport.config_read(data, 4)
    assert transport.config_write(data, b"\xff\xff\xff\xff") is None


# --- MSI-X -------------------------------------------------------------------------------------------------------


def enable_msix(transport: VirtioPciTransport, control: int = 0x8000) -> None:
    """As a bus master, which alone may send messages."""
    transport.config_write(4, b"\4\0")
    at = transport.config.read(0x34, 1)[0]
    while transport.config.read(at, 1) != b"\x11":
        at = transport.config.read(at + 1, 1)[0]
    transport.config_write(at + 2, struct.pack("<H", control))


def set_vector(transport: VirtioPciTransport, index: int, data: int, masked: int = 0) -> None:
    for word, value in enumerate((0xFEE0_0000, 0, data, masked)):
        write(transport, TABLE + 16 * index + 4 * word, 4, value)


def routes(vm: ScriptedVm) -> set[tuple[int, int]]:
    return {(address, data) for _, address, data in vm.msi.values()}


def test_a_masked_vector_has_no_route_and_its_eventfd_is_its_pending_bit(
    transport: VirtioPciTransport, vm: ScriptedVm
) -> None:
    transport.connect_interrupts()
    enable_msix(transport)
    set_vector(transport, 1, 0x51)
    assert routes(vm) == {(0xFEE0_0000, 0x51)}
    write(transport, TABLE + 16 + 12, 4, 1)
    assert routes(vm) == set()
    assert read(transport, PBA, 8) == 0
    os.eventfd_write(transport.msix.fd_of(1), 1)
    assert read(transport, PBA, 8) == 0b10
    write(transport, TABLE + 16 + 12, 4, 0)
    assert routes(vm) == {(0xFEE0_0000, 0x51)}
    assert os.eventfd_read(transport.msix.fd_of(1)) == 1, "still there when the route is: it injects at once"


def test_function_mask_disable_and_new_messages(transport: VirtioPciTransport, vm: ScriptedVm) -> None:
    transport.connect_interrupts()
    set_vector(transport, 0, 0x50)
    assert routes(vm) == set(), "not enabled"
    enable_msix(transport)
    assert routes(vm) == {(0xFEE0_0000, 0x50)}
    enable_msix(transport, 0xC000)
    assert routes(vm) == set()
    enable_msix(transport)
    write(transport, TABLE + 8, 4, 0x60)
    assert routes(vm) == {(0xFEE0_0000, 0x60)}
    transport.disconnect_interrupts()
    assert routes(vm) == set()
    transport.connect_interrupts()
    assert routes(vm) == {(0xFEE0_0000, 0x60)}


def test_messages_are_those_that_connecting_routes(transport: VirtioPciTransport, vm: ScriptedVm) -> None:
    set_vector(transport, 0, 0x50)
    assert transport.messages() == [], "not enabled"
    enable_msix(transport)
    set_vector(transport, 1, 0x51, masked=1)
    assert transport.messages() == [(0xFEE0_0000, 0x50)]
    transport.connect_interrupts()
    assert routes(vm) == {(0xFEE0_0000, 0x50)}
    assert transport.messages() == [], "routed"


def test_a_message_that_the_hypervisor_refuses_is_the_guests_mistake(
    transport: VirtioPciTransport, vm: ScriptedVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, address: int, data: int) -> int:
        raise HypervisorError("KVM_SET_GSI_ROUTING", "refused")

    monkeypatch.setattr(vm, "connect_msi", refuse)
    transport.connect_interrupts()
    enable_msix(transport)
    set_vector(transport, 0, 0x50)
    assert transport.msix.refused >= 1
    monkeypatch.undo()
    set_vector(transport, 0, 0x51)
    assert routes(vm) == {(0xFEE0_0000, 0x51)}


def test_a_reset_does_not_wait_for_a_vcpu_that_the_kernel_holds_up_at_a_route(
    transport: VirtioPciTransport, vm: ScriptedVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made in the trio thread; a route is changed under another lock."""
    asked, go_on = threading.Event(), threading.Event()
    connect = vm.connect_msi

    def slowly(fd: int, address: int, data: int) -> int:
        asked.set()
        assert go_on.wait(20)
        return connect(fd, address, data)

    monkeypatch.setattr(vm, "connect_msi", slowly)
    transport.connect_interrupts()
    enable_msix(transport)
    vcpu = threading.Thread(target=set_vector, args=(transport, 1, 0x51))
    vcpu.start()
    try:
        assert asked.wait(20)
        os.eventfd_write(transport.msix.fd_of(2), 1)
        set_up_queue(transport)
        transport.reset_registers()
        assert transport.common.queues[0].enabled is False
        with pytest.raises(BlockingIOError):
            os.eventfd_read(transport.msix.fd_of(2))
    finally:
        go_on.set()
        vcpu.join(20)
    assert routes(vm) == {(0xFEE0_0000, 0x51)}


def test_closing_leaves_doorbells_and_routes_to_the_vm(transport: VirtioPciTransport, vm: ScriptedVm) -> None:
    """It is closed next; each of them would wait for the kernel."""
    transport.connect_interrupts()
    enable_msix(transport)
    set_vector(transport, 1, 0x51)
    before = (dict(vm.doorbells), dict(vm.msi))
    transport.close()
    assert (vm.doorbells, vm.msi) == before


# --- save and load -----------------------------------------------------------------------------------------------


def twin_of(transport: VirtioPciTransport, vm: ScriptedVm) -> tuple[VirtioPciTransport, PciBus]:
    made = VirtioPciTransport(transport.device, vm, Deadlines())
    bus = PciBus(AddressSpace("mmio"), Deadlines())
    bus.add(made)
    return made, bus


def test_everything_travels(transport: VirtioPciTransport) -> None:
    transport.connect_interrupts()
    enable_msix(transport)
    set_vector(transport, 1, 0x51, masked=1)
    take_features(transport)
    set_up_queue(transport, index=1, size=32, vector=1)
    write(transport, 0x10, 2, 0)
    write(transport, STATUS, 1, 0xF)
    os.eventfd_write(transport.msix.fd_of(1), 1)
    transport.handles.signal_config_change()
    transport.disconnect_interrupts()
    working = transport.state.setup
    assert working is not None
    transport.state.setup = attrs.evolve(
        working, queues=(working.queues[0], attrs.evolve(working.queues[1], next_avail=5, next_used=3))
    )
    life, saved = transport.save()
    assert life == DeviceLifeState(LifeStage.ACTIVATING, 0xF, 1)
    assert saved.registers.queues[1] == QueueState(32, 1, True, 0x1000, 0x2000, 0x1_0000_3000, 5, 3)

    vm = ScriptedVm(())
    other, bus = twin_of(transport, vm)
    for _ in range(2):  # again after an undo
        other.check(sent(life), sent(saved), "device")
        other.load(sent(life), sent(saved))
        bus.placement.place()
        assert other.save() == (life, saved)
        assert other.state.setup == transport.state.setup
        assert other.state.barrier is not None
        assert other.state.barrier.what == "activation"
    assert other.handles.queues[1].irq.fd == other.msix.fd_of(1)
    other.connect_interrupts()
    assert routes(vm) == set(), "vector 1 is masked, vector 0 never set up"
    write(other, TABLE + 16 + 12, 4, 0)
    assert (0xFEE0_0000, 0x51) in routes(vm)
    other.close()
