"""The rate limiter that the queue workers of a device share (``ffi/limit.h``)."""

from __future__ import annotations

import time
from typing import Any

from trivmm._native import ffi, lib
from trivmm.config import RateLimiterConfig

__all__ = ["make_limiter"]


def make_limiter(config: RateLimiterConfig | None) -> Any:
    """A ``struct tv_limiter *`` with full buckets, or NULL where nothing is limited."""
    if config is None or not any(each and each.size and each.refill_time for each in (config.bandwidth, config.ops)):
        return ffi.NULL
    limiter = ffi.new("struct tv_limiter *")
    for bucket, each in ((limiter.bytes, config.bandwidth), (limiter.ops, config.ops)):
        if each is not None:
            pointer = ffi.addressof(bucket)
            lib.tv_bucket_init(pointer, each.size, each.one_time_burst, each.refill_time, time.monotonic_ns())
    lib.tv_limiter_init(limiter)
    return limiter
