"""Which format an image has, and opening it as that.

Raw and qcow2 images can be opened, and none is taken for raw by mistake: where the configuration says ``Unknown``, one
whose first bytes (for a fixed VHD: last sector) are another format's is refused by name. The guess is made once, before
the guest first runs, and its result stays in the VM's configuration: what a guest writes into its own disk never shuts
it out at a reboot or after a migration. Cloud Hypervisor and QEMU refuse a guest's writes to sector 0 of an image that
they guessed, since a later guess could open a format that the guest forged, and with it another file of the host. Here
a guess opens no other file (:mod:`trivmm.virtio.block.chain`), so the guest may write what it likes.
"""

from __future__ import annotations

import os
from typing import Final

from trivmm.config import DiskConfig
from trivmm.errors import ConfigError, NotSupported
from trivmm.virtio.block.file import SECTOR, ImageFile
from trivmm.virtio.block.image import Image
from trivmm.virtio.block.qcow2 import Qcow2Image
from trivmm.virtio.block.raw import RawImage

__all__ = ["foreign_format", "open_image"]

QCOW: Final = b"QFI\xfb"  # docs/interop/qcow2.rst; the version is a big-endian integer after it
VHD: Final = b"conectix"  # Virtual Hard Disk Image Format Specification: "Hard Disk Footer Format"
SIGNATURES: Final = (
    (0, b"vhdxfile", "VHDX"),  # MS-VHDX section 2.2.1
    (0, VHD, "VHD"),  # a dynamic one has a copy of its footer here
    (0, b"KDMV", "VMDK"),  # Virtual Disk Format 5.0: sparse extents, and text descriptors of any kind
    (0, b"COWD", "VMDK"),
    (0, b"# Disk DescriptorFile", "VMDK"),
    (0, b"QED\0", "QED"),
    (0x40, b"\x7f\x10\xda\xbe", "VDI"),
    (0, b"WithoutFreeSpace", "Parallels"),
    (0, b"WithouFreSpacExt", "Parallels"),
)


def foreign_format(first: bytes, last: bytes) -> str | None:
    """Whose format an image is that is not raw, or None. ``first`` and ``last``: its sectors, or less of a short file.

    What a guest itself keeps on a disk (partition tables, file systems, LUKS, archives) is raw."""
    if first.startswith(QCOW):
        return "qcow" if first[4:8] == b"\0\0\0\x01" else "qcow2"
    for offset, magic, name in SIGNATURES:
        if first[offset:].startswith(magic):
            return name
    # A fixed VHD is raw data and a footer, of 512 bytes, or of 511 where an old tool wrote it.
    return "VHD" if last.startswith(VHD) or last[1:].startswith(VHD) else None


def open_image(config: DiskConfig, *, lock: bool) -> Image:
    """The image of a disk, as its ``image_type`` says, locked or not.

    :raises ConfigError: naming ``disks.path`` and what is wrong with it. :raises NotSupported: its format."""
    file = ImageFile(config.path, readonly=config.readonly, lock=lock, direct=config.direct)
    try:
        found = None if config.image_type == "Raw" else _look(file)
        if config.image_type == "Qcow2" and found != "qcow2":
            what = "a raw one" if found is None else f"a {found} image"
            raise ConfigError("disks.path", file.path, f"no qcow2 image but {what}", "give the image_type that it has")
        if found == "qcow2":
            if config.direct:
                remedy = "leave it out, or convert the image (qemu-img convert -O raw OLD NEW)"
                raise NotSupported("disks.direct", True, "not for qcow2 images yet", remedy)
            return Qcow2Image(file, config, lock=lock)
        if found is not None:
            remedy = (
                "convert it (qemu-img convert -O qcow2 OLD NEW), or give image_type=raw if its very bytes are meant"
            )
            problem = f"a {found} image; only raw and qcow2 ones are supported yet"
            raise NotSupported("disks.path", file.path, problem, remedy)
        return RawImage(file)
    except BaseException:
        file.close()
        raise


def _look(file: ImageFile) -> str | None:
    try:
        first = os.pread(file.fd, SECTOR, 0)
        last = os.pread(file.fd, SECTOR, max(0, file.size - SECTOR))
    except OSError as error:
        raise ConfigError(
            "disks.path", file.path, f"cannot read it ({error.strerror})", "give a readable image"
        ) from error
    return foreign_format(first, last)
