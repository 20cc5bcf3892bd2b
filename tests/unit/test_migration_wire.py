"""Frames and messages: whole, byte by byte, with trailing data, damaged and invented."""

from __future__ import annotations

import contextlib
import json
import mmap
import random
import struct
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivmm._native import ffi, lib
from trivmm.config import DiskConfig, PayloadConfig, VmConfig
from trivmm.errors import ConfigError, ProtocolError
from trivmm.hypervisor.base import VcpuState, VmBackendState
from trivmm.migration.wire import frame as wire
from trivmm.migration.wire import messages as m
from trivmm.migration.wire.session import FROM_DESTINATION, FROM_SOURCE, Session, SessionState
from trivmm.state.codec import state_to_json
from trivmm.state.jsontext import MAX_DEPTH, load_json
from trivmm.state.machine import Barrier, BarrierKind, MachineState, PendingReset, SavedVcpu
from trivmm.state.setup import config_from_setup, config_to_setup
from trivmm.state.virtio import LifeStage
from trivmm.testing.states import a_board, a_device

ID = bytes(range(16))
STATE = MachineState(
    vcpus=(
        SavedVcpu(
            0,
            VcpuState("kvm/1", {"regs": b"\x00\xff" * 9, "none": b""}),
            Barrier("rng", BarrierKind.ACTIVATION),
        ),
        SavedVcpu(1, VcpuState("kvm/1", {}), None),
    ),
    vmm=VmBackendState("kvm/1", {"clock": b"123"}),
    devices={"rng": a_device(LifeStage.ACTIVATING, status=15)},
    board=a_board(),
    reset_pending=PendingReset.RESET,
    run=False,
)
# a device's own part is an object whose shape is only looked at by the device
STATE_JSON = json.dumps(state_to_json(STATE)).replace('"own": {}', '"own": {"x": %s}')
EVERY: list[m.Message] = [
    m.Hello(ID, m.Role.CONTROL),
    m.Hello(ID, m.Role.PAGES, 63),
    m.Hello(ID, m.Role.FAULT),
    m.Setup({"cpus": {"boot_vcpus": 2}, "text": "ä"}, ((0, 1 << 21), (1 << 32, 1 << 21))),
    m.SetupOk(2.5),
    m.SetupFail("no"),
    m.RoundEnd(3, 1 << 40),
    m.RoundAck(3),
    m.State(STATE),
    m.Ready(0.0, 1.5),
    m.Undo("late"),
    m.Undone(),
    m.Commit(ID),
    m.Running(1.0),
    m.Refused("locked"),
    m.Done(),
    m.Query(),
    m.Verdict(m.Fate.PENDING, ""),
    m.Abort("bye"),
]
MESSAGES = {each.kind: each for each in EVERY}
ON_THEIR_OWN = {wire.MessageType.PAGES, wire.MessageType.ZERO}  # made and taken by whoever has the pages
PAGES = wire.encode_frame(wire.MessageType.PAGES, struct.pack("<III", 0, 1, 7), b"p" * 4096)


def read_all(reader: wire.FrameReader) -> list[wire.Frame]:
    found = []
    while frame := reader.next_frame():
        found.append(frame)
    return found


def test_crc32c_is_castagnoli_and_both_implementations_agree() -> None:
    assert wire.crc32c(b"123456789") == 0xE3069283  # RFC 3720's check value
    assert wire.crc32c(b"\x00" * 32) == 0x8A9136AA  # RFC 3720, B.4
    for length in (0, 1, 7, 8, 9, 63, 4096, 5001):
        data = bytes((i * 37 + 11) & 0xFF for i in range(length))
        assert wire.crc32c(data) == bitwise_crc32c(data)


def bitwise_crc32c(data: bytes) -> int:
    """As the polynomial is defined, without any table."""
    crc = 0xFFFF_FFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F6_3B78 if crc & 1 else 0)
    return crc ^ 0xFFFF_FFFF


