"""Choosing what runs guest code: ``--hypervisor auto|kvm|soft``. Stateless."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from typing import Final

from trivmm.errors import ConfigError, HypervisorError
from trivmm.hypervisor.base import Hypervisor

__all__ = ["SOFT_REQUIREMENT", "choose_hypervisor", "install_soft"]


SOFT_REQUIREMENT: Final = "unicorn==2.1.4"  # the soft extra's, in pyproject.toml


def install_soft() -> str:
    """The command that adds the soft CPU to the Python that runs this, wherever trivmm was installed from."""
    return f"{shlex.quote(sys.executable or 'python3')} -m pip install {SOFT_REQUIREMENT}"


def choose_hypervisor(choice: str = "auto") -> Hypervisor:
    """``auto`` takes KVM where it works and else the soft CPU. The result's ``note`` says why not KVM, or is empty.

    :raises ConfigError: for an unknown name, or ``soft`` without its extra.
    :raises HypervisorError: for ``kvm`` (or ``auto`` with neither) when the host cannot, with a remedy.
    """
    match choice:
        case "kvm":
            return _kvm()
        case "soft":
            return _soft("")
        case "auto":
            try:
                return _kvm()
            except HypervisorError as error:
                return _fall_back(error)
        case _:
            raise ConfigError("--hypervisor", choice, "unknown hypervisor", "use auto, kvm or soft")


def _fall_back(error: HypervisorError) -> Hypervisor:
    try:
        return _soft(f"KVM cannot be used ({error}): running on the soft CPU, which is much slower")
    except ConfigError:
        raise HypervisorError(
            error.call, str(error), f"or install the soft CPU: {install_soft()}", error.errno
        ) from error


def _kvm() -> Hypervisor:
    from trivmm.hypervisor.kvm.system import KvmHypervisor

    return KvmHypervisor()


def _soft(note: str) -> Hypervisor:
    try:
        from trivmm.hypervisor.soft import SoftHypervisor

        if importlib.util.find_spec("unicorn") is None:
            raise ImportError("no module named unicorn")
    except ImportError as error:
        raise ConfigError("--hypervisor", "soft", f"the soft CPU is not installed ({error})", install_soft()) from error
    return SoftHypervisor(note)
