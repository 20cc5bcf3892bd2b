"""``trivmm run``: one VMM process, from its options to its exit code.

The end is the same whatever asked for it (a signal, the guest, a client, a migration away): the Vmm nursery is
cancelled, a migration rolls back, the VM ends, the sockets go. A watchdog thread gives all that ``shutdown_grace``;
then it names what still runs and leaves by ``os._exit``, since a thread stuck in the kernel can't be ended otherwise.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs
import trio

from trivmm.cli import EXIT_CRASH, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, say_error
from trivmm.cli.options import parse_deadlines, parse_socket, parse_vm
from trivmm.cli.parser import REFUSED, UsageError, run_parser
from trivmm.cli.terminal import follow_size, is_terminal, is_typed_on, raw_terminal, restore_terminal, type_into
from trivmm.config import VmConfig
from trivmm.control.schema import load_config
from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError, GuestCrash, HypervisorError, TrivmmError
from trivmm.hypervisor.select import choose_hypervisor
from trivmm.unixsocket import SocketFd

if TYPE_CHECKING:
    from trivmm.hypervisor.base import Hypervisor
    from trivmm.testing.faults import Faults
    from trivmm.vmm import Vmm, VmmEnd

__all__ = ["RunOptions", "parse_run", "run", "serve"]

LOG: Final = logging.getLogger(__name__)
SWITCH_INTERVAL_S: Final = 1e-4  # the GIL's: with the default 5 ms two busy vCPU threads starve each other
LEVELS: Final = (logging.WARNING, logging.INFO, logging.DEBUG)
VM_OPTIONS: Final = ("cmdline", "initramfs", "cpus", "memory", "disk", "rng", "serial", "console")


@attrs.frozen
class RunOptions:
    """``config`` None: only serve."""

    config: VmConfig | None
    api_socket: str | SocketFd | None
    hypervisor: str
    deadlines: Deadlines
    stay_after_migration: bool
    stay_after_shutdown: bool
    log_file: str | None
    verbose: int
    event_monitor: str | None


def parse_run(arguments: Sequence[str]) -> RunOptions:
    """:raises UsageError: / :raises ConfigError: one line each."""
    given = run_parser().parse(arguments, REFUSED)
    if given.seccomp not in (None, "false"):
        raise ConfigError("--seccomp", given.seccomp, "there is no seccomp filter yet", "give false, or leave it out")
    deadlines = parse_deadlines(given.deadlines)
    config: VmConfig | None = None
    if given.kernel is not None:
        config = load_config(parse_vm(given, terminal=is_terminal(1)), deadlines=deadlines)
        if len(_terminal_lines(config)) > 1 and is_typed_on():
            raise ConfigError("--console", "tty", "the serial port reads the terminal", "give one of them another mode")
    else:
        alone = [name for name in VM_OPTIONS if getattr(given, name) is not None]
        if alone:
            raise UsageError(f"--{alone[0]}: there is no --kernel; give the path of a PVH ELF")
        if given.api_socket is None:
            raise UsageError("nothing to do; give --kernel FILE, or --api-socket path=FILE to serve only")
    return RunOptions(
        config,
        None if given.api_socket is None else parse_socket(given.api_socket),
        given.hypervisor,
        deadlines,
        given.stay_after_migration,
        given.no_shutdown,
        given.log_file,
        given.verbose,
        given.event_monitor,
    )


def _terminal_lines(config: VmConfig | None) -> list[str]:
    if config is None:
        return []
    return [name for name in ("serial", "console") if getattr(config, name).mode == "Tty"]


def run(arguments: Sequence[str]) -> int:
    return serve(parse_run(arguments))


def serve(options: RunOptions, faults: Faults | None = None, hypervisor: Hypervisor | None = None) -> int:
    """One VMM's life; ``faults`` and ``hypervisor`` are for ``trivmm fake``."""
    _set_up_log(options)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    watchdog = Watchdog(options.deadlines.shutdown_grace)
    with raw_terminal(bool(_terminal_lines(options.config))):
        try:
            return trio.run(_serve, options, watchdog, faults, hypervisor)
        finally:
            watchdog.stop()


def _set_up_log(options: RunOptions) -> None:
    try:
        if options.log_file is not None:  # a FIFO that nobody reads is an error here, where logging's open would hang
            os.close(os.open(options.log_file, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666))
        logging.basicConfig(
            filename=options.log_file,
            level=LEVELS[min(options.verbose, len(LEVELS) - 1)],
            format="trivmm: %(relativeCreated)10.1f ms <%(threadName)s> %(levelname)s:%(name)s -- %(message)s",
        )
    except OSError as error:
        raise ConfigError("--log-file", options.log_file, error.strerror or str(error), "give another path") from error


