"""virtio-vsock: a guest that lies, what travels and what doesn't, and a path that can't be."""

from __future__ import annotations

import logging
import os
import resource
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm._native import lib
from trivmm.errors import ConfigError
from trivmm.memory.guest import GuestMemory
from trivmm.state.strict import structure, unstructure
from trivmm.testing.driver import until
from trivmm.testing.vsock import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
    Packet,
    VsockGuest,
    serving,
)
from trivmm.virtio.vsock.config import VsockConfig
from trivmm.virtio.vsock.device import VsockDevice
from trivmm.virtio.vsock.kind import VSOCK

LIMIT_S = 20
PORT = 52


@pytest.fixture
def guest() -> Iterator[VsockGuest]:
    made = VsockGuest()
    yield made
    made.close()


@pytest.fixture
def device(guest: VsockGuest, tmp_path: Path) -> Iterator[VsockDevice]:
    made = VsockDevice(VsockConfig(3, str(tmp_path / "v.sock")), guest.memory)
    yield made
    made.close()


async def connected(guest: VsockGuest, path: Path) -> tuple[trio.SocketStream, int]:
    stream = await trio.open_unix_socket(path / "v.sock")
    await stream.send_all(b"CONNECT %d\n" % PORT)
    asked = await guest.packet()
    assert asked.op == REQUEST
    await guest.send(Packet(RESPONSE, PORT, asked.host))
    assert await stream.receive_some(64) == b"OK %d\n" % asked.host
    return stream, asked.host


async def ended(stream: trio.SocketStream) -> None:
    """It ends, in whatever way."""
    try:
        while await stream.receive_some(65536):
            pass
    except trio.BrokenResourceError:
        pass
    await stream.aclose()


# --- a guest that lies -------------------------------------------------------------------------------------------


