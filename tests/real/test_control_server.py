"""The API on a real unix socket: Cloud Hypervisor's client, ours, codes, deadlines, descriptors, and the end."""

from __future__ import annotations

import array
import json
import os
import re
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from trivmm.config import PayloadConfig, VmConfig
from trivmm.control.client import ApiError, ApiUnreachable, Client
from trivmm.control.contract import NOT_YET_ROUTES
from trivmm.control.http import Request, Response
from trivmm.control.routes import Router
from trivmm.control.server import open_server
from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError, MigrationError, TrivmmError
from trivmm.migration.options import TimeoutStrategy
from trivmm.testing.control import ChRemoteError, FakeHypervisor, Stage, ch_remote, open_stage
from trivmm.vm import ExitReason
from trivmm.vmm import Vmm, VmmOptions, open_vmm

CONFIG = VmConfig(PayloadConfig("/boot/vmlinux", "console=ttyS0 ü"))
BODY = {"payload": {"kernel": "/boot/vmlinux", "cmdline": "console=ttyS0 ü"}}
CPUS = {"boot_vcpus": 1, "max_vcpus": 1}
LIMIT_S = 30

StageOf = Callable[..., Any]


@pytest.fixture
def stage_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StageOf:
    def make(options: VmmOptions | None = None, **limits: float) -> Any:
        return open_stage(monkeypatch, tmp_path, CONFIG, options=options, **limits)

    return make


async def ch(stage: Stage, method: str, command: str, body: object = None) -> Any:
    """A call by ch-remote's way of reading, in a thread."""
    text = None if body is None else json.dumps(body)
    with trio.fail_after(LIMIT_S):
        found = await trio.to_thread.run_sync(ch_remote, stage.path, method, command, text)
    return json.loads(found) if found else None


