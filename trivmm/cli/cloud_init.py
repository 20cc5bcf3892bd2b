"""``--cloud-init``: a disk that tells the guest's cloud-init who it is, made of some files when the VM is started."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from trivmm.errors import ConfigError
from trivmm.image.output import source_date
from trivmm.image.seed import SEED_FILES, write_seed
from trivmm.syntax import parse_pairs

__all__ = ["CloudInit", "parse_cloud_init"]

OPTION: Final = "--cloud-init"
ID: Final = "cloud-init"


@attrs.frozen
class CloudInit:
    """``parts``: where each of the seed's files is. ``path``: where the seed is, which has a name of its own because a
    migration's destination, and every reboot, opens it by that."""

    parts: Mapping[str, Path]
    path: str

    def disk(self) -> dict[str, Any]:
        """As the body of vm.create has it."""
        return {"path": self.path, "readonly": True, "image_type": "Raw", "id": ID}

    def write(self) -> None:
        """:raises ConfigError:"""
        write_seed(OPTION, self.parts, Path(self.path), source_date())


def parse_cloud_init(text: str) -> CloudInit:
    """``user-data=FILE,meta-data=FILE,…``; reads none of them. :raises ConfigError:"""
    given = parse_pairs(OPTION, text, (*SEED_FILES, "path"), SEED_FILES[0])
    for key, value in given.items():
        if not value or "\0" in value:
            raise ConfigError(f"{OPTION} {key}", value, "no path", f"give {key}=FILE")
    if SEED_FILES[0] not in given:
        raise ConfigError(OPTION, text, "no user-data", "give user-data=FILE")
    path = given.pop("path", f"{given[SEED_FILES[0]]}.seed")
    return CloudInit({name: Path(file) for name, file in given.items()}, path)
