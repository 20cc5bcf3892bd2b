"""``trivmm remote``: ch-remote's verbs and ``key=value`` strings, over the API socket.

Light: ``http.client`` on a unix socket, no trio, no httpx, no cffi. Answers are tables on a terminal, JSON elsewhere.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from trivmm.cli.move import watch_move
from trivmm.cli.options import parse_device, parse_receive, parse_send, parse_socket_path
from trivmm.cli.parser import Parser, UsageError
from trivmm.cli.table import table
from trivmm.control.apierror import ApiError, ApiUnreachable, answer_of, messages_of
from trivmm.control.contract import API_ROOT, NOT_YET_ROUTES
from trivmm.errors import one_line, reason_of
from trivmm.values import parse_size
from trivmm.virtio.kinds import hotplug_verbs

__all__ = ["remote"]

CONNECT_LIMIT_S: Final = 10.0
ANSWER_LIMIT_S: Final = 60.0  # the slowest short verb (delete, boot) is bounded by deadlines that sum to less
MOVE_LIMIT_S: Final = 3600.0 + 600.0  # a migration's own default limit, and room for its verdict
MAX_ANSWER: Final = 64 << 20
MAX_FILE: Final = 1 << 20  # the server takes no larger body

# verb → (method, route, what its argument is called or None, how the argument becomes a body)
VERBS: Final[Mapping[str, tuple[str, str, str | None]]] = {
    "ping": ("GET", "vmm.ping", None),
    "info": ("GET", "vm.info", None),
    "counters": ("GET", "vm.counters", None),
    "migration-progress": ("GET", "vm.migration-progress", None),
    "create": ("PUT", "vm.create", "FILE with the VM's configuration in JSON, or - for standard input"),
    "boot": ("PUT", "vm.boot", None),
    "pause": ("PUT", "vm.pause", None),
    "resume": ("PUT", "vm.resume", None),
    "shutdown": ("PUT", "vm.shutdown", None),
    "reboot": ("PUT", "vm.reboot", None),
    "nmi": ("PUT", "vm.nmi", None),
    "power-button": ("PUT", "vm.power-button", None),
    "resize": ("PUT", "vm.resize", None),
    **{verb: ("PUT", f"vm.{verb}", kind.option.metavar) for verb, kind in hotplug_verbs().items()},
    "remove-device": ("PUT", "vm.remove-device", "the ID of a device"),
    "resize-disk": ("PUT", "vm.resize-disk", None),
    "delete": ("PUT", "vm.delete", None),
    "shutdown-vmm": ("PUT", "vmm.shutdown", None),
    "send-migration": (
        "PUT",
        "vm.send-migration",
        "destination_url=URL[,downtime_ms=…,timeout_s=…,timeout_strategy=…]",
    ),
    "receive-migration": ("PUT", "vm.receive-migration", "receiver_url=URL"),
    "cancel-migration": ("PUT", "vm.cancel-migration", None),
    "resolve-migration": ("PUT", "vm.resolve-migration", None),
    "events": ("GET", "events", None),
}
LONG: Final = frozenset({"send-migration", "receive-migration"})


def remote(arguments: Sequence[str]) -> int:
    """:raises UsageError: / :raises ApiError: / :raises ApiUnreachable: / :raises ConfigError:"""
    verbs = "\n".join(f"  {verb:<20}{argument or ''}".rstrip() for verb, (_, _, argument) in VERBS.items())
    parser = Parser("trivmm remote", f"Drive a VMM over its API socket.\n\nverbs:\n{verbs}")
    parser.add_argument("--api-socket", metavar="FILE", help="the VMM's unix socket (or $TRIVMM_API_SOCKET)")
    parser.add_argument("--timeout", metavar="SECONDS", type=float, help="how long to wait for the answer")
    parser.add_argument("--json", action="store_true", help="JSON, on a terminal too")
    parser.add_argument("--detach", action="store_true", help="send-migration: don't wait for the end")
    parser.add_argument("--cpus", metavar="N", help="resize: vCPUs")
    parser.add_argument("--memory", metavar="SIZE", help="resize: RAM")
    parser.add_argument("--balloon", metavar="SIZE", help="resize: the balloon")
    parser.add_argument("--disk", metavar="ID", help="resize-disk: which one")
    parser.add_argument("--size", metavar="SIZE", help="resize-disk: of its image")
    parser.add_argument(
        "--force", action="store_true", help="resolve-migration: take the doubt away; two copies may run then"
    )
    parser.add_argument("verb", metavar="VERB")
    parser.add_argument("argument", metavar="ARGUMENT", nargs="?")
    given = parser.parse(arguments)
    if given.verb not in VERBS:
        raise UsageError(_unknown(given.verb))
    method, route, wants = VERBS[given.verb]
    if wants is None and given.argument is not None:
        raise UsageError(f"{given.verb} {given.argument}: the verb takes no argument")
    if wants is not None and given.argument is None and given.verb != "create":
        raise UsageError(f"{given.verb}: give {wants}")
    where = given.api_socket or os.environ.get("TRIVMM_API_SOCKET")
    if not where:
        raise UsageError("--api-socket: missing; give the path of the VMM's socket")
    limit_s = given.timeout or (MOVE_LIMIT_S if given.verb in LONG else ANSWER_LIMIT_S)
    path, body = parse_socket_path(where), _body(given)
    if given.verb == "events":
        return follow_events(path)
    if given.verb == "send-migration" and not given.detach:
        return watch_move(
            lambda: call(path, method, route, body, ANSWER_LIMIT_S),
            lambda method, route: call(path, method, route, None, ANSWER_LIMIT_S),
            draw=sys.stdout.isatty() and not given.json,
            limit_s=limit_s,
        )
    found = call(path, method, route, body, limit_s)
    if found is not None:
        as_table = sys.stdout.isatty() and not given.json
        print(_drawn(given.verb, found) if as_table else json.dumps(found, indent=2))
    return 0


def _unknown(verb: str) -> str:
    import difflib

    if f"vm.{verb}" in NOT_YET_ROUTES:
        return f"{verb}: not supported yet"
    near = difflib.get_close_matches(verb, VERBS, n=1)
    return f"{verb}: unknown verb; {f'did you mean {near[0]}?' if near else 'trivmm remote --help lists them'}"


def _body(given: Any) -> bytes | None:
    convert: Callable[[str], dict[str, Any]]
    argument: str | None = given.argument
    sizes = {"desired_vcpus": given.cpus, "desired_ram": given.memory, "desired_balloon": given.balloon}
    if given.verb != "resize" and any(sizes.values()):
        raise UsageError(f"{given.verb}: --cpus, --memory and --balloon belong to resize")
    if given.verb != "resize-disk" and (given.disk or given.size):
        raise UsageError(f"{given.verb}: --disk and --size belong to resize-disk")
    if given.verb != "resolve-migration" and given.force:
        raise UsageError(f"{given.verb}: --force belongs to resolve-migration")
    match given.verb:
        case "create":
            return _read_file(argument or "-")
        case "resize":
            if not any(sizes.values()):
                raise UsageError("resize: give --cpus, --memory or --balloon")
            wanted = {name: None if text is None else parse_size("resize", text) for name, text in sizes.items()}
            return json.dumps(wanted).encode()
        case "resize-disk":
            if not given.disk or not given.size:
                raise UsageError("resize-disk: give --disk and --size")
            return json.dumps({"id": given.disk, "desired_size": parse_size("resize-disk", given.size)}).encode()
        case "resolve-migration":
            return json.dumps({"force": given.force}).encode()
        case "remove-device":
            return json.dumps({"id": argument}).encode()
        case verb if verb in hotplug_verbs():
            return json.dumps(parse_device(hotplug_verbs()[verb], argument or "", verb)).encode()
        case "send-migration":
            convert = parse_send
        case "receive-migration":
            convert = parse_receive
        case _:
            return None
    return json.dumps(convert(argument or "")).encode()


def _read_file(path: str) -> bytes:
    try:
        if path == "-":
            body = sys.stdin.buffer.read(MAX_FILE + 1)
        else:
            with Path(path).open("rb") as file:
                body = file.read(MAX_FILE + 1)
    except OSError as error:
        raise UsageError(f"create {path}: {error.strerror}; give a file with the configuration in JSON") from error
    if len(body) > MAX_FILE:
        raise UsageError(f"create {path}: larger than {MAX_FILE} bytes; is that a configuration?")
    return body


class _Connection(http.client.HTTPConnection):
    """HTTP over a unix socket. ``limit_s`` None: an answer that lasts as long as the VMM."""

    def __init__(self, path: str, limit_s: float | None) -> None:
        super().__init__("localhost")
        self._path = path
        self._limit_s = limit_s

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONNECT_LIMIT_S)
        self.sock.connect(self._path)
        self.sock.settimeout(self._limit_s)


def call(path: str, method: str, route: str, body: bytes | None, limit_s: float) -> Any:
    """One request; gives the answer's JSON or None. :raises ApiError: / :raises ApiUnreachable:"""
    connection = _Connection(path, limit_s)
    try:
        connection.request(method, API_ROOT + route, body=body)
        answer = connection.getresponse()
        content = answer.read(MAX_ANSWER)
    except TimeoutError as error:
        raise ApiUnreachable(path, f"no answer to {route} within {limit_s:g} s") from error
    except (OSError, http.client.HTTPException) as error:
        raise ApiUnreachable(path, reason_of(error)) from error
    finally:
        connection.close()
    if answer.status >= 400:
        raise ApiError(answer.status, messages_of(content))
    return answer_of(content)