KERNELS = {"portable": lib.TV_CRC_PORTABLE, "sse42": lib.TV_CRC_SSE42, "avx512": lib.TV_CRC_AVX512}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_each_kernel_gives_the_crc_of_pages_wherever_they_lie(kernel: int) -> None:
    """Alone and with the copy, for counts that fill the lanes, and that leave one or two pages over."""
    if lib.tv_crc32c_kernel() < kernel:
        pytest.skip("this CPU has no such instructions: the kernel is never chosen here")
    chance = random.Random(kernel)
    memory = mmap.mmap(-1, 600 * 4096)
    memory[:] = chance.randbytes(len(memory))
    start = ffi.cast("uint8_t *", ffi.from_buffer(memory))
    for count in (0, 1, 2, 3, 4, 5, 6, 42, 127, 128, 386, 400):
        numbers = chance.sample(range(600), count)
        pages = ffi.new("uint8_t *[]", [start + number * 4096 for number in numbers])
        joined = b"".join(memory[number * 4096 : (number + 1) * 4096] for number in numbers)
        assert lib.tv_crc32c_by(kernel, ffi.NULL, pages, count) == wire.crc32c(joined)
        copy = mmap.mmap(-1, max(count, 1) * 4096)
        assert lib.tv_crc32c_by(kernel, ffi.from_buffer("uint8_t[]", copy), pages, count) == wire.crc32c(joined)
        assert copy[: count * 4096] == joined


@pytest.mark.parametrize("message", EVERY, ids=lambda each: type(each).__name__)
def test_message_round_trip_whole_bytewise_and_with_trailing_data(message: m.Message) -> None:
    raw = m.encode_message(message)
    reader = wire.FrameReader()
    reader.feed(raw)
    assert [m.parse_message(each) for each in read_all(reader)] == [message]

    reader = wire.FrameReader()
    for byte in raw[:-1]:
        reader.feed(bytes([byte]))
        assert reader.next_frame() is None
    assert reader.pending == len(raw) - 1
    reader.feed(raw[-1:])
    frame = reader.next_frame()
    assert frame is not None
    assert m.parse_message(frame) == message

    reader = wire.FrameReader()
    reader.feed(raw + wire.numbered(PAGES, 1) + wire.numbered(raw, 2) + raw[:10])
    frames = read_all(reader)
    assert [each.type for each in frames] == [message.kind, wire.MessageType.PAGES, frames[0].type]
    assert frames[1].payload == b"p" * 4096
    assert reader.pending == 10


@pytest.mark.parametrize("message", EVERY, ids=lambda each: type(each).__name__)
def test_every_damaged_byte_is_noticed(message: m.Message) -> None:
    raw = m.encode_message(message)
    for place in range(len(raw)):
        reader = wire.FrameReader()
        reader.feed(raw[:place] + bytes([raw[place] ^ 0x10]) + raw[place + 1 :])
        with pytest.raises(ProtocolError):
            read_all(reader)


def pages_frame(content: bytes) -> bytes:
    count = len(content) // 4096
    return wire.encode_frame(wire.MessageType.PAGES, struct.pack(f"<II{count}I", 0, count, *range(count)), content)


def test_every_damaged_byte_of_a_frame_of_pages_is_noticed() -> None:
    raw = pages_frame(b"".join(bytes([i]) * 4096 for i in (1, 2, 3)))
    for place in [*range(200), *range(200, len(raw), 61), len(raw) - 1]:
        reader = wire.FrameReader()
        reader.feed(raw[:place] + bytes([raw[place] ^ 0x10]) + raw[place + 1 :])
        with pytest.raises(ProtocolError):
            read_all(reader)


def test_pages_that_changed_places_got_lost_or_came_twice_in_a_frame_are_noticed() -> None:
    content = [bytes([i]) * 4096 for i in range(8)]
    raw, start = pages_frame(b"".join(content)), len(pages_frame(b"")) + 4 * 8
    says = r"bad CRC of the pages in frame 0, of memory slot 0: the stream is damaged"
    for i in range(7):
        for other in (
            [*content[:i], content[i + 1], content[i], *content[i + 2 :]],
            [*content[:i], *content[i + 1 :], bytes(4096)],
            [*content[: i + 1], *content[i:-1]],
        ):
            reader = wire.FrameReader()
            reader.feed(raw[:start] + b"".join(other))
            with pytest.raises(ProtocolError, match=says):
                read_all(reader)


