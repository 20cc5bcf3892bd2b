"""What a VM boots: a kernel or firmware, each in its own way. Chosen by what the file is.

Runs at boot and at every reboot, in the caller's thread; it reads files, so an event loop calls it through a thread
that it does not abandon.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from trivmm.boot import firmware, linux, pvh
from trivmm.boot.elf import NoPvhEntry
from trivmm.boot.smbios import smbios_image
from trivmm.config import PayloadConfig, PlatformConfig
from trivmm.hypervisor.base import LongModeEntry, PvhEntry
from trivmm.memory.guest import GuestMemory

__all__ = ["check_payload", "load_payload", "wants_rom"]

logger = logging.getLogger(__name__)


def _nothing() -> None:
    pass


def wants_rom(payload: PayloadConfig) -> bool:
    """Whether it begins at the reset vector, in ROM. :raises ConfigError: a firmware file that is none."""
    return payload.firmware is not None and firmware.is_flat(payload.firmware)


def check_payload(payload: PayloadConfig, checkpoint: Callable[[], None] = _nothing) -> None:
    """:raises ConfigError: when there is nothing in the payload's file that could be booted."""
    if wants_rom(payload):
        return
    try:
        pvh.check_payload(payload, checkpoint)
    except NoPvhEntry:
        if not payload.kernel or not linux.has_own_entry("payload.kernel", payload.kernel):
            raise
        linux.check_linux(payload.kernel)


def load_payload(
    memory: GuestMemory,
    payload: PayloadConfig,
    vcpus: int = 1,
    checkpoint: Callable[[], None] = _nothing,
    platform: PlatformConfig | None = None,
) -> PvhEntry | LongModeEntry | None:
    """Everything that the guest needs to start; gives where, None being the reset vector.

    ``vcpus`` are listed in the ACPI tables, ``platform`` in SMBIOS. ``checkpoint`` is called between pieces of work and
    may raise to end them.

    :raises ConfigError: for whatever is wrong with a file or the command line; memory may then be half written."""
    if payload.firmware is not None and (payload.cmdline or payload.initramfs):
        logger.warning("firmware takes no command line and no initramfs: they are ignored")
    if payload.firmware is not None and wants_rom(payload):
        firmware.load_firmware(memory, payload.firmware)
        return None
    smbios = smbios_image(platform or PlatformConfig())
    try:
        return pvh.load_payload(memory, payload, vcpus, checkpoint, smbios)
    except NoPvhEntry:
        if not payload.kernel or not linux.has_own_entry("payload.kernel", payload.kernel):
            raise
        return linux.load_linux(memory, payload, vcpus, checkpoint, smbios)
