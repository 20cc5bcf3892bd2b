"""A guest that makes KVM's emulator fail on purpose, over and over: it slows itself, and nobody else."""

from __future__ import annotations

import logging
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from trivmm import Deadlines, MemoryConfig, PayloadConfig, SerialConfig, Vm, VmConfig, VmState, open_vm
from trivmm.hypervisor.base import Hypervisor
from trivmm.hypervisor.kvm.ring0 import look_at_ring0
from trivmm.hypervisor.kvm.system import KvmHypervisor
from trivmm.testing.kernels import with_own_entry

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(not (shutil.which("gcc") and shutil.which("ld")), reason="needs gcc and ld"),
]
ROUND = 512
FAILURES = 8  # of a round, at least: what an emulator lacks that has MOVAPS
SOME, MILLION = 20_000, 1_000_000
LIMIT_S = 600
GROWTH_KIB = 16 << 10  # of this process, at most
FAILED = "exit_17"  # KVM_EXIT_INTERNAL_ERROR

Build = Callable[..., VmConfig]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def with_options(*options: str) -> VmConfig:
        made, raw, kernel = tmp_path / "failing.o", tmp_path / "failing.bin", tmp_path / "failing"
        source = Path(__file__).with_name("failing.S")
        subprocess.run(["gcc", "-c", f"-DROUND={ROUND}", *options, source, "-o", made], check=True, timeout=60)
        linker = ["ld", "-Ttext", "0x200000", "-e", "start", "--oformat", "binary", "--build-id=none"]
        subprocess.run([*linker, "-o", raw, made], check=True, timeout=60)
        kernel.write_bytes(with_own_entry(raw.read_bytes(), preferred=2 << 20))
        return VmConfig(
            PayloadConfig(str(kernel)),
            memory=MemoryConfig(64 << 20),
            serial=SerialConfig("Null"),
            deadlines=Deadlines(pause=10),
        )

    return with_options


@pytest.fixture
def hypervisor() -> Hypervisor:
    return KvmHypervisor()


def failures(vm: Vm) -> int:
    return sum(counted.get(FAILED, 0) for who, counted in vm.counters().items() if "vcpu" in who)


async def suffer(config: VmConfig, hypervisor: Hypervisor, wanted: int, caplog: pytest.LogCaptureFixture) -> None:
    """Two of them side by side; the one is paused again and again while the other goes on."""
    with caplog.at_level(logging.DEBUG), trio.fail_after(LIMIT_S):
        async with open_vm(config, hypervisor=hypervisor) as first, open_vm(config, hypervisor=hypervisor) as second:
            await first.boot()
            await second.boot()
            for vm in (first, second):
                await vm.wait_for_console(".")
            said, memory = len(caplog.records), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            rounds = 1
            while rounds * ROUND * FAILURES < wanted:
                await first.wait_for_console(".")
                await first.pause()
                await second.wait_for_console(".")
                assert first.state is VmState.PAUSED
                await first.resume()
                rounds += 1
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < GROWTH_KIB
            pauses = 3 * rounds  # of each, a few lines of the log
            assert len(caplog.records) - said < 10 * pauses
            if look_at_ring0().emulated:
                assert min(failures(first), failures(second)) >= wanted
            await first.shutdown()  # while it fails
            await second.wait_for_console(".")
            await second.shutdown()


async def test_only_the_guest_that_fails_is_slow(
    build: Build, hypervisor: Hypervisor, caplog: pytest.LogCaptureFixture
) -> None:
    await suffer(build(), hypervisor, SOME, caplog)


@pytest.mark.slow
async def test_a_million_failures(build: Build, hypervisor: Hypervisor, caplog: pytest.LogCaptureFixture) -> None:
    await suffer(build(), hypervisor, MILLION, caplog)


async def test_the_crash_report_names_what_is_beyond_the_assist(build: Build, hypervisor: Hypervisor) -> None:
    with trio.fail_after(LIMIT_S):
        async with open_vm(build("-DEND"), hypervisor=hypervisor) as vm:
            await vm.boot()
            await vm.wait_for_console(".")
            if not look_at_ring0().emulated:
                await vm.wait_for_console("u")
                return
            ended = await vm.wait()
            assert ended.kind == "crash"
            assert "beyond the assist, AVX-512 (EVEX): 62 f1 7c 48 58 c1" in str(ended)
