"""The API's routes: a table from name to verb, and the codes that Cloud Hypervisor answers with.

200 with a JSON body, 204 without one; 400 for what the client got wrong (malformed body, wrong method); 404 for an
unknown route and where there is no VM; 501 for a route of the contract that does not exist here yet; 500 for
everything else, a wrong state included. An error's body is a JSON array of strings, outermost to root cause.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import attrs

import trivmm
from trivmm.control.contract import NOT_YET_ROUTES
from trivmm.control.http import Request, Response, error_response
from trivmm.control.schema import dump_config, load_config, load_receive, load_send, parse_json
from trivmm.control.unknown import Unknown
from trivmm.errors import ConfigError, TrivmmError, VmNotCreated
from trivmm.migration.progress import MigrationProgress
from trivmm.vmm import Vmm

__all__ = ["ROUTES", "Route", "Router", "progress_body"]

MAX_CAUSES: Final = 8  # of an error's chain; ours are two or three long
FEATURES: Final = ("live-migration",)


@attrs.frozen
class Route:
    """``load`` turns the body into the verb's argument, and tells a collector the keys that it doesn't know; None: the
    route takes no body."""

    method: str
    run: Callable[[Vmm, Any], Awaitable[Response]]
    load: Callable[[object, Unknown], object] | None = None


async def _ping(vmm: Vmm, _: None) -> Response:
    return Response.of(
        {
            "version": f"v{trivmm.__version__}",
            "build_version": f"trivmm {trivmm.__version__}",
            "pid": os.getpid(),
            "features": [*FEATURES, vmm.hypervisor.name],
            "hypervisor": vmm.hypervisor.name,
            "note": vmm.hypervisor.note,
            "unknown_keys": vmm.unknown_keys.counts,
        }
    )


async def _shut_down(vmm: Vmm, _: None) -> Response:
    vmm.shut_down()
    return Response(204)


async def _info(vmm: Vmm, _: None) -> Response:
    vm = vmm.vm
    return Response.of({"config": dump_config(vm.config), **vm.info(), "state": vm.state.value})


async def _counters(vmm: Vmm, _: None) -> Response:
    return Response.of(vmm.vm.counters())


async def _create(vmm: Vmm, config: Any) -> Response:
    await vmm.create(attrs.evolve(config, deadlines=vmm.deadlines))
    return Response(204)


async def _send(vmm: Vmm, data: Any) -> Response:
    await vmm.send_migration(data)
    return Response(204)


async def _receive(vmm: Vmm, data: Any) -> Response:
    await vmm.receive_migration(data.receiver_url)
    return Response(204)


async def _progress(vmm: Vmm, _: None) -> Response:
    progress = vmm.progress
    return Response(204) if progress is None else Response.of(progress_body(progress, vmm.memory_pages))


async def _cancel(vmm: Vmm, _: None) -> Response:
    vmm.cancel_migration()
    return Response(204)


def _verb(name: str) -> Route:
    async def run(vmm: Vmm, _: None) -> Response:
        await getattr(vmm, name)()
        return Response(204)

    return Route("PUT", run)


ROUTES: Final[Mapping[str, Route]] = {
    "vmm.ping": Route("GET", _ping),
    "vmm.shutdown": Route("PUT", _shut_down),
    "vm.info": Route("GET", _info),
    "vm.counters": Route("GET", _counters),
    "vm.create": Route("PUT", _create, load_config),
    "vm.delete": _verb("delete"),
    "vm.boot": _verb("boot"),
    "vm.pause": _verb("pause"),
    "vm.resume": _verb("resume"),
    "vm.shutdown": _verb("shutdown"),
    "vm.send-migration": Route("PUT", _send, load_send),
    "vm.receive-migration": Route("PUT", _receive, load_receive),
    "vm.migration-progress": Route("GET", _progress),
    "vm.cancel-migration": Route("PUT", _cancel),
}


def progress_body(progress: MigrationProgress, memory_pages: int) -> dict[str, Any]:
    """A snapshot as JSON: ``phase`` in capitals (``PRECOPY``), ``dirty_pages`` those still to be sent."""
    made = attrs.asdict(progress)
    made["phase"] = progress.phase.name
    made["dirty_pages"] = progress.remaining_pages
    made["memory_pages"] = memory_pages
    made["downtime_ms"] = None if progress.actual_downtime is None else progress.actual_downtime.total_ms
    return made


@attrs.frozen(eq=False)
class Router:
    """The server's handler. Answers whatever is asked; raises nothing but cancellation."""

    vmm: Vmm

    async def __call__(self, request: Request) -> Response:
        name = request.name
        if name in NOT_YET_ROUTES:
            return error_response(501, f"{name} failed", f"{name} is not supported yet")
        route = ROUTES.get(name) if name is not None else None
        if route is None:
            return error_response(404, "not found", f"{name or 'that path'} is not a route of this API")
        if request.method != route.method:
            return error_response(400, "bad request", f"{name} takes {route.method}, not {request.method}")
        argument: object = None
        if route.load is not None:
            try:
                argument = route.load(parse_json(request.body), self.vmm.unknown_keys)
            except ConfigError as error:
                return error_response(400, "bad request", *_chain(error))
        elif request.method == "PUT" and request.body:
            return error_response(400, "bad request", f"{name} takes no body")
        try:
            return await route.run(self.vmm, argument)
        except VmNotCreated as error:
            return error_response(404, f"{name} failed", *_chain(error))
        except (TrivmmError, OSError) as error:
            return error_response(500, f"{name} failed", *_chain(error))


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
