"""The embedding API: a VM is an object in a trio program, with a scope.

::

    async with open_vm(config) as vm:            # builds nothing yet; checks nothing that boot would not
        await vm.boot()
        await vm.wait_for_console("login:")
        report = await vm.migrate_to("unix:/run/b.sock")

    async with open_incoming("unix:/run/b.sock") as incoming:
        vm = await incoming.receive()
        reason = await vm.wait()

The VM nursery lives from ``open_vm`` to the end of its block. Whatever ends the block (return, error, cancellation),
the owner ends first (a migration is cancelled and rolled back), then the vCPUs, then the devices, each within its
deadline. An error raised in the block leaves it as it is, not wrapped in a group.

``core`` is state and ownership; ``consoles``, ``devices``, ``moves`` and ``vm`` the verbs; ``scope`` the blocks.
"""

from trivmm.vm.core import ExitReason, VmState
from trivmm.vm.devices import PciDeviceInfo
from trivmm.vm.moves import Dial
from trivmm.vm.scope import open_vm, vm_scope
from trivmm.vm.vm import Vm

__all__ = ["Dial", "ExitReason", "PciDeviceInfo", "Vm", "VmState", "open_vm", "vm_scope"]