async def test_packets_that_are_none_are_counted_and_told_of_once(
    guest: VsockGuest, device: VsockDevice, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with serving(device, guest):
        stream, host = await connected(guest, tmp_path)
        await guest.send_raw(b"")
        await guest.send_raw(bytes(43))
        await guest.send(Packet(RW, 1, 1, length=1))
        await guest.send(Packet(0, 1, 1))
        await guest.send(Packet(8, 1, 1))
        await guest.send(Packet(RW, PORT, host, b"x", src_cid=4))
        await guest.send(Packet(RW, PORT, host, b"x", src_cid=3 | 1 << 32))
        await guest.send(Packet(RW, PORT, host, b"x", dst_cid=3))
        await guest.send(Packet(RST, 1, 1))  # a reset of nothing is answered with nothing
        assert guest.no_packet()
        await guest.send(Packet(RW, PORT, host, b"good"))
        assert await stream.receive_some(16) == b"good"
        counted = device.counters()
        assert (counted["malformed"], counted["misaddressed"], counted["unknown"]) == (5, 3, 0)
        await stream.aclose()
    device.counters()
    assert sorted(record.getMessage().split("counted as ")[1] for record in caplog.records) == [
        "malformed",
        "misaddressed",
    ]


@pytest.mark.parametrize("op", [RESPONSE, RW, SHUTDOWN, CREDIT_UPDATE, CREDIT_REQUEST])
async def test_packets_of_no_connection_are_answered_with_a_reset(
    op: int, guest: VsockGuest, device: VsockDevice
) -> None:
    async with serving(device, guest):
        await guest.send(Packet(op, 5, 6, flags=3))
        answer = await guest.packet()
        assert (answer.op, answer.guest, answer.host, answer.type) == (RST, 5, 6, 1)
    assert device.counters()["unknown"] == 1


async def test_sequenced_packets_are_not_there(guest: VsockGuest, device: VsockDevice, tmp_path: Path) -> None:
    async with serving(device, guest):
        await guest.send(Packet(REQUEST, 5, 6, type=2))
        answer = await guest.packet()
        assert (answer.op, answer.type) == (RST, 2)
    assert not device.features & 2


@pytest.mark.parametrize(
    "packet",
    [
        {"op": REQUEST},
        {"op": RESPONSE},
        {"op": RW, "length": 99},
        {"op": 77},
    ],
    ids=str,
)
async def test_packets_that_make_no_sense_cost_their_connection(
    packet: dict[str, int], guest: VsockGuest, device: VsockDevice, tmp_path: Path
) -> None:
    async with serving(device, guest):
        other, other_port = await connected(guest, tmp_path)
        stream, host = await connected(guest, tmp_path)
        await guest.send(Packet(guest=PORT, host=host, **packet))
        answer = await guest.packet()
        assert (answer.op, answer.host) == (RST, host)
        await ended(stream)
        await guest.send(Packet(RW, PORT, other_port, b"unharmed"))
        assert await other.receive_some(16) == b"unharmed"
        assert device.counters()["open"] == 1
        await other.aclose()


async def test_data_after_its_own_end_and_before_the_answer(
    guest: VsockGuest, device: VsockDevice, tmp_path: Path
) -> None:
    async with serving(device, guest):
        stream, host = await connected(guest, tmp_path)
        await guest.send(Packet(SHUTDOWN, PORT, host, flags=2))
        await guest.send(Packet(RW, PORT, host, b"after all"))
        assert (await guest.packet()).op == RST
        await ended(stream)
        for op in (RW, SHUTDOWN, REQUEST):
            stream = await trio.open_unix_socket(tmp_path / "v.sock")
            await stream.send_all(b"CONNECT 9\n")
            asked = await guest.packet()
            await guest.send(Packet(op, 9, asked.host, b"x" if op == RW else b""))
            assert (await guest.packet()).op == RST
            await ended(stream)
    assert device.counters()["out_of_order"] == 4


@pytest.mark.parametrize("size", [1, 43, 44])
async def test_a_buffer_without_room_for_a_packet_breaks_the_queue(size: int, tmp_path: Path) -> None:
    guest = VsockGuest(buffers=1, buffer=size)
    device = VsockDevice(VsockConfig(3, str(tmp_path / "v.sock")), guest.memory)
    broken = trio.Event()
    device.on_broken = lambda problem: broken.set()
    async with serving(device, guest):
        await guest.send(Packet(RW, 1, 1))
        await broken.wait()
    device.reset()
    device.close()
    guest.close()


async def test_descriptors_that_run_out_are_waited_for(guest: VsockGuest, device: VsockDevice, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with serving(device, guest):
        stream = await trio.open_unix_socket(tmp_path / "v.sock")
        await until(lambda: device.counters()["half_open"] == 1)
        late = socket.socket(socket.AF_UNIX)
        lowest = os.dup(0)
        os.close(lowest)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
            late.connect(str(tmp_path / "v.sock"))
            late.send(b"CONNECT 52\n")
            await until(lambda: device.counters()["no_descriptors"] > 0)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert (await guest.packet()).op == REQUEST
        late.close()
        await stream.aclose()


async def test_a_guest_leaves_the_vm_half_of_the_descriptors(guest: VsockGuest, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    half = lowest + 16  # what is open already, and room for what the device itself needs
    resource.setrlimit(resource.RLIMIT_NOFILE, (2 * half, before[1]))
    try:
        device = VsockDevice(VsockConfig(3, str(tmp_path / "v.sock")), guest.memory)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(tmp_path / "v.sock_7"))
            sock.listen(64)
            async with serving(device, guest):
                for port in range(half + 1):
                    await guest.send(Packet(REQUEST, 1000 + port, 7))
                    assert (await guest.packet()).op == (RESPONSE if port < half else RST)
                assert [device.counters()[name] for name in ("open", "refused")] == [half, 1]
                await guest.send(Packet(RST, 1000, 7))
                await guest.send(Packet(REQUEST, 2000, 7))
                assert (await guest.packet()).op == RESPONSE
    finally:
        device.close()


# --- state -------------------------------------------------------------------------------------------------------


async def test_a_destination_resets_the_transport(guest: VsockGuest, device: VsockDevice, tmp_path: Path) -> None:
    async with serving(device, guest):
        stream, host = await connected(guest, tmp_path)
    state = structure("state", unstructure(device.save()), device.state_type)
    twin = VsockDevice(VsockConfig(3, str(tmp_path / "v.sock")), guest.memory, listen=False)
    twin.become(device.describe())
    twin.load(state)
    twin.load(state)  # again: the source went on meanwhile
    assert twin.storage is not None
    with pytest.raises(ConfigError, match="in use by another process"):
        twin.storage.take_lock()
    assert device.storage is not None
    device.storage.release_lock()
    twin.storage.take_lock()
    async with serving(twin, guest, queues=device.queues):
        assert await guest.event() == 0
        await guest.send(Packet(RW, PORT, host, b"from before"))
        assert (await guest.packet()).op == RST
        again, _ = await connected(guest, tmp_path)
        await again.aclose()
    device.close()
    await ended(stream)
    twin.close()


async def test_a_driver_that_begins_anew_hears_of_no_reset(
    guest: VsockGuest, device: VsockDevice, tmp_path: Path
) -> None:
    device.load(device.save())
    device.reset()
    async with serving(device, guest):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.event)
            stream, _ = await connected(guest, tmp_path)
            await stream.aclose()
            assert guest.events.used_index == 0
            nursery.cancel_scope.cancel()


async def test_an_undone_switchover_goes_on_at_the_same_path(
    guest: VsockGuest, device: VsockDevice, tmp_path: Path
) -> None:
    assert device.storage is not None
    async with serving(device, guest):
        stream, _ = await connected(guest, tmp_path)
    device.save()
    for _ in range(2):
        device.storage.release_lock()
    assert not (tmp_path / "v.sock").exists()
    device.storage.flush()
    device.storage.refresh()
    for _ in range(2):
        device.storage.take_lock()
    async with serving(device, guest, queues=device.queues):
        await stream.send_all(b"on it goes")
        assert (await guest.packet()).data == b"on it goes"
        again, _ = await connected(guest, tmp_path)
        await again.aclose()
        await stream.aclose()


def test_the_guests_address_is_in_its_configuration_space(device: VsockDevice) -> None:
    assert device.read_config(0, 8) == struct.pack("<Q", 3)
    assert device.read_config(4, 8) == bytes(4) + b"\xff" * 4
    assert device.queue_sizes == (256, 256, 256)


# --- configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cid", [0, 1, 2, (1 << 32) - 1, 1 << 32])
def test_addresses_that_no_guest_can_have(cid: int) -> None:
    with pytest.raises(ConfigError, match=f"vsock.cid = {cid}: no guest can have that address; give 3 to 4294967294"):
        VsockConfig(cid, "/v")


@pytest.mark.parametrize("values", [("3", "/v"), (True, "/v"), (3, 5), (3, "a\0b"), (-1, "/v")])
def test_values_of_another_kind(values: Any) -> None:
    with pytest.raises(ConfigError, match=r"vsock.*wrong type"):
        VsockConfig(*values)


def test_paths_that_can_not_be() -> None:
    most = int(107 - lib.TV_VSOCK_SUFFIX)
    VSOCK.check([VsockConfig(3, "x" * most)])
    for path, said in (("x" * (most + 1), f"more than {most} bytes"), ("", "no path"), ("x" * 200, "at most 107")):
        with pytest.raises(ConfigError, match=said):
            VSOCK.check([VsockConfig(3, path)])
    with pytest.raises(ConfigError, match="more than one vsock device"):
        VSOCK.check([VsockConfig(3, "/a"), VsockConfig(4, "/b")])


def test_a_path_that_is_taken_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "v.sock"
    path.write_text("mine")
    memory = GuestMemory([(0, 1 << 20)])
    before = len(os.listdir("/proc/self/fd"))
    for there, said in ((path, "exists and is not a socket"), (tmp_path / "no" / "v.sock", "cannot make")):
        with pytest.raises(ConfigError, match=said):
            VsockDevice(VsockConfig(3, str(there)), memory)
    assert len(os.listdir("/proc/self/fd")) == before
    assert path.read_text() == "mine"
    memory.close()


async def test_a_worker_that_is_stuck_keeps_what_it_works_on(
    device: VsockDevice, guest: VsockGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed while its thread runs, as after ``device_stop`` has expired: nothing is freed under it."""
    freed: list[object] = []

    class Library:
        def __getattr__(self, name: str) -> object:
            return freed.append if name == "tv_vsock_free" else getattr(lib, name)

    monkeypatch.setattr("trivmm.virtio.vsock.device.lib", Library())
    async with serving(device, guest):
        device.close()
        assert freed == []
        assert set(device.counters().values()) == {0}
