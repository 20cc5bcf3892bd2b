"""Exits per second against a bare C KVM_RUN loop: served in our C run loop, and by a Python device that does nothing.

The device is on a bus like any other, so an access's whole way is measured: exit, decoding, address lookup, device.

``python benchmarks/exits.py [--runs N] [--json]``. The three take turns in each run: figures drift from run to run,
ratios of one run don't.
"""

from __future__ import annotations

import subprocess
import tempfile
import threading
import time
from pathlib import Path

from results import Figure, median, parser_for, show

from trivmm.bus.bus import Bus
from trivmm.bus.space import AddressSpace, Effect, GuestRequest, Range
from trivmm.hypervisor.base import INTERRUPTED
from trivmm.hypervisor.kvm.system import KvmHypervisor
from trivmm.hypervisor.kvm.vcpu import KvmVcpu
from trivmm.memory.guest import GuestMemory

CODE = 0x100000
EXITS = 20_000
C_SECONDS = 0.4
PORT_C, PORT_PYTHON = 0x80, 0x10


def compile_bare(folder: Path) -> Path:
    source, program = Path(__file__).with_name("bare_kvm.c"), folder / "bare_kvm"
    subprocess.run(["cc", "-O2", "-o", str(program), str(source)], check=True, timeout=60)
    return program


def bare(program: Path) -> float:
    command = [str(program), str(PORT_C), str(EXITS)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout)


class Counting:
    """Ends the run after so many writes."""

    def __init__(self, left: int) -> None:
        self.left = left

    def read(self, offset: int, size: int) -> bytes:
        return bytes(size)

    def write(self, offset: int, data: bytes) -> Effect:
        self.left -= 1
        return None if self.left else GuestRequest("enough", "of that")


def make_bus() -> Bus:
    bus = Bus(AddressSpace("pio"), AddressSpace("mmio"))
    bus.pio.insert(Range(PORT_PYTHON, 1, Counting(EXITS), "counting"))
    return bus


def in_python(cpu: KvmVcpu) -> float:
    bus = make_bus()
    began = time.perf_counter()
    while cpu.run(bus) is INTERRUPTED:
        pass
    return EXITS / (time.perf_counter() - began)


def in_c(cpu: KvmVcpu) -> float:
    timer = threading.Timer(C_SECONDS, cpu.kick)
    before = cpu.counters()["exits"]
    cpu.attach_thread()
    timer.start()
    began = time.perf_counter()
    cpu.run(make_bus())
    took = time.perf_counter() - began
    cpu.detach_thread()
    timer.join(10)
    return (cpu.counters()["exits"] - before) / took


def measure(port: int, hypervisor: KvmHypervisor) -> float:
    memory = GuestMemory([(0, 4 << 20)])
    vm = hypervisor.open_vm()
    try:
        for region in memory.regions:
            vm.add_memory(region.slot, region.gpa, region.size, region.hva)
        memory.write(CODE, bytes([0xE6, port, 0xEB, 0xFC]))
        cpu = vm.create_vcpu(0)
        cpu.set_boot_state(CODE, 0x6000)
        return in_c(cpu) if port == PORT_C else in_python(cpu)
    finally:
        vm.close()
        memory.close()


def main() -> None:
    arguments = parser_for(__doc__, runs=7).parse_args()
    hypervisor = KvmHypervisor()
    rates: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        program = compile_bare(Path(folder))
        for _ in range(arguments.runs):
            rates.append((bare(program), measure(PORT_C, hypervisor), measure(PORT_PYTHON, hypervisor)))
    hypervisor.close()
    figures = [
        Figure(name, median([each[at] for each in rates]), "/s") for at, name in enumerate(("bare", "C", "Python"))
    ]
    figures += [
        Figure("C-handled / bare", median([each[1] / each[0] for each in rates]), aim=0.9),
        Figure("Python-handled / bare", median([each[2] / each[0] for each in rates]), aim=0.6),
    ]
    show("exits a second", figures, as_json=arguments.json)


if __name__ == "__main__":
    main()
