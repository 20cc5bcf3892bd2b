"""The verbs of a VM's owner, and the loop that carries out what its guest asks for."""

from __future__ import annotations

import logging

import attrs
import trio

from trivmm.bus.space import GuestRequest
from trivmm.config import CpusConfig
from trivmm.errors import ConfigError, GuestCrash, NotSupported, WrongState
from trivmm.machine.board import Kept
from trivmm.machine.build import close_sinks
from trivmm.machine.machine import Machine
from trivmm.virtio.balloon.kind import BALLOON
from trivmm.vm.consoles import Consoles
from trivmm.vm.core import ExitReason, VmState
from trivmm.vm.devices import Devices
from trivmm.vm.moves import Moves
from trivmm.vm.triplefaults import LIMIT, TripleFaults

__all__ = ["Vm"]

logger = logging.getLogger(__name__)


class Vm(Consoles, Devices, Moves):
    """One VM, from :func:`open_vm` (or ``open_incoming``) to the end of that block. Use from one trio program."""

    # --- verbs: need the lease -------------------------------------------------------------------------------

    async def boot(self) -> None:
        """Build the machine, load the kernel, start the vCPUs.

        :raises ConfigError: naming the field, the value and the remedy; nothing is left behind."""
        async with self.ownership.lease("boot"):
            if self.state not in (VmState.CREATED, VmState.SHUTDOWN) or self.host.machine is not None:
                raise WrongState("boot", self.state.value, "Created or Shutdown")
            self._tell("booting")
            self._triple_faults = TripleFaults()  # you may have mended what made it fault
            await self.host.end()  # of a machine that ended by itself, if that still goes on
            await self._boot()
            self._console = None
            self._tell("booted")

    async def _reboot(self, why: str) -> None:
        """End the machine and build it anew; the sinks of its console lines, and their clients, stay."""
        assert self.host.machine is not None
        self._tell("rebooting", reason=why)
        kept = self.host.machine.board.keep()
        try:
            await self.host.end()
            await self._boot(kept)
        except BaseException:
            close_sinks(kept.sinks)
            raise

    async def _boot(self, kept: Kept | None = None) -> None:
        machine = await self.host.boot(self.config, kept)
        self.config = machine.board.config
        try:
            await machine.resume()
        except BaseException:
            await self.host.end()  # noqa: ASYNC102 - shields and bounds itself
            raise
        self._triple_faults.booted(trio.current_time())
        self._exit = None
        if self._exited.is_set():  # else somebody may wait on it already: since before boot, or since before a reboot
            self._exited = trio.Event()
        self._enter(VmState.RUNNING)
        self.doubt = None  # its board took the locks afresh

    async def pause(self) -> None:
        """Stop the vCPUs. Devices finish what was queued. :raises PauseTimeout: the VM runs."""
        async with self.ownership.lease("pause"):
            machine = self._machine_in("pause", VmState.RUNNING)
            self._tell("pausing")
            await machine.pause()
            self._enter(VmState.PAUSED)
            self._tell("paused")

    async def resume(self, *, force: bool = False) -> None:
        """Run again. A VM in doubt asks its destination first (at most ``resolve``), then takes its image locks.

        ``force`` runs it although the destination does not answer, or does not know. If the VM runs there after all,
        two copies run: nothing but the image locks is left to keep them apart, and a VM without a writable image, or
        with a copy of it on each side, has none. It never overrides an answer.

        :raises RunsElsewhere: the destination says that it runs the VM.
        :raises MigrationInDoubt: nobody knows, and ``force`` was not said.
        :raises ConfigError: another process has the image locks: the VM runs elsewhere."""
        async with self.ownership.lease("resume"):
            machine = self._machine_in("resume", VmState.PAUSED)
            await self._out_of_doubt(machine, "resume", force)
            self._tell("resuming")
            await machine.resume()
            self._enter(VmState.RUNNING)
            if machine.guest_request is not None:
                self._ask_owner()  # it came while nobody carried it out: in doubt, or in the moment of the pause
            self._tell("resumed")

    async def _out_of_doubt(self, machine: Machine, operation: str, force: bool) -> None:
        if self.doubt is not None:
            self.doubt = await self.doubt.look(self.deadlines)
            self.doubt.check(operation, force)
            await machine.take_locks()
            self.doubt = None

    async def shutdown(self) -> None:
        """Power off: vCPUs, then devices, end. The configuration stays; ``boot`` starts afresh."""
        async with self.ownership.lease("shutdown"):
            self._machine_in("shutdown", VmState.RUNNING, VmState.PAUSED)
            await self.host.end()
            self._finish(ExitReason("shutdown"))

    async def reboot(self) -> None:
        """Power off and boot afresh, keeping the sinks of the console lines. In doubt as :meth:`resume`."""
        async with self.ownership.lease("reboot"):
            machine = self._machine_in("reboot", VmState.RUNNING, VmState.PAUSED)
            await self._out_of_doubt(machine, "reboot", force=False)
            self._triple_faults = TripleFaults()
            try:
                await self._reboot("reboot")
            except BaseException:
                self._finish(ExitReason("shutdown"))
                raise
            self._console = None  # you asked: what the machine before it said is of the past
            self.reboots += 1
            self._tell("rebooted")

    async def nmi(self) -> None:
        """Give every vCPU a non-maskable interrupt, which a paused VM takes when it resumes.

        :raises PauseTimeout: a vCPU could not be stopped for it; nobody got one, the VM runs."""
        async with self.ownership.lease("nmi"):
            await self._machine_in("nmi", VmState.RUNNING, VmState.PAUSED).nmi()

    async def power_button(self) -> None:
        """Press the ACPI power button. What comes of it is the guest's affair: a usual one powers off."""
        async with self.ownership.lease("power-button"):
            self._machine_in("power-button", VmState.RUNNING, VmState.PAUSED).power_button()

    async def resize(self, vcpus: int | None = None, ram: int | None = None, balloon: int | None = None) -> None:
        """What is None, or what is so already, stays. A VM that was never booted takes the new numbers on paper, even
        of a balloon that it doesn't have, as Cloud Hypervisor's does. The guest fills its balloon in its own time.

        :raises NotSupported: hotplug of vCPUs and memory is not there yet.
        :raises ConfigError: a number that can't be, or there is no balloon."""
        async with self.ownership.lease("resize"):
            cpus, memory = self.config.cpus, self.config.memory
            if vcpus is not None and vcpus != cpus.boot_vcpus:
                cpus = CpusConfig(vcpus, max(vcpus, cpus.max_vcpus))
                self._refuse_hotplug("desired_vcpus", vcpus, self.config.cpus.boot_vcpus)
            if ram is not None and ram != memory.size:
                memory = attrs.evolve(memory, size=ram)
                self._refuse_hotplug("desired_ram", ram, self.config.memory.size)
            self._tell("resizing")
            if balloon is not None:
                self._resize_balloon(balloon)
            self.config = attrs.evolve(self.config, cpus=cpus, memory=memory)
            self._tell("resized")

    def _resize_balloon(self, size: int) -> None:
        machine = self.host.machine
        configs = [attrs.evolve(each, size=size) for each in BALLOON.of(self.config)]
        if machine is not None:
            if machine.board.balloon is None:
                remedy = "shut it down, and give it one (--balloon size=0)"
                raise ConfigError("desired_balloon", size, "this VM has no balloon", remedy)
            machine.board.balloon.resize(size)
            machine.board.config = BALLOON.put(machine.board.config, configs)
        self.config = BALLOON.put(self.config, configs)

    def _refuse_hotplug(self, field: str, wanted: int, have: int) -> None:
        if self.host.machine is not None:
            raise NotSupported(field, wanted, "a booted VM can't be resized yet", f"shut it down first, or give {have}")

    async def _control(self) -> None:
        """Carries out what the guest asks for. It needs the lease, so a migration in progress comes first: then the
        request travels with the VM, and the side that ends up running it carries it out."""
        while True:
            await self._asked.wait()
            self._asked = trio.Event()
            async with self.ownership.lease("guest request", wait_for_migration=True):
                machine = self.host.machine
                if machine is None or machine.guest_request is None or self.in_doubt:
                    continue
                request = machine.guest_request
                if self.state is VmState.PAUSED and request.kind != "crash":
                    continue  # resume() asks again: a paused VM neither reboots nor goes away by itself
                logger.info("the guest asks for %s (%s)", request.kind, request.why)
                crash = machine.crash
                fault = machine.fault
                if request.kind == "reset" and fault is not None and self._triple_faults.loop(trio.current_time()):
                    request = GuestRequest("crash", f"{fault.reason}, {LIMIT} in a row")
                    crash = GuestCrash(fault.vcpu, request.why, fault.details)
                if request.kind == "reset":
                    try:
                        await self._reboot(request.why)
                    except Exception as error:
                        logger.error("reboot failed: %s", error)
                        self._finish(ExitReason("crash", GuestCrash(0, f"its reboot failed: {error}", "")))
                    else:
                        self.reboots += 1
                        self._tell("rebooted")
                    continue
                await self.host.end()
                if request.kind == "crash":
                    self._finish(ExitReason("crash", crash or GuestCrash(0, request.why, "")))
                else:
                    self._finish(ExitReason("poweroff"))

    async def _close(self) -> None:
        """The bounded end: owner, vCPUs, devices. Shielded by the caller."""
        self.host.closing = True
        if self.host.machine is not None:
            self.host.machine.dirty_log.forget()
        if self._migration is not None:
            self._migration.cancel()  # past COMMIT it does not hear that
            with trio.move_on_after(self.deadlines.rollback + self.deadlines.commit):
                await self.ownership.free()
        await self.host.end()
        self._finish(ExitReason("shutdown"))
