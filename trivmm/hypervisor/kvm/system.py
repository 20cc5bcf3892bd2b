"""/dev/kvm itself: the ``kvm`` hypervisor. Owns one descriptor, from construction to ``close``."""

from __future__ import annotations

import os
from typing import ClassVar

from trivmm._native import lib
from trivmm.errors import HypervisorError
from trivmm.hypervisor.base import Hypervisor
from trivmm.hypervisor.kvm.report import check_host, extension, open_device
from trivmm.hypervisor.kvm.vm import KvmVm

__all__ = ["KvmHypervisor"]


class KvmHypervisor(Hypervisor):
    name: ClassVar[str] = "kvm"

    def __init__(self) -> None:
        """:raises HypervisorError: when /dev/kvm can't be opened or lacks something; says what to do."""
        self._fd = open_device()
        try:
            check_host(self._fd)
            problem = lib.tv_kick_signal_install()
            if problem:
                raise HypervisorError("sigaction", os.strerror(-problem), errno=-problem)
            self.max_vcpus = max(extension(self._fd, "KVM_CAP_MAX_VCPUS"), extension(self._fd, "KVM_CAP_NR_VCPUS"), 1)
        except BaseException:
            self.close()
            raise

    def open_vm(self) -> KvmVm:
        if self._fd < 0:
            raise HypervisorError("KVM_CREATE_VM", "the hypervisor is closed")
        return KvmVm(self._fd)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
