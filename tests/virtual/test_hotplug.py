"""Devices come and go on a board whose guest does what it is told, in virtual time: whatever it does, and whenever."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
import trio.testing

import trivmm.virtio.kinds
from trivmm import (
    ConfigError,
    CpusConfig,
    DeadlineError,
    DiskConfig,
    MemoryConfig,
    NoSuchDevice,
    PayloadConfig,
    PciDeviceInfo,
    RngConfig,
    Vm,
    VmConfig,
    VmMigrating,
    WrongState,
    open_vm,
)
from trivmm.machine.machine import Machine
from trivmm.memory import layout
from trivmm.nursery.ownership import MIGRATION
from trivmm.platform.ged import PCI_DEVICES_CHANGED
from trivmm.testing.cancel_walk import Walk, cancel_walk
from trivmm.testing.script_driver import ScriptDriver, pci_read
from trivmm.testing.scripted import ScriptedHypervisor
from trivmm.testing.told_guest import PCID, PCIU, ToldGuest, eject, ged_events, hotplug_read
from trivmm.virtio.device import RING_FEATURES, WorkerDevice
from trivmm.virtio.handles import QueueHandle
from trivmm.virtio.kind import BUS_KEYS, Contract, DeviceKind, Hotplug, Option, Place
from trivmm.virtio.setup import DriverSetup

pytestmark = pytest.mark.usefixtures("card_kind")

Clock = trio.testing.MockClock
BAR, BASE = layout.BAR64_START, 0x10_0000
NOBODY = 0xFFFF_FFFF


@attrs.frozen
class CardConfig:
    """``opens`` False: it can't be made."""

    id: str | None = None
    pci_device_id: int | None = None
    opens: bool = True


@attrs.define(eq=False)
class Cards:
    """What becomes of the cards, by id: what was asked of each; and what theirs wait for."""

    log: dict[str, list[str]] = attrs.field(factory=dict)
    on_activate: Callable[[], Awaitable[None]] | None = None
    on_stop: dict[str, Callable[[], Awaitable[None]]] = attrs.field(factory=dict)

    @property
    def open(self) -> list[str]:
        return [name for name, log in self.log.items() if log.count("open") > log.count("close")]


CARDS = Cards()


class Card(WorkerDevice):
    """A device whose queue nobody serves."""

    device_type, features, queue_sizes = 63, RING_FEATURES, (8,)

    def __init__(self, config: CardConfig, place: Place) -> None:
        if not config.opens:
            raise ConfigError("card", place.name, "does not open", "give another one")
        super().__init__(place.name, place.memory)
        self.log = CARDS.log.setdefault(place.name, [])
        self.log.append("open")

    async def activate(self, setup: DriverSetup, handles: Sequence[QueueHandle], workers: trio.Nursery) -> None:
        self.log.append("activate")
        if CARDS.on_activate is not None:
            await CARDS.on_activate()
        self.log.append("active")

    async def stop(self) -> None:
        if self.name in CARDS.on_stop:
            await CARDS.on_stop[self.name]()
        self.log.append("stop")

    def close(self) -> None:
        self.log.append("close")


CARD = DeviceKind(
    config=CardConfig,
    contract=Contract("CardConfig", "cards", many=True),
    option=Option("card", "[id=…]", "a card", keys=BUS_KEYS),
    name="_card{}",
    make=Card,
    hotplug=Hotplug("add-card", "The card could not be added to the VM"),
)


@pytest.fixture
def card_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CARDS, "log", {})
    monkeypatch.setattr(CARDS, "on_activate", None)
    monkeypatch.setattr(CARDS, "on_stop", {})
    monkeypatch.setattr(trivmm.virtio.kinds, "KINDS", [*trivmm.virtio.kinds.KINDS, CARD])
    monkeypatch.setattr(trivmm.machine.board, "KINDS", trivmm.virtio.kinds.KINDS)
    monkeypatch.setattr(trivmm.machine.build, "KINDS", trivmm.virtio.kinds.KINDS)


