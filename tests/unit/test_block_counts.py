"""A disk's counters: added over queues and lives, shown as Cloud Hypervisor shows them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trivmm._native import ffi, lib
from trivmm.virtio.block.counts import BlockCounts, Flow

requests = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 10**12)))


def flow_of(served: list[tuple[int, int]]) -> Flow:
    return sum((Flow(1, size, took, took, took) for size, took in served), Flow())


def test_latencies_are_whole_microseconds() -> None:
    assert flow_of([(512, 1_999), (1024, 3_000)]).shown("read") == {
        "read_bytes": 1536,
        "read_ops": 2,
        "read_latency_min": 1,
        "read_latency_max": 3,
        "read_latency_avg": 2,
    }


@given(requests, requests)
def test_two_queues_count_as_one(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> None:
    assert flow_of(first) + flow_of(second) == flow_of(first + second)
    shown = flow_of(first + second).shown("write")
    if first or second:
        assert shown["write_latency_min"] <= shown["write_latency_avg"] <= shown["write_latency_max"]


def test_a_read_in_the_middle_of_a_request_stays_between_the_extremes() -> None:
    ahead = Flow(ops=1, total_ns=50_000, least_ns=20_000, most_ns=30_000)
    assert ahead.shown("read")["read_latency_avg"] == 30


def test_a_new_worker_has_counted_nothing() -> None:
    native = ffi.new("struct tv_block *")
    lib.tv_block_init(native)
    assert BlockCounts.of(native) == BlockCounts()
