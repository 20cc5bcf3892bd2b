"""Start to the guest's first serial byte, and the VMM's memory without guest RAM.

Once as a whole process (``python -m trivmm --kernel …``, interpreter and imports included) and once inside a running
program (``Vm.boot``). The probe guest prints its first byte after its tables and its own RAM are set up in ring 0. The
memory is that of the process with a running guest of ``--mib`` MiB from its smaps: private pages, and proportional
shares, of everything that is not guest RAM.

    python benchmarks/start.py [--runs 7] [--mib 128] [--json]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import trio
from results import Figure, median, parser_for, show

from trivmm import MemoryConfig, PayloadConfig, SerialConfig, VmConfig, open_vm
from trivmm.guest import probe_cmdline, probe_path

CMDLINE = probe_cmdline(cpus=1, mem=1)
PATIENCE_S = 30


def memory_of(pid: int) -> dict[str, float]:
    """MiB: resident and proportional, each without guest RAM, and the guest's resident RAM."""
    sums = {"rss": 0, "pss": 0, "guest": 0}
    guest = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            guest = "trivmm-ram" in line
        elif line.startswith(("Rss:", "Pss:")):
            value, name = int(line.split()[1]), line[:3].lower()
            if not guest:
                sums[name] += value
            elif name == "rss":
                sums["guest"] += value
    return {name: value / 1024 for name, value in sums.items()}


def whole_process(mib: int) -> tuple[float, dict[str, float]]:
    command = [sys.executable, "-P", "-m", "trivmm", "--kernel", str(probe_path()), "--cmdline", CMDLINE]
    command += ["--memory", f"size={mib}M", "--cpus", "boot=1", "--serial", "tty", "--console", "off"]
    began = time.perf_counter()
    running = subprocess.Popen([*command, "--hypervisor", "kvm"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        assert running.stdout is not None
        if not os.read(running.stdout.fileno(), 1):
            raise SystemExit("the process ended before its guest said a word")
        took = time.perf_counter() - began
        time.sleep(0.5)
        return took * 1000, memory_of(running.pid)
    finally:
        running.kill()
        running.wait(PATIENCE_S)
        running.stdout.close() if running.stdout else None


async def in_program(mib: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        payload = PayloadConfig(str(probe_path()), CMDLINE)
        serial = SerialConfig("File", f"{folder}/serial.txt")
        async with open_vm(VmConfig(payload, memory=MemoryConfig(mib << 20), serial=serial)) as vm:
            began = time.perf_counter()
            await vm.boot()
            with trio.fail_after(PATIENCE_S):
                while not vm.console_tail:
                    await vm.console_output()
            return (time.perf_counter() - began) * 1000


def main() -> None:
    parser = parser_for(__doc__, runs=7)
    parser.add_argument("--mib", type=int, default=128)
    options = parser.parse_args()
    processes, boots = [], []
    for _ in range(options.runs):
        processes.append(whole_process(options.mib))
        boots.append(trio.run(in_program, options.mib))
    memory = {name: median([each[1][name] for each in processes]) for name in ("rss", "pss", "guest")}
    figures = [
        Figure("process start to first serial byte", median([each[0] for each in processes]), "ms"),
        Figure("Vm.boot to first serial byte", median(boots), "ms"),
        Figure("VMM memory, resident without guest RAM", memory["rss"], "MiB"),
        Figure("VMM memory, proportional share", memory["pss"], "MiB", note="shared libraries divided by their users"),
        Figure("guest RAM resident", memory["guest"], "MiB", note=f"of {options.mib}"),
    ]
    show("start and memory", figures, as_json=options.json)


if __name__ == "__main__":
    main()