CONFIG = VmConfig(PayloadConfig("told"), cpus=CpusConfig(2), memory=MemoryConfig(16 << 20))


@attrs.define(eq=False)
class World:
    vm: Vm
    guest: ToldGuest
    hypervisor: ScriptedHypervisor

    async def add(self, *ids: str) -> list[int]:
        """Their slots."""
        found = []
        for each in ids:
            info = await self.vm.add_device(CardConfig(each))
            assert info is not None
            found.append(int(info.bdf.split(":")[2].split(".")[0], 16))
        return found

    async def driven(self, slot: int, cpu: int = 0) -> ScriptDriver:
        """One that is active."""
        driver = ScriptDriver(slot, BAR + slot * 0x10_0000, BASE + slot * 0x1_0000)
        await self.guest.does(driver.place(), cpu)
        assert await self.guest.does(driver.activate(), cpu) == 15
        return driver

    async def ids_at(self, slot: int) -> int:
        return int(await self.guest.does(pci_read(slot, 0)))

    async def until_gone(self, name: str) -> None:
        with trio.fail_after(60):
            while name in self.vm.info()["device_tree"]:
                await self.guest.does(ged_events())  # a moment of the guest's time


@asynccontextmanager
async def a_world(config: VmConfig = CONFIG, *, boot: bool = True) -> AsyncIterator[World]:
    guest = ToldGuest()
    hypervisor = ScriptedHypervisor(guest.cpu(0), guest.cpu(1), needs_payload=False)
    async with open_vm(config, hypervisor=hypervisor) as vm:
        if boot:
            await vm.boot()
        yield World(vm, guest, hypervisor)
    assert CARDS.open == [], "every device is closed in the end"


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with a_world() as made:
        yield made


# --- coming --------------------------------------------------------------------------------------------------


async def test_a_device_that_is_added_is_found_used_and_shown(world: World, autojump_clock: Clock) -> None:
    vm, guest = world.vm, world.guest
    with vm.events.subscribe() as events:
        info = await vm.add_device(CardConfig())
        assert info == PciDeviceInfo("_card0", "0000:00:02.0")
        async for event in events:
            assert (event.event, event.properties) == ("device-added", {"id": "_card0", "bdf": "0000:00:02.0"})
            break
    assert vm.config.virtio == (CardConfig("_card0", 2),)
    assert await guest.does(ged_events()) == PCI_DEVICES_CHANGED
    assert await guest.does(hotplug_read(PCIU)) == 1 << 2
    assert await guest.does(hotplug_read(PCIU)) == 0
    assert await world.ids_at(2) == 0x107F1AF4
    await world.driven(2)
    assert CARDS.log["_card0"] == ["open", "activate", "active"]
    tree = vm.info()["device_tree"]
    assert (tree["_card0"]["status"], tree["_virtio-pci-_card0"]["pci_bdf"]) == ("active", "0000:00:02.0")
    assert vm.counters()["_card0"]["activations"] == 1


async def test_a_paused_vm_gets_one_too_and_its_guest_finds_it_later(world: World, autojump_clock: Clock) -> None:
    await world.vm.pause()
    (slot,) = await world.add("late")
    await world.vm.resume()
    assert await world.guest.does(hotplug_read(PCIU)) == 1 << slot
    await world.driven(slot)
    await world.vm.pause()
    await world.vm.resume()
    assert CARDS.log["late"] == ["open", "activate", "active"], "a pause leaves the device gate open"


