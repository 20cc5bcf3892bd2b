"""What the one who sends a machine may ask for."""

from __future__ import annotations

import enum
from typing import Final

import attrs

from trivmm.errors import ConfigError

__all__ = ["SendOptions", "TimeoutStrategy"]

LONGEST: Final = 1e9  # seconds or milliseconds: decades, and days


class TimeoutStrategy(enum.Enum):
    """What happens when time is up without convergence; spelled as in Cloud Hypervisor's contract."""

    CANCEL = "Cancel"  # the source goes on
    IGNORE = "Ignore"  # it is switched over, however long that takes


def _strategy(value: object) -> TimeoutStrategy:
    try:
        return TimeoutStrategy(value)
    except ValueError:
        known = " or ".join(each.value for each in TimeoutStrategy)
        raise ConfigError("timeout_strategy", value, "unknown", f"give {known}") from None


def _at_least_1(instance: object, attribute: attrs.Attribute[float], value: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(attribute.name, value, "not a number", "give 1 or more")
    if not value >= 1:  # nor is NaN
        raise ConfigError(attribute.name, value, "too small", "give 1 or more")
    if not value <= LONGEST:
        raise ConfigError(attribute.name, value, "too large", f"give {LONGEST:g} at most")


@attrs.frozen
class SendOptions:
    """``downtime_ms`` and ``timeout_s`` None take the VM's own deadlines (300 ms, 3600 s unless configured).

    :raises ConfigError: naming the option."""

    downtime_ms: float | None = attrs.field(default=None, validator=attrs.validators.optional(_at_least_1))
    timeout_s: float | None = attrs.field(default=None, validator=attrs.validators.optional(_at_least_1))
    timeout_strategy: TimeoutStrategy = attrs.field(default=TimeoutStrategy.CANCEL, converter=_strategy)
