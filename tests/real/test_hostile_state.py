"""A saved state that a peer made up: refused by the name of a field, or the machine works with it.

Real board, devices and worker threads; a scripted vCPU.
"""

from __future__ import annotations

import base64
import copy
import json
import os
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trivmm import ConsoleConfig, Deadlines, DiskConfig, MemoryConfig, PayloadConfig, VmConfig
from trivmm.errors import HypervisorError, MigrationError
from trivmm.machine.board import Board
from trivmm.machine.build import build_board
from trivmm.machine.machine import Machine, open_machine
from trivmm.machine.saved import load_state, save_board
from trivmm.memory import layout
from trivmm.platform.pm_timer import PmTimer
from trivmm.state.codec import state_from_json, state_to_json
from trivmm.state.machine import MachineState
from trivmm.state.stage import Stage
from trivmm.state.virtio import LifeStage
from trivmm.testing.driver import until
from trivmm.testing.script_driver import ScriptDriver
from trivmm.testing.scripted import Compute, ScriptedHypervisor

LIMIT_S = 30
RAM = 4 << 20
CONSOLE, DISK, RNG = "__console", "_disk0", "__rng"


def drivers() -> list[ScriptDriver]:
    """Of the console, the disk and the rng, in their slots."""
    high = layout.BAR64_END
    places = ((1, high - 0x80000), (2, layout.BAR32_START), (3, high - 0x100000))
    return [ScriptDriver(slot, bar, 0x100000 + 0x10000 * slot) for slot, bar in places]


