"""``Vm.wait_for_console``: what a guest prints is read in order, over reboots, by one owner or several."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from trivmm import MemoryConfig, PayloadConfig, Vm, VmConfig, WrongState, open_vm
from trivmm.guest import probe_path
from trivmm.testing.scripted import Compute, IoOut, ScriptedHypervisor

RESET = IoOut(0x600, 1, b"\x01")
POWER_OFF = IoOut(0x600, 1, b"\x34")


class Guest:
    """Prints and does what it is told, in all its lives: bytes are printed, anything else is a step of the script."""

    def __init__(self, *steps: Any) -> None:
        self.steps: list[Any] = list(steps)

    def __call__(self, cpu: Any) -> Generator[Any, bytes | None, None]:
        while True:
            while not self.steps:
                yield Compute(0.001)
            step = self.steps.pop(0)
            if isinstance(step, bytes):
                for letter in step:
                    yield IoOut(0x3F8, 1, bytes([letter]))
            else:
                yield step


@asynccontextmanager
async def running(*steps: Any) -> AsyncIterator[tuple[Vm, Guest]]:
    guest = Guest(*steps)
    config = VmConfig(PayloadConfig(str(probe_path())), memory=MemoryConfig(8 << 20))
    with trio.fail_after(60):
        async with open_vm(config, hypervisor=ScriptedHypervisor(guest)) as vm:
            await vm.boot()
            yield vm, guest


async def test_a_second_wait_waits_for_a_second_text(autojump_clock: trio.testing.MockClock) -> None:
    async with running(b"boot ready\n") as (vm, guest):
        first = await vm.wait_for_console("ready")
        assert first.text == b"boot ready"
        with trio.move_on_after(1) as scope:
            await vm.wait_for_console("ready")
        assert scope.cancelled_caught
        guest.steps += [b"again ", b"ready n=5;\n"]
        assert (await vm.wait_for_console(b"ready")).text == b"\nagain ready"
        assert (await vm.wait_for_console(re.compile(r"n=(\d+);"))).match[1] == b"5"


async def test_rewind_reads_the_console_from_its_start(autojump_clock: trio.testing.MockClock) -> None:
    async with running(b"a 1, a 2.") as (vm, guest):
        await vm.wait_for_console(".")
        number = re.compile(rb"a (\d)")
        assert (await vm.wait_for_console(number, rewind=True)).match[1] == b"1"
        assert (await vm.wait_for_console(number)).match[1] == b"2"
        guest.steps.append(b"a 3")
        assert (await vm.wait_for_console(number)).match[1] == b"3"


async def test_a_wait_loses_nothing_to_another_that_ends_first(autojump_clock: trio.testing.MockClock) -> None:
    seen: dict[str, bytes] = {}
    async with running() as (vm, guest):

        async def wait(text: str) -> None:
            seen[text] = (await vm.wait_for_console(text)).text

        async with trio.open_nursery() as nursery:
            for text in ("late", "early"):
                nursery.start_soon(wait, text)
                await trio.testing.wait_all_tasks_blocked()
            guest.steps.append(b"early late.")
        assert seen == {"early": b"early", "late": b"early late"}
        with trio.move_on_after(1) as scope:
            await vm.wait_for_console("late")
        assert scope.cancelled_caught, "the cursor is behind the furthest match"


async def test_a_guests_own_reboot_is_read_through(autojump_clock: trio.testing.MockClock) -> None:
    """What it said before the reboot is not lost to a wait that began, or is called, only afterwards."""
    rebooted = trio.Event()
    async with running(b"ready ") as (vm, guest):
        vm.events.listen(lambda event: rebooted.set() if event.event == "rebooted" else None)
        await vm.wait_for_console("ready")
        guest.steps += [b"bye ", RESET, b"up ready "]
        await rebooted.wait()
        assert (await vm.wait_for_console("bye")).text == b" bye"
        assert (await vm.wait_for_console("ready")).text == b"up ready"


@pytest.mark.parametrize("again", ["reboot", "shutdown and boot"])
async def test_a_boot_that_you_ask_for_begins_a_new_console(autojump_clock: trio.testing.MockClock, again: str) -> None:
    async with running(b"ready, and ready once more.") as (vm, guest):
        await vm.wait_for_console("ready")
        await vm.wait_for_console(".", rewind=True)
        await vm.wait_for_console("ready", rewind=True)  # one more is unread
        if again == "reboot":
            await vm.reboot()
        else:
            await vm.shutdown()
            await vm.boot()
        guest.steps.append(b"now ready")
        assert (await vm.wait_for_console("ready")).text == b"now ready"


async def test_a_wait_begun_before_the_boot_hears_the_first_word(autojump_clock: trio.testing.MockClock) -> None:
    heard: list[bytes] = []
    config = VmConfig(PayloadConfig(str(probe_path())), memory=MemoryConfig(8 << 20))
    with trio.fail_after(60):
        async with (
            open_vm(config, hypervisor=ScriptedHypervisor(Guest(b"hello"))) as vm,
            trio.open_nursery() as nursery,
        ):

            async def wait() -> None:
                heard.append((await vm.wait_for_console("hello")).text)

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            await vm.boot()
    assert heard == [b"hello"]


async def test_the_last_words_are_found_and_then_the_end_is_said(autojump_clock: trio.testing.MockClock) -> None:
    async with running(b"going down", POWER_OFF) as (vm, _):
        await vm.wait()
        assert (await vm.wait_for_console("down")).text == b"going down"
        for pattern in ("more", re.compile("m[o]re")):
            with pytest.raises(WrongState, match=r"wait for 'm.*re' on the console"):
                await vm.wait_for_console(pattern)