# Whole headers, as they were.
VERSION_1 = struct.pack("<4sHHIIII", b"TVMg", 1, 1, 2, 2, 0, 0x1234)
VERSION_2 = struct.pack("<4sHHIIQI24x", b"TVMg", 2, 1, 2, 2, 0, 0x1234) + bytes(4)


def header(
    magic: bytes = b"TVMg", version: int = 3, kind: int = 4, length: int = 0, body: int = 0, sequence: int = 0
) -> bytes:
    head = struct.pack("<4sHHIIQII20x", magic, version, kind, length, body, sequence, 0, 0)
    return head + struct.pack("<I", wire.crc32c(head))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (header(magic=b"HTTP"), "bad magic"),
        (header(version=4), "bad version 4: this side speaks 3$"),
        (header(version=2), "bad version 2: this side speaks 3$"),
        (VERSION_1, "bad version 1: this side speaks 3$"),
        (VERSION_2, "bad version 2: this side speaks 3$"),
        (b"GET ", "bad magic b'GET '"),
        (b"S", "bad magic b'S'"),
        (header(sequence=1), r"frame 1 \(ROUND_END\) came where 0 was due: the link lost or moved frames"),
        (header(sequence=(1 << 64) - 1), "came where 0 was due"),
        (header(kind=99), "bad type 99"),
        (header(length=1 << 30, body=1 << 30), "bad length"),
        (header(length=8, body=9), "bad length"),
        (header(length=4096, body=0), "bad length"),
        (header(kind=16, length=16 + 4097, body=16), "bad length"),
        (header(kind=16, length=16 + (wire.FRAME_PAGES + 1) * 4096, body=16), "bad length"),
        (header()[:-1] + b"\0", "bad header CRC"),
    ],
)
def test_bad_headers_are_named_before_anything_is_awaited(raw: bytes, says: str) -> None:
    reader = wire.FrameReader()
    reader.feed(raw)
    with pytest.raises(ProtocolError, match=says):
        reader.next_frame()


def test_a_number_changes_nothing_else() -> None:
    for number in (0, 1, 1 << 32, (1 << 64) - 1):
        frame = wire.numbered(PAGES, number)
        head = wire.parse_header(frame[: wire.HEADER_BYTES])
        assert head.sequence == number
        assert attrs.evolve(head, sequence=0) == wire.parse_header(PAGES[: wire.HEADER_BYTES])
        assert frame[wire.HEADER_BYTES :] == PAGES[wire.HEADER_BYTES :]


def test_a_repeated_frame_is_named() -> None:
    reader = wire.FrameReader()
    reader.feed(PAGES + wire.numbered(PAGES, 1) + wire.numbered(PAGES, 1))
    assert reader.next_frame()
    assert reader.next_frame()
    with pytest.raises(ProtocolError, match=r"frame 1 \(PAGES\) came where 2 was due: the link repeated frames"):
        reader.next_frame()


@given(st.data())
def test_fuzzed_order_gives_the_frames_up_to_the_first_that_is_out_of_place(data: st.DataObject) -> None:
    """Whole frames, lost, repeated and moved, in pieces of any size: what comes out is the start of what was sent."""
    count = data.draw(st.integers(1, 6))
    frames = [wire.numbered(m.encode_message(data.draw(st.sampled_from(EVERY))), i) for i in range(count)]
    order = data.draw(st.lists(st.integers(0, count - 1), max_size=8) | st.just(list(range(count))))
    stream = b"".join(frames[i] for i in order)
    good = next((place for place, i in enumerate(order) if place != i), len(order))
    reader, found, at = wire.FrameReader(), 0, 0
    try:
        while at < len(stream):
            piece = data.draw(st.integers(1, 200))
            reader.feed(stream[at : at + piece])
            at += piece
            found += len(read_all(reader))
    except ProtocolError as error:
        assert f"came where {good} was due" in str(error)  # noqa: PT017 - there may be none
        assert good < len(order)
    else:
        assert good == len(order)
        assert found == good