class Guest:
    """Sets its devices up; where it finds that done, in a life before, it resets them and sets them up again."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.found: list[tuple[int, int]] = []  # status after the reset, and after DRIVER_OK

    def __call__(self, cpu: Any) -> Iterator[Any]:
        devices = drivers()
        for device in devices:  # twice: where one's place is taken, the other has left it by the second time
            yield from device.place()
        for device in devices:
            yield from device.place()
        for device in devices:
            after_reset = yield from device.reset()
            status = yield from device.activate(vector=1)
            self.found.append((after_reset, status))
        rng = devices[2]
        yield from rng.offer(0x200000, 64)
        yield from rng.until_used(cpu, 1)
        cpu.registers["lives"] = cpu.registers.get("lives", 0) + 1
        self.done.set()
        while True:
            yield Compute(1)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> VmConfig:
    disk = tmp_path_factory.mktemp("disk") / "disk.img"
    disk.write_bytes(bytes(1 << 20))
    return VmConfig(
        PayloadConfig("none"),
        memory=MemoryConfig(RAM),
        disks=(DiskConfig(str(disk)),),
        console=ConsoleConfig("Null"),
        deadlines=Deadlines(pause=10, quiesce=10, device_stop=10, vcpu_stop=10, activation=10),
    )


def a_board(config: VmConfig, guest: Guest, *, incoming: bool = True) -> Board:
    board = build_board(config, ScriptedHypervisor(guest, needs_payload=False), incoming=incoming)
    board.fixed["pm_timer"] = PmTimer(lambda: 0)  # whose count is the time, which these tests compare
    return board


def house(board: Board, guest: Guest, stage: Stage = Stage.DETACHED) -> AbstractAsyncContextManager[Machine]:
    """The machine; a guest that crashes is done, too."""
    return open_machine(board, board.config.deadlines, stage=stage, on_guest_request=guest.done.set)


@pytest.fixture(scope="module")
def good(config: VmConfig) -> dict[str, Any]:
    """The state of a machine whose devices are active, as JSON."""

    async def run() -> MachineState:
        guest = Guest()
        board = a_board(config, guest, incoming=False)
        try:
            async with open_machine(board, config.deadlines, on_guest_request=guest.done.set) as machine:
                await machine.resume()
                with trio.fail_after(LIMIT_S):
                    await guest.done.wait()
                assert machine.crash is None, machine.crash
                await machine.stop(LIMIT_S)
                return machine.save()
        finally:
            board.close()

    made: dict[str, Any] = json.loads(json.dumps(state_to_json(trio.run(run))))
    assert [made["devices"][name]["life"]["stage"] for name in (CONSOLE, DISK, RNG)] == ["active"] * 3
    assert made["devices"][RNG]["transport"]["registers"]["queues"][0]["next_used"] == 1
    return made


def changed(good: dict[str, Any], *changes: tuple[str, Any]) -> dict[str, Any]:
    made = copy.deepcopy(good)
    for path, new in changes:
        *way, last = path.split(".")
        at: Any = made
        for step in way:
            at = at[int(step) if step.isdigit() else step]
        at[int(last) if last.isdigit() else last] = new
    return made


def bytes_with(good: dict[str, Any], path: str, at: int, new: bytes) -> str:
    value: Any = good
    for step in path.split("."):
        value = value[step]
    raw = bytearray(base64.b64decode(value))
    raw[at : at + len(new)] = new
    return base64.b64encode(raw).decode()


RNG_LIFE, RNG_AT = f"devices.{RNG}.life", f"devices.{RNG}.transport"
QUEUE = f"{RNG_AT}.registers.queues.0"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        # life stage and status
        ([(f"{RNG_LIFE}.stage", "reset"), (f"{RNG_LIFE}.status", 11)], r"__rng\.life\.status is 11, not .* as reset"),
        ([(f"{RNG_LIFE}.stage", "driver")], r"__rng\.life\.status is 15, not .* as driver wants"),
        ([(f"{RNG_LIFE}.stage", "features_ok")], r"__rng\.life\.status is 15"),
        ([(f"{RNG_LIFE}.stage", "needs_reset")], r"__rng\.life\.status is 15"),
        ([(f"{RNG_LIFE}.status", 79)], r"__rng\.life\.status is 79"),
        ([(f"{RNG_LIFE}.status", 0)], r"__rng\.life\.status is 0"),
        ([(f"{RNG_LIFE}.status", 15.0)], r"__rng\.life\.status is 15\.0, not an integer"),
        ([(f"{RNG_LIFE}.status", "15")], r'__rng\.life\.status is "15", not an integer'),
        ([(f"{RNG_LIFE}.generation", True)], r"__rng\.life\.generation is true, not an integer"),
        ([(f"{RNG_LIFE}.generation", 1 << 63)], r"__rng\.life\.generation is "),
        # features and queues
        ([(f"{RNG_AT}.registers.features", 0)], r"registers\.features is 0, not a subset of .* with VERSION_1"),
        ([(f"{RNG_AT}.registers.features", (1 << 32) | 1)], r"registers\.features is 4294967297"),
        ([(f"{RNG_AT}.registers.queues", [])], r"registers\.queues is 0, not 1 of them"),
        ([(f"{QUEUE}.size", 3)], r"queues\[0\]\.size is 3, not a power of two up to 256"),
        ([(f"{QUEUE}.size", 512)], r"queues\[0\]\.size is 512"),
        ([(f"{QUEUE}.desc_gpa", 8)], r"queues\[0\]\.desc_gpa is 8, not a multiple of 16"),
        ([(f"{QUEUE}.avail_gpa", 1)], r"queues\[0\]\.avail_gpa is 1"),
        ([(f"{QUEUE}.used_gpa", 2)], r"queues\[0\]\.used_gpa is 2"),
        ([(f"{QUEUE}.used_gpa", 2.0)], r"queues\[0\]\.used_gpa is 2\.0, not an integer"),
        ([(f"{QUEUE}.enabled", 1)], r"queues\[0\]\.enabled is 1, not true or false"),
        ([(f"{QUEUE}.enabled", False)], r"queues\[0\]\.next_avail is 1, not 0: no device works on this queue"),
        ([(f"{QUEUE}.next_avail", 10)], r"queues\[0\]\.next_avail is 10, not at most 8 after next_used"),
        ([(f"{QUEUE}.next_used", 2)], r"queues\[0\]\.next_avail is 1, not at most 8 after next_used"),
        ([(f"{RNG_LIFE}.stage", "resetting")], r"queues\[0\]\.next_avail is 1, not 0"),
        # vectors
        ([(f"{QUEUE}.vector", 2)], r"queues\[0\]\.vector is 2, not below 2, or 65535"),
        ([(f"{RNG_AT}.registers.config_vector", 9)], r"registers\.config_vector is 9"),
        ([(f"{RNG_AT}.msix.pending", [2])], r"msix\.pending is 2"),
        ([(f"{RNG_AT}.msix.pending", [0, 0])], r"msix\.pending is 0"),
        ([(f"{RNG_AT}.msix.table", "")], r"msix\.table is 0, not the 32 bytes of 2 vectors"),
        ([(f"{RNG_AT}.isr", 4)], r"transport\.isr is 4"),
        # barriers
        ([("vcpus.0.barrier", {"device": RNG, "what": "activation"})], r"vcpus\[0\]\.barrier\.what is .activation."),
        ([("vcpus.0.barrier", {"device": RNG, "what": "reset"})], r"vcpus\[0\]\.barrier\.what is .reset."),
        ([("vcpus.0.barrier", {"device": "_net0", "what": "reset"})], r"vcpus\[0\]\.barrier\.device is ._net0."),
        ([("vcpus.0.barrier", ["__rng", "reset"])], r"vcpus\[0\]\.barrier is \["),
        # PCI
        ([(f"{RNG_AT}.pci.was_enabled", False)], r"pci\.was_enabled is false"),
        ([(f"{RNG_AT}.pci.sizing", [4])], r"pci\.sizing is \[4\]"),
        (
            [("board.pci.host_bridge.registers", base64.b64encode(bytes(256)).decode())],
            r"host_bridge\.registers\[0x0\]",
        ),
        # the devices' own, the fixed parts, the whole
        ([(f"devices.{RNG}.own", {"bytes": 1})], r"__rng\.own: unknown field .bytes."),
        ([(f"devices.{CONSOLE}.own.columns", 65536)], r"__console\.own\.columns is 65536"),
        ([(f"devices.{CONSOLE}.own.rx", "A" * 8192)], r"__console\.own\.rx is "),
        ([("board.serial.ier", 2.0)], r"board\.serial\.ier is 2\.0"),
        ([("board.cmos.data", "")], r"board\.cmos\.data is "),
        ([("board.ged.events", -1)], r"board\.ged\.events is -1"),
        ([("board.debug_port.last", None)], r"board\.debug_port\.last is null"),
        ([("devices", {})], r"state has devices \[\]"),
        ([("vcpus", [])], r"state has 0 vCPUs"),
    ],
)
def test_what_contradicts_itself_is_refused_and_a_good_one_loads_after_it(
    config: VmConfig, good: dict[str, Any], changes: list[tuple[str, Any]], says: str
) -> None:
    board = a_board(config, Guest())
    try:
        before = save_board(board)
        with pytest.raises(MigrationError, match=says):
            load_state(board, state_from_json(changed(good, *changes)))
        assert save_board(board) == before, "nothing is changed before all of it is known to be good"
        state = state_from_json(good)
        load_state(board, state)
        assert save_board(board) == (state.devices, state.board)
    finally:
        board.close()


def test_reserved_bits_of_a_vector_are_refused(config: VmConfig, good: dict[str, Any]) -> None:
    bad = bytes_with(good, f"{RNG_AT}.msix.table", 12, b"\3")
    test_what_contradicts_itself_is_refused_and_a_good_one_loads_after_it(
        config, good, [(f"{RNG_AT}.msix.table", bad)], r"msix\.table\[0\]\.control is 3"
    )


@pytest.mark.parametrize("path", ["vmm.kind", "vcpus.0.state.kind"])
def test_what_the_hypervisor_refuses_leaves_the_devices_alone(
    config: VmConfig, good: dict[str, Any], path: str
) -> None:
    board = a_board(config, Guest())
    try:
        before = save_board(board)
        with pytest.raises(HypervisorError, match="of kind other"):
            load_state(board, state_from_json(changed(good, (path, "other"))))
        assert save_board(board) == before
        load_state(board, state_from_json(good))
    finally:
        board.close()


def test_bars_that_a_peer_puts_over_ram_or_over_each_other_decode_nothing(
    config: VmConfig, good: dict[str, Any]
) -> None:
    disk_at = f"devices.{DISK}.transport.pci.registers"
    for place in (0x100000 & ~0x7FFFF, layout.IOAPIC_START & ~0x7FFFF, 0xFFF80000):
        board = a_board(config, Guest())
        try:
            moved = bytes_with(good, disk_at, 0x10, place.to_bytes(4, "little"))
            load_state(board, state_from_json(changed(good, (disk_at, moved))))
            disk = next(slot for slot in board.devices if slot.backend.name == DISK)
            assert disk.transport.config.bars[0].mapped is None
            load_state(board, state_from_json(good))
            assert disk.transport.config.bars[0].mapped == layout.BAR32_START
        finally:
            board.close()


# --- whatever comes, the machine works with it or says no ----------------------------------------------------------


@pytest.fixture(scope="module")
def goods(good: dict[str, Any]) -> list[dict[str, Any]]:
    """Devices active, one that is being activated, one that is being reset, one that needs it."""
    waiting = {"device": RNG, "what": "activation"}
    resetting = {"device": RNG, "what": "reset"}
    idle = [(f"{QUEUE}.next_avail", 0), (f"{QUEUE}.next_used", 0)]
    return [
        good,
        changed(good, (f"{RNG_LIFE}.stage", "activating"), ("vcpus.0.barrier", waiting)),
        changed(good, (f"{RNG_LIFE}.stage", "resetting"), ("vcpus.0.barrier", resetting), *idle),
        changed(good, (f"{RNG_LIFE}.stage", "needs_reset"), (f"{RNG_LIFE}.status", 79), *idle),
    ]


async def live_with(config: VmConfig, value: dict[str, Any], fallback: dict[str, Any]) -> bool:
    """Load it, or else ``fallback``, and run the guest until its devices work. Whether it was ``value``."""
    guest = Guest()
    board = a_board(config, guest)
    taken = True
    try:
        async with house(board, guest, Stage.UNLOCKED) as machine:
            before = save_board(board)
            try:
                await machine.load(state_from_json(value))
            except (MigrationError, HypervisorError) as error:
                taken = False
                assert len(str(error)) < 1000  # noqa: PT017 - there may be none
                assert save_board(board) == before
                await machine.load(state_from_json(fallback))
            await machine.take_locks()
            await machine.start()
            if machine.guest_request is None:
                await machine.resume()
                with trio.fail_after(LIMIT_S):
                    await guest.done.wait()
                assert guest.found == [(0, 15)] * 3
            assert machine.crash is None
        assert board.stuck == []
    finally:
        board.close()
    return taken


async def test_each_good_state_works(config: VmConfig, goods: list[dict[str, Any]]) -> None:
    for each in goods:
        assert await live_with(config, each, each)


@pytest.mark.parametrize("register", ["desc_gpa", "avail_gpa", "used_gpa"])
@pytest.mark.parametrize("gpa", [RAM, RAM - 16, (1 << 64) - 16])
async def test_rings_outside_ram_cost_their_own_device_and_nothing_else(
    config: VmConfig, good: dict[str, Any], register: str, gpa: int
) -> None:
    """They are not refused: a guest that leaves its device no bus master can bring this about by itself, and is to be
    moved all the same. The device needs a reset, as it would have where the guest set it up."""
    value = changed(good, (f"{QUEUE}.{register}", gpa))
    guest = Guest()
    board = a_board(config, guest)
    slots = {slot.backend.name: slot for slot in board.devices}
    try:
        async with house(board, guest, Stage.UNLOCKED) as machine:
            await machine.load(state_from_json(value))
            await machine.take_locks()
            await machine.start()
            with trio.fail_after(LIMIT_S):
                await until(lambda: slots[RNG].transport.state.stage is LifeStage.NEEDS_RESET)
                assert slots[DISK].transport.state.stage is LifeStage.ACTIVE
                await machine.resume()
                await guest.done.wait()
            assert guest.found == [(0, 15)] * 3, "a reset leads out"
    finally:
        board.close()


def paths(value: Any, path: str = "") -> Iterator[str]:
    """Of all values in it, but for the hypervisor's own blobs."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if key != "blobs":
            yield f"{path}.{key}".lstrip(".")
            yield from paths(inner, f"{path}.{key}")