def raw(path: str, data: bytes, *, fds: list[int] | None = None) -> bytes:
    """Send bytes, then read to the end of the connection."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(20)
        sock.connect(path)
        if fds:
            sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        else:
            sock.sendall(data)
        found = b""
        while piece := sock.recv(4096):
            found += piece
        return found


async def test_a_vm_driven_as_ch_remote_does(stage_of: StageOf) -> None:
    async with stage_of() as stage:
        ping = await ch(stage, "GET", "vmm.ping")
        assert ping["pid"] == os.getpid()
        assert set(ping) >= {"version", "build_version", "features"}
        for command, status in (("vm.boot", 404), ("vm.pause", 500), ("vm.resume", 500), ("vm.shutdown", 500)):
            with pytest.raises(ChRemoteError) as caught:
                await ch(stage, "PUT", command)
            assert caught.value.status == status
        assert await ch(stage, "PUT", "vm.create", BODY) is None
        info = await ch(stage, "GET", "vm.info")
        assert info["state"] == "Created"
        assert info["config"]["payload"]["cmdline"] == "console=ttyS0 ü"
        with pytest.raises(ChRemoteError) as caught:
            await ch(stage, "PUT", "vm.pause")
        assert caught.value.status == 500
        assert json.loads(caught.value.body or "") == [
            "Error from API",
            "The VM could not be paused",
            "pause: the VM is Created; it must be Running",
        ]
        for command, state in [
            ("boot", "Running"),
            ("pause", "Paused"),
            ("resume", "Running"),
            ("shutdown", "Created"),
        ]:
            assert await ch(stage, "PUT", f"vm.{command}") is None
            assert (await ch(stage, "GET", "vm.info"))["state"] == state
        assert await ch(stage, "PUT", "vm.boot") is None
        assert await ch(stage, "GET", "vm.counters") == {"__rng": {"activations": 3}}
        for command in ("nmi", "power-button"):
            assert await ch(stage, "PUT", f"vm.{command}") is None
            assert stage.vms[0].said[-1] == command
        assert await ch(stage, "PUT", "vm.delete") is None
        assert stage.vms[0].closed
        with pytest.raises(ChRemoteError) as caught:
            await ch(stage, "GET", "vm.info")
        assert caught.value.status == 404
        assert await ch(stage, "PUT", "vm.delete") is None
        assert await ch(stage, "PUT", "vmm.shutdown") is None
        with trio.fail_after(LIMIT_S):
            assert (await stage.vmm.ended()).kind == "asked"


@pytest.mark.parametrize(
    ("command", "fails"), [("nmi", "Error triggering NMI"), ("power-button", "Error triggering power button")]
)
async def test_a_vm_that_does_not_run_takes_no_nmi_and_no_button(stage_of: StageOf, command: str, fails: str) -> None:
    async with stage_of() as stage:
        for state, why in (
            ("no VM", "VM is not created; create it first"),
            ("Created", f"{command}: the VM is Created; it must be Running or Paused"),
        ):
            if state == "Created":
                assert await ch(stage, "PUT", "vm.create", BODY) is None
            with pytest.raises(ChRemoteError) as caught:
                await ch(stage, "PUT", f"vm.{command}")
            said = json.loads(caught.value.body or "")
            assert (caught.value.status, said[:2]) == (500, ["Error from API", fails])
            assert said[2].startswith(why)


async def test_routes_that_do_not_exist_yet_say_so_by_name(stage_of: StageOf) -> None:
    async with stage_of() as stage, Client(stage.path) as client:
        for name in NOT_YET_ROUTES:
            with pytest.raises(ApiError) as caught:
                await client.call("PUT", name, {})
            assert caught.value.status == 501
            assert caught.value.messages[-1] == f"{name} is not supported yet"


async def test_unknown_keys_fail_nothing_and_are_counted(stage_of: StageOf) -> None:
    async with stage_of() as stage:
        assert (await ch(stage, "GET", "vmm.ping"))["unknown_keys"] == {}
        assert await ch(stage, "PUT", "vm.create", {**BODY, "colour": None, "cpus": CPUS | {"sockets": 1}}) is None
        assert await ch(stage, "PUT", "vm.boot") is None
        stage.vms[0].let_migrate.set()
        move = {"destination_url": "unix:/x", "preserve_source": False, "urgent": [True]}
        assert await ch(stage, "PUT", "vm.send-migration", move) is None
        assert (await ch(stage, "GET", "vmm.ping"))["unknown_keys"] == {
            "VmConfig.colour": 1,
            "CpusConfig.sockets": 1,
            "SendMigrationData.urgent": 1,
        }


async def test_errors_speak_json(stage_of: StageOf) -> None:
    async with stage_of() as stage, Client(stage.path) as client:
        for body, said in [
            ({**BODY, "landlock_enable": True}, "landlock_enable = true: not supported yet; leave it out, or false"),
            ({**BODY, "disks": [{"path": None}]}, "disks[0].path = null: missing; give it"),
            ({**BODY, "rng": {"src": ["é"]}}, 'rng.src = ["é"]: wrong type; give text'),
        ]:
            with pytest.raises(ApiError) as caught:
                await client.call("PUT", "vm.create", body)
            assert caught.value.status == 400
            assert caught.value.messages[-1].startswith(said)


async def test_a_vm_without_a_payload_is_created_and_does_not_boot(tmp_path: Path) -> None:
    """As Cloud Hypervisor does: the configuration is looked at as a whole by the boot."""
    path, hypervisor = str(tmp_path / "api.sock"), FakeHypervisor()
    async with open_vmm(hypervisor) as vmm, open_server(path, Router(vmm), Deadlines()), Client(path) as client:
        await client.call("PUT", "vm.create", {})
        info = await client.info()
        assert (info["state"], "payload" in info["config"]) == ("Created", False)
        with pytest.raises(ApiError) as caught:
            await client.boot()
        assert caught.value.status == 500
        assert caught.value.messages[-1].startswith("payload.kernel = null: missing; give the path of a PVH ELF")
        assert (await client.info())["state"] == "Created"


@pytest.mark.parametrize(
    ("method", "route", "body", "status"),
    [
        ("GET", "vm.nothing", None, 404),
        ("GET", "vm.boot", None, 400),
        ("PUT", "vm.info", None, 400),
        ("DELETE", "vm.info", None, 400),
        ("PUT", "vm.boot", {}, 400),
        ("PUT", "vm.create", None, 400),
        ("PUT", "vm.create", [], 400),
        ("PUT", "vm.create", {"payload": {"kernel": "/refused"}}, 500),
        ("PUT", "vm.send-migration", {"destination_url": "unix:/x"}, 500),
        ("PUT", "vm.cancel-migration", None, 500),
        ("PUT", "vm.resolve-migration", None, 500),
        ("PUT", "vm.resolve-migration", {"force": 1}, 400),
        ("PUT", "vm.resolve-migration", [], 400),
        ("GET", "vm.resolve-migration", None, 400),
    ],
)
async def test_codes(stage_of: StageOf, method: str, route: str, body: Any, status: int) -> None:
    async with stage_of() as stage, Client(stage.path) as client:
        with pytest.raises(ApiError) as caught:
            await client.call(method, route, body)
        assert caught.value.status == status
        assert len(caught.value.messages) >= 2
        assert (await client.ping())["hypervisor"] == "fake"  # the server goes on
        assert await client.migration_progress() is None


@pytest.mark.parametrize("stays", [False, True])
async def test_a_doubt_that_is_resolved_as_moved_ends_the_vm_as_a_migration_does(
    stage_of: StageOf, stays: bool
) -> None:
    async with stage_of(options=VmmOptions(stay_after_migration=stays)) as stage, Client(stage.path) as client:
        await client.create(CONFIG)
        await client.boot()
        with pytest.raises(ApiError, match="it must be Paused"):
            await client.resolve_migration()
        await client.pause()
        with trio.fail_after(LIMIT_S):
            found = await client.resolve_migration()
            assert (found["verdict"], found["in_doubt"], found["forced"]) == ("running", False, False)
            if stays:
                with pytest.raises(ApiError, match="not created"):
                    await client.info()
            else:
                assert (await stage.vmm.ended()).kind == "migrated"


async def test_one_vm_at_a_time(stage_of: StageOf) -> None:
    async with stage_of() as stage, Client(stage.path) as client:
        await client.create(CONFIG)
        await client.boot()
        for refused in (client.create(BODY), client.receive_migration("unix:/x")):
            with pytest.raises(ApiError, match="there already"):
                await refused
        assert (await client.info())["config"]["payload"]["kernel"] == "/boot/vmlinux"


@pytest.mark.parametrize("shut_down", [False, True])
async def test_a_vm_that_is_not_booted_gives_way_to_one_that_comes(stage_of: StageOf, shut_down: bool) -> None:
    """As in Cloud Hypervisor, where it is a configuration only; but here it is kept when none comes."""
    names: list[str] = []
    async with stage_of() as stage, Client(stage.path) as client:
        stage.vmm.events.listen(lambda event: names.append(event.event))
        await client.create({**BODY, "payload": {"kernel": "/boot/other"}})
        if shut_down:
            await client.boot()
            await client.shutdown()
        for fails in (MigrationError("the link broke"), None):
            with trio.fail_after(LIMIT_S):
                async with trio.open_nursery() as nursery:

                    async def receive(fails: Exception | None = fails) -> None:
                        if fails is None:
                            await client.receive_migration("unix:/x")
                            return
                        with pytest.raises(ApiError, match="the link broke"):
                            await client.receive_migration("unix:/x")

                    before = len(stage.incoming)
                    nursery.start_soon(receive)
                    while len(stage.incoming) == before:
                        await client.ping()
                    with pytest.raises(ApiError, match="in the middle of receive-migration"):
                        await client.boot()
                    stage.incoming[-1].fails = fails
                    stage.incoming[-1].arrived.set()
            info = await client.info()
            kernel, state = info["config"]["payload"]["kernel"], info["state"]
            assert (kernel, state) == (("/boot/vmlinux", "Running") if fails is None else ("/boot/other", "Created"))
        await trio.testing.wait_all_tasks_blocked()
        assert [vm.closed for vm in stage.vms] == [True]
        assert names == []  # nothing was deleted by anybody
        await client.delete()
        assert names == ["deleted"]
        with pytest.raises(ApiError, match="not created"):
            await client.info()


async def test_a_migration_is_accepted_at_once_and_the_process_ends_with_it(stage_of: StageOf) -> None:
    async with stage_of() as stage, Client(stage.path) as client:
        await client.create(BODY)
        await client.boot()
        with trio.fail_after(LIMIT_S):
            await client.send_migration("unix:/x", downtime_ms=50, timeout_strategy="Ignore")
            verbs = (client.pause, client.boot, client.delete, client.shutdown, client.reboot, client.nmi)
            for refused in (*verbs, client.power_button):
                with pytest.raises(ApiError, match="the VM is migrating") as caught:
                    await refused()
                assert caught.value.status == 500
            with pytest.raises(ApiError, match="the VM is migrating"):
                await client.send_migration("unix:/y")
            assert (await client.info())["state"] == "Running"  # reads always work
            assert await client.counters()
            stage.vms[0].let_migrate.set()
            assert (await stage.vmm.ended()).kind == "migrated"
        options = stage.vms[0].migrate_options
        assert (options["url"], options["downtime_ms"], options["timeout_s"], options["timeout_strategy"]) == (
            "unix:/x",
            50,
            None,
            TimeoutStrategy.IGNORE,
        )


async def test_after_a_migration_it_can_stay_and_receive(stage_of: StageOf) -> None:
    async with stage_of(VmmOptions(stay_after_migration=True)) as stage, Client(stage.path) as client:
        await client.create(BODY)
        await client.boot()
        stage.vms[0].let_migrate.set()
        await client.send_migration("unix:/x")
        await trio.testing.wait_all_tasks_blocked()
        assert stage.vms[0].closed
        with pytest.raises(ApiError, match="not created"):
            await client.info()
        with trio.fail_after(LIMIT_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.receive_migration, "unix:/back")
                while not stage.incoming:
                    await client.ping()
                with pytest.raises(ApiError, match="in the middle of receive-migration"):
                    await client.create(BODY)
                stage.incoming[0].arrived.set()
        assert stage.incoming[0].url == "unix:/back"
        assert (await client.info())["state"] == "Running"


async def test_a_failed_migration_fails_nothing_else(stage_of: StageOf) -> None:
    async with stage_of() as stage, Client(stage.path) as client:
        await client.create(BODY)
        await client.boot()
        vm = stage.vms[0]
        vm.let_migrate.set()
        vm.migration_ends = MigrationError("the link broke")
        await client.send_migration("unix:/x")
        await trio.testing.wait_all_tasks_blocked()
        await client.pause()
        await client.resume()
        vm.migration_ends = None
        await client.send_migration("unix:/x")
        with trio.fail_after(LIMIT_S):
            assert (await stage.vmm.ended()).kind == "migrated"


async def test_what_can_not_begin_is_refused_and_not_accepted(stage_of: StageOf) -> None:
    async with stage_of() as stage, Client(stage.path) as client:
        await client.create(BODY)
        with pytest.raises(ApiError, match="the VM is Created") as caught:
            await client.send_migration("unix:/x")
        assert (caught.value.status, caught.value.messages[1]) == (500, "Error dispatching the migration worker")
        await client.boot()  # the refused one left nothing behind
        stage.vms[0].let_migrate.set()
        await client.send_migration("unix:/x")


async def test_a_migration_can_be_cancelled_in_either_direction(stage_of: StageOf) -> None:
    async with stage_of() as stage, Client(stage.path) as client:
        outcomes: list[str] = []

        async def noted(call: Callable[[str], Any]) -> None:
            with pytest.raises(ApiError) as caught:
                await call("unix:/x")
            outcomes.append(str(caught.value))

        async def cancelled(call: Callable[[str], Any], begun: Callable[[], object]) -> None:
            with trio.fail_after(LIMIT_S):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(noted, call)
                    while not begun():
                        await client.ping()
                    await client.cancel_migration()

        await cancelled(client.receive_migration, lambda: stage.incoming)
        assert all("cancelled" in outcome for outcome in outcomes)
        await client.create(BODY)
        await client.boot()
        await client.send_migration("unix:/x")
        await client.cancel_migration()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ApiError, match="not migrating"):
            await client.cancel_migration()
        assert (await client.info())["state"] == "Running"


async def test_a_cancellation_that_comes_after_commit_does_not_end_the_vm_that_came(stage_of: StageOf) -> None:
    """Its source has been told, or is about to be, that the VM runs here: nobody else would run it."""
    async with stage_of() as stage, Client(stage.path) as client:
        with trio.fail_after(LIMIT_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(client.receive_migration, "unix:/x")
                while not stage.incoming:
                    await client.ping()
                stage.incoming[0].guard.shield = True
                with pytest.raises(ApiError, match="COMMIT has come: nothing can be cancelled any more") as caught:
                    await client.cancel_migration()
                assert caught.value.status == 500
                stage.incoming[0].arrived.set()
            assert (await client.info())["state"] == "Running"
            await client.pause()


@pytest.mark.parametrize("kind", ["poweroff", "crash"])
async def test_the_guest_ends_the_process(stage_of: StageOf, kind: str) -> None:
    async with stage_of() as stage, Client(stage.path) as client:
        await client.create(BODY)
        await client.boot()
        await client.shutdown()  # ours does not
        await client.boot()
        await trio.testing.wait_all_tasks_blocked()
        if kind == "crash":
            stage.vms[0].crash()
        else:
            stage.vms[0].end(ExitReason("poweroff"))
        with trio.fail_after(LIMIT_S):
            end = await stage.vmm.ended()
        assert end.kind == kind
        assert (end.reason is not None and end.reason.crash is not None) == (kind == "crash")


async def test_a_vm_whose_task_fails_ends_the_process(stage_of: StageOf) -> None:
    """A fault of ours took the VM's nursery down. Nobody would ever tell a process without a socket to end."""
    async with stage_of() as stage, Client(stage.path) as client:
        await client.create(BODY)
        await client.boot()
        stage.vms[0].wait_fails = ZeroDivisionError("a bug")
        stage.vms[0].end(ExitReason("poweroff"))
        with trio.fail_after(LIMIT_S):
            assert (await stage.vmm.ended()).kind == "failed"
        with pytest.raises(ApiError, match="not created"):
            await client.info()


