"""The probe guest: a freestanding PVH guest that checks its own memory, disk and devices for ever.

It is built when TriVMM is installed, runs under KVM and on the soft CPU (and under any VMM with PVH and modern virtio
over PCI), and reports in lines on COM1. Its words on the command line:

==============  ====================================================================================================
``cpus=N``      vCPUs to start by INIT-SIPI, 1 to 8; memory work is shared, CPU 1 (or 0) drives the devices
``mem=MiB``     memory to test; all of the low RAM above 16 MiB when left out
``rate=N``      pages a second to dirty
``cycle=a,b``   drivers to run: ``rng``, ``blk`` reset, activate, use and verify their device without rest
``rng_id=N``    the PCI device id of what it takes for its rng
``window=1``    every other cycle through the PCI config-access capability
``race=1``      CPU 0 resets the rng while CPU 1 activates it, every 20 ms; ``race=2``: without a pause
``event_idx=1`` ``indirect=1``   negotiate these ring features
``keys=1``      show what is typed on COM1, in a line ``TYPED …`` of its own
``hostile=N``   a driver that lies to the rng in every way, from the seed N; the other devices are to notice nothing
``echo=1``      echo on the virtio console what is typed there
``vsock=1``       serve vsock ports 1 (echo), 2 (checks a pattern), 3 (sends it); ``vsock_out=N`` connects to the host's
``balloon=MiB`` give pages away from so much RAM behind that of ``mem=``; ``balloon_report=1`` report free ones too
``pmem=N``      store in, and check, N pages of the persistent memory, and flush it
``watchdog=N``  ping the watchdog N times, and then no more
``pvpanic=N``   say N to pvpanic, again and again
``sectors=N``   sectors to use of each disk, at most 4096; ``disks=N`` disks to cycle, 1 to 8, by ``blk_queues=N`` of
                their queues, 1 to 4; ``blk_clear=1``: discard and zero blocks, too
``cycle=load``  random reads of ``load_kib=N`` (4, to 64), or with ``load_write=1`` writes, of the first disk,
                ``load_depth=N`` of them at once (16): for benchmarks; a block of 4 KiB begins with its number
``net=1``       drive the network interface; ``net_mib=N`` to send the other end, which is one like this, in frames of
                ``net_frame=bytes`` (1400), received into buffers of ``net_buffer=bytes`` (65536). With ``net_ip=N`` it
                answers ARP and pings there; with ``net_gateway=N`` and ``net_port=N`` it asks a UDP server that echoes
``beat=ms``     heartbeat period; ``report=ms`` report period
``once=N``      power off after N activations; ``reboot=N`` reboots by the i8042
``corrupt=1``   self-test: spoil two pages, which must be reported as LOST and STALE
``plug=1``      serve PCI hotplug: use disks that come, eject those that are to go; ``plug=2``: never eject;
                ``plug=3``: eject in the middle of whatever goes on
``tsc_khz=N``   the TSC's frequency
==============  ====================================================================================================

Typing ``q`` on the console powers it off.

A driver of one more kind of device is a file here and a line in ``drivers.c`` (``driver.h`` says what it is); what it
reports is in :attr:`ProbeReport.counts`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import attrs

__all__ = ["ProbeReport", "parse_report", "probe_cmdline", "probe_path"]

# Numbers of at most 20 digits, the widest of 64 bits: what a guest prints never makes int() raise.
READY: Final = re.compile(r"^PROBE ready cpus=([0-9]{1,20}) pages=([0-9]{1,20})$", re.MULTILINE)
REPORT: Final = re.compile(r"^PROBE (t=[0-9]{1,20}(?: \w+=[0-9]{1,20})+)$", re.MULTILINE)
PROBLEM: Final = re.compile(r"^PROBE (?!t=|ready|off|reboot|absent)(.+)$", re.MULTILINE)

NOT_REPORTED: Final = {"ready", "cpus", "reports", "problems", "counts"}


@attrs.frozen
class ProbeReport:
    """What the guest last said. ``errors`` counts pages, sectors and entropy lost or stale, by the guest's own
    checks; ``stuck`` requests or resets that did not end in 30 s; ``gap_ms`` the longest time it did not run;
    ``counts`` what drivers report of their own."""

    ready: bool = False
    cpus: int = 0
    t: int = 0
    beats: int = 0
    gap_ms: int = 0
    pages: int = 0
    dirtied: int = 0
    checked: int = 0
    errors: int = 0
    rng_act: int = 0
    blk_act: int = 0
    rng_ios: int = 0
    blk_ios: int = 0
    stuck: int = 0
    needs_reset: int = 0
    raced: int = 0
    echoed: int = 0
    cols: int = 0
    rows: int = 0
    reports: int = 0
    problems: tuple[str, ...] = ()
    counts: Mapping[str, int] = attrs.field(factory=dict)


def parse_report(text: str) -> ProbeReport:
    """From the guest's serial output; an unfinished last line is left for the next time."""
    text = text[: text.rfind("\n") + 1].replace("\r", "")
    ready = list(READY.finditer(text))
    lines = REPORT.findall(text)
    values: dict[str, int] = {}
    counts: dict[str, int] = {}
    if lines:
        known = {field.name for field in attrs.fields(ProbeReport)} - NOT_REPORTED
        for name, value in (word.split("=", 1) for word in lines[-1].split()):
            (values if name in known else counts)[name] = int(value)
    return ProbeReport(
        **values,
        ready=bool(ready),
        cpus=int(ready[-1][1]) if ready else 0,
        reports=len(lines),
        problems=tuple(PROBLEM.findall(text)),
        counts=counts,
    )


def probe_path() -> Path:
    """The ELF. :raises FileNotFoundError: in a source tree where it was not built (``python ffi/build_guest.py``)."""
    path = Path(__file__).with_name("probe.elf")
    if not path.exists():
        raise FileNotFoundError(f"{path}: not built; install the package, or run python ffi/build_guest.py")
    return path


def probe_cmdline(**options: object) -> str:
    """The guest's command line: ``probe_cmdline(cpus=2, rate=500, cycle="rng,blk")``. None leaves a word out."""
    options.setdefault("tsc_khz", _tsc_khz())
    return " ".join(f"{name}={value}" for name, value in options.items() if value is not None)


def _tsc_khz() -> int:
    """A good guess: the guest tells time by the TSC, and only to pace itself."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("cpu MHz"):
                    return int(float(line.split(":")[1]) * 1000)
    except (OSError, ValueError):
        pass
    return 2_000_000
