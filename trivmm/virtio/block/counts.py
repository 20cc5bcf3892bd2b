"""What a disk counts, with the names and units of Cloud Hypervisor's vm.counters.

Latencies run from the moment a worker has the request to the moment its I/O is done, on the medium where the driver
asked for write-through; microseconds. Where nothing was read (or written) yet they are what Cloud Hypervisor answers
then: all ones, and all ones divided by its scale for the average.
"""

from __future__ import annotations

from typing import Any, Final

import attrs

from trivmm._native import ffi, lib

__all__ = ["BlockCounts", "Flow"]

NONE_YET: Final = (1 << 64) - 1
AVERAGE_SCALE: Final = 10_000  # Cloud Hypervisor keeps its average in 1/10000 microseconds
NS_IN_US: Final = 1000


@attrs.frozen
class Flow:
    """Requests of one direction that succeeded. ``least_ns`` and ``most_ns`` are neutral, not latencies, before the
    first one."""

    ops: int = 0
    bytes: int = 0
    total_ns: int = 0
    least_ns: int = NONE_YET
    most_ns: int = 0

    def __add__(self, other: Flow) -> Flow:
        return Flow(
            self.ops + other.ops,
            self.bytes + other.bytes,
            self.total_ns + other.total_ns,
            min(self.least_ns, other.least_ns),
            max(self.most_ns, other.most_ns),
        )

    def shown(self, name: str) -> dict[str, int]:
        least = most = NONE_YET
        average = NONE_YET // AVERAGE_SCALE
        if self.ops:
            least, most = self.least_ns // NS_IN_US, self.most_ns // NS_IN_US
            # Read field by field while the worker goes on, the sum may be a request ahead of the number.
            average = min(max(self.total_ns // self.ops // NS_IN_US, least), most)
        return {
            f"{name}_bytes": self.bytes,
            f"{name}_ops": self.ops,
            f"{name}_latency_min": least,
            f"{name}_latency_max": most,
            f"{name}_latency_avg": average,
        }


@attrs.frozen
class BlockCounts:
    """Of one queue, or added up. Ours beside Cloud Hypervisor's: ``flush_ops``, ``discard_ops``, ``write_zeroes_ops``;
    ``errors``, requests answered with another status than OK; ``io_errors``, those of these that are the image's fault;
    ``limited``, how often a request had to wait for the rate limiter."""

    read: Flow = Flow()
    write: Flow = Flow()
    flush_ops: int = 0
    discard_ops: int = 0
    write_zeroes_ops: int = 0
    errors: int = 0
    io_errors: int = 0
    limited: int = 0

    @classmethod
    def of(cls, native: Any) -> BlockCounts:
        """Of a ``struct tv_block``, whose worker may run."""
        counts = ffi.new("struct tv_block_counts *")
        lib.tv_block_count(native, counts)
        return cls(_flow(counts.read), _flow(counts.write), *(int(getattr(counts, name)) for name in PLAIN))

    def __add__(self, other: BlockCounts) -> BlockCounts:
        plain = (getattr(self, name) + getattr(other, name) for name in PLAIN)
        return BlockCounts(self.read + other.read, self.write + other.write, *plain)

    def shown(self) -> dict[str, int]:
        """``{read,write}_{bytes,ops,latency_min,latency_max,latency_avg}``, and what is ours."""
        ours = {name: getattr(self, name) for name in PLAIN}
        return {**self.read.shown("read"), **self.write.shown("write"), **ours}


PLAIN: Final = tuple(field.name for field in attrs.fields(BlockCounts) if field.name not in ("read", "write"))


def _flow(native: Any) -> Flow:
    return Flow(*(int(getattr(native, field.name)) for field in attrs.fields(Flow)))