async def test_no_shutdown_outlives_the_guests_power_off(stage_of: StageOf) -> None:
    async with stage_of(VmmOptions(stay_after_shutdown=True)) as stage, Client(stage.path) as client:
        await client.create(BODY)
        await client.boot()
        stage.vms[0].end(ExitReason("poweroff"))
        await trio.testing.wait_all_tasks_blocked()
        assert (await client.info())["state"] == "Created"
        await client.boot()
        stage.vms[0].crash()
        with trio.fail_after(LIMIT_S):
            assert (await stage.vmm.ended()).kind == "crash"


async def test_at_the_end_a_running_call_answers_500_and_then_closes(stage_of: StageOf) -> None:
    answers: list[bytes] = []

    async def ask(path: str, data: bytes) -> None:
        answers.append(await trio.to_thread.run_sync(raw, path, data))

    with trio.fail_after(LIMIT_S):
        async with trio.open_nursery() as nursery, stage_of() as stage:
            body = b'{"receiver_url":"unix:/x"}'
            request = b"PUT /api/v1/vm.receive-migration HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
            nursery.start_soon(ask, stage.path, request % (len(body), body))
            async with Client(stage.path) as client:
                while not stage.incoming:
                    await client.ping()
    assert answers[0].startswith(b"HTTP/1.1 500 \r\n")
    assert json.loads(answers[0].partition(b"\r\n\r\n")[2]) == [
        "vm.receive-migration was cancelled",
        "the VMM is shutting down",
    ]