def follow_events(path: str) -> int:
    """A line of JSON an event, until the VMM ends. :raises ApiUnreachable: it did not end in good order."""
    connection = _Connection(path, None)
    try:
        connection.request("GET", API_ROOT + "events")
        answer = connection.getresponse()
        if answer.status >= 400:
            raise ApiError(answer.status, messages_of(answer.read(MAX_ANSWER)))
        while line := answer.readline(MAX_FILE):
            if line.startswith(b"data: "):
                print(one_line(line.removeprefix(b"data: ").decode(errors="replace").rstrip(), MAX_FILE), flush=True)
    except (OSError, http.client.HTTPException) as error:
        raise ApiUnreachable(path, reason_of(error)) from error
    finally:
        connection.close()
    return 0


def _drawn(verb: str, found: Any) -> str:
    if verb == "counters":
        rows = [[device, name, value] for device, each in found.items() for name, value in each.items()]
        return table(["device", "counter", "value"], rows)
    return table(["what", "value"], _flat(found, ""))


def _flat(value: Any, name: str) -> list[list[object]]:
    """Nested objects as dotted rows; what is null or empty says nothing and is left out."""
    if isinstance(value, dict):
        return [row for key, item in value.items() for row in _flat(item, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return [row for index, item in enumerate(value) for row in _flat(item, f"{name}[{index}]")]
    if value is None or value == []:
        return []
    return [[name, ", ".join(map(str, value)) if isinstance(value, list) else value]]
