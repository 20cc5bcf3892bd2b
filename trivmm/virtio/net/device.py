"""virtio-net (virtio 1.2 section 5.1) over a tap or a unix socket: ``ffi/net.c``, a worker a pair of queues.

Queues 2N and 2N + 1 receive and transmit, the last one has commands. Offloads are a tap's, since only it has
virtio-net headers; the rest is every link's. The link is always up: a peer that comes and goes is a cable that loses
frames for a while, not one that is pulled out, so that a peer's migration costs a guest no more than that.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Final

import attrs
import trio

from trivmm._native import ffi, lib
from trivmm.memory.guest import GuestMemory
from trivmm.values import U64, Exactly, Within
from trivmm.virtio.device import RING_FEATURES, WorkerDevice
from trivmm.virtio.handles import QueueHandle
from trivmm.virtio.net.config import MAX_PAIRS, NetConfig, mac_bytes
from trivmm.virtio.net.link import NetLinks
from trivmm.virtio.queue import QueueWorker
from trivmm.virtio.setup import DriverSetup

__all__ = ["NetDevice", "NetState"]

logger = logging.getLogger(__name__)

COMMON: Final = (
    lib.TV_NET_F_MAC
    | lib.TV_NET_F_MRG_RXBUF
    | lib.TV_NET_F_STATUS
    | lib.TV_NET_F_CTRL_VQ
    | lib.TV_NET_F_CTRL_MAC_ADDR
    | lib.TV_NET_F_GUEST_ANNOUNCE
)
CHECKSUM: Final = lib.TV_NET_F_CSUM | lib.TV_NET_F_GUEST_CSUM
TSO: Final = (
    lib.TV_NET_F_HOST_TSO4
    | lib.TV_NET_F_HOST_TSO6
    | lib.TV_NET_F_HOST_ECN
    | lib.TV_NET_F_GUEST_TSO4
    | lib.TV_NET_F_GUEST_TSO6
    | lib.TV_NET_F_GUEST_ECN
)
UFO: Final = lib.TV_NET_F_HOST_UFO | lib.TV_NET_F_GUEST_UFO
CONTROL_SIZE: Final = 64  # of the command queue: a driver waits for each answer
CONFIG: Final = struct.Struct("<6sHHH")  # section 5.1.4: mac, status, max_virtqueue_pairs, mtu
ANNOUNCEMENTS: Final = 5  # after a move, as many as QEMU sends
SAID: Final = {
    "rx_malformed": "received what is no frame",
    "tx_malformed": "was given frames to send that are none, or whose headers lie",
}


@attrs.frozen
class NetState:
    """What a driver has chosen. ``begun``: there is one; before, the rest means nothing."""

    mac: Annotated[bytes, Exactly(6)]
    pairs: Annotated[int, Within(1, MAX_PAIRS)]
    offloads: U64
    begun: bool


def features_of(config: NetConfig) -> int:
    """What is offered: by the configuration alone, so that a destination, which has no link yet, offers the same."""
    features = RING_FEATURES | COMMON
    if config.is_tap:
        features |= lib.TV_NET_F_CTRL_GUEST_OFFLOADS
        features |= CHECKSUM if config.offload_csum else 0
        features |= TSO if config.offload_tso else 0
        features |= UFO if config.offload_ufo else 0
    if config.mtu is not None:
        features |= lib.TV_NET_F_MTU
    if config.pairs > 1:
        features |= lib.TV_NET_F_MQ
    return int(features)


class NetDevice(WorkerDevice):
    """``incoming``: its link waits for a migration's COMMIT; ``passt_s``: how long for passt (the deadline ``passt``).
    Owns its links."""

    device_type = 1
    state_type = NetState

    def __init__(
        self, config: NetConfig, memory: GuestMemory, name: str, *, incoming: bool = False, passt_s: float = 2.0
    ) -> None:
        """:raises ConfigError: naming what is wrong with what it is tied to."""
        super().__init__(config.id or name, memory)
        self._pairs = config.pairs
        self._mtu = config.mtu or 0
        self._mac = mac_bytes(config.mac)
        self.features = features_of(config)
        self.queue_sizes = (config.queue_size,) * config.num_queues + (CONTROL_SIZE,)
        self.links = NetLinks(config, incoming=incoming, passt_s=passt_s)
        self.storage = self.links
        self._net = ffi.new("struct tv_net *")
        lib.tv_net_init(self._net, self._mac, config.pairs)
        for at, native in enumerate(self.links.natives):
            self._net.links[at] = native
        self._features = 0  # of the driver that is there
        self._begun = False
        self._moved = False  # loaded, and not announced yet
        self._ended: dict[str, int] = {}  # counts of workers that have ended
        self._said: set[str] = set()

    # --- configuration space -------------------------------------------------------------------------------------

    @property
    def mac(self) -> bytes:
        """As the driver has set it, or was told."""
        return int(self._net.mac).to_bytes(8, "little")[:6]

    def read_config(self, offset: int, size: int) -> bytes:
        space = CONFIG.pack(self.mac, int(self._net.status), self._pairs, self._mtu)
        return space[offset : offset + size].ljust(size, b"\xff")

    # --- queues --------------------------------------------------------------------------------------------------

    def _shared_out(self, queues: Sequence[int]) -> list[Sequence[int]]:
        """Queues by pair; commands are the first pair's. Without MQ there is one pair, and the third queue has the
        commands (section 5.1.2), however many there are."""
        pairs = self._pairs_in_use
        control = 2 * pairs if self._features & lib.TV_NET_F_CTRL_VQ else -1
        shared: dict[int, list[int]] = {}
        for queue in queues:
            if queue == control:
                shared.setdefault(0, []).append(queue)
            elif queue < 2 * pairs:
                shared.setdefault(queue // 2, []).append(queue)
        return list(shared.values())

    def _worker_of(self, queues: Sequence[int], features: int) -> Any:
        pair = min(queues) // 2 if min(queues) < 2 * self._pairs_in_use else 0
        native = ffi.gc(ffi.new("struct tv_net_worker *"), partial(_free, self))
        if lib.tv_net_worker_init(native, self._net, pair):
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        if pair == 0 and self._moved:
            native.announce = ANNOUNCEMENTS
            self._moved = False
        return native

    @property
    def _pairs_in_use(self) -> int:
        return self._pairs if self._features & lib.TV_NET_F_MQ else 1

    async def activate(self, setup: DriverSetup, handles: Sequence[QueueHandle], workers: trio.Nursery) -> None:
        """:raises ValueError: when a queue's rings don't lie in RAM. :raises OSError: without descriptors."""
        self._features = setup.features
        lib.tv_net_begin(self._net, setup.features, self._begun)
        announces = bool(self._moved and setup.features & lib.TV_NET_F_GUEST_ANNOUNCE)
        if announces:
            self._net.status |= lib.TV_NET_S_ANNOUNCE
        await super().activate(setup, handles, workers)
        self._begun = True
        if announces or self._net.status & lib.TV_NET_S_ANNOUNCE:
            self.on_config_change()  # section 5.1.6.5.4: the driver knows more of what is to be announced

    def reset(self) -> None:
        super().reset()
        self._begun = self._moved = False
        lib.tv_net_reset(self._net, self._mac)

    # --- state ---------------------------------------------------------------------------------------------------

    def save(self) -> NetState:
        return NetState(self.mac, int(self._net.pairs), int(self._net.offloads), self._begun)

    def load(self, state: NetState) -> None:
        """What makes no sense for the driver's features is left out when it is taken up again."""
        self._begun = self._moved = state.begun
        if state.begun:
            self._net.mac = int.from_bytes(state.mac, "little")
            self._net.pairs, self._net.offloads = state.pairs, state.offloads

    # --- counters ------------------------------------------------------------------------------------------------

    def _count(self, worker: QueueWorker) -> None:
        for name, value in _counts(worker.native).items():
            self._ended[name] = self._ended.get(name, 0) + value
        for name, what in SAID.items():
            if self._ended[name] and name not in self._said:
                self._said.add(name)
                logger.warning("%s: %s (%d until now)", self.name, what, self._ended[name])

    def counters(self) -> dict[str, int]:
        """Frames and their bytes, without virtio-net headers, and what was dropped; ``link_`` is about peers."""
        counted = dict.fromkeys(NAMES, 0) | self._ended
        for worker in self._workers:
            for name, value in _counts(worker.native).items():
                counted[name] += value
        for name in ("connections", "violations"):
            counted[f"link_{name}"] = sum(int(getattr(native, name)) for native in self.links.natives)
        return counted

    def close(self) -> None:
        self.links.close()


NAMES: Final = (
    "rx_frames",
    "rx_bytes",
    "rx_malformed",
    "rx_long",
    "tx_frames",
    "tx_bytes",
    "tx_malformed",
    "tx_lost",
    "announced",
    "commands",
    "refused",
)


def _free(device: NetDevice, native: Any) -> None:
    """``device`` is what the worker's pointers point into: kept as long as a thread may follow them."""
    lib.tv_net_worker_free(native)


def _counts(native: Any) -> dict[str, int]:
    return {name: int(getattr(native.counts, name)) for name in NAMES}