async def test_descriptors_that_a_client_passes_are_closed(stage_of: StageOf) -> None:
    async with stage_of() as stage:
        before = len(os.listdir("/proc/self/fd"))
        request = b"GET /api/v1/vmm.ping HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        answer = await trio.to_thread.run_sync(lambda: raw(stage.path, request, fds=[0] * 5))
        assert answer.startswith(b"HTTP/1.1 200 \r\n")
        await trio.testing.wait_all_tasks_blocked()
        assert len(os.listdir("/proc/self/fd")) <= before + 1  # a spare worker thread's own, at the most


@pytest.mark.parametrize("data", [b"PUT /api/v1/vm.create HTTP/1.1\r\nHo", b""])
async def test_a_client_that_stops_in_the_middle_is_closed_at_its_deadline(stage_of: StageOf, data: bytes) -> None:
    async with stage_of(api_read=0.2, api_idle=0.2) as stage:
        with trio.fail_after(LIMIT_S):
            assert await trio.to_thread.run_sync(raw, stage.path, data) == b""


async def test_an_oversized_request_reads_its_refusal(stage_of: StageOf) -> None:
    async with stage_of() as stage:
        data = b"PUT /api/v1/vm.create HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n" + bytes(3_000_000)
        answer = await trio.to_thread.run_sync(raw, stage.path, data)
        assert answer.startswith(b"HTTP/1.1 400 \r\n")
        assert b"Connection: close" in answer


