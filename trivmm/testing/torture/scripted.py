"""A VMM process on scripted vCPUs whose guest checks its memory: ``python -m trivmm.testing.torture.scripted``.

Takes the options of ``trivmm run``. Without /dev/kvm, and next to no load; what travels is real. The guest says what
the probe guest says, in its words (``trivmm.guest``). Each page holds its number and its generation, at both ends;
what the generation must be travels with the vCPU's registers and not with the pages.
"""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Generator
from typing import Final

from trivmm.platform.serial import COM1
from trivmm.testing.scripted import Compute, IoOut, Script, ScriptedHypervisor, ScriptedVcpu, Step

__all__ = ["checking_guest", "main"]

FIRST_PAGE, PAGES = 1024, 512  # 2 MiB from 4 MiB on
PAGE_BYTES: Final = 4096
TICK_S: Final = 0.01
DIRTIED, CHECKED = 5, 32  # pages a tick
REPORT_TICKS: Final = 5
STAMP: Final = struct.Struct("<QQ")
ENDS: Final = (0, PAGE_BYTES - STAMP.size)


def checking_guest() -> Script:
    def script(cpu: ScriptedVcpu) -> Generator[Step, bytes | None, None]:
        own = cpu.registers
        if not own:
            own |= {"began": time.monotonic(), "made": [0] * PAGES, "at": 0, "looked": 0, "ticks": 0}
            own |= {"dirtied": 0, "checked": 0, "errors": 0}
            for page in range(PAGES):
                _write(cpu, page, 1)
            yield from _print(f"PROBE ready cpus=1 pages={PAGES}")
        while True:
            yield Compute(TICK_S)
            # No step in between, so nothing is saved in the middle of it.
            for _ in range(DIRTIED):
                own["at"] = (own["at"] + 1) % PAGES
                _write(cpu, own["at"], own["made"][own["at"]] + 1)
                own["dirtied"] += 1
            for _ in range(CHECKED):
                own["looked"] = (own["looked"] + 1) % PAGES
                _check(cpu, own["looked"])
            own["ticks"] += 1
            if own["ticks"] % REPORT_TICKS == 0:
                t_ms = int((time.monotonic() - own["began"]) * 1000)
                counted = " ".join(f"{name}={own[name]}" for name in ("dirtied", "checked", "errors"))
                yield from _print(f"PROBE t={t_ms} beats={own['ticks']} pages={PAGES} {counted}")

    return script


def _write(cpu: ScriptedVcpu, page: int, generation: int) -> None:
    for end in ENDS:
        cpu.vm.store((FIRST_PAGE + page) * PAGE_BYTES + end, STAMP.pack(page, generation))
    cpu.registers["made"][page] = generation


def _check(cpu: ScriptedVcpu, page: int) -> None:
    own = cpu.registers
    own["checked"] += 1
    want = own["made"][page]
    if any(
        STAMP.unpack(cpu.vm.fetch((FIRST_PAGE + page) * PAGE_BYTES + end, STAMP.size)) != (page, want) for end in ENDS
    ):
        own["errors"] += 1
        _write(cpu, page, want)  # each is counted once


def _print(line: str) -> Generator[Step, bytes | None, None]:
    for byte in (line + "\r\n").encode():
        yield IoOut(COM1[0], 1, bytes([byte]))


def main(arguments: list[str]) -> int:
    from trivmm.cli.run import parse_run, serve

    return serve(parse_run(arguments), hypervisor=ScriptedHypervisor(checking_guest(), needs_payload=False))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
