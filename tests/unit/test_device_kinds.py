"""Kinds of devices: where a VM's configuration holds them, and what does not belong there."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from trivmm.config import ConsoleConfig, DiskConfig, RngConfig, VmConfig
from trivmm.errors import ConfigError
from trivmm.testing.toy.config import ToyConfig
from trivmm.testing.toy.kind import TOY
from trivmm.virtio.kinds import KINDS, names_of


@pytest.mark.parametrize(
    ("device", "said"),
    [
        (1, "virtio[1] = 1: no kind of device; give one of "),
        (DiskConfig("a"), "virtio[1] = "),
        (RngConfig(), "virtio[1] = "),
        (ConsoleConfig("Null"), "virtio[1] = "),
    ],
)
def test_virtio_takes_devices_that_have_no_field_of_their_own(
    device: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk there would be left out of the machine, and nobody told."""
    monkeypatch.setattr("trivmm.virtio.kinds.KINDS", [*KINDS, TOY])
    with pytest.raises(ConfigError) as caught:
        names_of(VmConfig(virtio=[ToyConfig(), device]))
    assert str(caught.value).startswith(said)


def test_a_device_with_a_field_of_its_own_is_told_where_it_belongs() -> None:
    with pytest.raises(ConfigError, match="DiskConfig has a place of its own; give it in disks"):
        names_of(VmConfig(virtio=[DiskConfig("a")]))


def test_those_that_stand_for_no_device_stay_where_they_are() -> None:
    kind = attrs.evolve(TOY, present=lambda toy: toy.src != "off")
    config = VmConfig(virtio=[ToyConfig("off"), ToyConfig("a"), ToyConfig("off"), ToyConfig("b")])
    made = kind.put(config, [attrs.evolve(each, id=each.src) for each in kind.of(config)])
    assert made.virtio == (ToyConfig("off"), ToyConfig("a", "a"), ToyConfig("off"), ToyConfig("b", "b"))
