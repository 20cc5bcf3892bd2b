"""The API's routes: a table from name to verb, and the codes that Cloud Hypervisor answers with.

200 with a JSON body, 204 without one (vmm.shutdown: 200 without one, as there); 400 for what the client got wrong
(malformed body, wrong method); 404 for an unknown route, where there is no VM to look at or to boot, and for a device
that it does not have; 501 for a route of the contract that does not exist here yet; 500 for everything else, a wrong
state included. An error's body is a JSON array of strings, outermost to root cause, the first two in Cloud Hypervisor's
words.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final

import attrs

import trivmm
from trivmm.control.contract import CONTRACT_VERSION, NOT_YET_ROUTES
from trivmm.control.http import Request, Response, error_response
from trivmm.control.progress import progress_body
from trivmm.control.schema import (
    dump_config,
    load_config,
    load_device,
    load_receive,
    load_remove,
    load_resize,
    load_resize_disk,
    load_resolve,
    load_send,
    parse_json,
    with_descriptors,
    without_descriptors,
)
from trivmm.control.unknown import Unknown, UnknownKeys
from trivmm.errors import ConfigError, NoSuchDevice, TrivmmError, VmNotCreated, WrongState, shown
from trivmm.events import Subscription
from trivmm.virtio.kind import AnyKind
from trivmm.virtio.kinds import hotplug_verbs
from trivmm.vm import VmState
from trivmm.vmm import Vmm

__all__ = ["ROUTES", "Route", "Router"]

MAX_CAUSES: Final = 8  # of an error's chain; ours are two or three long
API_ERROR: Final = "Error from API"
FEATURES: Final = ("live-migration",)
STATES: Final = {VmState.SHUTDOWN: VmState.CREATED}  # as there: of a VM that was shut down its configuration is left


@attrs.frozen
class Route:
    """``load`` turns the body into the verb's argument, and tells a collector the keys that it doesn't know; None: the
    route takes no body; where that is ``optional``, none is ``{}``. ``fails`` is what its errors say first;
    ``without_vm`` the code where there is none, and ``not_booted`` where the one that is there is in a state that won't
    do. ``unknown``: it takes the router's collector as its argument. ``adds``: the kind of device that it adds; its
    argument is that configuration, and the descriptors that came along."""

    method: str
    run: Callable[[Vmm, Any], Awaitable[Response]]
    load: Callable[[object, Unknown], object] | None = None
    fails: str = "The VM info is not available"
    without_vm: int = 404
    not_booted: int = 500
    optional: bool = False
    unknown: bool = False
    adds: AnyKind | None = None

    def argument(self, request: Request, unknown: Unknown) -> object:
        """:raises ConfigError:"""
        if self.load is None:
            return unknown if self.unknown else None
        body = {} if self.optional and not request.body else parse_json(request.body)
        if self.adds is None:
            return self.load(without_descriptors(body), unknown)
        return self.load(with_descriptors(self.adds, body, request.passed.fds), unknown), request.passed


async def _ping(vmm: Vmm, unknown: UnknownKeys) -> Response:
    return Response.of(
        {
            "build_version": f"v{CONTRACT_VERSION}",
            "version": CONTRACT_VERSION,
            "pid": os.getpid(),
            "features": [*FEATURES, vmm.hypervisor.name],
            "trivmm_version": trivmm.__version__,
            "hypervisor": vmm.hypervisor.name,
            "note": vmm.hypervisor.note,
            "unknown_keys": unknown.counts,
        }
    )


async def _shut_down(vmm: Vmm, _: None) -> Response:
    vmm.shut_down()
    return Response(200)


async def _info(vmm: Vmm, _: None) -> Response:
    vm = vmm.vm
    state = STATES.get(vm.state, vm.state)
    config = dump_config(vm.config)
    for line, path in vm.pty_paths.items():  # where a client finds the other end, as there
        config[line]["file"] = path
    return Response.of({"config": config, **vm.info(), "state": state.value})


async def _counters(vmm: Vmm, _: None) -> Response:
    vm = vmm.vm
    if vm.state not in (VmState.RUNNING, VmState.PAUSED):
        raise WrongState("counters", vm.state.value, "booted")
    return Response.of(vm.counters())


async def _create(vmm: Vmm, config: Any) -> Response:
    await vmm.create(attrs.evolve(config, deadlines=vmm.deadlines))
    return Response(204)


async def _send(vmm: Vmm, data: Any) -> Response:
    await vmm.send_migration(data.destination_url, data.options)
    return Response(204)


async def _receive(vmm: Vmm, data: Any) -> Response:
    await vmm.receive_migration(data.receiver_url)
    return Response(204)


async def _progress(vmm: Vmm, _: None) -> Response:
    progress = vmm.read_progress()
    return Response(204) if progress is None else Response.of(progress_body(progress))


async def _resize(vmm: Vmm, data: Any) -> Response:
    await vmm.resize(data.desired_vcpus, data.desired_ram, data.desired_balloon)
    return Response(204)


async def _add(vmm: Vmm, added: Any) -> Response:
    """200 with where it is, 204 where that is on paper."""
    config, passed = added
    info = await vmm.add_device(config, passed)
    return Response(204) if info is None else Response.of(attrs.asdict(info))


def _adding(kind: AnyKind, fails: str) -> Route:
    return Route("PUT", _add, partial(load_device, kind), fails, adds=kind)


async def _remove(vmm: Vmm, data: Any) -> Response:
    await vmm.remove_device(data.id)
    return Response(204)


async def _resize_disk(vmm: Vmm, data: Any) -> Response:
    await vmm.resize_disk(data.id, data.desired_size)
    return Response(204)


async def _cancel(vmm: Vmm, _: None) -> Response:
    vmm.cancel_migration()
    return Response(204)


async def _resolve(vmm: Vmm, data: Any) -> Response:
    return Response.of(attrs.asdict(await vmm.resolve_migration(data.force)))


async def _events(vmm: Vmm, _: None) -> Response:
    return Response(200, stream=partial(_open_events, vmm))


@attrs.define(eq=False)
class _EventStream:
    """Server-sent events: a line of JSON each, as ``--event-monitor`` writes them; ends with the VMM's shutdown."""

    _events: Subscription

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for event in self._events:
            yield f"data: {event.text()}\n\n".encode()

    def finish(self) -> None:
        self._events.end()


