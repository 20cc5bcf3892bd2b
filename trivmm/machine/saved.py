"""A board as it travels: described for a destination that builds the same, saved, checked and loaded.

Loading has two halves. :func:`check_state` looks at all of a state that a peer sent, each part against the others and
against what this board is, and changes nothing; only then is it taken over, the hypervisor's part first, since the
kernel may still refuse a register. So a state that fails to load leaves a board that a later good one can be loaded
into.
"""

from __future__ import annotations

from typing import Any

import attrs

from trivmm.errors import MigrationError, shown
from trivmm.machine.board import Board
from trivmm.state.machine import BarrierKind, MachineState
from trivmm.state.platform import BoardState
from trivmm.state.setup import DeviceSetup, MachineSetup, config_to_setup
from trivmm.state.strict import prepare, refused, structure, unstructure
from trivmm.state.virtio import LifeStage, SavedDevice
from trivmm.virtio.kinds import sections

__all__ = ["check_setup", "check_state", "describe", "load_state", "save_board"]

WAITS_FOR = {BarrierKind.ACTIVATION: LifeStage.ACTIVATING, BarrierKind.RESET: LifeStage.RESETTING}


# --- SETUP ---------------------------------------------------------------------------------------------------


def describe(board: Board) -> dict[str, Any]:
    """What a destination needs to build the same board (the SETUP section of a migration); JSON-able."""
    prepare(MachineState)
    devices = {
        slot.backend.name: DeviceSetup(slot.pci_slot, unstructure(slot.backend.describe())) for slot in board.devices
    }
    made: dict[str, Any] = unstructure(
        MachineSetup(config_to_setup(board.config, sections()), board.vm.name, _ram(board), devices, _pvpanic(board))
    )
    return made


def _ram(board: Board) -> tuple[tuple[int, int], ...]:
    return tuple((region.gpa, region.size) for region in board.memory.regions)


def _pvpanic(board: Board) -> int | None:
    return None if board.pvpanic is None else board.pvpanic.slot


def check_setup(board: Board, value: object) -> None:
    """Make this board, which was built of the configuration in it, the one that the sender has.

    :raises TrivmmError: naming what it can't be."""
    prepare(MachineState)
    setup = structure("SETUP", value, MachineSetup)
    for part, there, here in (("hypervisor", setup.hypervisor, board.vm.name), ("ram", setup.ram, _ram(board))):
        if there != here:
            raise MigrationError(f"the sender's {part} is {shown(there)}, here it is {shown(here)}")
    mine = {slot.backend.name: slot for slot in board.devices}
    if set(setup.devices) != set(mine):
        raise MigrationError(f"the sender's devices are {shown(sorted(setup.devices))}, here they are {sorted(mine)}")
    for name, described in setup.devices.items():
        slot = mine[name]
        if described.slot != slot.pci_slot:
            raise MigrationError(f"{name}: the sender's PCI slot is {described.slot}, here it is {slot.pci_slot}")
        slot.backend.become(structure(f"SETUP.devices.{name}.device", described.device, slot.backend.description_type))
    if (setup.pvpanic is None) != (board.pvpanic is None):
        raise refused("SETUP.pvpanic", setup.pvpanic, "what the configuration says")
    if board.pvpanic is not None and setup.pvpanic is not None:
        board.pvpanic.move(board.pci, setup.pvpanic)


# --- STATE ---------------------------------------------------------------------------------------------------


def save_board(board: Board) -> tuple[dict[str, SavedDevice], BoardState]:
    """(devices by name, the fixed parts); after the machine stopped."""
    devices = {
        slot.backend.name: SavedDevice(*slot.transport.save(), unstructure(slot.backend.save()))
        for slot in board.devices
    }
    parts: dict[str, Any] = dict.fromkeys(field.name for field in attrs.fields(BoardState))
    parts |= {name: part.save() for name, part in board.fixed.items()}
    return devices, BoardState(**parts)


def check_state(board: Board, state: MachineState) -> dict[str, Any]:
    """All that can be known without trying. Gives the devices' own states by name.

    :raises MigrationError: / :raises ProtocolError: naming the field that makes no sense here."""
    if len(state.vcpus) != len(board.cpus):
        raise MigrationError(f"state has {len(state.vcpus)} vCPUs, the machine {len(board.cpus)}")
    mine = {slot.backend.name: slot for slot in board.devices}
    if set(state.devices) != set(mine):
        raise MigrationError(f"state has devices {shown(sorted(state.devices))}, the machine {sorted(mine)}")
    for vcpu in state.vcpus:
        _check_barrier(state, vcpu.index)
    own: dict[str, Any] = {}
    for name, saved in state.devices.items():
        where, slot = f"state.devices.{name}", mine[name]
        slot.transport.check(saved.life, saved.transport, where)
        own[name] = structure(f"{where}.own", saved.own, slot.backend.state_type)
    for name, saved in attrs.asdict(state.board, recurse=False).items():
        if (saved is None) == (name in board.fixed):
            there = "a part of the machine" if name in board.fixed else "no part of the machine"
            raise refused(f"state.board.{name}", saved, f"what it is here: {there}")
        if saved is not None:
            board.fixed[name].check(saved, f"state.board.{name}")
    return own


def _check_barrier(state: MachineState, vcpu: int) -> None:
    """A vCPU that waits for what nobody will settle would wait for ever."""
    barrier = state.vcpus[vcpu].barrier
    if barrier is None:
        return
    saved, where = state.devices.get(barrier.device), f"state.vcpus[{vcpu}].barrier"
    if saved is None:
        raise refused(f"{where}.device", barrier.device, "a device of this machine")
    if saved.life.stage is not WAITS_FOR[barrier.what]:
        wanted = f"what {barrier.device} is about: its life is at {saved.life.stage.value}"
        raise refused(f"{where}.what", barrier.what.value, wanted)


def load_state(board: Board, state: MachineState) -> None:
    """Set everything, or nothing but what the hypervisor has taken already; may be called again.

    :raises MigrationError: / :raises ProtocolError: naming the field that makes no sense here.
    :raises HypervisorError: when the kernel refuses a part."""
    own = check_state(board, state)
    board.vm.load(state.vmm)
    for vcpu in state.vcpus:
        board.cpus[vcpu.index].load(vcpu.state)
    for slot in board.devices:
        saved = state.devices[slot.backend.name]
        slot.transport.load(saved.life, saved.transport)
        slot.backend.load(own[slot.backend.name])
    parts = attrs.asdict(state.board, recurse=False)
    for name, part in board.fixed.items():  # the PCI bus among them places the BARs that were just loaded
        part.load(parts[name])
