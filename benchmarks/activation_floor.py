"""Activation cycles a second of one device, against a bare C loop of the same exits.

A guest of a few hundred bytes resets a disk, negotiates, sets up its queue and writes DRIVER_OK, for ever, and polls
for nothing: between two activations it makes the same 26 exits in both. In the bare loop each is answered at once, from
a variable. Here a reset stops a worker, a thread, and an activation starts one, while the vCPU waits for either.

    python benchmarks/activation_floor.py [--runs 5] [--seconds 2] [--json]
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from pathlib import Path

import trio
from results import Figure, median, parser_for, show

from trivmm import Deadlines, DiskConfig, MemoryConfig, PayloadConfig, VmConfig
from trivmm.memory.layout import BAR32_START
from trivmm.testing.kernels import make_pvh
from trivmm.vm import Vm, open_vm

BAR = BAR32_START  # where the guest puts it
SLOT = 1
CYCLES = 2000
LIMIT_S = 120
QUEUE = {0x20: 0x200000, 0x24: 0, 0x28: 0x201000, 0x2C: 0, 0x30: 0x202000, 0x34: 0}
FEATURES = ((0x00, 0), (0x00, 1), (0x08, 0), (0x0C, 0), (0x08, 1), (0x0C, 1))


def write(offset: int, size: int, value: int) -> bytes:
    """mov [BAR + offset], value"""
    opcode = {1: b"\xc6\x05", 2: b"\x66\xc7\x05", 4: b"\xc7\x05"}[size]
    return opcode + struct.pack("<I", BAR + offset) + value.to_bytes(size, "little")


def read(offset: int, size: int) -> bytes:
    """mov al or eax, [BAR + offset]"""
    return (b"\xa0" if size == 1 else b"\xa1") + struct.pack("<I", BAR + offset)


def out(port: int, value: int, size: int = 4) -> bytes:
    """mov dx, port; mov eax, value; out dx, eax or ax"""
    return (
        b"\x66\xba"
        + struct.pack("<H", port)
        + b"\xb8"
        + struct.pack("<I", value)
        + (b"\xef" if size == 4 else b"\x66\xef")
    )


def pci(register: int, value: int, size: int = 4) -> bytes:
    return out(0xCF8, 1 << 31 | SLOT << 11 | register) + out(0xCFC, value, size)


def guest() -> bytes:
    start = pci(0x10, BAR) + pci(4, 6, 2)
    cycle = write(0x14, 1, 0) + read(0x14, 1) + write(0x14, 1, 1) + write(0x14, 1, 3)
    cycle += b"".join(write(offset, 4, value) + (read(0x04, 4) if not offset else b"") for offset, value in FEATURES)
    cycle += write(0x14, 1, 11) + read(0x14, 1) + write(0x16, 2, 0) + write(0x18, 2, 16)
    cycle += b"".join(write(offset, 4, value) for offset, value in QUEUE.items())
    cycle += write(0x1C, 2, 1) + write(0x14, 1, 15) + read(0x14, 1)
    back = -(len(cycle) + 5)
    return start + cycle + b"\xe9" + struct.pack("<i", back)


def bare(program: Path, code: Path) -> float:
    command = [str(program), str(code), hex(BAR), str(CYCLES)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=LIMIT_S).stdout)


async def rate(vm: Vm, seconds: float) -> float:
    before, began = vm.counters()["_disk0"]["activations"], trio.current_time()
    await trio.sleep(seconds)
    return (vm.counters()["_disk0"]["activations"] - before) / (trio.current_time() - began)


async def run(runs: int, seconds: float) -> list[Figure]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program, code, kernel, disk = (folder / each for each in ("bare_cycles", "code", "kernel", "disk.img"))
        source = Path(__file__).with_name("bare_cycles.c")
        await trio.run_process(["cc", "-O2", "-o", str(program), str(source)])
        code.write_bytes(guest())
        kernel.write_bytes(make_pvh(guest()))
        disk.write_bytes(bytes(1 << 20))
        config = VmConfig(
            PayloadConfig(str(kernel)),
            memory=MemoryConfig(32 << 20),
            disks=(DiskConfig(str(disk)),),
            deadlines=Deadlines(pause=30),
        )
        floor, ours = [], []
        async with open_vm(config) as vm:
            await vm.boot()
            for _ in range(runs):
                await vm.pause()
                floor.append(await trio.to_thread.run_sync(bare, program, code))
                await vm.resume()
                ours.append(await rate(vm, seconds))
    return [
        Figure("activation cycles / bare loop", median([a / b for a, b in zip(ours, floor, strict=True)])),
        Figure("activation cycles", median(ours), "/s"),
        Figure("bare loop of the same exits", median(floor), "/s"),
    ]


def main() -> None:
    parser = parser_for(__doc__, runs=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    show("activation cycles", trio.run(run, options.runs, options.seconds), as_json=options.json)


if __name__ == "__main__":
    main()