async def test_on_paper_it_is_there_at_the_boot(tmp_path: Path, autojump_clock: Clock) -> None:
    async with a_world(boot=False) as world:
        vm = world.vm
        assert await vm.add_device(CardConfig("a")) is None
        assert await vm.add_device(CardConfig(pci_device_id=9)) is None
        with pytest.raises(ConfigError, match='id = "a": two devices have this id'):
            await vm.add_device(CardConfig("a"))
        with pytest.raises(ConfigError, match="pci_device_id = 9: the slot is taken"):
            await vm.add_device(CardConfig(pci_device_id=9))
        with pytest.raises(NoSuchDevice, match='no device with id "b"'):
            await vm.remove_device("b")
        await vm.add_device(CardConfig("b"))
        await vm.remove_device("b")
        assert CARDS.log == {}, "nothing is opened"
        await vm.boot()
        assert [each.id for each in vm.config.virtio] == ["a", "_card0"]
        assert await world.ids_at(9) == 0x107F1AF4
        await vm.shutdown()
        await vm.remove_device("_card0")
        await vm.boot()
        assert [each.id for each in vm.config.virtio] == ["a"]
        assert await world.ids_at(9) == NOBODY


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (CardConfig(opens=False), "card = .*does not open"),
        (CardConfig("__rng"), 'id = "__rng": two devices'),
        (CardConfig(pci_device_id=1), "pci_device_id = 1: the slot is taken by __rng"),
        (CardConfig(pci_device_id=0), "pci_device_id = 0: the slot is taken by _pci_root"),
        (CardConfig(pci_device_id=77), "pci_device_id = 77"),
        (RngConfig(), "device = .*from boot"),
        (DiskConfig("/nowhere.img"), "disks.path"),
        ("disk", "no kind of device"),
    ],
)
async def test_what_can_not_be_added_changes_nothing(
    world: World, config: Any, says: str, autojump_clock: Clock
) -> None:
    before, tree = world.vm.config, world.vm.info()["device_tree"]
    with pytest.raises(ConfigError, match=says):
        await world.vm.add_device(config)
    assert (world.vm.config, world.vm.info()["device_tree"]) == (before, tree)
    assert await world.guest.does(hotplug_read(PCIU)) == 0
    assert await world.add("next") == [2]


async def test_slots_run_out_and_come_back(world: World, autojump_clock: Clock) -> None:
    slots = await world.add(*(f"card{number}" for number in range(24)))
    assert slots == list(range(2, 26))
    with pytest.raises(ConfigError, match="virtio = 25: too many devices"):
        await world.add("one too many")
    await world.vm.remove_device("card7")
    await world.guest.does(eject(1 << 9))
    await world.until_gone("card7")
    assert await world.add("again") == [9]


# --- going ---------------------------------------------------------------------------------------------------


async def test_a_device_goes_when_its_guest_ejects_it(world: World, autojump_clock: Clock) -> None:
    vm, guest = world.vm, world.guest
    (slot,) = await world.add("card")
    driver = await world.driven(slot)
    with vm.events.subscribe() as events:
        await vm.remove_device("card")
        assert vm.config.virtio == (), "gone from the configuration at once"
        assert vm.info()["device_tree"]["card"]["removal"] == "asked"
        assert await guest.does(hotplug_read(PCID)) == 1 << slot
        assert await guest.does(driver.status()) == 15, "and works on until the guest lets go of it"
        await guest.does(eject(1 << slot))
        assert await world.ids_at(slot) == NOBODY, "gone for it at once"
        async for event in events:
            if event.event == "device-removed":
                assert event.properties == {"id": "card", "bdf": f"0000:00:{slot:02x}.0"}
                break
    assert CARDS.log["card"] == ["open", "activate", "active", "stop", "close"]
    assert "card" not in vm.info()["device_tree"]
    assert await guest.does(driver.status()) == 0xFF, "nothing is mapped there"
    assert not any(range.start == driver.bar for range in vm.host.machine.board.mmio.ranges)  # type: ignore[union-attr]
    assert await world.add("other") == [slot]
    await world.driven(slot)


