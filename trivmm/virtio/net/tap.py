"""Taps: opened by name, made where there is none, or taken as open descriptors; one descriptor a pair of queues.

A tap that is made here is gone with its last descriptor. One that shall outlive a VM, in a bridge say, is made
before (``ip tuntap add NAME mode tap``), with ``multi_queue`` where the VM has more than one pair of queues.
Everything here may wait for the kernel's network lock, so nothing of it runs in the trio thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from typing import Final

from trivmm.errors import ConfigError, reason_of
from trivmm.virtio.net.config import NetConfig, mac_bytes

__all__ = ["HEADER", "TUN", "dup_taps", "open_taps", "why_no_tap"]

TUN: Final = "/dev/net/tun"
HEADER: Final = 12  # virtio-net's header with num_buffers, before each frame
NEW: Final = "vmtap%d"  # the kernel counts; Cloud Hypervisor's name

# linux/if_tun.h, linux/if.h, linux/sockios.h
TUNSETIFF, TUNGETIFF, TUNSETVNETHDRSZ = 0x400454CA, 0x800454D2, 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE = 0x2, 0x1000, 0x4000, 0x100
IFF_UP = 0x1
PLAIN: Final = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR  # frames with virtio-net headers, and nothing else
SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8913, 0x8914
SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFMTU, SIOCSIFHWADDR = 0x8916, 0x891C, 0x8922, 0x8924
ARPHRD_ETHER = 1
IFREQ: Final = struct.Struct("16s24s")


def open_taps(config: NetConfig) -> list[int]:
    """Nonblocking descriptors of the tap that ``config`` names, up, with its addresses; or of a new one.

    :raises ConfigError:"""
    fds: list[int] = []
    name = config.tap or NEW
    try:
        for _ in range(config.pairs):
            fd, name = _attach(name, config.pairs > 1)
            fds.append(fd)
        _set_up(name, config)
    except OSError as error:  # no socket to ask with
        _close(fds)
        raise _refused(name, error) from error
    except BaseException:
        _close(fds)
        raise
    return fds


def why_no_tap() -> str | None:
    """Why this process can't make a tap, by making one that is gone at once; None: it can."""
    try:
        fd, _ = _attach(NEW, False)
    except ConfigError as error:
        return error.problem
    os.close(fd)
    return None


def dup_taps(fds: Sequence[int]) -> list[int]:
    """Copies of open taps, nonblocking. :raises ConfigError: when one is none, or has no virtio-net headers."""
    made: list[int] = []
    remedy = "pass an open tap, made with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
    try:
        for fd in fds:
            try:
                copy = os.dup(fd)
            except OSError as error:
                raise ConfigError("net.fds", fd, f"not an open descriptor ({error.strerror})", remedy) from error
            made.append(copy)
            try:
                flags = struct.unpack_from("<H", fcntl.ioctl(copy, TUNGETIFF, bytes(IFREQ.size)), 16)[0]
                if flags & PLAIN != PLAIN:
                    problem = "not a tap with virtio-net headers and nothing before them"
                    raise ConfigError("net.fds", fd, problem, remedy)
                fcntl.ioctl(copy, TUNSETVNETHDRSZ, struct.pack("<i", HEADER))
            except OSError as error:
                raise ConfigError("net.fds", fd, f"not a tap ({error.strerror})", remedy) from error
            os.set_blocking(copy, False)  # its owner's too: they share it
    except BaseException:
        _close(made)
        raise
    return made


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _attach(name: str, multi_queue: bool) -> tuple[int, str]:
    """(descriptor, the interface's name) of one queue."""
    try:
        fd = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _refused(name, error) from error
    try:
        flags = PLAIN | (IFF_MULTI_QUEUE if multi_queue else 0)
        answer = fcntl.ioctl(fd, TUNSETIFF, IFREQ.pack(os.fsencode(name), struct.pack("<H", flags)))
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("<i", HEADER))
    except OSError as error:
        os.close(fd)
        raise _refused(name, error) from error
    return fd, os.fsdecode(IFREQ.unpack(answer)[0].rstrip(b"\0"))


def _refused(name: str, error: OSError) -> ConfigError:
    remedy = "look at `trivmm doctor`, or give link=passt"
    shown = "" if name == NEW else name
    if error.errno in (errno.EPERM, errno.EACCES):
        own = name if name != NEW else "NAME"
        remedy = f"make it for this user (ip tuntap add {own} mode tap user USER), or give link=passt"
    elif error.errno == errno.EBUSY:
        remedy = "stop who has it, or give another one"
    elif error.errno == errno.EINVAL:
        remedy = "an interface of that name is no tap, or was made with (without) multi_queue, unlike num_queues"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = "look at the host's limits (ulimit -n)"
    elif error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        remedy = "load the kernel's tun module, or give link=passt"
    return ConfigError("net.tap", shown, f"cannot open it ({reason_of(error)})", remedy)


def _set_up(name: str, config: NetConfig) -> None:
    """Addresses as far as they were asked for, and up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:

        def ask(number: int, field: str, value: object, data: bytes) -> bytes:
            try:
                return fcntl.ioctl(sock, number, IFREQ.pack(os.fsencode(name), data))
            except OSError as error:
                remedy = f"run as root, or leave it out and set it (ip link, ip addr) on {name} before"
                raise ConfigError(f"net.{field}", value, f"{name} refuses it ({reason_of(error)})", remedy) from error

        if config.host_mac is not None:
            data = struct.pack("<H", ARPHRD_ETHER) + mac_bytes(config.host_mac.lower())
            ask(SIOCSIFHWADDR, "host_mac", config.host_mac, data)
        if config.mtu is not None and config.mtu != _mtu(name):
            ask(SIOCSIFMTU, "mtu", config.mtu, struct.pack("<i", config.mtu))
        if config.ip is not None and config.mask is not None:
            for number, field, value in ((SIOCSIFADDR, "ip", config.ip), (SIOCSIFNETMASK, "mask", config.mask)):
                ask(number, field, value, struct.pack("<HH4s", socket.AF_INET, 0, socket.inet_aton(value)))
        flags = struct.unpack_from("<H", ask(SIOCGIFFLAGS, "tap", name, b""), 16)[0]
        if not flags & IFF_UP:
            ask(SIOCSIFFLAGS, "tap", name, struct.pack("<H", flags | IFF_UP))


def _mtu(name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError), open(f"/sys/class/net/{name}/mtu", encoding="ascii") as file:
        return int(file.read())
    return None