NUMBERS = st.integers(0, 16) | st.sampled_from([64, 79, 128, 255, 256, 4096, 65535, 65536, 1 << 32, (1 << 64) - 1])
WORDS = ["reset", "driver", "features_ok", "activating", "active", "needs_reset", "resetting", "activation", "poweroff"]
ODD = st.integers(-2, 1 << 65) | st.sampled_from([None, True, "", 1.0, -0.5, [], {}, [0], ["x"], {"x": 1}])


def like(old: Any) -> st.SearchStrategy[Any]:
    """Of the same kind, so that only the meaning can be wrong; or of any."""
    if isinstance(old, bool):
        return st.booleans()
    if isinstance(old, int):
        return NUMBERS
    return st.sampled_from(WORDS) if isinstance(old, str) else ODD


@st.composite
def mutations(draw: st.DrawFn, good: dict[str, Any]) -> dict[str, Any]:
    """One to three values replaced, by odd ones or by those of another place, or with bytes of them flipped."""
    made = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        here = sorted(paths(made))
        *way, last = draw(st.sampled_from(here)).split(".")
        at: Any = made
        for step in way:
            at = at[int(step)] if isinstance(at, list) else at[step]
        key: Any = int(last) if isinstance(at, list) else last
        old = at[key]
        if isinstance(old, str) and len(old) > 30 and draw(st.booleans()):
            raw = bytearray(base64.b64decode(old))
            where = draw(st.integers(0, len(raw) - 1))
            raw[where] ^= draw(st.integers(1, 255))
            at[key] = base64.b64encode(raw).decode()
        elif draw(st.integers(0, 15)) == 0:
            del at[key]
        else:
            at[key] = draw(ODD if draw(st.integers(0, 7)) == 0 else like(old))
    return made


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_of_a_good_state_is_refused_or_the_machine_works(
    config: VmConfig, goods: list[dict[str, Any]], data: st.DataObject
) -> None:
    base = data.draw(st.sampled_from(goods))
    value = data.draw(mutations(base))
    open_before = len(os.listdir("/proc/self/fd"))
    trio.run(live_with, config, value, base)
    assert len(os.listdir("/proc/self/fd")) == open_before
