"""The process-level service: at most one VM, driven by the API and the command line.

``open_vmm`` owns the Vmm nursery. A VM lives in one task of it (``async with open_vm``), a migration that is sent in
another, and each keeps its outcome as a value: a migration or a boot that fails never ends the nursery. ``ended`` says
when the process has nothing left to do: the guest powered off or crashed, its VM migrated away, or a client asked.

``slot`` is the VM's place, ``core`` its task, ``moves`` and ``service`` the verbs.
"""

from trivmm.vmm.core import VmmEnd, VmmOptions
from trivmm.vmm.service import Vmm, open_vmm

__all__ = ["Vmm", "VmmEnd", "VmmOptions", "open_vmm"]
