"""Boot code that was made for a PC, on the soft CPU: ISOLINUX and iPXE through SeaBIOS, Memtest86+ by its own entry.

Fetched by apt at each run; nothing of them is in the repository.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from trivmm import DiskConfig, MemoryConfig, NetConfig, PayloadConfig, SerialConfig, VmConfig, open_vm

from .life import answer_to
from .link import answering
from .memtest import memtest_starts

pytest.importorskip("unicorn", reason="the soft extra is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.soft]

from trivmm.hypervisor.soft import SoftHypervisor  # noqa: E402

LIMIT_S = 300
DHCP = b"\0\x44\0\x43"  # a client's port, and the server's
SEABIOS = Path("/usr/share/seabios/bios-256k.bin")


@pytest.mark.skipif(not SEABIOS.exists(), reason=f"needs {SEABIOS} (apt-get install seabios)")
async def test_ipxe_boots_from_its_iso_through_seabios(package: Callable[[str], Path], tmp_path: Path) -> None:
    """And its own virtio-net driver asks for an address."""
    image = (package("ipxe") / "usr/lib/ipxe/ipxe.iso").read_bytes()
    (tmp_path / "ipxe.img").write_bytes(image + bytes(-len(image) % (1 << 20)))
    config = VmConfig(
        PayloadConfig(firmware=str(SEABIOS)),
        memory=MemoryConfig(256 << 20),
        disks=(DiskConfig(str(tmp_path / "ipxe.img"), readonly=True),),
        serial=SerialConfig("Null"),
        virtio=[NetConfig(mac="52:54:00:00:00:02", link=f"connect:{tmp_path}/net.sock")],
    )
    asked = trio.Event()

    def watched(frame: bytes) -> bytes | None:
        if frame[6:14] == bytes.fromhex("525400000002") + b"\x08\0" and frame[23] == 17 and frame[34:38] == DHCP:
            asked.set()
        return answer_to(frame)

    with trio.fail_after(LIMIT_S):
        async with answering(f"{tmp_path}/net.sock", watched), open_vm(config, hypervisor=SoftHypervisor()) as vm:
            await vm.boot()
            for said in ("Booting from Hard Disk", "ISOLINUX", "iPXE initialising devices"):
                await vm.wait_for_console(said)
            await vm.wait_for_console("net0: 52:54:00:00:00:02 using virtio-net")
            await asked.wait()


async def test_memtest86_starts_at_its_64_bit_entry(package: Callable[[str], Path]) -> None:
    with trio.fail_after(LIMIT_S):
        await memtest_starts(package("memtest86+"), SoftHypervisor())
