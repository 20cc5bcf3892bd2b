"""``soft``: guest code on the unicorn CPU emulator, for machines without /dev/kvm.

The same guest memory and the same devices as ``kvm``; interrupts are delivered by us, with small LAPICs, 8259s and
a PIT. Its vCPUs take turns. unicorn comes with the ``soft`` extra and is imported only when a VM is opened.
"""

from __future__ import annotations

from typing import ClassVar

from trivmm.errors import HypervisorError
from trivmm.hypervisor.base import Hypervisor, VmBackend
from trivmm.hypervisor.select import install_soft

__all__ = ["SoftHypervisor"]


class SoftHypervisor(Hypervisor):
    """The back end for ``--hypervisor soft``. Holds nothing of its own."""

    name: ClassVar[str] = "soft"
    max_vcpus = 8  # a bit each in the flat logical addresses of an xAPIC; and they share one host CPU

    def __init__(self, note: str = "") -> None:
        self.note = note

    def open_vm(self) -> VmBackend:
        """:raises HypervisorError: when unicorn is not installed."""
        try:
            import unicorn  # noqa: F401
        except ImportError as error:
            raise HypervisorError("unicorn", f"not installed ({error})", install_soft()) from error
        from trivmm.hypervisor.soft.vm import SoftVm

        return SoftVm()

    def close(self) -> None: ...
