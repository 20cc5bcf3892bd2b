"""An argument parser whose mistakes are one line with a suggestion, and the parser of ``trivmm run``.

Light: argparse and our tables, no trio.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import trivmm
from trivmm.control.contract import CONTRACT_VERSION
from trivmm.errors import one_line
from trivmm.virtio.kinds import KINDS

__all__ = ["REFUSED", "USAGE", "Parser", "UsageError", "run_parser"]

USAGE: Final = """\
trivmm: a virtual machine monitor on trio

  trivmm [run] --kernel VMLINUX …    run a guest (trivmm --help lists the options)
  trivmm --api-socket path=FILE      serve the API only
  trivmm remote --api-socket FILE …  drive a running VMM (trivmm remote --help)
  trivmm doctor                      what this host can do, and remedies
  trivmm demo                        a guest moves live between two processes
  trivmm fake --api-socket path=…    the API without a guest, failing on cue (trivmm fake --help)
  trivmm image --fetch --into FOLDER a kernel and an initramfs to boot (trivmm image --help)"""

# Cloud Hypervisor's options that do not exist here, each with what to do instead.
REFUSED: Final = {
    "--dbus-object-path": "use --api-socket",
    "--dbus-service-name": "use --api-socket",
    "--dbus-system-bus": "use --api-socket",
    "--debug-console": "use --serial",
    "--device": "leave it out: VFIO is not there yet",
    "--fs": "leave it out",
    "--fw-cfg-config": "leave it out",
    "--gdb": "leave it out",
    "--generic-vhost-user": "leave it out",
    "--host-data": "leave it out",
    "--igvm": "give --kernel a PVH ELF",
    "--ivshmem": "leave it out",
    "--landlock": "leave it out: there is no sandbox yet",
    "--landlock-rules": "leave it out: there is no sandbox yet",
    "--memory-zone": "give --memory size=…",
    "--numa": "leave it out",
    "--pci-segment": "leave it out: there is one PCI bus",
    "--pvmemcontrol": "leave it out",
    "--rate-limit-group": "leave it out",
    "--restore": "leave it out: there are no snapshots yet",
    "--tpm": "leave it out",
    "--user-device": "leave it out",
    "--vdpa": "leave it out",
}


class _Several(argparse.Action):
    """Collects values; ``const`` stands for an option without any."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, [*before, *(values or [self.const])])


class UsageError(Exception):
    """The command line is wrong; one line."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class Parser(argparse.ArgumentParser):
    """``parse`` never exits but for ``--help`` and ``--version``. :raises UsageError:"""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; {self.prog} --help lists what there is")

    def parse(self, arguments: Sequence[str], refused: dict[str, str] | None = None) -> argparse.Namespace:
        known = [option for action in self._actions for option in action.option_strings]
        for word in arguments:
            if word == "--":
                break
            if not word.startswith("--"):
                continue
            option = word.partition("=")[0]
            if option in (refused or {}):
                raise UsageError(f"{option}: not supported yet; {(refused or {})[option]}")
            if option not in known and " " not in option:
                near = difflib.get_close_matches(option, [*known, *(refused or {})], n=1)
                hint = f"did you mean {near[0]}?" if near else f"{self.prog} --help lists the options"
                raise UsageError(f"{option}: unknown option; {hint}")
        return self.parse_intermixed_args(list(arguments))  # an option may stand between a verb and its argument


def version_text(program: str) -> str:
    """Management software asks ``cloud-hypervisor --version`` and parses the first line, so whoever installs a symlink
    of that name to ``trivmm`` gets the version of the contract there, and ours after it."""
    ours = f"trivmm v{trivmm.__version__}"
    return f"cloud-hypervisor v{CONTRACT_VERSION}\n{ours}" if Path(program).name == "cloud-hypervisor" else ours


def run_parser() -> Parser:
    """Options as Cloud Hypervisor spells them; defaults are filled in by ``trivmm.cli.options``."""
    parser = Parser("trivmm", USAGE)
    parser.add_argument("-V", "--version", action="version", version=version_text(sys.argv[0]))
    vm = parser.add_argument_group("the VM")
    vm.add_argument("--kernel", metavar="FILE", help="a vmlinux with a PVH entry note, or a bzImage with one in it")
    vm.add_argument("--firmware", metavar="FILE", help="instead of a kernel: a flat PC BIOS image, or a PVH ELF")
    vm.add_argument("--cmdline", metavar="TEXT", help="the kernel's command line")
    vm.add_argument("--initramfs", metavar="FILE")
    vm.add_argument("--cpus", metavar="boot=N[,max=N]", help="vCPUs (1)")
    vm.add_argument("--memory", metavar="size=SIZE[,shared=on]", help="RAM, with K, M, G or T (512M)")
    modes = "off|null|tty|pty|file=FILE|socket=PATH"
    vm.add_argument("--serial", metavar=modes, help="the serial port (tty where stdout is a terminal, else null)")
    vm.add_argument(
        "--platform",
        metavar="uuid=UUID,serial_number=TEXT,oem_strings=[TEXT,…]",
        help="what SMBIOS says of the machine; also system_manufacturer=, system_product_name=, system_version=, "
        "system_sku_number=, system_family=, chassis_asset_tag=",
    )
    for kind in KINDS:
        option = kind.option
        if kind.contract.flag:
            vm.add_argument(f"--{option.name}", action="store_true", default=None, help=option.help)
            continue
        several: dict[str, Any] = {}
        if kind.contract.many:
            several = {"nargs": "+" if option.plain is None else "*", "action": _Several, "const": option.plain}
        vm.add_argument(f"--{option.name}", metavar=option.metavar, help=option.help, **several)
    vm.add_argument(
        "--cloud-init",
        metavar="user-data=FILE[,meta-data=FILE][,network-config=FILE][,vendor-data=FILE][,path=FILE]",
        help="one more disk, read-only: a seed of these for the guest's cloud-init, made at path (USER-DATA.seed)",
    )
    vm.add_argument(
        "--pvpanic", action="store_true", default=None, help="a device by which the guest says that it has panicked"
    )
    vmm = parser.add_argument_group("the VMM")
    vmm.add_argument(
        "--api-socket", metavar="path=FILE|fd=N", help="serve the HTTP API on this unix socket, or on one passed in"
    )
    vmm.add_argument(
        "--event-monitor", metavar="path=FILE|fd=N", help="write what happens there, as JSON; a FIFO may lack a reader"
    )
    vmm.add_argument("--hypervisor", metavar="auto|kvm|soft", default="auto", help="what runs guest code (auto)")
    vmm.add_argument(
        "--deadlines",
        metavar="NAME=SECONDS[,…]",
        nargs="+",
        action="extend",
        default=[],
        help="limits of waits, by their names in the README",
    )
    vmm.add_argument("--no-shutdown", action="store_true", help="keep serving after the guest powered off")
    vmm.add_argument(
        "--stay-after-migration", action="store_true", help="keep serving after the VM migrated away, able to receive"
    )
    vmm.add_argument("--seccomp", metavar="false", help="accepted as false only: there is no filter")
    vmm.add_argument("--log-file", metavar="FILE", help="where the log goes (stderr)")
    vmm.add_argument("-v", action="count", default=0, dest="verbose", help="log more; -vv: everything")
    return parser
