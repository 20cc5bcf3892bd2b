"""The table of docs/cloud-hypervisor.md: what each request gets in each state, here and from Cloud Hypervisor.

``python -m trivmm.testing.contract_table tests/data`` prints it: our column is what a VMM answers while it runs, the
other one what was recorded. A difference without a reason is an error: see :func:`why`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs
import trio

from trivmm.control.contract import NOT_YET_ROUTES
from trivmm.testing.replay import STATES, Answer, Recorded, label_of, replay_in_states, route_of

__all__ = ["REASONS", "Book", "agree", "markdown", "read_book", "replay_book", "why"]

REASONS: Final[Mapping[str, str]] = {
    "a": "The verb does not exist here yet: 501 in every state, with its name.",
    "b": "A key asks for what does not exist here yet: it is refused by name, before the state is looked at.",
    "c": "A route of ours.",
}
OURS: Final = frozenset({"vm.migration-progress", "vm.cancel-migration", "events"})
NO_SUCH_KEYS: Final = ("connections = 4: not supported yet", "local = true: not supported yet")


@attrs.frozen
class Book:
    """What was recorded. ``theirs``: by state and label, ``{answer: [status line, texts…], then}``."""

    requests: Sequence[Recorded]
    theirs: Mapping[str, Mapping[str, Any]]
    config: Mapping[str, Any]


def read_book(folder: Path) -> Book:
    """From tests/data."""
    requests = json.loads((folder / "ch-remote-54.requests.json").read_text())
    recorded = json.loads((folder / "cloud-hypervisor-54.states.json").read_text())
    create = next(each["body"] for each in recorded["more"] if label_of(each) == "PUT vm.create")
    return Book([*requests, *recorded["more"]], recorded["states"], create)


def replay_book(book: Book, folder: Path) -> dict[str, dict[str, Answer]]:
    """What a VMM answers to all of it, by state and label. Its disk is made in ``folder``."""
    image = folder / "d.img"
    image.write_bytes(bytes(1 << 20))
    config = {**book.config, "disks": [{**each, "path": str(image)} for each in book.config["disks"]]}
    return trio.run(replay_in_states, [_elsewhere(each, folder) for each in book.requests], folder, config)


def _elsewhere(recorded: Recorded, folder: Path) -> Recorded:
    """A device that is added has what it opens in ``folder``: a disk an image, a network interface a socket, since a
    tap is not everybody's to make."""
    body, route = recorded["body"], route_of(recorded)
    if route == "vm.add-disk":
        image = folder / "added.img"
        image.write_bytes(bytes(1 << 20))
        moved = {**body, "path": str(image)}
    elif route == "vm.add-net":
        own = {key: item for key, item in body.items() if key not in ("tap", "ip", "mask")}
        moved = {**own, "num_queues": 2, "link": f"listen:{folder}/added.sock"}
    else:
        return recorded
    length = f"Content-Length: {len(json.dumps(moved, separators=(',', ':')))}"
    headers = [length if each.startswith("Content-Length:") else each for each in recorded["headers"]]
    return {**recorded, "headers": headers, "body": moved}


def texts_of(answer: Answer) -> list[str]:
    return answer.body if isinstance(answer.body, list) else []


def agree(ours: Answer, theirs: Mapping[str, Any]) -> bool:
    """The status line, what an error's first two texts are, and the state afterwards."""
    status, *texts = theirs["answer"]
    return (
        ours.status == status
        and texts_of(ours)[: len(texts[:2])] == texts[:2]
        and ("then" not in theirs or ours.then == theirs["then"])
    )


def why(recorded: Recorded, ours: Answer) -> str | None:
    """The key in :data:`REASONS` of a difference that is meant to be; None: there is none."""
    route, texts = route_of(recorded), texts_of(ours)
    if route in NOT_YET_ROUTES and ours.code == "501":
        return "a"
    if ours.code == "400" and texts[1].startswith(NO_SUCH_KEYS):
        return "b"
    return "c" if route in OURS and ours.code != "404" else None


def markdown(book: Book, ours: Mapping[str, Mapping[str, Answer]]) -> str:
    """:raises ValueError: a difference without a reason."""
    lines = [f"| request | {' | '.join(STATES)} |", "| --- |" + " --- |" * len(STATES)]
    used: set[str] = set()
    for recorded in book.requests:
        label = label_of(recorded)
        cells = []
        for state in STATES:
            mine, theirs = ours[state][label], book.theirs[state][label]
            if agree(mine, theirs):
                cells.append(mine.code)
                continue
            reason = why(recorded, mine)
            if reason is None:
                raise ValueError(f"{state}: {label}: {mine}, where Cloud Hypervisor says {theirs}")
            used.add(reason)
            there = theirs["answer"][0].removeprefix("HTTP/1.1 ").strip()
            cells.append(f"{mine.code} ({reason}: {there})")
        lines.append(f"| `{label}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {key}: {text}" for key, text in REASONS.items() if key in used)])


def main() -> None:
    book = read_book(Path(sys.argv[1]))
    with tempfile.TemporaryDirectory() as folder:
        print(markdown(book, replay_book(book, Path(folder))))


if __name__ == "__main__":
    main()
