"""Whatever text a user, a guest or a peer brings, what comes of it is a named error: one printable line of bounded
length."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any, Final

import attrs
import pytest

from trivmm.cli import main, say_error
from trivmm.cli.log import set_up_log
from trivmm.cli.move import watch_move
from trivmm.cli.options import parse_deadlines, parse_receive, parse_send, parse_socket, parse_socket_path
from trivmm.cli.parser import UsageError
from trivmm.cli.run import parse_run
from trivmm.cli.table import table
from trivmm.config import ConsoleConfig, DiskConfig, MemoryConfig, PayloadConfig, RngConfig, SerialConfig
from trivmm.console import bytes_pattern
from trivmm.control.contract import NOT_YET_KEYS
from trivmm.control.http import Request
from trivmm.control.routes import Router
from trivmm.control.schema import CLASSES, NESTED, load_config, load_receive, load_send
from trivmm.errors import MAX_LINE, ConfigError, GuestCrash, TrivmmError, one_line, reason_of
from trivmm.migration.link.transports import parse_url
from trivmm.migration.options import SendOptions, TimeoutStrategy
from trivmm.notyet import NotYetObject
from trivmm.platform.debug_ports import DebugConsole

LONG: Final = "x" * 100_000
HALF: Final = "/tmp/\ud800"  # half a surrogate pair, which JSON can spell
SEQUENCE: Final = "\x1b[2J\x9b2K\r\ntrivmm: 0 ms <MainThread> CRITICAL:trivmm -- lies\u202e"
HOSTILE: Final = {"long": LONG, "half": HALF, "sequence": SEQUENCE, "zero": "a\0b"}
each_hostile = pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)


def is_fine(error: BaseException) -> None:
    said = str(error)
    assert isinstance(error, TrivmmError | UsageError), repr(error)[:200]
    assert said
    assert said.isprintable(), ascii(said[:200])
    assert len(said) <= MAX_LINE + 1


# --- every string key of every body ----------------------------------------------------------------------------

MINIMAL: Final[dict[str, dict[str, Any]]] = {
    "VmConfig": {"payload": {"kernel": "/k"}},
    "CpusConfig": {"boot_vcpus": 1, "max_vcpus": 1},
    "MemoryConfig": {"size": 2 << 20},
    "DiskConfig": {"path": "/d"},
    "RngConfig": {"src": "/dev/urandom"},
    "VsockConfig": {"cid": 3, "socket": "/v"},
    "SerialConfig": {"mode": "Null"},
    "ConsoleConfig": {"mode": "Null"},
    "BalloonConfig": {"size": 0},
    "PmemConfig": {"file": "/p"},
    "PayloadConfig": {"kernel": "/k"},
    "PlatformConfig": {},
    "SendMigrationData": {"destination_url": "unix:/x"},
    "ReceiveMigrationData": {"receiver_url": "unix:/x"},
}
LOADS: Final[dict[str, Callable[[Any], Any]]] = {
    "VmConfig": load_config,
    "SendMigrationData": load_send,
    "ReceiveMigrationData": load_receive,
    **{schema: lambda body, key=key: load_config({key: body}) for key, schema in NESTED.items()},
    "DiskConfig": lambda body: load_config({"disks": [body]}),
}


# An annotation is its text until somebody resolves it.
TEXTS: Final = ("str", str, "str | None", str | None, "TimeoutStrategy", TimeoutStrategy)


def _string_keys() -> Iterator[tuple[str, str]]:
    for schema, load in LOADS.items():
        assert load(MINIMAL[schema]) is not None
        for cls in CLASSES[schema]:
            for field in attrs.fields(cls):
                if field.type in TEXTS:
                    yield schema, field.name
        for key, default in NOT_YET_KEYS.get(schema, {}).items():
            if not isinstance(default, NotYetObject):
                yield schema, key


STRING_KEYS: Final = list(_string_keys())


@pytest.mark.parametrize(("schema", "key"), STRING_KEYS)
def test_every_string_key_of_every_body(schema: str, key: str) -> None:
    for name, text in HOSTILE.items():
        try:
            LOADS[schema]({**MINIMAL[schema], key: text})
        except TrivmmError as error:
            is_fine(error)
            said = str(error)
        else:
            said = key
            assert name == "sequence", "a path may have any characters but these"
        assert key in said


def test_there_are_such_keys() -> None:
    assert len(STRING_KEYS) > 60
    assert {("SendMigrationData", "timeout_strategy"), ("DiskConfig", "path")} <= set(STRING_KEYS)


@each_hostile
@pytest.mark.parametrize("wrap", [lambda text: {text: 1}, lambda text: text, lambda text: [text]])
def test_bodies_that_are_something_else(
    text: str, wrap: Callable[[str], Any], caplog: pytest.LogCaptureFixture
) -> None:
    for schema, load in LOADS.items():
        try:
            load(wrap(text) if not isinstance(wrap(text), dict) else {**MINIMAL[schema], **wrap(text)})
        except TrivmmError as error:
            is_fine(error)
    for record in caplog.records:
        assert record.getMessage().isprintable()
        assert len(record.getMessage()) < 300


# --- from Python -----------------------------------------------------------------------------------------------

PYTHON: Final[dict[str, Callable[[str], object]]] = {
    "kernel": PayloadConfig,
    "cmdline": lambda text: PayloadConfig("/k", text),
    "disk": DiskConfig,
    "disk id": lambda text: DiskConfig("/d", id=text),
    "disk type": lambda text: DiskConfig("/d", image_type=text),
    "rng": RngConfig,
    "serial": SerialConfig,
    "serial file": lambda text: SerialConfig("File", file=text),
    "console": ConsoleConfig,
    "console id": lambda text: ConsoleConfig(id=text),
    "memory": MemoryConfig,
    "strategy": lambda text: SendOptions(timeout_strategy=text),  # type: ignore[arg-type]
    "url": lambda text: parse_url(text, "destination_url"),
    "unix": lambda text: parse_url(f"unix:{text}", "destination_url"),
    "tcp port": lambda text: parse_url(f"tcp:host:{text}", "receiver_url"),
    "api socket": lambda text: parse_socket(f"path={text}"),
    "server": parse_socket_path,
    "deadlines": lambda text: parse_deadlines([text]),
    "deadline": lambda text: parse_deadlines([f"pause={text}"]),
    "send": parse_send,
    "send strategy": lambda text: parse_send(f"unix:/x,timeout_strategy={text}"),
    "receive": parse_receive,
    "pattern": bytes_pattern,
    **{
        f"run {words}": lambda text, words=words: parse_run([*words.split(), text])
        for words in ("--kernel /k --disk", "--kernel /k --cpus", "--kernel /k --memory", "--kernel /k --serial", "")
    },
    "option": lambda text: parse_run([f"--{text}"]),
}


@each_hostile
@pytest.mark.parametrize("what", PYTHON)
def test_from_python(what: str, text: str) -> None:
    try:
        PYTHON[what](text)
    except (TrivmmError, UsageError) as error:
        is_fine(error)


# --- what is asked of a server ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vm." + "x" * 15_000, "vm.\x1b[2J"])
async def test_a_route_is_not_repeated_at_length(name: str) -> None:
    for request in (Request("GET", name, b""), Request("x" * 15_000, "vm.info", b"")):
        answer = await Router(None)(request)  # type: ignore[arg-type]
        assert answer.status in (400, 404)
        assert answer.body is not None
        assert len(answer.body) < 600
        assert b"\x1b" not in answer.body


# --- on a terminal and in the log ------------------------------------------------------------------------------


def test_one_line() -> None:
    assert one_line("déjà vu ☃ 😀") == "déjà vu ☃ 😀"
    assert one_line("a\tb\x1b\x7f\x9b\u2028\ud800") == r"a\tb\u001b\u007f\u009b\u2028\ud800"
    assert one_line("abc", 3) == "abc"
    assert one_line("abcd", 3) == "abc…"
    assert one_line("\n" * 5, 3) == r"\n\…"
    assert reason_of(OSError(2, "No such file", "/a/path")) == "No such file"
    assert reason_of(ValueError()) == "ValueError"


def test_an_error_says_no_more_than_a_line() -> None:
    error = TrivmmError(SEQUENCE * 1000)
    is_fine(error)
    is_fine(ConfigError("a.key", LONG, LONG, LONG))
    is_fine(GuestCrash(0, SEQUENCE, f"rip {SEQUENCE}\nmore"))


def test_the_guests_debug_console_moves_no_cursor() -> None:
    lines: list[str] = []
    console = DebugConsole(lines.append)
    for byte in b"SeaBIOS \x1b[2J\x00\xff\xe2\x98\x83\tok\r\n" + b"\x01" * 1024 + b"end\n":
        console.write(0, bytes([byte]))
    assert lines == [r"SeaBIOS \u001b[2J\u0000\xff☃\tok", r"\u0001" * 1024, "end"]


def test_the_log_is_one_line_a_record(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "root", logging.RootLogger(logging.WARNING))
    set_up_log(None, 0)
    log = logging.root
    log.warning("the peer says: %s", SEQUENCE)
    try:
        raise ValueError(SEQUENCE)
    except ValueError:
        log.exception("failed")
    said = capsys.readouterr().err
    assert [line.partition("-- ")[2][:8] for line in said.splitlines() if not line.startswith("  ")] == [
        "the peer",
        "failed",
    ]
    assert all(line.isprintable() for line in said.split("\n"))
    assert "Traceback (most recent call last)" in said


@pytest.mark.parametrize("path", ["/no/such/folder/log", HALF, "a\0b"])
def test_a_log_that_cannot_be(path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        set_up_log(path, 0)
    is_fine(caught.value)


def test_what_the_command_line_prints(capsys: pytest.CaptureFixture[str]) -> None:
    say_error(SEQUENCE)
    assert main([SEQUENCE]) == 2
    assert main(["remote", "--api-socket", HALF, "ping"]) == 2
    assert main(["remote", "--api-socket", LONG, "ping"]) == 2
    assert main(["remote", "--api-socket", "/no/such/socket", SEQUENCE]) == 2
    assert main(["remote", "--api-socket", "/no/such/socket", "ping"]) == 1
    lines = capsys.readouterr().err.split("\n")
    assert len(lines) == 7
    assert all(line.isprintable() and len(line) < MAX_LINE + 20 for line in lines)
    assert table([SEQUENCE], [[SEQUENCE], [LONG]]).replace("\n", "").isprintable()


def test_a_peers_reason_is_drawn_as_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {"memory_bytes_remaining_iteration": 0, "memory_bytes_total": 1}
    progress = {
        "phase": "FAILED", "round": 1, "attempts": 1, "rate": 0, "activations": 0, "downtime_estimated_ms": 0,
        "memory_transmission_info": memory, "state": {"Failed": {"error_msg": SEQUENCE}},
    }  # fmt: skip
    assert watch_move(lambda: None, lambda method, route: progress, draw=False, limit_s=10) == 1
    assert capsys.readouterr().err.rstrip("\n").isprintable()
