"""The hypervisor protocol: what the VMM asks of anything that can run guest code.

A *back end* opens VMs; a VM back end owns memory slots, interrupt routes, doorbells and the dirty log; a vCPU
back end runs guest code. Three implementations: ``kvm``, ``soft`` (unicorn) and ``scripted`` (``trivmm.testing``).

How a CPU tells of its guest's accesses is its back end's own affair: it serves them against the :class:`Bus` that it is
given, on the vCPU's own thread, and comes back only with an :data:`Outcome`: what its owner must know.

Most back ends run guest code in a blocking call, and so each vCPU has a thread (:class:`ThreadVcpu`); one whose time
is virtual has trio tasks instead (:class:`TaskVcpu`).

Threads: ``run``, ``finish`` and ``park`` belong to the vCPU's own thread; ``kick`` may be called by any thread at any
time, before the start and after the end too; ``save``, ``load``, ``inject_nmi`` and ``describe`` only while the vCPU is
parked or not started. ``VmBackend`` calls come from one thread at a time, not always the same
(``trivmm.nursery.kernel``), except ``connect_msi``/``disconnect_msi``/``add_doorbell``/``remove_doorbell``, which vCPU
threads make too (a guest that unmasks a vector or moves a BAR): implementations lock them.

Implementations derive from the protocols. What a back end need not have, has a default here: nothing is probed for.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, Protocol, TypeAlias

import attrs

from trivmm.bus.bus import Bus
from trivmm.bus.space import GuestRequest
from trivmm.bus.ticket import Ticket
from trivmm.values import AtMost, Name

__all__ = [
    "INTERRUPTED",
    "LONG_MODE_GDT",
    "AnyVcpu",
    "Crashed",
    "Hypervisor",
    "Interrupted",
    "LongModeEntry",
    "MemoryFault",
    "Outcome",
    "PvhEntry",
    "TaskVcpu",
    "ThreadVcpu",
    "VcpuBackend",
    "VcpuState",
    "VmBackend",
    "VmBackendState",
    "triple_fault",
]


# --- outcomes ------------------------------------------------------------------------------------------------


@attrs.frozen
class Interrupted:
    """A kick: look at the request word."""


INTERRUPTED: Final = Interrupted()


def triple_fault(details: str) -> GuestRequest:
    """The CPU met a fault that it could not deliver, nor that of the delivery: it stands still, and a PC resets it."""
    return GuestRequest("reset", "triple fault", details)


@attrs.frozen
class Crashed:
    """The vCPU can't go on: its hypervisor gave up. ``reason`` in a few words, ``details`` as
    :meth:`VcpuBackend.describe` told it in that moment."""

    reason: str
    details: str


Outcome: TypeAlias = Interrupted | Ticket | GuestRequest | Crashed
"""Why a vCPU came back: a kick, what a write asked of it (to park, to leave for the board's sake), or its end."""


# --- boot ----------------------------------------------------------------------------------------------------


@attrs.frozen
class PvhEntry:
    """The x86/HVM direct boot ABI (PVH): 32-bit protected mode, flat, EBX the start info."""

    entry_gpa: int
    start_info_gpa: int


@attrs.frozen
class LongModeEntry:
    """64-bit mode with ``page_tables_gpa`` in CR3, flat, interrupts off, RSI the zero page: Linux' 64-bit entry, which
    wants 0x10 and 0x18 to be its segments (``gdt_gpa``: :data:`LONG_MODE_GDT` goes there)."""

    entry_gpa: int
    zero_page_gpa: int
    page_tables_gpa: int
    gdt_gpa: int


LONG_MODE_GDT: Final = struct.pack("<5Q", 0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0)
"""64-bit code at 0x10, flat data at 0x18."""


# --- state ---------------------------------------------------------------------------------------------------

Blobs = Annotated[dict[Name, Annotated[bytes, AtMost(1 << 20)]], AtMost(64)]
"""A KVM vCPU has about 15 parts; the largest that there is, an engine's pickled context, has some 100 KiB."""


@attrs.frozen
class VcpuState:
    """One vCPU, saved. ``kind`` is the back end's name with its format (``kvm/1``); ``blobs`` its raw parts."""

    kind: Name
    blobs: Blobs


@attrs.frozen
class VmBackendState:
    """The VM-wide part of a back end (interrupt controllers, PIT, clock), saved."""

    kind: Name
    blobs: Blobs


class MemoryFault(Protocol):
    """Asked when the guest may have touched a page that is gone: gives why it can't go on, or None where that is not
    it. ``stopped``: an access has failed; else the CPU went on, with zeros. Any thread."""

    def __call__(self, *, stopped: bool) -> str | None: ...


# --- protocols -----------------------------------------------------------------------------------------------


class VcpuBackend(Protocol):
    """What may be asked of any vCPU. Created parked, with the registers of a reset CPU."""

    index: int
    write_hook: tuple[Any, Any] | None = None
    """What guest memory calls before the guest hears of a device's write (the arguments of
    ``GuestMemory.before_told``); None where the CPU sees such a write by itself."""

    def kick(self) -> None:
        """Make ``run`` or ``park`` return soon. Idempotent, any thread, any time; repeated by callers until seen."""

    def inject_nmi(self) -> None:
        """A non-maskable interrupt, taken when the vCPU next runs. A vCPU that waits for its INIT or SIPI gets none, as
        on hardware."""

    def set_boot_state(self, entry: PvhEntry | LongModeEntry) -> None:
        """The boot vCPU's registers for what boots otherwise than from the reset vector."""

    def save(self) -> VcpuState: ...

    def load(self, state: VcpuState) -> None:
        """Set a saved state; may be called again after an undo.

        :raises HypervisorError: when this back end or host cannot take it."""

    def describe(self) -> str:
        """RIP, registers and instruction bytes, several lines, for a crash report."""

    def counters(self) -> dict[str, int]:
        """What it counted since its creation; nothing, where it counts nothing. Any thread."""
        return {}

    def close(self) -> None:
        """Idempotent."""


class ThreadVcpu(VcpuBackend, Protocol):
    """A vCPU that blocks while it runs: all of this is called by one thread, its own."""

    threads: Literal[True] = True

    def attach_thread(self) -> None:
        """Called first by the thread that will run this vCPU: publishes its id to ``kick``."""

    def detach_thread(self) -> None:
        """Called last by that thread: withdraws the id, so that no signal can hit a reused thread."""

    def run(self, bus: Bus) -> Outcome:
        """Run guest code, its accesses served against ``bus``, until there is an outcome. A kick gives
        :class:`Interrupted`, before the next instruction or access."""

    def finish(self, bus: Bus) -> Outcome:
        """Finish a started instruction without running another, so that the registers lie between two of them:
        repeat until :class:`Interrupted`."""

    def park(self, timeout_s: float) -> None:
        """Wait until kicked, at most ``timeout_s`` seconds. A kick that came before makes it return at once."""


class TaskVcpu(VcpuBackend, Protocol):
    """A vCPU that is a trio task: the same verbs, awaited, under whatever clock trio has."""

    threads: Literal[False] = False

    async def run(self, bus: Bus) -> Outcome: ...

    async def finish(self, bus: Bus) -> Outcome: ...

    async def park(self, timeout_s: float) -> None: ...


AnyVcpu: TypeAlias = ThreadVcpu | TaskVcpu


class VmBackend(Protocol):
    """One VM. ``name`` is the back end's (``kvm``)."""

    name: str
    live_copy: bool = True
    """Whether there is a dirty log; without one a VM is copied while it stands still."""

    def add_memory(self, slot: int, gpa: int, size: int, hva: int, *, rom: bool = False) -> None:
        """Give the guest memory: ``size`` bytes at host address ``hva``, shared with the VMM. ``rom``: it can't write
        there, and is not logged; its writes are accesses of the bus."""

    memory_fault: MemoryFault | None = None
    """Who knows why memory that the guest has may be gone (``trivmm.memory.device_memory``), once there is such."""

    def add_device_memory(self, slot: int, gpa: int, size: int, hva: int) -> None:
        """As :meth:`add_memory`, of memory that no dirty log covers. :raises HypervisorError: not any more."""

    def remove_device_memory(self, slot: int, gpa: int, size: int) -> None:
        """Take it away again. The guest does not use it. :raises HypervisorError: it can't be, any more."""

    def attach_memory(self, memory: Any) -> None:
        """An offer: all of guest RAM as C sees it (cffi ``struct tv_memory *``), for a back end that must reach it by
        itself. After the slots are added, before the vCPUs are created; it outlives them."""
        return None

    def set_dirty_log(self, enabled: bool) -> None:
        """Start or stop logging of guest writes for every slot. Starting gives a log in which nothing is dirty."""

    def harvest_dirty(self, slot: int, into: Any) -> None:
        """OR the slot's dirty bits since the last harvest into ``into`` (cffi ``uint64_t *``, a bit a 4 KiB page)
        and clear them in the log."""

    def create_vcpu(self, index: int) -> AnyVcpu: ...

    def add_doorbell(self, fd: int, gpa: int) -> None:
        """A guest write of any size and value at ``gpa`` signals the eventfd ``fd`` instead of exiting."""

    def remove_doorbell(self, fd: int, gpa: int) -> None: ...

    def attach_pio_hook(self, base: int, length: int, function: Any, opaque: Any) -> None:
        """An offer: ports ``base`` … ``base + length`` can be served in C (cffi ``tv_pio_fn`` and ``void *``). A back
        end that runs its guest in C takes it; elsewhere, and where the function declines, they are accesses like any
        other. Before the vCPUs start; both outlive them."""
        return None

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

    def save(self) -> VmBackendState:
        """With all vCPUs parked and all interrupts disconnected."""

    def load(self, state: VmBackendState) -> None: ...

    def close(self) -> None:
        """After every vCPU is closed. Idempotent."""


class Hypervisor(Protocol):
    """A back end as chosen by ``--hypervisor``."""

    name: ClassVar[str]

    max_vcpus: int
    needs_payload: bool = True
    """Whether a kernel must be there to boot: false only where nothing runs it (``trivmm.testing``)."""
    note: str = ""
    """Why this one and not KVM, where ``auto`` fell back; empty otherwise."""
    threads: bool = True
    """Whether its vCPUs are a :class:`ThreadVcpu` each. False: a :class:`TaskVcpu`, so time may be virtual, and no
    thread is to be waited for on behalf of its VM: the clock would jump meanwhile."""

    def clock(self) -> float:
        """Seconds, in the time that its vCPUs live in. Any thread."""
        return time.monotonic()

    def open_vm(self) -> VmBackend:
        """:raises HypervisorError: with a remedy, when the host cannot."""

    def close(self) -> None: ...