def parse(kind: wire.MessageType, body: bytes) -> m.Message:
    return m.parse_message(wire.Frame(wire.VERSION, kind, body))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("SETUP_OK", b"[]"),
        ("SETUP_OK", b"{"),
        ("SETUP_OK", b"\xff"),
        ("SETUP_OK", b'{"resume_ms":NaN}'),
        ("SETUP_OK", b'{"resume_ms":-1}'),
        ("SETUP_OK", b'{"resume_ms":true}'),
        ("SETUP_OK", b'{"resume_ms":1e999}'),
        ("SETUP_OK", b'{"resume_ms":1,"resume_ms":2}'),
        ("SETUP_OK", b'{"resume_ms":1,"more":2}'),
        ("SETUP_OK", b"{}"),
        ("ROUND_END", b'{"pages":0,"round":' + b"9" * 5000 + b"}"),
        ("ROUND_END", b'{"round":1.0,"pages":0}'),
        ("ROUND_END", b'{"round":1}'),
        ("ROUND_END", b'{"round":1,"pages":-1}'),
        ("HELLO", json.dumps({"session": "00", "role": "control", "index": 0}).encode()),
        ("HELLO", json.dumps({"session": ID.hex(), "role": "snapshot", "index": 0}).encode()),
        ("HELLO", json.dumps({"session": ID.hex(), "role": "pages", "index": 64}).encode()),
        ("HELLO", json.dumps({"session": ID.hex(), "role": ["pages"], "index": 0}).encode()),
        ("COMMIT", b'{"session":"00"}'),
        ("COMMIT", b'{"session":"' + b"zz" * 16 + b'"}'),
        ("VERDICT", b'{"fate":"maybe","reason":""}'),
        ("ABORT", b'{"reason":"' + b"x" * 3000 + b'"}'),
        ("STATE", (STATE_JSON % "1e999").encode()),
        ("STATE", b"[" * 100_000),
        ("STATE", b'{"a":' * 100_000),
        ("SETUP", json.dumps({"machine": {}, "memory": [[0, 4095]]}).encode()),
        ("SETUP", json.dumps({"machine": {}, "memory": [[0, 4096]] * 2}).encode()),
        ("SETUP", json.dumps({"machine": {}, "memory": [[0, True]]}).encode()),
        (
            "SETUP",
            json.dumps({"machine": {}, "memory": [[i << 30, 4096] for i in range(9)]}).encode(),
        ),
        ("SETUP", json.dumps({"machine": [], "memory": []}).encode()),
        ("PAGES", b""),
    ],
)
def test_bad_bodies_are_protocol_errors(kind: str, body: bytes) -> None:
    with pytest.raises(ProtocolError):
        parse(wire.MessageType[kind], body)


def test_a_setup_with_text_that_is_none_is_refused() -> None:
    good = config_to_setup(VmConfig(PayloadConfig("k"), disks=(DiskConfig("d", serial="s"),)), {})
    assert config_to_setup(config_from_setup(json.loads(json.dumps(good)), {}), {}) == good
    assert good["disks"][0]["image_type"] == "Unknown"
    with pytest.raises(ConfigError, match="image_type"):
        config_from_setup({**good, "disks": [{**good["disks"][0], "image_type": "Vhdx"}]}, {})
    good["disks"][0]["serial"] = "\ud800"
    with pytest.raises(ProtocolError, match=r"setup\.config\.disks\[0\]\.serial is .*, not text"):
        config_from_setup(good, {})