@asynccontextmanager
async def _open_events(vmm: Vmm) -> AsyncIterator[_EventStream]:
    with vmm.events.subscribe() as events:
        yield _EventStream(events)


def _verb(name: str, fails: str, without_vm: int = 500, not_booted: int = 500) -> Route:
    async def run(vmm: Vmm, _: None) -> Response:
        await getattr(vmm, name)()
        return Response(204)

    return Route("PUT", run, fails=fails, without_vm=without_vm, not_booted=not_booted)


ROUTES: Final[Mapping[str, Route]] = {
    "vmm.ping": Route("GET", _ping, unknown=True),
    "vmm.shutdown": Route("PUT", _shut_down, fails="The VMM could not shutdown"),
    "vm.info": Route("GET", _info),
    "vm.counters": Route("GET", _counters, without_vm=500),
    "vm.create": Route("PUT", _create, load_config, "The VM could not be created"),
    "vm.delete": _verb("delete", "The VM could not be deleted"),
    "vm.boot": _verb("boot", "The VM could not boot", 404),
    "vm.pause": _verb("pause", "The VM could not be paused"),
    "vm.resume": _verb("resume", "The VM could not resume"),
    "vm.shutdown": _verb("shutdown", "The VM could not shutdown"),
    "vm.reboot": _verb("reboot", "The VM could not reboot", 404, not_booted=404),
    "vm.nmi": _verb("nmi", "Error triggering NMI"),
    "vm.power-button": _verb("power_button", "Error triggering power button"),
    "vm.resize": Route("PUT", _resize, load_resize, "The VM could not be resized"),
    **{f"vm.{verb}": _adding(kind, kind.hotplug.fails) for verb, kind in hotplug_verbs().items() if kind.hotplug},
    "vm.remove-device": Route("PUT", _remove, load_remove, "The device could not be removed from the VM"),
    "vm.resize-disk": Route("PUT", _resize_disk, load_resize_disk, "The disk could not be resized"),
    "vm.send-migration": Route("PUT", _send, load_send, "Error dispatching the migration worker", 500),
    "vm.receive-migration": Route("PUT", _receive, load_receive, "Error receiving migration", 500),
    "vm.migration-progress": Route("GET", _progress, fails="The migration's progress is not available"),
    "vm.cancel-migration": Route("PUT", _cancel, fails="The migration could not be cancelled"),
    "vm.resolve-migration": Route(
        "PUT", _resolve, load_resolve, "The migration could not be resolved", without_vm=500, optional=True
    ),
    "events": Route("GET", _events, fails="The events are not available"),
}


@attrs.frozen(eq=False)
class Router:
    """The server's handler. Answers whatever is asked; raises nothing but cancellation."""

    vmm: Vmm
    unknown: UnknownKeys = attrs.field(factory=UnknownKeys)

    async def __call__(self, request: Request) -> Response:
        name = request.name
        if name in NOT_YET_ROUTES:
            return error_response(501, API_ERROR, f"{name} failed", f"{name} is not supported yet")
        route = ROUTES.get(name) if name is not None else None
        if route is None:
            asked = "that path" if name is None else shown(name)[1:-1]
            return error_response(404, "Not Found", f"{asked} is not a route of this API")
        if request.method != route.method:
            asked = shown(request.method)[1:-1]
            return error_response(400, "Bad Request", f"{name} takes {route.method}, not {asked}")
        if route.load is None and request.method == "PUT" and request.body:
            return error_response(400, "Bad Request", f"{name} takes no body")
        try:
            argument = route.argument(request, self.unknown)
        except ConfigError as error:
            return error_response(400, "Bad Request", *_chain(error))
        try:
            return await route.run(self.vmm, argument)
        except NoSuchDevice as error:
            return error_response(404, API_ERROR, route.fails, *_chain(error))
        except VmNotCreated as error:
            return error_response(route.without_vm, API_ERROR, route.fails, *_chain(error))
        except WrongState as error:
            return error_response(route.not_booted, API_ERROR, route.fails, *_chain(error))
        except (TrivmmError, OSError) as error:
            return error_response(500, API_ERROR, route.fails, *_chain(error))


def _chain(error: BaseException) -> list[str]:
    """Messages from ``error`` to its root cause, along ``raise … from``."""
    messages: list[str] = []
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and len(seen) < MAX_CAUSES and id(cause) not in seen:
        seen.add(id(cause))
        text = str(cause) or type(cause).__name__
        if not messages or text not in messages[-1]:
            messages.append(text)
        cause = cause.__cause__
    return messages
