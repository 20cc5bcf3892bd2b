"""The hypervisor protocol: what the VMM asks of anything that can run guest code.

A *back end* opens VMs; a VM back end owns memory slots, interrupt routes, doorbells and the dirty log; a vCPU
back end runs guest code until an exit that Python must handle. Three implementations: ``kvm``, ``soft`` (unicorn)
and ``scripted`` (``trivmm.testing``). Exits are frozen classes, to be used with ``match``.

Threads: ``VcpuBackend.run``, ``run_immediate``, ``complete_read`` and ``park`` belong to the vCPU's own thread;
``kick`` may be called by any thread at any time, before the start and after the end too; ``save``, ``load``,
``inject_nmi`` and ``describe`` only while the vCPU is parked or not started. ``VmBackend`` calls come from one thread
at a time, not always the same (``trivmm.nursery.kernel``), except ``connect_msi``/``disconnect_msi``/``add_doorbell``/
``remove_doorbell``, which vCPU threads make too (a guest that unmasks a vector or moves a BAR): implementations lock
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Protocol, TypeAlias

import attrs

from trivmm.values import AtMost, Name

__all__ = [
    "Cpuid",
    "FailEntry",
    "Halted",
    "Hypervisor",
    "InternalError",
    "Interrupted",
    "IoIn",
    "IoOut",
    "MmioRead",
    "MmioWrite",
    "SystemEvent",
    "TripleFault",
    "VcpuBackend",
    "VcpuExit",
    "VcpuState",
    "VmBackend",
    "VmmState",
]


# --- exits ---------------------------------------------------------------------------------------------------


@attrs.frozen
class IoOut:
    """Port output. ``data`` holds ``count`` elements of ``size`` (1, 2, 4) bytes: a string instruction has many."""

    port: int
    size: int
    data: bytes


@attrs.frozen
class IoIn:
    """Port input of ``count`` elements of ``size`` bytes; answer with ``complete_read(size * count bytes)``."""

    port: int
    size: int
    count: int


@attrs.frozen
class MmioWrite:
    gpa: int
    data: bytes


@attrs.frozen
class MmioRead:
    """Answer with ``complete_read(size bytes)``."""

    gpa: int
    size: int


@attrs.frozen
class Interrupted:
    """A kick: look at the request word."""


@attrs.frozen
class Halted:
    """HLT without an interrupt controller that waits by itself; ``soft`` waits inside and never returns this."""


@attrs.frozen
class TripleFault:
    """The CPU shut down. On hardware the board resets; here it is a crash with a diagnosis."""


@attrs.frozen
class SystemEvent:
    """``kind``: ``reset``, ``shutdown`` or ``crash`` (KVM_SYSTEM_EVENT_*)."""

    kind: str


@attrs.frozen
class InternalError:
    """The hypervisor gave up. ``suberror`` 1 is an emulation failure; ``data`` are its raw words."""

    suberror: int
    data: tuple[int, ...]


@attrs.frozen
class FailEntry:
    """Hardware refused the guest state."""

    reason: int


VcpuExit: TypeAlias = (
    IoOut | IoIn | MmioWrite | MmioRead | Interrupted | Halted | TripleFault | SystemEvent | InternalError | FailEntry
)


# --- state ---------------------------------------------------------------------------------------------------

Blobs = Annotated[dict[Name, Annotated[bytes, AtMost(1 << 20)]], AtMost(64)]
"""A KVM vCPU has about 15 parts; the largest that there is, an engine's pickled context, has some 100 KiB."""


@attrs.frozen
class VcpuState:
    """One vCPU, saved. ``kind`` is the back end's name with its format (``kvm/1``); ``blobs`` its raw parts."""

    kind: Name
    blobs: Blobs


@attrs.frozen
class VmmState:
    """The VM-wide part of a back end (interrupt controllers, PIT, clock), saved."""

    kind: Name
    blobs: Blobs


@attrs.frozen
class Cpuid:
    """One CPUID leaf as given to the guest."""

    function: int
    index: int
    eax: int
    ebx: int
    ecx: int
    edx: int


# --- protocols -----------------------------------------------------------------------------------------------