async def test_pipelined_requests_are_answered_in_order(stage_of: StageOf) -> None:
    async with stage_of() as stage:
        get = b"GET /api/v1/%s HTTP/1.1\r\nHost: x\r\n%s\r\n"
        data = get % (b"vmm.ping", b"") + get % (b"vm.info", b"") + get % (b"x", b"Connection: close\r\n")
        answer = await trio.to_thread.run_sync(raw, stage.path, data)
        assert re.findall(rb"HTTP/1.1 (\d+) \r", answer) == [b"200", b"404", b"404"]


async def test_a_bug_in_a_handler_is_one_500(tmp_path: Path) -> None:
    async def handler(request: Request) -> Response:
        raise ZeroDivisionError("oops")

    path = str(tmp_path / "s")
    async with open_server(path, handler, Deadlines()):
        with pytest.raises(ChRemoteError) as caught:
            await trio.to_thread.run_sync(ch_remote, path, "GET", "x")
    assert caught.value.status == 500
    assert "ZeroDivisionError" in (caught.value.body or "")


async def test_an_error_that_is_its_own_cause_is_answered_all_the_same(stage_of: StageOf) -> None:
    """A loop in an error's chain once held the whole event loop, the guest's exits with it."""

    def broken(*_: object) -> None:
        first, second = TrivmmError("outer"), TrivmmError("inner")
        first.__cause__, second.__cause__ = second, first
        raise first

    async with stage_of() as stage:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Vmm, "cancel_migration", broken)
            with pytest.raises(ChRemoteError) as caught:
                await ch(stage, "PUT", "vm.cancel-migration")
    assert json.loads(caught.value.body or "") == [
        "Error from API",
        "The migration could not be cancelled",
        "outer",
        "inner",
    ]


