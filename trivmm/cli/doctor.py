"""``trivmm doctor``: what this host can do, with remedies for what it can't: a table for people, JSON for machines."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from trivmm.cli.parser import Parser
from trivmm.cli.table import table
from trivmm.errors import HypervisorError
from trivmm.hypervisor.select import install_soft

__all__ = ["doctor"]

NEEDED_FDS: Final = 256  # a VM takes about 30, an API connection one
USEFUL_MEMORY: Final = 1 << 30

Row = tuple[str, bool, str, str]
"""(what, is it there, why it is wanted, remedy or empty)."""


def doctor(arguments: Sequence[str]) -> int:
    """Gives 0 when guests can run here (under KVM or on the soft CPU), else 1."""
    parser = Parser("trivmm doctor", "What this host can do for guests, and remedies.")
    parser.add_argument("--json", action="store_true", help="JSON, for machines")
    given = parser.parse(arguments)
    kvm, soft = _kvm_rows(), _soft_row()
    live = [_live_row()] if soft[1] else []
    kvm_works = all(present or remedy == "optional" for _, present, _, remedy in kvm)
    rows = [*kvm, soft, *live, *_host_rows(), *_network_rows()]
    runs = kvm_works or soft[1]
    verdict = "guests run under KVM" if kvm_works else "guests run on the soft CPU" if runs else "guests can't run here"
    if given.json:
        keys = ("what", "present", "why", "remedy")
        report = {
            "runs": runs,
            "kvm": kvm_works,
            "soft": soft[1],
            "advice": _slow_lines(kvm_works),
            "rows": [dict(zip(keys, row, strict=True)) for row in rows],
        }
        print(json.dumps(report, indent=2))
    else:
        shown = [[name, "yes" if there else "no", why, remedy] for name, there, why, remedy in rows]
        print(table(["what", "there", "what for", "remedy"], shown))
        for line in _slow_lines(kvm_works):
            print(line)
        print(verdict)
    return 0 if runs else 1


def _kvm_rows() -> list[Row]:
    try:
        from trivmm.hypervisor.kvm.report import host_report
    except ImportError as error:
        return [("trivmm._native", False, "everything", f"install trivmm again ({error})")]
    return list(host_report())


def _slow_lines(kvm_works: bool) -> list[str]:
    """Where the guest's ring 0 is emulated: what that means, and how to boot Linux all the same."""
    if not kvm_works:
        return []
    from trivmm.hypervisor.kvm.ring0 import SLOW_HOST_OPTIONS, look_at_ring0

    try:
        ring0 = look_at_ring0()
    except HypervisorError as error:
        return [f"what the guest's ring 0 runs on is not known: {error}"]
    if not ring0.emulated:
        return []
    lost = ", and SYSCALLs that it leaves in ring 3" if ring0.syscall_lost else ""
    return [
        "this KVM emulates the guest's ring 0, at 2-3 million instructions a second: Linux boots in minutes",
        f"instructions that it lacks{lost} are finished by the VMM (vm.counters: assist_*), AVX-512 and gathers not",
        f"a Linux kernel's --cmdline here: {' '.join(option for option, _ in SLOW_HOST_OPTIONS)}",
    ]


def _soft_row() -> Row:
    there = importlib.util.find_spec("unicorn") is not None
    return (
        "unicorn (soft CPU)",
        there,
        "running guests without /dev/kvm",
        "" if there else install_soft(),
    )


def _live_row() -> Row:
    from trivmm.hypervisor.soft.written import why_no_dirty_log

    problem = why_no_dirty_log()
    return (
        "soft CPU's dirty log" if problem is None else f"soft CPU's dirty log ({problem})",
        problem is None,
        "live migration on the soft CPU (else copied while paused)",
        "" if problem is None else "optional: Linux 6.7 or newer, userfaultfd allowed",
    )


def _host_rows() -> list[Row]:
    available = _meminfo().get("MemAvailable", 0)
    enough = available >= USEFUL_MEMORY
    rows: list[Row] = [
        (
            f"memory: {available >> 20} MiB available",
            enough,
            "guest RAM",
            "" if enough else "free some, or give guests less",
        )
    ]
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    rows.append(
        (
            f"open files: {files}",
            files >= NEEDED_FDS,
            "devices, sockets",
            "" if files >= NEEDED_FDS else "ulimit -n 1024",
        )
    )
    cpus = len(os.sched_getaffinity(0))
    rows.append((f"CPUs: {cpus}", cpus > 1, "a vCPU and its devices side by side", "" if cpus > 1 else "optional"))
    shared = shutil.disk_usage("/tmp").free
    rows.append((f"/tmp: {shared >> 20} MiB free", shared > 64 << 20, "the demo's disk image", ""))
    return rows


def _network_rows() -> list[Row]:
    """What ``--net`` can be tied to here; a socket, always."""
    from trivmm.virtio.net.passt import PROGRAM
    from trivmm.virtio.net.tap import TUN, why_no_tap

    problem = why_no_tap()
    remedy = "" if problem is None else "optional: ip tuntap add NAME mode tap user USER, as root; or --net link=passt"
    if not os.path.exists(TUN):
        remedy = "optional: modprobe tun, or --net link=passt"
    tap: Row = ("taps" if problem is None else f"taps ({problem})", problem is None, "--net tap=, made here", remedy)
    passt = shutil.which(PROGRAM)
    why = "--net alone: the host's network, without root"
    return [tap, ("passt", passt is not None, why, "" if passt else "optional: apt-get install passt")]


def _meminfo() -> dict[str, int]:
    """Bytes by name."""
    found: dict[str, int] = {}
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return found
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            found[name] = int(words[0]) << 10
    return found
