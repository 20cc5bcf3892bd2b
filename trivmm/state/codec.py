"""MachineState to JSON and back. Bytes travel as base64; nothing of what comes back is trusted.

Only the shape is checked here: what a device or vCPU state *means* is checked by whoever loads it.
"""

from __future__ import annotations

import base64
from typing import Any, Final

from trivmm.config import MAX_VCPUS
from trivmm.errors import ProtocolError
from trivmm.hypervisor.base import VcpuState, VmBackendState
from trivmm.state.fields import Fields
from trivmm.state.machine import MachineState, SavedVcpu

__all__ = ["MAX_DEVICES", "state_from_json", "state_to_json"]

MAX_NAME: Final = 256  # device names and kinds are short words
MAX_BLOBS: Final = 64  # a KVM vCPU has about 15 parts
MAX_BLOB_BYTES: Final = 1 << 20  # the largest known part, an engine's pickled context, is some 100 KiB
MAX_DEVICES: Final = 64  # more than a PCI bus has slots
RESETS: Final = (None, "reset", "poweroff")
BARRIERS: Final = ("activation", "reset")


def _blobs(blobs: dict[str, bytes]) -> dict[str, str]:
    return {name: base64.b64encode(blob).decode("ascii") for name, blob in blobs.items()}


def state_to_json(state: MachineState) -> dict[str, Any]:
    """A JSON-able dict that :func:`state_from_json` takes."""
    return {
        "vcpus": [
            {
                "index": vcpu.index,
                "kind": vcpu.state.kind,
                "blobs": _blobs(vcpu.state.blobs),
                "barrier": None if vcpu.barrier is None else list(vcpu.barrier),
            }
            for vcpu in state.vcpus
        ],
        "vmm": {"kind": state.vmm.kind, "blobs": _blobs(state.vmm.blobs)},
        "devices": state.devices,
        "board": state.board,
        "reset_pending": state.reset_pending,
        "run": state.run,
    }


def _vcpu(place: int, value: object) -> SavedVcpu:
    fields = Fields(f"state.vcpus[{place}]", value)
    index = fields.integer("index", 0, MAX_VCPUS - 1)
    state = VcpuState(fields.text("kind", MAX_NAME), fields.blobs("blobs", MAX_BLOBS, MAX_BLOB_BYTES))
    barrier: tuple[str, str] | None = None
    raw = fields.anything("barrier")
    if raw is not None:
        if not isinstance(raw, list) or len(raw) != 2 or not all(isinstance(each, str) for each in raw):
            raise ProtocolError(f"state.vcpus[{place}]: barrier is not a pair of strings")
        if len(raw[0]) > MAX_NAME or raw[1] not in BARRIERS:
            raise ProtocolError(f"state.vcpus[{place}]: barrier is not a device and one of {BARRIERS}")
        barrier = (raw[0], raw[1])
    fields.end()
    return SavedVcpu(index, state, barrier)


def state_from_json(value: object) -> MachineState:
    """:raises ProtocolError: names the field that is missing, unknown, of a wrong type or out of bounds."""
    fields = Fields("state", value)
    vcpus = tuple(_vcpu(place, each) for place, each in enumerate(fields.array("vcpus", MAX_VCPUS)))
    if [vcpu.index for vcpu in vcpus] != list(range(len(vcpus))):
        raise ProtocolError(f"state.vcpus: indices {[vcpu.index for vcpu in vcpus]} are not 0, 1, … in order")
    inner = Fields("state.vmm", fields.object("vmm"))
    vmm = VmBackendState(inner.text("kind", MAX_NAME), inner.blobs("blobs", MAX_BLOBS, MAX_BLOB_BYTES))
    inner.end()
    devices, board = fields.objects("devices", MAX_DEVICES), fields.objects("board", MAX_DEVICES)
    reset = fields.maybe_text("reset_pending", MAX_NAME)
    if reset not in RESETS:
        raise ProtocolError(f"state.reset_pending is {reset!r}, not one of {RESETS}")
    run = fields.boolean("run")
    fields.end()
    return MachineState(vcpus, vmm, devices, board, reset, run)
