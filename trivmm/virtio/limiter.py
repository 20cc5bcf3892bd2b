"""Rate limiters as options: Cloud Hypervisor's token buckets, of any device that moves data. Pure."""

from __future__ import annotations

from typing import Any, Final

from trivmm.errors import ConfigError
from trivmm.syntax import Convert, Keys, parse_integer, parse_object
from trivmm.values import parse_size

__all__ = ["LIMITER_KEYS", "parse_limited"]

FIELD: Final = "rate_limiter_config"
BUCKETS: Final[dict[str, tuple[str, Convert]]] = {"bw": ("bandwidth", parse_size), "ops": ("ops", parse_integer)}
PARTS: Final = ("size", "one_time_burst", "refill_time")
LIMITER_KEYS: Final[Keys] = {
    f"{short}_{part}": (FIELD, parse_integer if part == "refill_time" else convert)
    for short, (_, convert) in BUCKETS.items()
    for part in PARTS
}
"""``bw_size``, ``bw_one_time_burst`` and ``bw_refill_time``, and the same of ``ops``."""


def parse_limited(option: str, text: str, keys: Keys, main: str) -> dict[str, Any]:
    """As ``parse_object``, of an option that has :data:`LIMITER_KEYS`. :raises ConfigError:"""
    flat = {key: (key if key in LIMITER_KEYS else name, convert) for key, (name, convert) in keys.items()}
    made = parse_object(option, text, flat, main)
    limiter = {}
    for short, (name, _) in BUCKETS.items():
        given = {part: made.pop(f"{short}_{part}", 0) for part in PARTS}
        if given["size"] and given["refill_time"]:
            limiter[name] = given
        elif any(given.values()):
            missing = "refill_time" if given["size"] else "size"
            raise ConfigError(f"{option} {short}_{missing}", given[missing], "missing for a limit", "give it")
    return made | ({FIELD: limiter} if limiter else {})
