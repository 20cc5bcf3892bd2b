"""Every request that Cloud Hypervisor's own client was recorded with, byte for byte, in every state of a VM's life.

Over real sockets, to a VMM whose CPUs alone are scripted; each answer is compared with the recorded one. Then the
recorded life itself, with what its bodies hold, and its events.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from trivmm.control.contract import NOT_YET_ROUTES
from trivmm.control.routes import ROUTES
from trivmm.testing.contract_table import REASONS, agree, markdown, read_book, replay_book, texts_of, why
from trivmm.testing.replay import STATES, WAITS, Answer, label_of, open_replay, pieces_of, route_of

ROOT: Final = Path(__file__).parents[2]
DATA: Final = ROOT / "tests" / "data"
BOOK: Final = read_book(DATA)
LIFE: Final = json.loads((DATA / "cloud-hypervisor-54.answers.json").read_text())
CONFIG: Final = next(each["body"]["config"] for each in LIFE["answers"] if "config" in (each["body"] or ()))
LIMIT_S: Final = 60
Outcomes = dict[str, dict[str, Answer]]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    return replay_book(BOOK, tmp_path_factory.mktemp("contract"))


@pytest.mark.parametrize("recorded", BOOK.requests, ids=label_of)
def test_a_request_is_sent_as_it_was_recorded(recorded: dict[str, Any]) -> None:
    head, _, body = b"".join(pieces_of(recorded)).partition(b"\r\n\r\n")
    assert head.decode().split("\r\n") == [recorded["request"], *recorded["headers"]]
    lengths = [header for header in recorded["headers"] if header.startswith("Content-Length")]
    assert lengths == ([] if recorded["body"] is None else [f"Content-Length: {len(body)}"])
    assert route_of(recorded) in {*ROUTES, *NOT_YET_ROUTES, "vm.nothing"}


def test_the_two_recordings_of_the_real_one_agree() -> None:
    labels = {recorded["request"].removesuffix(" HTTP/1.1"): label_of(recorded) for recorded in reversed(BOOK.requests)}
    same = 0
    for each in LIFE["answers"]:
        method, route = each["call"].split()
        theirs = BOOK.theirs.get(each["when"], {}).get(labels[f"{method} /api/v1/{route}"])
        if theirs is not None:
            assert theirs["answer"] == [each["status"], *(each["body"] if isinstance(each["body"], list) else ())]
            same += 1
    assert same == len(LIFE["answers"]) - 1  # the state after a failed migration is in one of them only


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("recorded", BOOK.requests, ids=label_of)
def test_the_outcome_is_the_recorded_one_or_differs_for_a_reason(
    ours: Outcomes, recorded: dict[str, Any], state: str
) -> None:
    answer, theirs = ours[state][label_of(recorded)], BOOK.theirs[state][label_of(recorded)]
    if answer.code in ("200", "204", WAITS):
        assert not texts_of(answer)
    else:
        assert answer.status == f"HTTP/1.1 {answer.code} "
        assert len(texts_of(answer)) >= 2
        assert all(isinstance(text, str) and text and "\n" not in text for text in texts_of(answer))
        assert answer.then == {"no VM": "no VM", "after vm.delete": "no VM", "after vm.shutdown": "Created"}.get(
            state, state
        )
    if agree(answer, theirs):
        return
    reason = why(recorded, answer)
    assert reason is not None, f"{answer}, where Cloud Hypervisor says {theirs}"
    if reason == "a":
        name = route_of(recorded)
        assert texts_of(answer) == ["Error from API", f"{name} failed", f"{name} is not supported yet"]


def test_the_table_in_the_docs_is_what_the_script_prints(ours: Outcomes) -> None:
    shown = (ROOT / "docs" / "cloud-hypervisor.md").read_text(encoding="utf-8")
    table = markdown(BOOK, ours)
    assert shown.split("<!-- outcomes -->\n")[1].split("\n<!-- /outcomes -->")[0] == table, (
        "copy what `python -m trivmm.testing.contract_table tests/data` prints"
    )
    assert all(f"\n- {key}: " in table for key in REASONS)  # none that excuses nothing


def test_a_difference_without_a_reason_is_no_table(ours: Outcomes) -> None:
    changed = {**ours, "Paused": {**ours["Paused"], "resume": Answer("HTTP/1.1 500 ", ["a", "b", "c"], "Paused")}}
    with pytest.raises(ValueError, match="Paused: resume: "):
        markdown(BOOK, changed)


# --- the recorded life ---------------------------------------------------------------------------------------------


def lacking(theirs: Any, ours: Any, at: str = "") -> list[str]:
    """What of the recorded JSON is not in ours, or is of another type there."""
    if type(theirs) is not type(ours):
        return [f"{at}: {ours!r} is no {type(theirs).__name__}"]
    if isinstance(theirs, dict):
        missing = [f"{at}.{key} is missing" for key in theirs if key not in ours]
        return missing + [
            fault for key in theirs if key in ours for fault in lacking(theirs[key], ours[key], f"{at}.{key}")
        ]
    if isinstance(theirs, list):
        if len(theirs) != len(ours):
            return [f"{at}: {len(ours)} of {len(theirs)}"]
        return [fault for index, item in enumerate(theirs) for fault in lacking(item, ours[index], f"{at}[{index}]")]
    return []


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ({"a": {"b": 1}}, ".a.c is missing"),
        ({"a": {"b": True, "c": []}}, ".a.b: True is no int"),
        ({"a": {"b": 1, "c": [1]}}, ".a.c: 1 of 0"),
    ],
)
def test_what_is_lacking_is_found(ours: Any, said: str) -> None:
    assert lacking({"a": {"b": 1, "c": []}}, ours) == [said]


async def test_the_recorded_life(tmp_path: Path) -> None:
    """The real one tells what it only tries, too; what was done is told by both, in the same order."""
    image, serial = tmp_path / "d.img", tmp_path / "ser"
    image.write_bytes(bytes(1 << 20))
    config = json.loads(json.dumps(CONFIG).replace('"d.img"', json.dumps(str(image))))
    config["serial"]["file"] = str(serial)
    move = next(each["body"] for each in BOOK.requests if route_of(each) == "vm.send-migration")
    told: list[tuple[str, str]] = []
    async with open_replay(tmp_path, config) as replay:
        replay.vmm.events.listen(lambda event: told.append((event.source, event.event)))
        with replay.vmm.events.subscribe() as events, trio.fail_after(LIMIT_S):
            for each in LIFE["answers"]:
                method, route = each["call"].split()
                body = {"vm.create": config, "vm.send-migration": move}.get(route)
                status, said = await replay.call(method, route, body)
                assert status == each["status"], each
                if isinstance(each["body"], list):
                    assert said[:2] == each["body"][:2]
                    continue
                assert lacking(each["body"], said, route) == []
                if route == "vm.info":
                    theirs = each["body"]
                    assert said["state"] == theirs["state"]
                    assert said["memory_actual_size"] == theirs["memory_actual_size"]
                    assert ("device_tree" in said) == ("device_tree" in theirs)
                    disks = [{**disk, "path": str(image)} for disk in theirs["config"]["disks"]]
                    for device in (*said["config"]["disks"], said["config"]["rng"]):
                        device.pop("pci_device_id", None)  # ours says it once the device has a slot, which it keeps
                    assert said["config"] == {**theirs["config"], "disks": disks, "serial": config["serial"]}
                if route == "vm.send-migration":
                    async for event in events:
                        if event.event == "migration-failed":
                            break
    pieces = [json.loads(piece) for piece in LIFE["events"].split("\n\n") if piece.strip()]
    theirs = [(piece["source"], piece["event"]) for piece in pieces]
    assert {*theirs} <= {*told, ("vmm", "starting")}
    trying = [name for _, name in theirs if name.endswith("ing")]
    done = [each for each in theirs if each[1] not in trying]
    assert [each for each in told if each in done] == done
    for name in ("boot", "paus", "resum", "reboot"):  # here what is begun is also done
        assert [event for _, event in told if event.startswith(name)] == [f"{name}ing", f"{name}ed"]
