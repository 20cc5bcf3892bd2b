"""What the host tells a guest unasked: NMIs and the power button, to a guest with handlers of its own for both."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from trivmm import CpusConfig, Deadlines, MemoryConfig, PayloadConfig, SerialConfig, VmConfig, VmState, open_vm
from trivmm.errors import WrongState
from trivmm.hypervisor.base import Hypervisor
from trivmm.hypervisor.select import choose_hypervisor
from trivmm.testing.road import open_road

pytestmark = pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("ld")), reason="needs gcc and ld")
HERE = Path(__file__).parent
LIMIT_S = 120
NMI_AT = 12  # of struct kvm_vcpu_events: nmi.injected, nmi.pending
NO_SOFT = pytest.mark.skipif(importlib.util.find_spec("unicorn") is None, reason="the soft extra is not installed")

BACK_ENDS = [pytest.param("kvm", marks=pytest.mark.kvm), pytest.param("soft", marks=[pytest.mark.soft, NO_SOFT])]


@pytest.fixture(params=BACK_ENDS)
def hypervisor(request: pytest.FixtureRequest) -> Iterator[Hypervisor]:
    chosen = choose_hypervisor(request.param)
    yield chosen
    chosen.close()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("events")
    made, kernel = folder / "events.o", folder / "events.elf"
    subprocess.run(["gcc", "-m32", "-c", HERE / "events.S", "-o", made], check=True, timeout=60)
    linker = ["ld", "-m", "elf_i386", "-T", HERE / "hostile.ld", "-e", "start", "--build-id=none"]
    subprocess.run([*linker, "-o", kernel, made], check=True, timeout=60, capture_output=True)
    return kernel


def config_of(kernel: Path, cpus: int = 1) -> VmConfig:
    return VmConfig(
        PayloadConfig(str(kernel)),
        cpus=CpusConfig(cpus),
        memory=MemoryConfig(64 << 20),
        serial=SerialConfig("Null"),
        deadlines=Deadlines(pause=10, downtime=5, quiesce=5),
    )


async def test_an_nmi_reaches_a_guest_that_runs_and_one_that_was_paused(kernel: Path, hypervisor: Hypervisor) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_vm(config_of(kernel), hypervisor=hypervisor) as vm:
            with pytest.raises(WrongState, match="nmi: the VM is Created"):
                await vm.nmi()
            await vm.boot()
            await vm.wait_for_console("r")
            await vm.nmi()
            await vm.wait_for_console("N")
            assert vm.state is VmState.RUNNING
            await vm.pause()
            await vm.nmi()
            assert vm.state is VmState.PAUSED
            await vm.resume()
            await vm.wait_for_console("N")


async def test_an_nmi_that_a_paused_guest_has_not_taken_moves_with_it(
    kernel: Path, hypervisor: Hypervisor, tmp_path: Path
) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_road(config_of(kernel), hypervisor=hypervisor) as road:
            await road.vm.wait_for_console("r")
            await road.vm.pause()
            await road.vm.nmi()
            await road.move(f"unix:{tmp_path}/m.sock")
            assert road.vm.state is VmState.PAUSED
            assert not road.vm.console_tail
            await road.vm.resume()
            await road.vm.wait_for_console("N")


@pytest.mark.kvm
async def test_a_vcpu_that_was_never_started_gets_no_nmi(kernel: Path) -> None:
    """Queued there it would keep KVM_RUN from sleeping, and hit the AP before it has an IDT."""
    with trio.fail_after(LIMIT_S):
        async with open_vm(config_of(kernel, cpus=2), hypervisor=choose_hypervisor("kvm")) as vm:
            await vm.boot()
            await vm.wait_for_console("r")
            await vm.nmi()
            await vm.wait_for_console("N")
            await vm.pause()
            assert vm.host.machine is not None
            injected, pending = vm.host.machine.board.cpus[1].save().blobs["events"][NMI_AT : NMI_AT + 2]
            assert (injected, pending) == (0, 0)


@pytest.mark.parametrize("paused", [False, True])
async def test_a_press_is_read_once(kernel: Path, hypervisor: Hypervisor, paused: bool) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_vm(config_of(kernel), hypervisor=hypervisor) as vm:
            with pytest.raises(WrongState, match="power-button: the VM is Created"):
                await vm.power_button()
            await vm.boot()
            await vm.wait_for_console("r")
            if paused:
                await vm.pause()
            await vm.power_button()
            if paused:
                await vm.resume()
            vm.console_input(b"!")
            assert (await vm.wait()).kind == "poweroff"
            assert vm.console_tail == b"r80"


@pytest.mark.parametrize("paused", [False, True])
async def test_a_press_that_the_guest_has_not_read_moves_with_it(
    kernel: Path, hypervisor: Hypervisor, tmp_path: Path, paused: bool
) -> None:
    """Its interrupt too: the guest sleeps until that comes. A soft vCPU that is parked has not even taken it yet."""
    with trio.fail_after(LIMIT_S):
        async with open_road(config_of(kernel), hypervisor=hypervisor) as road:
            await road.vm.wait_for_console("r")
            if paused:
                await road.vm.pause()
            await road.vm.power_button()
            await road.move(f"unix:{tmp_path}/m.sock")
            if paused:
                await road.vm.resume()
            road.vm.console_input(b"!")
            assert (await road.vm.wait()).kind == "poweroff"
            assert road.vm.console_tail == b"80"


async def test_a_press_after_a_move_wakes_the_guest_there(kernel: Path, hypervisor: Hypervisor, tmp_path: Path) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_road(config_of(kernel), hypervisor=hypervisor) as road:
            await road.vm.wait_for_console("r")
            road.vm.console_input(b"!")
            await road.move(f"unix:{tmp_path}/m.sock")
            await road.vm.power_button()
            assert (await road.vm.wait()).kind == "poweroff"
            assert road.vm.console_tail == b"80"