def test_a_reason_stays_one_line() -> None:
    """Whoever said it: ours go out that way, and a peer's is made so."""
    hostile = "disk full \n\x1b[2JTraceback \0ä"
    said = m.Abort(r"disk full \n\x1b[2JTraceback \x00ä")
    assert m.Abort(hostile) == said
    assert parse(wire.MessageType.ABORT, json.dumps({"reason": hostile.replace("\0", "\\x00")}).encode()) == said
    assert m.Abort("plain") == parse(wire.MessageType.ABORT, b'{"reason":"plain"}')
    assert m.Abort("\ud800").reason == r"\ud800"  # which no text that comes as JSON may have
    with pytest.raises(ProtocolError, match="reason"):
        parse(wire.MessageType.ABORT, rb'{"reason":"\ud800"}')
    assert len(m.Abort("\n" * 3000).reason) == 2000


def change(value: Any, path: str, new: Any) -> Any:
    copy = json.loads(json.dumps(value))
    *way, last = path.split(".")
    at = copy
    for step in way:
        at = at[int(step) if step.isdigit() else step]
    at[int(last) if last.isdigit() else last] = new
    return copy


@pytest.mark.parametrize(
    ("path", "new"),
    [
        ("vcpus", {}),
        ("vcpus", [0] * 9),
        ("vcpus.0.index", 8),
        ("vcpus.0.index", 1),
        ("vcpus.1.index", 5),
        ("vcpus.0.state.kind", None),
        ("vcpus.0.state.blobs", {"a": "*"}),
        ("vcpus.0.state.blobs", {str(i): "" for i in range(65)}),
        ("vcpus.0.barrier", ["rng"]),
        ("vcpus.0.barrier.what", "sleep"),
        ("vcpus.0.barrier.device", ["rng"]),
        ("devices.rng.life.stage", "asleep"),
        ("devices.rng.life.status", 15.0),
        ("devices.rng.life.status", "15"),
        ("devices.rng.life.generation", True),
        ("devices.rng.transport.registers.queues.0.size", 1 << 16),
        ("devices.rng.transport.pci.registers", "AAAA"),
        ("devices.rng.own", None),
        ("board.serial.ier", 256),
        ("board.ged", None),
        ("vcpus.0.extra", 1),
        ("vmm.kind", "x" * 300),
        ("devices", {"rng": []}),
        ("devices", {str(i): {} for i in range(65)}),
        ("reset_pending", "halt"),
        ("run", 1),
    ],
)
def test_bad_state_names_the_field(path: str, new: Any) -> None:
    reader = wire.FrameReader()
    reader.feed(m.encode_message(m.State(STATE)))
    frame = reader.next_frame()
    assert frame is not None
    good = json.loads(frame.body)
    with pytest.raises(ProtocolError, match=r"state"):
        parse(wire.MessageType.STATE, json.dumps(change(good, path, new)).encode())


def test_a_state_too_large_is_refused_by_the_sender() -> None:
    fat = attrs.evolve(STATE, vmm=VmBackendState("kvm/1", {"x": b"x" * (4 << 20)}))
    with pytest.raises(ProtocolError, match="does not fit"):
        m.encode_message(m.State(fat))


@given(st.binary(max_size=200))
def test_fuzzed_bytes_give_frames_or_protocol_errors(data: bytes) -> None:
    reader = wire.FrameReader()
    reader.feed(data)
    with contextlib.suppress(ProtocolError):
        read_all(reader)


FIELDS = ["session", "role", "index", "machine", "memory", "round", "vcpus", "vmm", "kind", "blobs", "run", "reason"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(FIELDS),
            inner,
            max_size=6,
        )
    ),
    max_leaves=12,
)


@given(st.sampled_from(list(wire.MessageType)), JSON)
def test_fuzzed_json_gives_messages_or_protocol_errors(kind: wire.MessageType, value: Any) -> None:
    with contextlib.suppress(ProtocolError):
        parse(kind, json.dumps(value).encode())


