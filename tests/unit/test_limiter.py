"""Token buckets (ffi/limit.c), their options and their JSON, beside a model that does the same sums with fractions."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivmm._native import ffi, lib
from trivmm.config import DiskConfig, PayloadConfig, RateLimiterConfig, TokenBucketConfig, VmConfig
from trivmm.control.schema import dump_config, load_config
from trivmm.errors import ConfigError
from trivmm.virtio.block.kind import BLOCK
from trivmm.virtio.queue.limiter import make_limiter

MS = 1_000_000
MAX = (1 << 64) - 1
LONGEST = (1 << 63) - 1  # ns: longer is not told


def bucket(size: int, burst: int, refill_ms: int, now: int = 0) -> Any:
    made = ffi.new("struct tv_bucket *")
    lib.tv_bucket_init(made, size, burst, refill_ms, now)
    return made


def test_a_full_bucket_a_burst_once_and_then_the_rate() -> None:
    tokens = bucket(100, 50, 1000)
    assert lib.tv_bucket_take(tokens, 50, 0) == 0, "the burst"
    assert lib.tv_bucket_take(tokens, 100, 0) == 0, "what it holds"
    assert lib.tv_bucket_take(tokens, 1, 0) == 10 * MS
    assert lib.tv_bucket_take(tokens, 10, 50 * MS) == 50 * MS
    assert lib.tv_bucket_take(tokens, 10, 100 * MS) == 0
    assert lib.tv_bucket_take(tokens, 100, 1000 * MS) == 100 * MS
    assert lib.tv_bucket_take(tokens, 150, 99_000 * MS) == 0, "a full one does for more than it holds"
    assert lib.tv_bucket_take(tokens, 1, 99_000 * MS) == 510 * MS, "which is paid for before the next"


def test_no_size_or_no_time_is_no_limit() -> None:
    for size, refill in ((0, 1000), (100, 0)):
        assert lib.tv_bucket_take(bucket(size, 0, refill), MAX, 0) == 0


@given(
    st.integers(1, 1 << 62),
    st.integers(0, 1 << 62),
    st.integers(1, 1 << 40),
    st.lists(st.tuples(st.integers(0, 1 << 62), st.integers(0, 1 << 50)), max_size=20),
)
def test_the_rate_holds_and_a_wait_is_as_long_as_it_says(
    size: int, burst: int, refill_ms: int, takes: list[tuple[int, int]]
) -> None:
    """What was taken is never more than was earned, burst and one debt aside; and who waits as told gets it."""
    tokens = bucket(size, burst, refill_ms)
    rate = Fraction(size, refill_ms * MS)
    now, taken, largest = 0, 0, 0
    for wanted, passed in takes:
        now += passed
        wait = lib.tv_bucket_take(tokens, wanted, now)
        if wait == LONGEST:
            return
        if wait:
            now += wait
            assert lib.tv_bucket_take(tokens, wanted, now) == 0
        taken, largest = taken + wanted, max(largest, wanted)
        assert taken <= size + burst + now * rate + largest
        assert -(1 << 63) <= tokens.tokens <= size


@given(*[st.integers(0, MAX)] * 5)
def test_any_numbers_are_survived(size: int, burst: int, refill: int, wanted: int, now: int) -> None:
    tokens = bucket(size, burst, refill)
    for at in (0, now, MAX, now):
        lib.tv_bucket_take(tokens, wanted, at)


def test_both_or_none() -> None:
    limiter = make_limiter(RateLimiterConfig(TokenBucketConfig(1000, 1000), TokenBucketConfig(2, 1000)))
    now = int(limiter.bytes.at_ns)
    assert lib.tv_limiter_take(limiter, 600, 1, now) == 0
    assert lib.tv_limiter_take(limiter, 600, 1, now) == 200 * MS
    assert int(limiter.ops.tokens) == 1, "not spent on what was refused"
    assert lib.tv_limiter_take(limiter, 400, 1, now) == 0
    assert lib.tv_limiter_take(limiter, 0, 1, now) == 500 * MS
    assert lib.tv_limiter_refused(limiter) == 2


def test_nothing_to_limit_is_no_limiter() -> None:
    for config in (None, RateLimiterConfig(), RateLimiterConfig(TokenBucketConfig(0, 100), TokenBucketConfig(5, 0))):
        assert make_limiter(config) == ffi.NULL


def test_options_and_json_say_the_same() -> None:
    text = "path=/d,bw_size=1M,bw_refill_time=100,ops_size=500,ops_one_time_burst=50,ops_refill_time=1000,direct=on"
    parsed = BLOCK.option.parse("--disk", text)
    body = {"payload": {"kernel": "/k"}, "disks": [parsed]}
    config = load_config(body)
    assert config.disks[0].direct
    assert config.disks[0].rate_limiter_config == RateLimiterConfig(
        TokenBucketConfig(1 << 20, 100), TokenBucketConfig(500, 1000, 50)
    )
    assert load_config(dump_config(config)) == config
    only = load_config(
        {**body, "disks": [{"path": "/d", "rate_limiter_config": {"ops": {"size": 1, "refill_time": 2}}}]}
    )
    assert only.disks[0].rate_limiter_config == RateLimiterConfig(None, TokenBucketConfig(1, 2))
    assert dump_config(only)["disks"][0]["rate_limiter_config"] == {
        "ops": {"size": 1, "refill_time": 2, "one_time_burst": 0}
    }
    assert "rate_limiter_config" not in dump_config(VmConfig(PayloadConfig("/k"), disks=["/d"]))["disks"][0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("path=/d,bw_size=1M", "--disk bw_refill_time = 0: missing for a limit; give it"),
        ("path=/d,ops_one_time_burst=1", "--disk ops_size = 0: missing for a limit; give it"),
        ("path=/d,ops_size=x", '--disk ops_size = "x": not a number'),
    ],
)
def test_half_an_option_is_a_mistake(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BLOCK.option.parse("--disk", text)
    assert str(caught.value).startswith(said)
    assert "rate_limiter_config" not in BLOCK.option.parse("--disk", "path=/d,bw_size=0,ops_size=0,ops_refill_time=0")


@pytest.mark.parametrize(
    ("limiter", "said"),
    [
        ({"bandwidth": {"size": 1}}, "disks[0].rate_limiter_config.bandwidth.refill_time = null: missing"),
        (
            {"bandwidth": {"size": "1", "refill_time": 1}},
            'disks[0].rate_limiter_config.bandwidth.size = "1": wrong type',
        ),
        ({"ops": {"size": 1 << 63, "refill_time": 1}}, "rate_limiter_config.size = 9223372036854775808: out of range"),
        ({"ops": 5}, "disks[0].rate_limiter_config.ops = 5: not an object"),
        (7, "disks[0].rate_limiter_config = 7: not an object"),
    ],
)
def test_mistakes_in_json_are_named(limiter: object, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"payload": {"kernel": "/k"}, "disks": [{"path": "/d", "rate_limiter_config": limiter}]})
    assert str(caught.value).startswith(said)


def test_a_serial_is_at_most_what_a_driver_can_read() -> None:
    DiskConfig("/d", serial="x" * 20)
    with pytest.raises(ConfigError, match=r"disks\.serial = .*: too long; give at most 20 bytes"):
        DiskConfig("/d", serial="x" * 21)