class VcpuBackend(Protocol):
    """One vCPU. Created parked, with the registers of a reset CPU.

    ``inline_handler`` is set by the board before the start: a back end whose reads cannot leave the guest and come
    back (``soft``) answers :class:`IoIn` and :class:`MmioRead` through it, on the vCPU's own thread."""

    index: int
    inline_handler: Callable[[VcpuExit], bytes | None] | None

    def attach_thread(self) -> None:
        """Called first by the thread that will run this vCPU: publishes its id to ``kick``."""

    def detach_thread(self) -> None:
        """Called last by that thread: withdraws the id, so that no signal can hit a reused thread."""

    def run(self) -> VcpuExit:
        """Run guest code until an exit that Python must handle. A kick gives :class:`Interrupted`."""

    def run_immediate(self) -> VcpuExit:
        """Finish a started instruction without running another: repeat until :class:`Interrupted`."""

    def complete_read(self, data: bytes) -> None:
        """Answer the last :class:`IoIn` or :class:`MmioRead`; consumed by the next run."""

    def park(self, timeout_s: float) -> None:
        """Wait until kicked, at most ``timeout_s`` seconds. A kick that came before makes it return at once."""

    def kick(self) -> None:
        """Make ``run`` or ``park`` return soon. Idempotent, any thread, any time; repeated by callers until seen."""

    def inject_nmi(self) -> None:
        """A non-maskable interrupt, taken when the vCPU next runs. A vCPU that waits for its INIT or SIPI gets none, as
        on hardware."""

    def set_boot_state(self, entry_gpa: int, start_info_gpa: int) -> None:
        """The boot vCPU's registers as the x86/HVM direct boot ABI (PVH) wants them."""

    def save(self) -> VcpuState: ...

    def load(self, state: VcpuState) -> None:
        """Set a saved state; may be called again after an undo.

        :raises HypervisorError: when this back end or host cannot take it."""

    def describe(self) -> str:
        """RIP, registers and instruction bytes, several lines, for a crash report."""

    def close(self) -> None:
        """Idempotent."""


class VmBackend(Protocol):
    """One VM. ``name`` is the back end's (``kvm``); ``live_copy`` is False where it has no dirty log."""

    name: str
    live_copy: bool

    def add_memory(self, slot: int, gpa: int, size: int, hva: int) -> None:
        """Give the guest RAM: ``size`` bytes at host address ``hva``, shared with the VMM."""

    def set_dirty_log(self, enabled: bool) -> None:
        """Start or stop logging of guest writes for every slot. Starting gives a log in which nothing is dirty."""

    def harvest_dirty(self, slot: int, into: Any) -> None:
        """OR the slot's dirty bits since the last harvest into ``into`` (cffi ``uint64_t *``, a bit a 4 KiB page)
        and clear them in the log."""

    def create_vcpu(self, index: int) -> VcpuBackend: ...

    def add_doorbell(self, fd: int, gpa: int) -> None:
        """A guest write of any size and value at ``gpa`` signals the eventfd ``fd`` instead of exiting."""

    def remove_doorbell(self, fd: int, gpa: int) -> None: ...

    def prepare_msi(self, messages: Sequence[tuple[int, int]]) -> None:
        """Each (address, data) is connected next: what can be done for all of them at once is done. Never raises for a
        message that can't be: its ``connect_msi`` does."""

    def connect_msi(self, fd: int, address: int, data: int) -> int:
        """Route the eventfd ``fd`` to an MSI message; gives a token. A readable ``fd`` injects at once."""

    def disconnect_msi(self, token: int) -> None:
        """Stop injecting; returns after injections queued in the kernel are done. ``fd`` keeps what it holds."""

    def connect_irq(self, fd: int, gsi: int) -> None:
        """Route the eventfd ``fd`` to an edge on an ISA line (serial: 4). Undone by ``disconnect_irq``."""

    def disconnect_irq(self, fd: int, gsi: int) -> None: ...

    def save(self) -> VmmState:
        """With all vCPUs parked and all interrupts disconnected."""

    def load(self, state: VmmState) -> None: ...

    def close(self) -> None:
        """After every vCPU is closed. Idempotent."""


class Hypervisor(Protocol):
    """A back end as chosen by ``--hypervisor``."""

    name: ClassVar[str]

    max_vcpus: int
    needs_payload: bool
    """Whether a kernel must be there to boot: false only where nothing runs it (``trivmm.testing``)."""
    note: str
    """Why this one and not KVM, where ``auto`` fell back; empty otherwise."""

    def open_vm(self) -> VmBackend:
        """:raises HypervisorError: with a remedy, when the host cannot."""

    def close(self) -> None: ...