async def _nobody(request: Request) -> Response:
    return Response(204)


async def test_the_sockets_life(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with open_server(str(path), _nobody, Deadlines()):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        with pytest.raises(ConfigError, match="in use by another process"):
            async with open_server(str(path), _nobody, Deadlines()):
                pass
        assert await trio.to_thread.run_sync(ch_remote, str(path), "PUT", "x") is None  # the first one goes on
    assert names_in(tmp_path) == []


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def leave_a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    path.with_name(path.name + ".lock").touch()


async def test_a_stale_socket_is_removed_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "s"
    leave_a_socket(path)
    async with open_server(str(path), _nobody, Deadlines()):
        pass
    assert names_in(tmp_path) == []
    with socket.socket(socket.AF_UNIX) as alive:  # serves without our lock
        alive.bind(str(path))
        alive.listen()
        with pytest.raises(ConfigError, match="in use"):
            async with open_server(str(path), _nobody, Deadlines()):
                pass
        os.unlink(path)
    (tmp_path / "s").write_text("mine")
    with pytest.raises(ConfigError, match="not a socket"):
        async with open_server(str(path), _nobody, Deadlines()):
            pass
    assert (tmp_path / "s").read_text() == "mine"
    for bad in ("", "x" * 200, str(tmp_path / "no" / "s")):
        with pytest.raises(ConfigError):
            async with open_server(bad, _nobody, Deadlines()):
                pass


async def test_a_client_without_a_server(tmp_path: Path) -> None:
    async with Client(str(tmp_path / "nobody")) as client:
        with pytest.raises(ApiUnreachable, match="nobody"):
            await client.ping()
