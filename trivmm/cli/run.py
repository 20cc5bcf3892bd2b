"""``trivmm run``: one VMM process, from its options to its exit code.

The end is the same whatever asked for it (a signal, the guest, a client, a migration away): a migration past COMMIT
is waited for, another one rolls back, and who watches it reads its outcome; then the Vmm nursery is cancelled, the VM
ends, the sockets go. A watchdog thread gives all that ``shutdown_grace``, which begins anew when the verdict is there;
then it names what still runs and leaves by ``os._exit``, since a thread stuck in the kernel can't be ended otherwise.

What ends the process first decides on its exit code: a signal that comes later changes nothing any more.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs
import trio

from trivmm.cli import EXIT_CRASH, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, say_error
from trivmm.cli.cloud_init import parse_cloud_init
from trivmm.cli.log import set_up_log
from trivmm.cli.options import parse_deadlines, parse_socket, parse_vm
from trivmm.cli.parser import REFUSED, UsageError, run_parser
from trivmm.cli.terminal import follow_size, is_terminal, is_typed_on, raw_terminal, restore_terminal, type_into
from trivmm.config import VmConfig
from trivmm.control.schema import load_config
from trivmm.deadlines import Deadlines
from trivmm.errors import ConfigError, GuestCrash, HypervisorError, TrivmmError, one_line
from trivmm.hypervisor.select import choose_hypervisor
from trivmm.migration.progress import MigrationProgress, Phase
from trivmm.migration.wire.session import LAST_LOOK_S
from trivmm.signals import Told
from trivmm.unixsocket import SocketFd
from trivmm.virtio.kinds import KINDS

if TYPE_CHECKING:
    from trivmm.hypervisor.base import Hypervisor
    from trivmm.testing.faults import Faults
    from trivmm.vmm import Vmm, VmmEnd

__all__ = ["RunOptions", "parse_run", "run", "serve"]

logger = logging.getLogger(__name__)

SWITCH_INTERVAL_S: Final = 1e-4  # the GIL's: with the default 5 ms two busy vCPU threads starve each other
VM_OPTIONS: Final = (
    *("cmdline", "initramfs", "cpus", "memory", "serial", "cloud-init", "platform", "pvpanic"),
    *(kind.option.name for kind in KINDS),
)


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
    if given.kernel is not None or given.firmware is not None:
        body = parse_vm(given, terminal=is_terminal(1))
        seed = None if given.cloud_init is None else parse_cloud_init(given.cloud_init)
        if seed is not None:
            body["disks"].append(seed.disk())
        config = load_config(body, deadlines=deadlines)
        if len(_terminal_lines(config)) > 1 and is_typed_on():
            raise ConfigError("--console", "tty", "the serial port reads the terminal", "give one of them another mode")
        if seed is not None:
            seed.write()  # once nothing else can be wrong with the command line
    else:
        alone = [name for name in VM_OPTIONS if getattr(given, name.replace("-", "_")) is not None]
        if alone:
            raise UsageError(f"--{alone[0]}: there is no --kernel and no --firmware; give the path of a PVH ELF")
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
    set_up_log(options.log_file, options.verbose)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    watchdog = Watchdog(options.deadlines)
    with Told() as told, raw_terminal(bool(_terminal_lines(options.config))):
        try:
            return trio.run(_Life(options, watchdog, told, faults, hypervisor).live)
        finally:
            watchdog.stop()


class Watchdog:
    """Ends the process with code 1 when its end takes longer than ``shutdown_grace``."""

    def __init__(self, deadlines: Deadlines) -> None:
        self._grace_s = deadlines.shutdown_grace
        self._commit_s = deadlines.commit
        self._timer: threading.Timer | None = None

    def start(self) -> None:
        """Idempotent."""
        if self._timer is None:
            self._arm(self._grace_s, "")

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    @contextmanager
    def waiting_for(self, migration: str) -> Iterator[None]:
        """Its verdict may take ``commit``, and giving the VM back after it the grace; afterwards that begins anew."""
        limit_s = self._commit_s + LAST_LOOK_S + self._grace_s
        self._arm(limit_s, f", {self._commit_s:g} s of commit before it: {migration} has no verdict")
        try:
            yield
        finally:
            self._arm(self._grace_s, "")

    def _arm(self, seconds: float, why: str) -> None:
        """A daemon thread, so that it never keeps the process itself."""
        self.stop()
        self._timer = threading.Timer(seconds, self._bite, (why,))
        self._timer.daemon = True
        self._timer.name = "shutdown watchdog"
        self._timer.start()

    def _bite(self, why: str) -> None:
        mine = threading.current_thread()
        left = [thread.name for thread in threading.enumerate() if thread is not mine and thread.is_alive()]
        still = f"{'; ' if why else ': '}still there: {', '.join(left)}"
        say_error(f"deadline shutdown_grace ({self._grace_s:g} s) expired{why}{still}")
        restore_terminal()
        os._exit(EXIT_FAILED)


@attrs.define(eq=False)
class _Life:
    """One VMM process's. ``faults`` and ``hypervisor`` as in :func:`serve`."""

    options: RunOptions
    watchdog: Watchdog
    told: Told
    faults: Faults | None
    hypervisor: Hypervisor | None
    vmm: Vmm | None = None
    code: int | None = None  # the process's, once something has ended it
    ends: bool = False  # by itself: a signal has nothing to say any more
    work: trio.CancelScope = attrs.field(factory=trio.CancelScope)  # VM and VMM; what tells of their end outlives them

    async def live(self) -> int:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.on_signal, name="signals")
            await self.run_vmm()
            nursery.cancel_scope.cancel()
        return EXIT_FAILED if self.code is None else self.code

    def decide(self, code: int) -> None:
        """Once: what comes later comes of it."""
        if self.code is None:
            self.code = code

    async def on_signal(self) -> None:
        number = await self.told.wait()
        logger.info("%s: ending", number.name)
        self.watchdog.start()
        if self.ends:
            return
        moved = await self.settle(number.name)
        self.decide(_code_of(moved, EXIT_INTERRUPTED if number == signal.SIGINT else 0))
        self.work.cancel()

    async def settle(self, why: str) -> MigrationProgress | None:
        """No migration is in the middle of its COMMIT any more. Gives how one ended that was sent."""
        if self.vmm is None:
            return None
        migration = self.vmm.committing
        if migration is None:
            return await self.vmm.settle(why)
        logger.warning("%s: waiting for the verdict of %s", why, migration)
        with self.watchdog.waiting_for(migration):
            return await self.vmm.settle(why)

    async def run_vmm(self) -> None:
        """The Vmm nursery's whole life. What the user did wrong is told here, in one line."""
        try:
            end = await self._serve()
        except (TrivmmError, OSError) as error:
            say_error(error)
            self.decide(_code_of_error(error))
            if self.code == 0 and self.ends:  # well, but for the last steps
                self.code = EXIT_FAILED
        else:
            if end is not None and end.reason is not None and end.reason.crash is not None:
                _tell_crash(end.reason.crash)
        finally:
            if self.hypervisor is not None:
                self.hypervisor.close()

    async def _serve(self) -> VmmEnd | None:
        """Gives why it ended; None: a signal has ended it."""
        from trivmm.cli.event_monitor import open_event_monitor
        from trivmm.control.gate import Gate
        from trivmm.control.routes import Router
        from trivmm.control.server import Handler, open_server
        from trivmm.events import EventBus
        from trivmm.migration.source.sender import socket_dialer
        from trivmm.vm import Dial
        from trivmm.vmm import VmmOptions, open_vmm

        options = self.options
        handler: Callable[[Vmm], Handler] = Router
        dial: Dial = socket_dialer
        if self.faults is not None:
            from trivmm.testing.fake import FakeRouter
            from trivmm.testing.faults import faulty_dial

            handler, dial = partial(FakeRouter, faults=self.faults), faulty_dial(self.faults)
        if self.hypervisor is None:
            self.hypervisor = choose_hypervisor(options.hypervisor)
        if self.hypervisor.note:
            logger.warning("%s", self.hypervisor.note)
        behaviour = VmmOptions(options.stay_after_migration, options.stay_after_shutdown)
        events, gate = EventBus(), Gate(options.deadlines)
        end: VmmEnd | None = None
        async with open_event_monitor(options.event_monitor, events, options.deadlines), AsyncExitStack() as stack:
            if options.api_socket is not None:
                await stack.enter_async_context(open_server(options.api_socket, gate, options.deadlines))
            try:
                with self.work:
                    async with open_vmm(
                        self.hypervisor,
                        deadlines=options.deadlines,
                        options=behaviour,
                        events=events,
                        dial=dial,
                        told_to_end=lambda: self.told.name,
                    ) as self.vmm:
                        gate.open(handler(self.vmm))
                        end = await self._until_end(self.vmm)
            finally:
                self.vmm = None
                gate.close()
        return end

    async def _until_end(self, vmm: Vmm) -> VmmEnd:
        """The VM of the command line, if there is one, and whatever clients make, until nothing is left to do."""
        config = self.options.config
        try:
            async with AsyncExitStack() as stack:
                if config is not None:
                    vm = await vmm.create(config)
                    await vmm.boot()
                    nursery = await stack.enter_async_context(trio.open_nursery())
                    stack.callback(nursery.cancel_scope.cancel)
                    for line in _terminal_lines(config) if is_typed_on() else ():
                        nursery.start_soon(type_into, vm, line, self.options.deadlines, name="terminal input")
                    if config.console.mode == "Tty":
                        nursery.start_soon(follow_size, vm, name="terminal size")
                end = await vmm.ended()
                self.ends = True
                self.watchdog.start()
                crashed = end.reason is not None and end.reason.crash is not None
                code = EXIT_CRASH if crashed else EXIT_FAILED if end.kind == "failed" else 0
                self.decide(_code_of(await self.settle("vmm.shutdown" if end.kind == "asked" else end.kind), code))
                return end
        except (TrivmmError, OSError) as error:
            self.ends = self.code is None  # else it comes of an end that was decided
            self.decide(_code_of_error(error))
            raise
        finally:
            self.watchdog.start()


def _code_of_error(error: Exception) -> int:
    return EXIT_USAGE if isinstance(error, ConfigError | HypervisorError) else EXIT_FAILED


def _code_of(migration: MigrationProgress | None, code: int) -> int:
    """The end that a migration made of the process, if it did: ``code`` is what it would be without."""
    if migration is None:
        return code
    if migration.phase is Phase.IN_DOUBT:
        say_error(f"the migration {migration.session} is in doubt, and the VM here ends: {migration.reason}")
        return EXIT_FAILED
    return 0 if migration.phase is Phase.DONE else code


def _tell_crash(crash: GuestCrash) -> None:
    restore_terminal()
    say_error(f"the guest crashed: vcpu{crash.vcpu}: {crash.reason}")
    for line in crash.details.splitlines():
        print(one_line(line), file=sys.stderr, flush=True)