async def test_its_transports_name_means_the_device(world: World, autojump_clock: Clock) -> None:
    (slot,) = await world.add("card")
    await world.vm.remove_device("_virtio-pci-card")
    assert await world.guest.does(hotplug_read(PCID)) == 1 << slot


async def test_asked_twice_the_guest_is_told_twice(world: World, autojump_clock: Clock) -> None:
    (slot,) = await world.add("card")
    for _ in range(2):
        await world.vm.remove_device("card")
        assert await world.guest.does(ged_events()) & PCI_DEVICES_CHANGED
        assert await world.guest.does(hotplug_read(PCID)) == 1 << slot
    with pytest.raises(ConfigError, match='id = "card": two devices have this id'):
        await world.vm.add_device(CardConfig("card"))  # until the guest has let go of it


async def test_only_what_can_go_is_asked_for(world: World, autojump_clock: Clock) -> None:
    with pytest.raises(NoSuchDevice, match='no device with id "card"'):
        await world.vm.remove_device("card")
    with pytest.raises(ConfigError, match='id = "__rng": a device of rng can\'t be removed'):
        await world.vm.remove_device("__rng")


async def test_what_was_not_asked_for_stays(world: World, autojump_clock: Clock) -> None:
    first, second = await world.add("first", "second")
    await world.driven(first)
    await world.guest.does(eject(NOBODY))
    await world.vm.remove_device("second")
    await world.guest.does(eject(1 << second))
    await world.guest.does(eject(1 << second))
    await world.until_gone("second")
    assert await world.ids_at(first) == 0x107F1AF4
    assert CARDS.log["first"] == ["open", "activate", "active"]
    assert world.vm.counters()["__bus"]["ejects_ignored"] == 33


async def test_an_eject_in_mid_activation_lets_the_waiting_vcpu_go(world: World, autojump_clock: Clock) -> None:
    (slot,) = await world.add("card")
    driver = ScriptDriver(slot, BAR, BASE)
    CARDS.on_activate = trio.sleep_forever
    await world.guest.does(driver.place())
    waiting = world.guest.begin(driver.activate(), cpu=0)
    await trio.sleep(0.1)
    assert CARDS.log["card"] == ["open", "activate"]
    assert not waiting.done.is_set()
    await world.vm.remove_device("card")
    began = trio.current_time()
    await world.guest.does(eject(1 << slot), cpu=1)
    await waiting.done.wait()
    assert trio.current_time() - began < 0.1, "long before the activation's own deadline"
    await world.until_gone("card")
    assert CARDS.log["card"] == ["open", "activate", "stop", "close"]


async def test_a_vcpu_that_is_still_in_the_device_asks_for_nothing(world: World, autojump_clock: Clock) -> None:
    """It has found the BAR, and writes DRIVER_OK after the device has begun to go: nobody would serve that."""
    (slot,) = await world.add("card")
    machine = world.vm.host.machine
    assert machine is not None
    card = machine.board.devices[-1]
    await world.guest.does(ScriptDriver(slot, BAR, BASE).place())
    await world.vm.remove_device("card")
    await world.guest.does(eject(1 << slot))
    await world.until_gone("card")
    for value in (1 | 2, 1 | 2 | 8, 15, 0):
        assert card.transport.bar_write(0, 0x14, bytes([value])) is None
    assert card.transport.config_write(4, b"\6\0") is None
    assert card.transport.config_write(4, b"\0\0") is None
    assert card.transport.bar_write(0, 0x6000, b"\0\0") is None


