"""MachineState to JSON and back; nothing of what comes back is trusted.

Shapes and widths are checked here; what a device's or vCPU's state *means* is checked by whoever takes it over, before
anything is changed (``Board.load``).
"""

from __future__ import annotations

from typing import Any

from trivmm.state.machine import MachineState
from trivmm.state.strict import refused, structure, unstructure

__all__ = ["state_from_json", "state_to_json"]


def state_to_json(state: MachineState) -> dict[str, Any]:
    """A JSON-able dict that :func:`state_from_json` takes. Bytes travel as base64."""
    made: dict[str, Any] = unstructure(state)
    return made


def state_from_json(value: object) -> MachineState:
    """:raises ProtocolError: names the field that is missing, unknown, of a wrong type or out of bounds."""
    state = structure("state", value, MachineState)
    for place, vcpu in enumerate(state.vcpus):
        if vcpu.index != place:
            raise refused(f"state.vcpus[{place}].index", vcpu.index, str(place))
    return state
