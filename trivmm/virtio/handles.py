"""What only this process has of a device: eventfds that notifications signal, and its interrupts. Never saved.

Owned by the transport and as long-lived: nothing here moves, so a worker's C thread may keep pointers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import attrs

from trivmm._native import ffi, lib

__all__ = ["DeviceHandles", "QueueHandle"]


@attrs.frozen(eq=False)
class QueueHandle:
    """``doorbell`` is the eventfd that a notification signals, ``irq`` the queue's interrupt as the C worker sees it
    (cffi ``struct tv_irq *``)."""

    doorbell: int
    irq: Any


class DeviceHandles:
    """``queues`` by index. Any thread may use them."""

    def __init__(self, queues: int) -> None:
        self._isr = ffi.new("uint32_t *")
        self._config_irq = self._new_irq()
        self.queues: tuple[QueueHandle, ...] = ()
        try:
            for _ in range(queues):
                doorbell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                self.queues += (QueueHandle(doorbell, self._new_irq()),)
        except BaseException:
            self.close()
            raise

    def _new_irq(self) -> Any:
        irq = ffi.new("struct tv_irq *")
        irq.fd, irq.isr = -1, self._isr
        return irq

    def route(self, config_fd: int, queue_fds: Sequence[int]) -> None:
        """The eventfds that interrupts signal from now on, -1 for none: a worker sees the new one at its next."""
        lib.tv_irq_set_fd(self._config_irq, config_fd)
        for queue, fd in zip(self.queues, queue_fds, strict=True):
            lib.tv_irq_set_fd(queue.irq, fd)

    def ring(self, index: int) -> None:
        """Notify a queue; one that isn't there is the guest's mistake."""
        if index < len(self.queues):
            os.eventfd_write(self.queues[index].doorbell, 1)

    def signal_config_change(self) -> None:
        """The configuration-change interrupt."""
        lib.tv_irq_signal(self._config_irq, lib.TV_ISR_CONFIG)

    def take_isr(self) -> int:
        """The ISR status (virtio 1.2 section 4.1.4.5), which reading clears."""
        return int(lib.tv_isr_take(self._isr)) & 0xFF

    @property
    def isr(self) -> int:
        return int(self._isr[0]) & 0xFF

    @isr.setter
    def isr(self, value: int) -> None:
        self._isr[0] = value

    def close(self) -> None:
        """After every worker and vCPU has ended. Idempotent."""
        queues, self.queues = self.queues, ()
        for queue in queues:
            os.close(queue.doorbell)
