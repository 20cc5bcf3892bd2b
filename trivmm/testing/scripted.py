"""The scripted hypervisor: vCPUs are trio tasks that play a script of steps, so that virtual time works.

A script is a generator function of one argument, its :class:`ScriptedVcpu`. It yields what the guest does:

- an access: :class:`MmioWrite` ``(gpa, data)``, ``value = yield MmioRead(gpa, 4)``, :class:`IoOut` ``(port, size,
  data)``, ``value = yield IoIn(port, 1)``;
- a tuple of accesses: one instruction with several (a page-crossing store), finished before a pause;
- :class:`Compute` ``(seconds)``: runs guest code, reachable by a kick; :class:`Wedge` ``(seconds)``: does not react to
  kicks for so long; :class:`Store` ``(gpa, data)``: writes RAM, seen by the dirty log;
- :class:`Crash` ``(reason)``: its hypervisor gives up; :class:`TripleFault`: it is reset;
- and when it returns, the vCPU computes for ever.

``cpu.registers`` is a dict that travels with a migration: the destination's script is called anew and reads it.
The board, the devices, the activation protocol and the migration around it are the real ones. Hot loops cost
nothing: under trio's ``autojump_clock`` a script of an hour takes milliseconds. No thread is involved.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from typing import Any, ClassVar, TypeAlias

import attrs
import trio

from trivmm._native import ffi
from trivmm.bus.bus import Bus
from trivmm.bus.space import Effect
from trivmm.errors import HypervisorError
from trivmm.hypervisor.base import (
    INTERRUPTED,
    Crashed,
    Hypervisor,
    LongModeEntry,
    Outcome,
    PvhEntry,
    TaskVcpu,
    VcpuState,
    VmBackend,
    VmBackendState,
    triple_fault,
)

__all__ = [
    "Access",
    "Compute",
    "Crash",
    "IoIn",
    "IoOut",
    "MmioRead",
    "MmioWrite",
    "Script",
    "ScriptedHypervisor",
    "ScriptedVcpu",
    "ScriptedVm",
    "Step",
    "Store",
    "TripleFault",
    "Wedge",
]


@attrs.frozen
class IoOut:
    """Port output. ``data`` holds one element of ``size`` (1, 2, 4) bytes, or several: a string instruction."""

    port: int
    size: int
    data: bytes


@attrs.frozen
class IoIn:
    """Port input of ``count`` elements of ``size`` bytes, which the script is sent."""

    port: int
    size: int
    count: int = 1


@attrs.frozen
class MmioWrite:
    gpa: int
    data: bytes


@attrs.frozen
class MmioRead:
    """The script is sent ``size`` bytes."""

    gpa: int
    size: int


@attrs.frozen
class Compute:
    seconds: float


@attrs.frozen
class Wedge:
    seconds: float


@attrs.frozen
class Store:
    gpa: int
    data: bytes


@attrs.frozen
class Crash:
    reason: str = "hypervisor internal error"


@attrs.frozen
class TripleFault:
    """The CPU is reset."""


Access: TypeAlias = IoOut | IoIn | MmioWrite | MmioRead
Step: TypeAlias = "Access | tuple[Access, ...] | Compute | Wedge | Store | Crash | TripleFault"
Script: TypeAlias = "Callable[[ScriptedVcpu], Generator[Step, bytes | None, None]]"


def idle(cpu: ScriptedVcpu) -> Generator[Step, bytes | None, None]:
    """The script of a vCPU that was given none: it computes for ever."""
    yield Compute(1e9)


class ScriptedVcpu(TaskVcpu):
    """See the module's docstring. ``calls`` is the log of what the VMM did to this vCPU."""

    def __init__(self, vm: ScriptedVm, index: int, script: Script) -> None:
        self.index = index
        self.vm = vm
        self.registers: dict[str, Any] = {}
        self.calls: list[str] = []
        self._script = script
        self._steps: Generator[Step, bytes | None, None] | None = None
        self._pending: list[Access] = []
        self._left: Compute | None = None
        self._answer: bytes | None = None
        self._kicked = trio.Event()

    # --- the protocol ----------------------------------------------------------------------------------------

    def kick(self) -> None:
        self._kicked.set()

    def inject_nmi(self) -> None:
        self.calls.append("inject_nmi")

    def set_boot_state(self, entry: PvhEntry | LongModeEntry) -> None:
        self.calls.append("set_boot_state")

    def save(self) -> VcpuState:
        self.calls.append("save")
        return VcpuState("scripted/1", {"registers": json.dumps(self.registers).encode()})

    def load(self, state: VcpuState) -> None:
        self.calls.append("load")
        if state.kind != "scripted/1":
            raise HypervisorError("scripted", f"cannot load a vCPU of kind {state.kind}")
        self.registers = json.loads(state.blobs["registers"])
        self._steps = None

    def describe(self) -> str:
        return f"scripted vcpu{self.index}: registers {self.registers}"

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    # --- the task ------------------------------------------------------------------------------

    def _next(self) -> Step:
        answer, self._answer = self._answer, None
        if self._steps is None:
            self._steps = self._script(self)
            answer = None
        try:
            return self._steps.send(answer)
        except StopIteration:
            return Compute(1e9)

    async def run(self, bus: Bus) -> Outcome:
        while True:
            await trio.lowlevel.checkpoint()
            if self._kicked.is_set():
                self._kicked = trio.Event()
                return INTERRUPTED
            if self._pending:
                step: Step = self._pending.pop(0)
            else:
                step, self._left = self._left or self._next(), None
            match step:
                case Compute(seconds):
                    began = trio.current_time()
                    with trio.move_on_after(seconds) as scope:
                        await self._kicked.wait()
                    if not scope.cancelled_caught:
                        self._left = Compute(max(0.0, seconds - (trio.current_time() - began)))
                case Wedge(seconds):
                    await trio.sleep(seconds)
                case Store(gpa, data):
                    self.vm.store(gpa, data)
                case Crash(reason):
                    return Crashed(reason, self.describe())
                case TripleFault():
                    return triple_fault(self.describe())
                case tuple():
                    self._pending = list(step)
                case _:
                    effect = self._access(bus, step)
                    if effect is not None:
                        return effect

    async def finish(self, bus: Bus) -> Outcome:
        await trio.lowlevel.checkpoint()
        while self._pending:
            effect = self._access(bus, self._pending.pop(0))
            if effect is not None:
                return effect
        return INTERRUPTED

    def _access(self, bus: Bus, access: Access) -> Effect:
        match access:
            case IoOut(port, size, data):
                return bus.write_port(port, size, data)
            case MmioWrite(gpa, data):
                return bus.write_mmio(gpa, data)
            case IoIn(port, size, count):
                self._answer = bus.read_port(port, size, count)
            case MmioRead(gpa, size):
                self._answer = bus.read_mmio(gpa, size)
        return None

    async def park(self, timeout_s: float) -> None:
        with trio.move_on_after(timeout_s):
            await self._kicked.wait()
        self._kicked = trio.Event()