class Watchdog:
    """Ends the process with code 1 when its end takes longer than the grace."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._timer: threading.Timer | None = None

    def start(self) -> None:
        """Idempotent. A daemon thread, so that it never keeps the process itself."""
        if self._timer is None:
            self._timer = threading.Timer(self._grace_s, self._bite)
            self._timer.daemon = True
            self._timer.name = "shutdown watchdog"
            self._timer.start()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _bite(self) -> None:
        mine = threading.current_thread()
        left = [thread.name for thread in threading.enumerate() if thread is not mine and thread.is_alive()]
        say_error(f"deadline shutdown_grace ({self._grace_s:g} s) expired: still there: {', '.join(left)}")
        restore_terminal()
        os._exit(EXIT_FAILED)


async def _serve(options: RunOptions, watchdog: Watchdog, faults: Faults | None, hypervisor: Hypervisor | None) -> int:
    code: int | None = None
    work = trio.CancelScope()  # the VM and its VMM; what tells of their end outlives them
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def on_signal() -> None:
                nonlocal code
                async for number in signals:
                    LOG.info("%s: ending", signal.Signals(number).name)
                    code = EXIT_INTERRUPTED if number == signal.SIGINT else 0
                    watchdog.start()
                    work.cancel()
                    return

            nursery.start_soon(on_signal, name="signals")
            ended = await _run_vmm(options, watchdog, work, faults, hypervisor)
            code = ended if code is None else code
            nursery.cancel_scope.cancel()
    return EXIT_FAILED if code is None else code


async def _run_vmm(
    options: RunOptions,
    watchdog: Watchdog,
    work: trio.CancelScope,
    faults: Faults | None,
    hypervisor: Hypervisor | None,
) -> int:
    """The Vmm nursery's whole life; gives the exit code. What the user did wrong is told here, in one line."""
    from trivmm.cli.event_monitor import open_event_monitor
    from trivmm.control.gate import Gate
    from trivmm.control.routes import Router
    from trivmm.control.server import Handler, open_server
    from trivmm.events import EventBus
    from trivmm.migration.sender import socket_dialer
    from trivmm.vm import Dial
    from trivmm.vmm import VmmEnd, VmmOptions, open_vmm

    handler: Callable[[Vmm], Handler] = Router
    dial: Dial = socket_dialer
    try:
        if faults is not None:
            from trivmm.testing.fake import FakeRouter
            from trivmm.testing.faults import faulty_dial

            handler, dial = partial(FakeRouter, faults=faults), faulty_dial(faults)
        if hypervisor is None:
            hypervisor = choose_hypervisor(options.hypervisor)
        if hypervisor.note:
            LOG.warning("%s", hypervisor.note)
        behaviour = VmmOptions(options.stay_after_migration, options.stay_after_shutdown)
        events, gate, end = EventBus(), Gate(options.deadlines), VmmEnd("asked")
        async with open_event_monitor(options.event_monitor, events, options.deadlines), AsyncExitStack() as stack:
            if options.api_socket is not None:
                await stack.enter_async_context(open_server(options.api_socket, gate, options.deadlines))
            try:
                with work:
                    async with open_vmm(
                        hypervisor, deadlines=options.deadlines, options=behaviour, events=events, dial=dial
                    ) as vmm:
                        gate.open(handler(vmm))
                        end = await _live(options, vmm, watchdog)
            finally:
                gate.close()
        if end.reason is not None and end.reason.crash is not None:
            _tell_crash(end.reason.crash)
            return EXIT_CRASH
        return EXIT_FAILED if end.kind == "failed" else 0
    except (ConfigError, HypervisorError) as error:
        say_error(error)
        return EXIT_USAGE
    except (TrivmmError, OSError) as error:
        say_error(error)
        return EXIT_FAILED
    finally:
        if hypervisor is not None:
            hypervisor.close()


async def _live(options: RunOptions, vmm: Vmm, watchdog: Watchdog) -> VmmEnd:
    """The VM of the command line, if there is one, and whatever clients make, until nothing is left to do."""
    try:
        async with AsyncExitStack() as stack:
            if options.config is not None:
                vm = await vmm.create(options.config)
                await vmm.boot()
                nursery = await stack.enter_async_context(trio.open_nursery())
                stack.callback(nursery.cancel_scope.cancel)
                for line in _terminal_lines(options.config) if is_typed_on() else ():
                    nursery.start_soon(type_into, vm, line, options.deadlines, name="terminal input")
                if options.config.console.mode == "Tty":
                    nursery.start_soon(follow_size, vm, name="terminal size")
            return await vmm.ended()
    finally:
        watchdog.start()


def _tell_crash(crash: GuestCrash) -> None:
    restore_terminal()
    say_error(f"the guest crashed: vcpu{crash.vcpu}: {crash.reason}")
    if crash.details:
        print(crash.details, file=sys.stderr, flush=True)