async def test_a_device_that_does_not_stop_is_named_and_in_no_other_ones_way(
    world: World, autojump_clock: Clock
) -> None:
    slow, quick = await world.add("slow", "quick")
    for slot in (slow, quick):
        await world.driven(slot)
    back = trio.Event()
    CARDS.on_stop["slow"] = back.wait
    for name in ("slow", "quick"):
        await world.vm.remove_device(name)
    await world.guest.does(eject(1 << slow | 1 << quick))
    await world.until_gone("quick")
    await trio.sleep(3)  # past device_stop
    machine = world.vm.host.machine
    assert machine is not None
    assert [slot.actor.stuck is None for slot in machine.board.devices] == [True, False]
    assert "close" not in CARDS.log["slow"], "while something of it may still run"
    accepted: list[int] = []
    with pytest.raises(DeadlineError, match=r"quiesce.*PCI slots \[2\] are being ejected"):
        await world.vm.migrate_to("unix:/nowhere", on_accepted=lambda: accepted.append(1))
    assert accepted == [], "it is refused before it begins"
    back.set()
    await world.until_gone("slow")
    assert CARDS.log["slow"][-1] == "close"


async def test_a_kernel_that_refuses_leaves_it_to_be_tried_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    (slot,) = await world.add("card")
    machine = world.vm.host.machine
    assert machine is not None
    card = machine.board.devices[-1].transport
    unplugs, refusing = card.disconnect_interrupts, [True]

    def refuse() -> None:
        if refusing[0]:
            raise OSError("not now")
        unplugs()

    card.disconnect_interrupts = refuse  # type: ignore[method-assign]
    await world.vm.remove_device("card")
    await world.guest.does(eject(1 << slot))
    await trio.sleep(1)
    assert "the device in PCI slot 2 is ejected, and can't be taken away: not now" in caplog.text
    assert "card" in world.vm.info()["device_tree"]
    refusing[0] = False
    await world.vm.remove_device("card")
    await world.until_gone("card")


# --- reboots -------------------------------------------------------------------------------------------------


async def test_over_a_reboot_devices_keep_ids_and_slots_and_those_that_are_to_go_are_gone(
    world: World, autojump_clock: Clock
) -> None:
    await world.add("a")
    info = await world.vm.add_device(CardConfig())
    assert info == PciDeviceInfo("_card0", "0000:00:03.0")
    await world.vm.add_device(CardConfig())
    await world.add("d")
    await world.vm.remove_device("a")  # never ejected
    await world.vm.remove_device("_card0")
    await world.guest.does(eject(1 << 3))
    await world.until_gone("_card0")
    await world.vm.reboot()
    tree = world.vm.info()["device_tree"]
    places = {name: tree[f"_virtio-pci-{name}"]["pci_bdf"] for name in ("_card1", "d", "__rng")}
    assert places == {"_card1": "0000:00:04.0", "d": "0000:00:05.0", "__rng": "0000:00:01.0"}
    assert "a" not in tree
    assert await world.guest.does(hotplug_read(PCIU)) == await world.guest.does(hotplug_read(PCID)) == 0
    assert await world.vm.add_device(CardConfig()) == PciDeviceInfo("_card0", "0000:00:02.0")


# --- owners --------------------------------------------------------------------------------------------------


async def test_while_a_migration_owns_the_vm_nothing_comes_or_is_asked_for(world: World, autojump_clock: Clock) -> None:
    (slot,) = await world.add("card")
    await world.vm.remove_device("card")
    machine = world.vm.host.machine
    assert machine is not None
    async with world.vm.ownership.lease(MIGRATION):
        began = trio.current_time()
        with pytest.raises(VmMigrating, match="add-card"):
            await world.vm.add_device(CardConfig())
        with pytest.raises(VmMigrating, match="remove-device"):
            await world.vm.remove_device("card")
        assert trio.current_time() == began
        async with machine.hotplug.ejector.held():
            await world.guest.does(eject(1 << slot))
            await trio.sleep(1)
            assert await world.ids_at(slot) == NOBODY
            tree = world.vm.info()["device_tree"]
            assert tree["card"]["removal"] == "ejected", "the destination builds it: it goes where the VM runs"
            assert machine.board.hotplug.save().ejected == 1 << slot
    await world.until_gone("card")


