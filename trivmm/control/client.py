"""The Python client: httpx over the unix socket, one method a route.

It sets no timeouts (``timeout=None``): the caller owns the deadline, as everywhere in trio::

    async with Client("/run/a.sock") as client:
        with trio.fail_after(30):
            await client.send_migration("unix:/run/move.sock", downtime_ms=200)
            await client.migration_outcome()
"""

from __future__ import annotations

import json
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

import attrs
import httpx
import trio

from trivmm.config import VmConfig
from trivmm.control.apierror import ApiError, ApiUnreachable, MigrationFailed, answer_of, messages_of
from trivmm.control.contract import API_ROOT
from trivmm.control.schema import dump_config
from trivmm.errors import ConfigError
from trivmm.unixsocket import check_path

__all__ = ["ApiError", "ApiUnreachable", "Client", "MigrationFailed"]

MAX_CONNECTIONS: Final = 16  # calls in flight at once; a call that lasts must not keep a progress query waiting
POLL_S: Final = 0.05
JSON: Final = {"Content-Type": "application/json"}


@attrs.define(eq=False)
class Client:
    """A connection pool to one VMM, for the length of ``async with``.

    :raises ConfigError: no socket can be at ``path``.

    Every method raises ``ApiError`` for an error answer and ``ApiUnreachable`` when there is no server; both are
    ``TrivmmError``. Cancelling a call closes its connection; the VMM goes on with what was asked."""

    path: str
    _http: httpx.AsyncClient = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        check_path(self.path, "path", self.path)
        limits = httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS)
        transport = httpx.AsyncHTTPTransport(uds=self.path, limits=limits)
        self._http = httpx.AsyncClient(
            transport=transport, base_url="http://localhost" + API_ROOT, timeout=None, trust_env=False
        )

    async def __aenter__(self) -> Client:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.__aexit__(kind, error, trace)  # noqa: ASYNC102 - closes sockets, waits for nobody

    async def call(self, method: str, route: str, body: object = None) -> Any:
        """``route`` such as ``vm.info``; ``body`` is JSON-able, None sends none. Gives the answer's JSON, or None.

        :raises ConfigError: there can be no such route."""
        if not (route.isascii() and route.isprintable()):
            raise ConfigError("route", route, "not ASCII", "give the name of one, such as vm.info")
        # In ASCII, as the contract wants it: what is no Unicode text is the server's to refuse, by its name.
        content = None if body is None else json.dumps(body).encode()
        try:
            answer = await self._http.request(method, route, content=content, headers=JSON if content else None)
        except httpx.TransportError as error:
            raise ApiUnreachable(self.path, str(error) or type(error).__name__) from error
        if answer.status_code >= 400:
            raise ApiError(answer.status_code, messages_of(answer.content))
        return answer_of(answer.content)

    async def ping(self) -> dict[str, Any]:
        """Version, process id, features, hypervisor."""
        return await self._object("vmm.ping")

    async def shutdown_vmm(self) -> None:
        """End the process."""
        await self.call("PUT", "vmm.shutdown")

    async def info(self) -> dict[str, Any]:
        """``config``, ``state``, ``memory_actual_size``, ``device_tree``, …"""
        return await self._object("vm.info")

    async def counters(self) -> dict[str, dict[str, int]]:
        """By device: counters by name."""
        return await self._object("vm.counters")

    async def create(self, config: VmConfig | dict[str, Any]) -> None:
        """``config`` as our class or as the contract's JSON object."""
        await self.call("PUT", "vm.create", dump_config(config) if isinstance(config, VmConfig) else config)

    async def delete(self) -> None:
        await self.call("PUT", "vm.delete")

    async def boot(self) -> None:
        await self.call("PUT", "vm.boot")

    async def pause(self) -> None:
        await self.call("PUT", "vm.pause")

    async def resume(self) -> None:
        await self.call("PUT", "vm.resume")

    async def shutdown(self) -> None:
        """Power the VM off; its configuration stays."""
        await self.call("PUT", "vm.shutdown")

    async def reboot(self) -> None:
        await self.call("PUT", "vm.reboot")

    async def nmi(self) -> None:
        """A non-maskable interrupt for every vCPU."""
        await self.call("PUT", "vm.nmi")

    async def power_button(self) -> None:
        """Press the ACPI power button."""
        await self.call("PUT", "vm.power-button")

    async def send_migration(
        self,
        destination_url: str,
        *,
        downtime_ms: int | None = None,
        timeout_s: int | None = None,
        timeout_strategy: str | None = None,
    ) -> None:
        """Returns as soon as the migration begins: see :meth:`migration_outcome`. ``timeout_strategy`` is ``Cancel``
        or ``Ignore``."""
        options = {"downtime_ms": downtime_ms, "timeout_s": timeout_s, "timeout_strategy": timeout_strategy}
        given = {name: value for name, value in options.items() if value is not None}
        await self.call("PUT", "vm.send-migration", {"destination_url": destination_url, **given})

    async def migration_outcome(self, on_progress: Callable[[dict[str, Any]], None] | None = None) -> dict[str, Any]:
        """Wait for the end of a migration that began, asking every 50 ms; gives its last progress.

        :raises MigrationFailed: it did not take the VM away; the reason is in its progress."""
        while True:
            progress = await self.migration_progress()
            if progress is not None:
                if on_progress is not None:
                    on_progress(progress)
                state, details = next(iter(progress["state"].items()))
                if state == "Finished":
                    return progress
                if state != "Ongoing":
                    raise MigrationFailed(state, details.get("error_msg", ""), progress)
            await trio.sleep(POLL_S)

    async def receive_migration(self, receiver_url: str) -> None:
        """Returns when the VM that came runs there."""
        await self.call("PUT", "vm.receive-migration", {"receiver_url": receiver_url})

    async def migration_progress(self) -> dict[str, Any] | None:
        """The running migration, or the last one; None when there was none."""
        found: dict[str, Any] | None = await self.call("GET", "vm.migration-progress")
        return found

    async def cancel_migration(self) -> None:
        await self.call("PUT", "vm.cancel-migration")

    async def resolve_migration(self, *, force: bool = False) -> dict[str, Any]:
        """What became of a migration that ended in doubt: ``verdict``, ``reason``, ``advice``, ``in_doubt``,
        ``forced``, as :class:`~trivmm.migration.source.doubt.Resolution` has them."""
        found: dict[str, Any] = await self.call("PUT", "vm.resolve-migration", {"force": force})
        return found

    async def _object(self, route: str) -> dict[str, Any]:
        found: dict[str, Any] = await self.call("GET", route)
        return found
