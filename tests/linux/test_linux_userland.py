"""What `trivmm image` makes of Debian's packages, booted on the soft CPU: network, cloud-init's seed, a script of the
user's, login prompts on both consoles, a system on a disk; and the five lines of docs/linux.md as they stand there."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from trivmm import (
    ConsoleConfig,
    DiskConfig,
    MemoryConfig,
    NetConfig,
    PayloadConfig,
    SerialConfig,
    Vm,
    VmConfig,
    open_vm,
)
from trivmm.cli import main
from trivmm.cli.cloud_init import parse_cloud_init
from trivmm.virtio.balloon.config import BalloonConfig
from trivmm.virtio.vsock.config import VsockConfig

from .link import answering

pytest.importorskip("unicorn", reason="the soft extra is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.soft]

from trivmm.hypervisor.soft import SoftHypervisor  # noqa: E402

ROOT = Path(__file__).parents[2]
LIMIT_S = 900
CMDLINE = "console=ttyS0"
SERVER, GUEST = bytes((10, 9, 8, 1)), bytes((10, 9, 8, 2))
USER_DATA = b"#cloud-config\nhostname: from-the-seed\n"

SCRIPT = """#!/bin/sh
echo "RUN address $(ip -4 -o addr show dev eth0 | awk '{print $4}')"
echo "RUN route $(ip route | grep default)"
echo "RUN server $(cat /etc/resolv.conf | tr '\\n' ' ')"
for driver in /sys/bus/virtio/drivers/*; do
    for device in $driver/virtio*; do
        [ -e $device ] && echo "RUN bound $(basename $driver)"
    done
done
seed=$(findfs LABEL=CIDATA)
mount -o ro -t iso9660 $seed /mnt
echo "RUN seed $(ls /mnt | tr '\\n' ' ')"
sed 's/^/RUN user-data /' /mnt/user-data
sed 's/^/RUN meta-data /' /mnt/meta-data
umount /mnt
dd if=/dev/zero of=$seed bs=512 count=1 2>/dev/null || echo "RUN seed is read-only"
mke2fs -F -L system /dev/vda >/dev/null 2>&1 && mount -t ext2 /dev/vda /mnt || echo "RUN problem: mke2fs"
mkdir -p /mnt/bin /mnt/sbin /mnt/dev /mnt/proc /mnt/sys /mnt/run
cp /bin/busybox /mnt/bin
cat > /mnt/sbin/init <<'END'
#!/bin/busybox sh
/bin/busybox grep -E ' (/|/proc|/dev|/sys) ' /proc/mounts | /bin/busybox sed 's/^/DISK /'
echo DISK done
/bin/busybox poweroff -f
END
chmod +x /mnt/sbin/init
umount /mnt
cat /extra/word
exit 7
"""


def make(folder: Path, *options: str) -> Path:
    """Of packages that apt fetches; skips where it can't."""
    missing = [tool for tool in ("apt-get", "apt-cache") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} to fetch a kernel and busybox")
    code = main(["image", "--fetch", "--cache", str(folder / "cache"), "--into", str(folder / "guest"), *options])
    assert code == 0
    return folder / "guest"


def checksum(raw: bytes) -> int:
    total = sum(int.from_bytes(raw[at : at + 2], "big") for at in range(0, len(raw), 2))
    return ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF


def dhcp_answer(frame: bytes) -> bytes | None:
    """To DISCOVER an OFFER, to REQUEST an ACK (RFC 2131); to anything else nothing."""
    if frame[12:14] != b"\x08\0" or frame[23] != 17 or frame[36:38] != b"\0\x43":
        return None
    asked = frame[42:]
    kind = asked[asked.index(b"\x35\x01") + 2]
    if kind not in (1, 3):
        return None
    options = b"\x35\1" + bytes((2 if kind == 1 else 5,)) + b"\x36\4" + SERVER + b"\x33\4\0\0\x0e\x10"
    options += b"\1\4\xff\xff\xff\0\3\4" + SERVER + b"\6\4" + SERVER + b"\x0f\4test\xff"
    body = b"\2\1\6\0" + asked[4:8] + bytes(4) + bytes(4) + GUEST + SERVER + bytes(4) + asked[28:44] + bytes(192)
    body += b"\x63\x82\x53\x63" + options
    udp = b"\0\x43\0\x44" + (8 + len(body)).to_bytes(2, "big") + bytes(2) + body
    head = b"\x45\0" + (20 + len(udp)).to_bytes(2, "big") + bytes(4) + b"\x40\x11\0\0" + SERVER + b"\xff" * 4
    head = head[:10] + checksum(head).to_bytes(2, "big") + head[12:]
    return frame[6:12] + b"\x52\x54\0\0\0\1\x08\0" + head + udp


async def log_in(vm: Vm) -> None:
    await vm.wait_for_console("guest login: ")
    await vm.feed_console(b"root\n")
    await vm.wait_for_console("guest:~# ")


async def test_the_userland_drives_its_devices_and_lets_people_in(tmp_path: Path) -> None:
    script, extra, user = tmp_path / "script", tmp_path / "extra", tmp_path / "user-data"
    script.write_text(SCRIPT)
    extra.mkdir()
    (extra / "word").write_text("RUN extra word\n")
    user.write_bytes(USER_DATA)
    guest = make(tmp_path, "--run", str(script), "--add", f"{extra}:/extra")
    seed = parse_cloud_init(f"user-data={user}")
    seed.write()
    disk = tmp_path / "disk.img"
    disk.touch()
    os.truncate(disk, 16 << 20)
    serial, console = tmp_path / "serial.txt", tmp_path / "console.txt"
    config = VmConfig(
        PayloadConfig(guest / "vmlinuz", CMDLINE, initramfs=guest / "initramfs"),
        memory=MemoryConfig(256 << 20),
        disks=(DiskConfig(disk), DiskConfig(**seed.disk())),
        serial=SerialConfig("File", serial),
        console=ConsoleConfig("File", console),
        virtio=[
            NetConfig(link=f"connect:{tmp_path}/net.sock"),
            BalloonConfig(),
            VsockConfig(cid=3, socket=f"{tmp_path}/vsock"),
        ],
    )
    with trio.fail_after(LIMIT_S):
        async with answering(f"{tmp_path}/net.sock", dhcp_answer), open_vm(config, hypervisor=SoftHypervisor()) as vm:
            await vm.boot()
            await log_in(vm)
            await vm.feed_console(b"grep -c . /etc/modules; mount\n")
            await vm.feed_console(b"root\n", "console")
            await vm.wait_for_console("root login on 'hvc0'")
            await vm.feed_console(b"echo FROM $(tty) > /dev/ttyS0\n", "console")
            await vm.wait_for_console("FROM /dev/hvc0")
            await vm.power_button()
            assert (await vm.wait()).kind == "poweroff"
        said = serial.read_text(errors="replace").replace("\r", "")
        told = re.findall(r"^RUN (.*)", said, re.MULTILINE)
        meta = next(line for line in told if line.startswith("meta-data"))
        bound = sorted(line.split()[1] for line in told if line.startswith("bound"))
        assert bound == [
            *("virtio_balloon", "virtio_blk", "virtio_blk", "virtio_console", "virtio_net", "virtio_rng"),
            "vmw_vsock_virtio_transport",
        ]
        assert re.fullmatch(r"meta-data instance-id: iid-[0-9a-f]{16}", meta)
        assert [line for line in told if not line.startswith("bound") and line != meta] == [
            "address 10.9.8.2/24",
            "route default via 10.9.8.1 dev eth0 ",
            "server search test nameserver 10.9.8.1 ",
            "seed meta-data user-data ",
            *(f"user-data {line}" for line in USER_DATA.decode().splitlines()),
            "seed is read-only",
            "extra word",
        ]
        assert "run: exit code 7" in said
        assert "could not be loaded" not in said
        assert "guest login: " in console.read_text()

        again = VmConfig(
            PayloadConfig(guest / "vmlinuz", f"{CMDLINE} root=LABEL=system rw", initramfs=guest / "initramfs"),
            memory=MemoryConfig(256 << 20),
            disks=(DiskConfig(disk),),
        )
        async with open_vm(again, hypervisor=SoftHypervisor()) as vm:
            await vm.boot()
            await vm.wait_for_console("DISK done")
            said = vm.console_tail.decode(errors="replace")
            assert (await vm.wait()).kind == "poweroff"
        assert re.search(r"^DISK /dev/vda / ext[24] rw", said, re.MULTILINE)
        assert {"/proc", "/dev", "/sys"} <= set(re.findall(r"^DISK \S+ (\S+)", said, re.MULTILINE))


# --- five lines -----------------------------------------------------------------------------------------------------


def five_lines(document: Path) -> list[str]:
    text = document.read_text()
    return text.split("<!-- five-lines -->\n```sh\n")[1].split("```\n<!-- /five-lines -->")[0].splitlines()


def follow(command: str, folder: Path, environment: dict[str, str]) -> str:
    """On a terminal: waits for the login prompt, logs in, looks around, powers off. Gives what it showed."""
    controller, terminal = pty.openpty()
    try:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=folder,
            env=environment,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
        )
        os.close(terminal)
        try:
            shown = ""
            ends = time.monotonic() + LIMIT_S
            for prompt, answer in (
                ("guest login: ", "root\n"),
                ("guest:~# ", "echo data on $(findfs LABEL=CIDATA), $(cat /sys/block/vda/size)\n"),
                ("data on /dev/vdb, 2097152", "poweroff\n"),
            ):
                seen = len(shown)
                while prompt not in shown[seen:]:
                    ready, _, _ = select.select([controller], [], [], max(0.0, ends - time.monotonic()))
                    assert ready, f"no {prompt!r}: {shown[-2000:]}"
                    shown += os.read(controller, 1 << 16).decode(errors="replace")
                os.write(controller, answer.encode())
            while process.poll() is None and select.select([controller], [], [], max(0.0, ends - time.monotonic()))[0]:
                try:
                    shown += os.read(controller, 1 << 16).decode(errors="replace")
                except OSError:  # the last one has left the terminal
                    break
            assert process.wait(timeout=60) == 0, shown[-2000:]
            return shown
        finally:
            process.kill()
            process.wait()
    finally:
        os.close(controller)


def test_five_lines_lead_to_a_login_prompt(tmp_path: Path) -> None:
    """As a stranger types them in a checkout; on the emulated CPU where KVM has no hardware behind it."""
    if shutil.which("apt-get") is None:
        pytest.skip("needs apt-get to fetch a kernel and busybox")
    lines = five_lines(ROOT / "docs/linux.md")
    assert lines == five_lines(ROOT / "README.md")
    assert len(lines) == 5
    checkout = tmp_path / "checkout"
    left_out = shutil.ignore_patterns(".*", "*.so", "*.o", "*.elf", "build", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, checkout, ignore=left_out)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "TERM": "vt100"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # whose python3 has its headers
    for line in lines[:-1]:
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, f"{line}: {done.stderr}"
    cpu = Path("/proc/cpuinfo").read_text()
    fast = os.access("/dev/kvm", os.R_OK | os.W_OK) and re.search(r"\b(vmx|svm)\b", cpu) is not None
    shown = follow(lines[-1] if fast else f"{lines[-1]} --hypervisor soft", checkout, environment)
    assert "Log in as root" in shown
