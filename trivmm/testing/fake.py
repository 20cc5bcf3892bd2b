"""A VMM without a guest: the whole API, real sockets and real migrations, on scripted vCPUs, failing on cue.

What ``trivmm fake`` runs. Nothing of it is a double but the CPU: configuration, states, devices, events, migrations
between two of them and every error are those of the VMM itself. Its guest prints a line, then dirties pages for ever.
"""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any, Final

import attrs
import trio

from trivmm.control.http import Request, Response, error_response
from trivmm.control.routes import ROUTES, Router
from trivmm.control.schema import parse_json
from trivmm.errors import ConfigError, PauseTimeout, TrivmmError
from trivmm.platform.serial import COM1
from trivmm.testing.faults import Fault, Faults, parse_fault
from trivmm.testing.scripted import Compute, IoOut, Script, ScriptedHypervisor, ScriptedVcpu, Step, Store
from trivmm.vmm import Vmm

__all__ = ["FAKE_ROUTE", "VERBS", "FakeRouter", "busy_guest", "fake_hypervisor"]

FAKE_ROUTE: Final = "fake.faults"
VERBS: Final = tuple(name.removeprefix("vm.") for name in ROUTES)
GREETING: Final = b"fake guest ready\r\n"
FIRST_PAGE, PAGES = 256, 1024  # what the guest dirties: 4 MiB from 1 MiB on
TICK_S: Final = 0.01
MAX_FAULTS: Final = 64


def busy_guest(pages_per_s: int) -> Script:
    """A guest that says that it is ready, then writes ``pages_per_s`` pages a second; its place travels with it."""

    def script(cpu: ScriptedVcpu) -> Generator[Step, bytes | None, None]:
        if "page" not in cpu.registers:
            for byte in GREETING if cpu.index == 0 else b"":
                yield IoOut(COM1[0], 1, bytes([byte]))
            cpu.registers["page"] = 0
        owed = 0.0
        while True:
            yield Compute(TICK_S)
            owed += pages_per_s * TICK_S
            while owed >= 1:
                owed -= 1
                page = cpu.registers["page"] = (cpu.registers["page"] + 1) % PAGES
                yield Store((FIRST_PAGE + page) << 12, cpu.registers["page"].to_bytes(8, "little"))

    return script


def fake_hypervisor(pages_per_s: int = 200) -> ScriptedHypervisor:
    """For ``open_vm`` and ``open_vmm``: boots any payload's name without looking for the file."""
    guest = busy_guest(pages_per_s)
    return ScriptedHypervisor(*[guest] * ScriptedHypervisor.max_vcpus, needs_payload=False)


@attrs.define(eq=False)
class FakeRouter:
    """The server's handler: the VMM's own, after whatever was asked to fail. ``fake.faults`` (GET, PUT) is the list."""

    vmm: Vmm
    faults: Faults
    _router: Router = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._router = Router(self.vmm)

    async def __call__(self, request: Request) -> Response:
        name = request.name or ""
        if name == FAKE_ROUTE:
            return self._change(request)
        fault = self.faults.take(name.removeprefix("vm.")) if name in ROUTES else None
        if fault is not None:
            try:
                await self._carry_out(fault)
            except TrivmmError as error:
                return error_response(500, "Error from API", ROUTES[name].fails, str(error))
        response = await self._router(request)
        if name == "vmm.ping" and response.body is not None:
            body: dict[str, Any] = json.loads(response.body)
            return Response.of({**body, "fake": True, "fails": self.faults.told()})
        return response

    async def _carry_out(self, fault: Fault) -> None:
        match fault.kind:
            case "delay":
                await trio.sleep(fault.seconds)
            case "timeout":
                await trio.sleep(self.vmm.deadlines.pause)
                raise PauseTimeout("pause", self.vmm.deadlines.pause, "vcpu0 (RUNNING) did not stop: as --fail asked")
            case _:
                await trio.lowlevel.checkpoint()
                raise TrivmmError(fault.text or f"{fault.verb} failed, as --fail asked")

    def _change(self, request: Request) -> Response:
        if request.method == "GET":
            return Response.of(self.faults.told())
        try:
            wanted = parse_json(request.body)
            if not isinstance(wanted, list) or not all(isinstance(each, str) for each in wanted):
                raise ConfigError("body", None, "not a list of texts", 'send ["pause=timeout", …], or [] for none')
            if len(wanted) > MAX_FAULTS:
                raise ConfigError("body", len(wanted), "too many faults", f"give at most {MAX_FAULTS}")
            self.faults.replace([parse_fault(each, VERBS) for each in wanted])
        except ConfigError as error:
            return error_response(400, "Bad Request", str(error))
        return Response(204)