def nested(depth: int, opening: str, closing: str) -> str:
    return opening * depth + "1" + closing * depth


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}"), ('{"a":[', "]}"), ('["\\"[",', "]")])
def test_what_is_nested_too_deep_is_refused_and_never_parsed(opening: str, closing: str) -> None:
    room = (MAX_DEPTH - 2) // len(closing)  # the message and its field are two levels
    for depth in (room, room + 1, 300, 900, 100_000):
        inner = f'{{"x":{nested(depth, opening, closing)}}}'
        setup = f'{{"memory":[],"machine":{inner}}}'.encode()
        if depth == room:
            assert isinstance(parse(wire.MessageType.SETUP, setup), m.Setup)
            continue
        for kind, body in (("SETUP", setup), ("STATE", (STATE_JSON % inner).encode()), ("READY", b"[" + setup + b"]")):
            with pytest.raises(ProtocolError, match="nested more than 32 deep"):
                parse(wire.MessageType[kind], body)


def test_brackets_in_strings_nest_nothing() -> None:
    for text in ("[" * 99, "{" * 99 + '"', '\\"' + "[" * 99, "\\" * 99, '"]}"'):
        body = json.dumps({"memory": [], "machine": {"x": text, text: 1}}).encode()
        assert parse(wire.MessageType.SETUP, body) == m.Setup({"x": text, text: 1}, ())


@given(st.sampled_from(list(wire.MessageType)), st.text(alphabet='{}[]":,1\\a ', max_size=60))
def test_fuzzed_syntax_gives_messages_or_protocol_errors(kind: wire.MessageType, text: str) -> None:
    with contextlib.suppress(ProtocolError):
        parse(kind, text.encode())


@given(st.text(alphabet='{}[]":,1\\a ', max_size=60) | st.integers(1, 60).map(lambda n: nested(n, '{"a":[', "]}")))
def test_what_passes_the_depth_check_and_parses_is_not_deep(text: str) -> None:
    def depth(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("twice")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except ValueError:
        value = None
    if isinstance(value, dict) and depth(value) <= MAX_DEPTH:
        assert load_json("x", text.encode()) == value
    else:
        with pytest.raises(ProtocolError):
            load_json("x", text.encode())


@pytest.mark.parametrize("source", [True, False])
@pytest.mark.parametrize("kind", list(wire.MessageType))
@pytest.mark.parametrize("state", list(SessionState))
def test_a_message_out_of_order_names_it_and_both_states(
    state: SessionState, kind: wire.MessageType, source: bool
) -> None:
    for outgoing in (True, False):
        session = Session(source, state)
        table = FROM_SOURCE if source is outgoing else FROM_DESTINATION
        step = partial(go if outgoing else come, session, kind)
        if (state, kind) in table:
            step()
            assert session.state is table[state, kind]
        else:
            with pytest.raises(ProtocolError, match=rf"{kind.name} out of order: the session is {state.value}, not "):
                step()
            assert session.state is state


def go(session: Session, kind: wire.MessageType) -> None:
    if kind in ON_THEIR_OWN:
        session.send_pages(kind)
    else:
        assert session.send(MESSAGES[kind]) == m.encode_message(MESSAGES[kind])


def come(session: Session, kind: wire.MessageType) -> None:
    if kind in ON_THEIR_OWN:
        try:
            session.receive(wire.Frame(wire.VERSION, kind, b""))
        except ProtocolError as error:
            if "where a message is due" not in str(error):
                raise
        return
    reader = wire.FrameReader()
    reader.feed(m.encode_message(MESSAGES[kind]))
    (frame,) = read_all(reader)
    assert session.receive(frame) == MESSAGES[kind]


def test_the_page_has_the_table() -> None:
    rows = []
    for state in SessionState:
        cells = [
            ", ".join(f"{kind.name} → {after.value}" for (at, kind), after in table.items() if at is state)
            for table in (FROM_SOURCE, FROM_DESTINATION)
        ]
        rows.append(f"| {state.value} | {' | '.join(cells)} |")
    assert "\n".join(rows) in (Path(__file__).parents[2] / "docs" / "migration.md").read_text()


def test_after_commit_nothing_brings_the_source_back_but_a_promise() -> None:
    ways = {kind for state, kind in FROM_DESTINATION if state is SessionState.COMMITTED}
    assert ways == {wire.MessageType.RUNNING, wire.MessageType.REFUSED, wire.MessageType.ABORT}
    assert not [kind for state, kind in FROM_SOURCE if state is SessionState.COMMITTED]
