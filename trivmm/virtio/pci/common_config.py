"""The common configuration structure (virtio 1.2 section 4.1.4.3): features, status, queues. Pure registers.

Drivers access a field with its own width (section 4.1.3.1), 64-bit ones as a whole or in 32-bit halves. Not all keep to
that: iPXE reads 16 bits of device_feature. So an aligned read inside a field gets that part of it; any other width or
offset reads all-ones, and only whole fields are written.

A queue's registers are its :class:`QueueState`, replaced at each write: who was handed one keeps what it was handed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import attrs

from trivmm.state.strict import refused
from trivmm.state.virtio import NO_VECTOR, QueueState, RegistersState
from trivmm.virtio.life import DRIVER_OK, FEATURES_OK
from trivmm.virtio.setup import DeviceLimits, DriverSetup, queue_fault

__all__ = ["COMMON_SIZE", "DEVICE_STATUS", "VECTORS", "CommonConfig"]

COMMON_SIZE: Final = 56
DEVICE_STATUS: Final = 0x14
VECTORS: Final = (0x10, 0x1A)  # of the configuration, of the selected queue
FIELDS: Final = tuple(field.name for field in attrs.fields(QueueState))
ADDRESSES: Final = {0x20: "desc_gpa", 0x28: "avail_gpa", 0x30: "used_gpa"}


class CommonConfig:
    """``status()`` is device_status, which settles features (FEATURES_OK) and queues (DRIVER_OK)."""

    def __init__(self, limits: DeviceLimits, status: Callable[[], int]) -> None:
        self.limits = limits
        self.generation = 0
        self._status = status
        self._unused = [QueueState.unused(size) for size in limits.queue_sizes]
        self.reset()

    def reset(self) -> None:
        self.device_feature_select = self.driver_feature_select = 0
        self.acked = 0
        self.config_vector = NO_VECTOR
        self.queue_select = 0
        self.queues = list(self._unused)

    def setup(self) -> DriverSetup:
        """What the driver has set up until now."""
        return DriverSetup(self.acked, tuple(self.queues))

    @property
    def _selected(self) -> QueueState | None:
        return self.queues[self.queue_select] if self.queue_select < len(self.queues) else None

    # --- reading ---------------------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> bytes:
        found = self._field(offset, size)
        if found is None:
            return self._part(offset, size)
        return found.to_bytes(size, "little")

    def _part(self, offset: int, size: int) -> bytes:
        """Of the field around it, if there is one."""
        if offset % size == 0:
            for width in (2, 4):
                at = offset & (width - 1)
                if size < width and (whole := self._field(offset - at, width)) is not None:
                    return whole.to_bytes(width, "little")[at : at + size]
        return b"\xff" * size

    def _field(self, offset: int, size: int) -> int | None:
        queue = self._selected
        match offset, size:
            case 0x00, 4:
                return self.device_feature_select
            case 0x04, 4:
                select = self.device_feature_select
                return self.limits.features >> 32 * select & 0xFFFF_FFFF if select < 2 else 0
            case 0x08, 4:
                return self.driver_feature_select
            case 0x0C, 4:
                select = self.driver_feature_select
                return self.acked >> 32 * select & 0xFFFF_FFFF if select < 2 else 0
            case 0x10, 2:
                return self.config_vector
            case 0x12, 2:
                return len(self.queues)
            case 0x14, 1:
                return self._status()
            case 0x15, 1:
                return self.generation & 0xFF
            case 0x16, 2:
                return self.queue_select
            case 0x18, 2:
                return queue.size if queue else 0
            case 0x1A, 2:
                return queue.vector if queue else NO_VECTOR
            case 0x1C, 2:
                return int(queue.enabled) if queue else 0
            case 0x1E, 2:
                return self.queue_select if queue else 0
            case ((0x20 | 0x28 | 0x30 | 0x24 | 0x2C | 0x34), 4):
                whole = self._address(offset & ~7)
                return whole >> 8 * (offset & 4) & 0xFFFF_FFFF
            case ((0x20 | 0x28 | 0x30), 8):
                return self._address(offset)
        return None

    def _address(self, offset: int) -> int:
        queue = self._selected
        return 0 if queue is None else int(getattr(queue, ADDRESSES[offset]))

    # --- writing ---------------------------------------------------------------------------------------------

    def write(self, offset: int, data: bytes) -> None:
        """Everything but device_status, which is the :class:`~trivmm.virtio.status.StatusRegister`'s."""
        value = int.from_bytes(data, "little")
        match offset, len(data):
            case 0x00, 4:
                self.device_feature_select = value
            case 0x08, 4:
                self.driver_feature_select = value
            case 0x0C, 4:
                self._ack(value)
            case 0x10, 2:
                self.config_vector = self._vector(value)
            case 0x16, 2:
                self.queue_select = value
            case _:
                self._write_queue(offset, len(data), value)

    def _ack(self, value: int) -> None:
        select = self.driver_feature_select
        if select < 2 and not self._status() & FEATURES_OK:  # settled once it is (section 3.1.1)
            self.acked = self.acked & ~(0xFFFF_FFFF << 32 * select) | value << 32 * select

    def _vector(self, value: int) -> int:
        return value if value < self.limits.vectors else NO_VECTOR

    def _write_queue(self, offset: int, size: int, value: int) -> None:
        queue = self._selected
        if queue is None:
            return
        if (offset, size) == (0x1A, 2):
            self._change("vector", self._vector(value))
            return
        if queue.enabled or self._status() & DRIVER_OK:
            return  # a live queue's registers are settled (section 4.1.4.3.2)
        match offset, size:
            case 0x18, 2:
                if 0 < value <= self.limits.queue_sizes[self.queue_select] and not value & (value - 1):
                    self._change("size", value)
            case 0x1C, 2:
                self._change("enabled", value == 1)
            case ((0x20 | 0x24 | 0x28 | 0x2C | 0x30 | 0x34), 4):
                shift, at = 8 * (offset & 4), offset & ~7
                whole = self._address(at) & ~(0xFFFF_FFFF << shift) | value << shift
                self._change(ADDRESSES[at], whole)
            case ((0x20 | 0x28 | 0x30), 8):
                self._change(ADDRESSES[offset], value)

    def _change(self, field: str, value: int | bool) -> None:
        queue = self.queues[self.queue_select]
        values: Any = (value if name == field else getattr(queue, name) for name in FIELDS)
        self.queues[self.queue_select] = QueueState(*values)  # a third of attrs.evolve, and drivers write a lot

    # --- state -----------------------------------------------------------------------------------------------

    def save(self, setup: DriverSetup | None) -> RegistersState:
        """``setup`` is what the device works with, if there is one: it has the queues' positions."""
        where = self.queues if setup is None else setup.queues
        return RegistersState(
            device_feature_select=self.device_feature_select,
            driver_feature_select=self.driver_feature_select,
            features=self.acked,
            config_vector=self.config_vector,
            queue_select=self.queue_select,
            generation=self.generation & 0xFF,
            queues=tuple(
                attrs.evolve(queue, next_avail=at.next_avail, next_used=at.next_used)
                for queue, at in zip(self.queues, where, strict=True)
            ),
        )

    def check(self, state: RegistersState, where: str) -> None:
        """:raises ProtocolError: for what no driver can have written."""
        limits = self.limits
        if len(state.queues) != len(limits.queue_sizes):
            raise refused(f"{where}.queues", len(state.queues), f"{len(limits.queue_sizes)} of them")
        for index, queue in enumerate(state.queues):
            fault = queue_fault(index, queue, limits)
            if fault is not None:
                raise refused(f"{where}.{fault.field}", fault.value, fault.wanted)
        if state.config_vector >= limits.vectors and state.config_vector != NO_VECTOR:
            raise refused(f"{where}.config_vector", state.config_vector, f"below {limits.vectors}, or {NO_VECTOR}")

    def load(self, state: RegistersState) -> None:
        """Take over what :meth:`check` has passed. Positions are the device's, which gets them with its setup."""
        self.device_feature_select = state.device_feature_select
        self.driver_feature_select = state.driver_feature_select
        self.acked = state.features
        self.config_vector = state.config_vector
        self.queue_select = state.queue_select
        self.generation = state.generation
        self.queues = [attrs.evolve(queue, next_avail=0, next_used=0) for queue in state.queues]