async def test_a_disk_that_its_guest_has_let_go_of_is_not_resized(
    world: World, tmp_path: Path, autojump_clock: Clock
) -> None:
    """Whoever takes it away closes it soon, and its image is its owner's again."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    await world.vm.add_device(DiskConfig(str(image), id="disk"))
    await world.vm.remove_device("disk")
    await world.vm.resize_disk("disk", 2 << 20)  # asked for, and its guest's still
    machine = world.vm.host.machine
    assert machine is not None
    async with machine.hotplug.ejector.held():
        await world.guest.does(eject(1 << 2))
        with pytest.raises(NoSuchDevice, match="disk"):
            await world.vm.resize_disk("disk", 4 << 20)
    await world.until_gone("disk")
    assert image.stat().st_size == 2 << 20


async def test_nothing_goes_while_the_gate_is_closed(world: World, autojump_clock: Clock) -> None:
    (slot,) = await world.add("card")
    await world.vm.remove_device("card")
    machine = world.vm.host.machine
    assert machine is not None
    await machine.stop(5)
    machine.board.hotplug.write(8, (1 << slot).to_bytes(4, "little"))  # in the last moment
    await trio.sleep(1)
    assert "card" in world.vm.info()["device_tree"]
    await machine.undo()
    await world.until_gone("card")


async def test_a_vm_that_is_gone_or_in_doubt_gets_nothing(world: World, autojump_clock: Clock) -> None:
    await world.vm.pause()
    world.vm.doubt = object()  # type: ignore[assignment]
    for verb in (world.vm.add_device(CardConfig()), world.vm.remove_device("__rng")):
        with pytest.raises(WrongState, match="in doubt"):
            await verb
    world.vm.doubt = None


# --- cancelled, or ended, at every await ------------------------------------------------------------------------


def _gate_closes_and_opens(machine: Machine, slot: int) -> None:
    machine.gate.shut()
    machine.hotplug.ejector.reopen()
    for each in machine.board.devices:
        each.actor.reopen()


def _asked_again(machine: Machine, slot: int) -> None:
    with suppress(NoSuchDevice):  # after the last step
        machine.hotplug.ask("card")


def _ejected_again(machine: Machine, slot: int) -> None:
    machine.board.hotplug.write(8, (1 << slot).to_bytes(4, "little"))


def _reset_by_a_vcpu(machine: Machine, slot: int) -> None:
    for each in machine.board.devices:
        each.transport.bar_write(0, 0x14, b"\0")
        each.transport.bar_write(0, 0x14, b"\x0f")


@pytest.mark.parametrize("strike", [_gate_closes_and_opens, _asked_again, _ejected_again, _reset_by_a_vcpu])
async def test_whatever_is_done_at_every_await_of_an_ejection(
    strike: Callable[[Machine, int], None], autojump_clock: Clock
) -> None:
    async def world_of(walk: Walk[None]) -> None:
        async with a_world() as world:
            (slot,) = await world.add("card")
            await world.driven(slot)
            CARDS.on_stop["card"] = partial(trio.sleep, 0.01)
            await world.vm.remove_device("card")
            machine = world.vm.host.machine
            assert machine is not None

            async def ejection() -> None:
                await world.guest.does(eject(1 << slot))
                await world.until_gone("card")

            await walk.run(ejection, strike=partial(strike, machine, slot), of=[f"ejecting slot {slot}"])
            assert await world.add("next") == [slot]
            await world.driven(slot)
        assert CARDS.log["card"].count("close") == 1
        CARDS.log.clear()

    assert await cancel_walk(world_of) >= 1


async def test_the_vm_ended_at_every_step_of_an_ejection(autojump_clock: Clock) -> None:
    for steps in range(60):
        async with a_world() as world:
            (slot,) = await world.add("card")
            await world.driven(slot)
            await world.vm.remove_device("card")
            await world.guest.does(eject(1 << slot))
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
        assert CARDS.log["card"].count("close") == 1
        CARDS.log.clear()
