"""Sections of a VM's configuration that are devices of its ``virtio``: by option, by JSON, in vm.info and in SETUP."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from trivmm.cli.options import parse_vm
from trivmm.config import PayloadConfig, VmConfig
from trivmm.control.schema import dump_config, load_config
from trivmm.errors import ConfigError
from trivmm.state.setup import config_from_setup, config_to_setup
from trivmm.virtio.balloon.config import BalloonConfig
from trivmm.virtio.kinds import KINDS, sections
from trivmm.virtio.pmem.config import PmemConfig
from trivmm.virtio.watchdog.config import WatchdogConfig

OPTIONS = ["firmware", "kernel", "cmdline", "initramfs", "cpus", "memory", "serial", "platform", "pvpanic"]
OPTIONS += [kind.option.name for kind in KINDS]


def of_options(**given: Any) -> VmConfig:
    return load_config(parse_vm(SimpleNamespace(**{**dict.fromkeys(OPTIONS), "kernel": "/k", **given})))


def of_body(**given: Any) -> VmConfig:
    return load_config({"payload": {"kernel": "/k"}, **given})


@pytest.mark.parametrize(
    ("option", "body", "device"),
    [
        ({"balloon": ""}, {"balloon": {"size": 0}}, BalloonConfig()),
        (
            {"balloon": "size=1G,deflate_on_oom=on,free_page_reporting=on,id=b,addr=9"},
            {
                "balloon": {
                    "size": 1 << 30,
                    "deflate_on_oom": True,
                    "free_page_reporting": True,
                    "id": "b",
                    "pci_device_id": 9,
                    "iommu": False,
                }
            },
            BalloonConfig("1G", deflate_on_oom=True, free_page_reporting=True, id="b", pci_device_id=9),
        ),
        ({"pmem": ["file=/p"]}, {"pmem": [{"file": "/p"}]}, PmemConfig("/p")),
        (
            {"pmem": ["file=/p,size=4M,discard_writes=on,id=p,addr=9"]},
            {"pmem": [{"file": "/p", "size": 4 << 20, "discard_writes": True, "id": "p", "pci_device_id": 9}]},
            PmemConfig("/p", "4M", discard_writes=True, id="p", pci_device_id=9),
        ),
    ],
)
def test_an_option_and_a_body_say_the_same(option: dict[str, Any], body: dict[str, Any], device: Any) -> None:
    config = of_body(**body)
    assert of_options(**option).virtio == config.virtio == (device,)
    assert load_config(json.loads(json.dumps(dump_config(config)))) == config
    there = json.loads(json.dumps(config_to_setup(config, sections())))
    assert config_from_setup(there, sections()) == config


@pytest.mark.parametrize("flag", ["pvpanic", "watchdog"])
def test_a_device_that_is_there_or_not(flag: str) -> None:
    config = of_body(**{flag: True})
    assert (config.pvpanic, config.virtio) == ((True, ()) if flag == "pvpanic" else (False, (WatchdogConfig(),)))
    assert of_options(**{flag: True}) == config
    assert dump_config(config)[flag]
    assert load_config(json.loads(json.dumps(dump_config(config)))) == config
    assert config_from_setup(json.loads(json.dumps(config_to_setup(config, sections()))), sections()) == config
    assert not dump_config(of_body(**{flag: False}))[flag]
    with pytest.raises(ConfigError, match=rf"^{flag} = 1: wrong type; give true or false"):
        of_body(**{flag: 1})


def test_what_is_not_there_is_not_said() -> None:
    assert of_body(balloon=None) == of_body() == VmConfig(PayloadConfig("/k"))
    assert "balloon" not in dump_config(of_body())


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"balloon": {}}, "balloon.size = null: missing"),
        ({"balloon": []}, "balloon = []: not an object"),
        ({"balloon": {"size": "1G"}}, 'balloon.size = "1G": wrong type; give an integer'),
        ({"balloon": {"size": -1}}, "balloon.size = -1: wrong type; give an integer"),
        ({"balloon": {"size": 1.5}}, "balloon.size = 1.5: wrong type; give an integer"),
        ({"balloon": {"size": 0, "deflate_on_oom": 1}}, "balloon.deflate_on_oom = 1: wrong type; give true or false"),
        ({"balloon": {"size": 0, "id": "__x"}}, 'balloon.id = "__x": ids that begin with'),
        ({"balloon": {"size": 0, "iommu": True}}, "balloon.iommu = true: not supported yet"),
        ({"pmem": [{}]}, "pmem[0].file = null: missing"),
        ({"pmem": [{"file": 1}]}, "pmem[0].file = 1: wrong type; give text"),
        ({"pmem": [{"file": "/p", "size": 0}]}, "pmem.size = 0: not a multiple of 2 MiB; give 2097152"),
        ({"pmem": [{"file": "/p", "size": 3 << 20}]}, "pmem.size = 3145728: not a multiple of 2 MiB; give 4194304"),
        ({"pmem": [{"file": "/p", "pci_segment": 1}]}, "pmem[0].pci_segment = 1: not supported yet"),
    ],
)
def test_mistakes(body: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        of_body(**body)
    assert str(caught.value).startswith(said)