class ScriptedVm(VmBackend):
    """``calls`` is the log of what the VMM asked of the VM, in order."""

    name = "scripted"

    def __init__(self, scripts: Sequence[Script]) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.doorbells: dict[int, int] = {}
        self.msi: dict[int, tuple[int, int, int]] = {}
        self._scripts = scripts
        self._slots: dict[int, tuple[int, int, int]] = {}
        self._dirty: dict[int, set[int]] | None = None
        self._tokens = 0

    def add_memory(self, slot: int, gpa: int, size: int, hva: int, *, rom: bool = False) -> None:
        self._slots[slot] = (gpa, size, hva)

    def add_device_memory(self, slot: int, gpa: int, size: int, hva: int) -> None:
        self.calls.append(("add_device_memory", slot, gpa, size))
        self._slots[slot] = (gpa, size, hva)

    def remove_device_memory(self, slot: int, gpa: int, size: int) -> None:
        self.calls.append(("remove_device_memory", slot, gpa, size))
        del self._slots[slot]

    def store(self, gpa: int, data: bytes) -> None:
        for slot, (start, size, hva) in self._slots.items():
            if start <= gpa and gpa + len(data) <= start + size:
                ffi.buffer(ffi.cast("uint8_t *", hva + gpa - start), len(data))[:] = data
                if self._dirty is not None:
                    first, last = (gpa - start) >> 12, (gpa - start + len(data) - 1) >> 12
                    self._dirty.setdefault(slot, set()).update(range(first, last + 1))
                return
        raise ValueError(f"script stores outside RAM: {gpa:#x}")

    def fetch(self, gpa: int, size: int) -> bytes:
        """What the guest reads there."""
        for start, length, hva in self._slots.values():
            if start <= gpa and gpa + size <= start + length:
                return bytes(ffi.buffer(ffi.cast("uint8_t *", hva + gpa - start), size))
        raise ValueError(f"script reads outside RAM: {gpa:#x}")

    def set_dirty_log(self, enabled: bool) -> None:
        self.calls.append(("set_dirty_log", enabled))
        self._dirty = {} if enabled else None

    def harvest_dirty(self, slot: int, into: Any) -> None:
        if self._dirty is None:
            raise HypervisorError("harvest_dirty", "the dirty log is off")
        for page in self._dirty.pop(slot, ()):
            into[page // 64] |= 1 << page % 64

    def create_vcpu(self, index: int) -> ScriptedVcpu:
        script = self._scripts[index] if index < len(self._scripts) else idle
        return ScriptedVcpu(self, index, script)

    def add_doorbell(self, fd: int, gpa: int) -> None:
        self.doorbells[gpa] = fd

    def remove_doorbell(self, fd: int, gpa: int) -> None:
        self.doorbells.pop(gpa, None)

    def prepare_msi(self, messages: Sequence[tuple[int, int]]) -> None:
        return None

    def connect_msi(self, fd: int, address: int, data: int) -> int:
        self._tokens += 1
        self.msi[self._tokens] = (fd, address, data)
        self.calls.append(("connect_msi", address, data))
        return self._tokens

    def disconnect_msi(self, token: int) -> None:
        self.calls.append(("disconnect_msi", *self.msi.pop(token)[1:]))

    def connect_irq(self, fd: int, gsi: int) -> None:
        self.calls.append(("connect_irq", gsi))

    def disconnect_irq(self, fd: int, gsi: int) -> None:
        self.calls.append(("disconnect_irq", gsi))

    def save(self) -> VmBackendState:
        self.calls.append(("save",))
        return VmBackendState("scripted/1", {})

    def load(self, state: VmBackendState) -> None:
        self.calls.append(("load",))
        if state.kind != "scripted/1":
            raise HypervisorError("scripted", f"cannot load a VM of kind {state.kind}")

    def close(self) -> None:
        self.calls.append(("close",))


class ScriptedHypervisor(Hypervisor):
    """Give it one script per vCPU; vCPUs without one compute for ever. ``needs_payload`` False boots without looking
    for the kernel's file: no script reads it."""

    name: ClassVar[str] = "scripted"
    max_vcpus = 8
    threads = False

    def __init__(self, *scripts: Script, needs_payload: bool = True) -> None:
        self.scripts = scripts
        self.needs_payload = needs_payload
        self.vms: list[ScriptedVm] = []

    def clock(self) -> float:
        return trio.current_time()

    def open_vm(self) -> ScriptedVm:
        vm = ScriptedVm(self.scripts)
        self.vms.append(vm)
        return vm

    def close(self) -> None:
        return None
