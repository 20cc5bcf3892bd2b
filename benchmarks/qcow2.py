"""qcow2 against raw: requests a second through virtio-blk, and through QEMU's block layer where it is installed.

The mock driver of rings.py offers bursts of requests; the images are in the page cache. Allocating writes go to a
fresh image each, in order, a cluster at a time. QEMU's figures are `qemu-img bench`'s: its block layer alone, without
a virtqueue, a doorbell and an interrupt. A ratio above 1 means that qcow2, or that we, are faster.

    python benchmarks/qcow2.py [--runs 5] [--json]
"""

from __future__ import annotations

import os
import random
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import attrs
import trio
from results import Figure, median, parser_for, show
from rings import HEADERS, STATUS, Burst

from trivmm.config import DiskConfig
from trivmm.memory.guest import GuestMemory
from trivmm.testing.driver import WRITE, Descriptor, MockDriver, activated
from trivmm.testing.images import qemu_img, why_no_qemu_img
from trivmm.virtio.block.device import F_FLUSH, BlockDevice
from trivmm.virtio.queue import F_EVENT_IDX, F_VERSION_1

DISK = 256 << 20
AT_ONCE = 16
REQUESTS = 4000
CLUSTER = 65536
BUFFERS = 0x300000  # behind the headers and status bytes of rings.py


@attrs.frozen
class Work:
    """``length`` bytes a request; ``fresh``: each of them into a cluster that nothing was ever written to."""

    name: str
    length: int
    write: bool
    fresh: bool = False

    def places(self) -> list[int]:
        if self.fresh:
            return list(range(0, REQUESTS * self.length, self.length))
        chance = random.Random(self.name)
        return [chance.randrange(DISK // self.length) * self.length for _ in range(REQUESTS)]


WORKS = (
    Work("4 KiB reads", 4096, write=False),
    Work("4 KiB writes in place", 4096, write=True),
    Work("64 KiB reads", CLUSTER, write=False),
    Work("64 KiB writes that allocate", CLUSTER, write=True, fresh=True),
)


def image(folder: Path, kind: str, work: Work) -> Path:
    path = folder / f"disk.{kind}"
    path.unlink(missing_ok=True)
    qemu_img("create", "-q", "-f", kind, path, str(REQUESTS * CLUSTER if work.fresh else DISK))
    if not work.fresh:
        command = ["qemu-io", "-f", kind, "-c", f"write -P 5 0 {DISK}", str(path)]
        subprocess.run(command, check=True, capture_output=True, timeout=600)
    return path


async def ours(path: Path, kind: str, work: Work) -> float:
    """Requests a second."""
    memory = GuestMemory([(0, 8 << 20)])
    driver = MockDriver(memory, size=64, event_idx=True)
    heads = []
    for number in range(AT_ONCE):
        data = Descriptor(BUFFERS + CLUSTER * number, work.length, 0 if work.write else WRITE)
        parts = Descriptor(HEADERS + 16 * number, 16), data, Descriptor(STATUS + number, 1, WRITE)
        heads.append(driver.chain(*parts, first=4 * number))
    burst = Burst(driver, heads)
    places = work.places()

    def run() -> float:
        took = 0.0
        for first in range(0, REQUESTS, AT_ONCE):
            for number, at in enumerate(places[first : first + AT_ONCE]):
                memory.write(HEADERS + 16 * number, struct.pack("<IIQ", int(work.write), 0, at // 512))
            took += burst.run(AT_ONCE)
            if memory.read(STATUS, AT_ONCE) != bytes(AT_ONCE):
                raise SystemExit("a request failed")
        return REQUESTS / took

    config = DiskConfig(str(path), queue_size=64, image_type=kind.capitalize())
    device = BlockDevice(config, memory, "_disk0")
    async with activated(device, driver.setup(F_VERSION_1 | F_EVENT_IDX | F_FLUSH), [driver.handle]):
        rate = await trio.to_thread.run_sync(run)
    device.close()
    driver.close()
    memory.close()
    return rate


def qemu(path: Path, kind: str, work: Work) -> float:
    """Requests a second. Its places are in order; reads and writes in place are spread by a large step."""
    step = work.length if work.fresh else 17 * CLUSTER + work.length
    command = ["bench", "-f", kind, "-t", "writeback", "-c", REQUESTS, "-d", AT_ONCE, "-s", work.length, "-S", step]
    said = qemu_img(*map(str, command), *(["-w"] if work.write else []), path).stdout
    found = re.search(r"completed in ([\d.]+) seconds", said)
    assert found is not None, said
    return REQUESTS / float(found[1])


async def measure(work: Work, runs: int) -> Sequence[Figure]:
    rates: dict[str, list[float]] = {name: [] for name in ("raw", "qcow2", "QEMU raw", "QEMU qcow2")}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for _ in range(runs):
            for kind in ("raw", "qcow2"):
                rates[kind].append(await ours(image(folder, kind, work), kind, work))
                rates[f"QEMU {kind}"].append(qemu(image(folder, kind, work), kind, work))
    middle = {name: median(each) for name, each in rates.items()}
    against_raw = median([mine / raw for mine, raw in zip(rates["qcow2"], rates["raw"], strict=True)])
    against_qemu = median([mine / its for mine, its in zip(rates["qcow2"], rates["QEMU qcow2"], strict=True)])
    theirs = median([mine / raw for mine, raw in zip(rates["QEMU qcow2"], rates["QEMU raw"], strict=True)])
    note = ", ".join(f"{name} {value / 1e3:,.1f}" for name, value in middle.items()) + " thousand/s"
    return [
        Figure(f"{work.name}: qcow2 over raw", against_raw, aim=0.8, note=f"QEMU's own ratio is {theirs:.2f}"),
        Figure(f"{work.name}: ours over QEMU's, qcow2", against_qemu, note=note),
    ]


def main() -> None:
    options = parser_for(__doc__, runs=5).parse_args()
    if why := why_no_qemu_img():
        raise SystemExit(why)
    os.sync()
    figures = [figure for work in WORKS for figure in trio.run(measure, work, options.runs)]
    show("qcow2", figures, as_json=options.json)


if __name__ == "__main__":
    main()
