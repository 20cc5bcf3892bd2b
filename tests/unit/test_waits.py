"""Reads the source and fails on a wait that nothing bounds.

A wait is an ``await`` (or ``async for``) of a call that can block on a guest, a peer, a thread, a device or another
task, and a blocking call of threading or the operating system. It is bounded when it stands inside one of our
deadlines or trio's timeouts *in the same function*, or when its function is on the list below, with the reason why
something else ends it. The list is exact: an entry that excuses nothing fails too.
"""

from __future__ import annotations

import ast
from pathlib import Path

import trivmm

ROOT = Path(trivmm.__file__).parent

WAITS = {
    "accept",
    "connect",
    "receive",
    "receive_some",
    "recv",
    "recvmsg",
    "run_sync",
    "send",
    "send_all",
    "sendall",
    "sleep_forever",
    "take",
    "wait",
    "wait_for_exit",
    "wait_output",
    "wait_readable",
    "wait_writable",
}
BLOCKING = {"acquire", "join", "poll", "select"}
BOUNDS = {"enter", "fail_after", "fail_at", "move_on_after", "move_on_at"}
SCOPE = "an idle task: its scope ends it, and open_machine (or the receiver's nursery) ends that in bounded time"
CALLER = "documented as bounded by its caller, all of which are"
THREAD = "a C call that polls its kicker and a timeout, in a task with a kicker"
CORE = "bounded inside by its own named deadlines, step by step"
EXCUSED: dict[str, str] = {
    "cli/event_monitor.py:_write_all": "its scope gets the drain deadline when the bus closes",
    "cli/demo.py:_until_gone": CALLER,
    "cli/demo.py:open_host": "Popen.poll() only looks whether the process has ended",
    "cli/demo.py:run_demo.on_signal": "waits for a signal as long as the process lives",
    "cli/run.py:_Life.on_signal": "waits for a signal as long as the process lives",
    "cli/terminal.py:follow_size": "waits for a signal as long as the process lives",
    "cli/terminal.py:type_into": "waits for typing as long as the process lives",
    "control/routes.py:_EventStream.__aiter__": "a VMM's life: its bus ends it, and the server its client",
    "events.py:Subscription.__anext__": CALLER,
    "control/server.py:_Connection.has_input": "select.poll() makes an object; it is asked with timeout 0",
    "control/server.py:_Server._receive": CALLER,
    "control/server.py:_Server._send_stream": "ends with its client, its stream, or within the limit that the end sets",
    "control/server.py:_Server.accept": SCOPE,
    "control/server.py:_Server.hurry_at_the_end": SCOPE,
    "hypervisor/soft/vcpu.py:SoftVcpu.__init__": "select.poll() makes an object, it does not wait",
    "incoming.py:Incoming.receive": CORE,
    "platform/line.py:Line._drain": SCOPE,
    "platform/line.py:Line._serve": SCOPE,
    "platform/line.py:Line._take_piece": "as FdSink.take",
    "platform/line.py:Line._watch": SCOPE,
    "platform/line.py:Line.until_room": CALLER,
    "platform/line.py:Subscription.receive": CALLER,
    "platform/sinks/clients.py:ClientSink._read": SCOPE,
    "platform/sinks/clients.py:ClientSink._write": SCOPE,
    "platform/sinks/plain.py:FdSink._take_in_thread": "as FdSink.take",
    "platform/sinks/plain.py:FdSink.take": "a slow sink is back-pressure on the guest; drain bounds a switchover",
    "platform/sinks/clients.py:SocketSink.serve": SCOPE,
    "migration/link/control.py:Link.expect": CALLER,
    "migration/link/control.py:Link.receive": CALLER,
    "migration/link/control.py:Link.send": CALLER,
    "migration/destination/door.py:Door._accept": SCOPE,
    "migration/destination/door.py:Door._answer_questions": "its scope has a deadline, or a machine's life",
    "migration/destination/door.py:Door._reply": CALLER,
    "migration/destination/door.py:Door._until_done": CALLER,
    "migration/destination/intake.py:Intake._commit": CORE,
    "migration/destination/intake.py:Intake._handle": CORE,
    "migration/destination/intake.py:Intake._next": CORE,
    "migration/source/switchover.py:Switchover._stop_and_load": CORE,
    "migration/source/switchover.py:Switchover._tell_undone": CORE,
    "migration/link/halves.py:_with_grace.hurry_when_cancelled": "ends with the block that it hurries",
    "migration/link/roles.py:PageLink.end_round": "Link.send, under the stall deadline",
    "migration/link/roles.py:open_control": "Link.send, under the stall deadline",
    "migration/link/sockets.py:PageThread._kick_on_cancel": "the kicker: waits for the end of the call it kicks",
    "migration/link/sockets.py:PageThread.run": THREAD,
    "migration/link/sockets.py:SocketReceiver.read": "ReceivingHalf.whole_frame bounds it by stall",
    "migration/link/sockets.py:SocketSender.write": "SendingHalf._send_frame bounds it by stall",
    "migration/link/streams.py:StreamReceiver.read": "ReceivingHalf.whole_frame bounds it by stall",
    "migration/link/streams.py:StreamSender.send_pages": CALLER,
    "migration/link/streams.py:StreamSender.write": "SendingHalf._send_frame bounds it by stall",
    "migration/link/transports.py:SocketListener.accept": CALLER,
    "migration/source/verdict.py:_Wait._listen": CALLER,
    "migration/source/verdict.py:_ask": CALLER,
    "nursery/activation.py:ActivationActor.quiesce": CALLER,
    "nursery/activation.py:ActivationActor.retire": "device_stop, past which the device is named as stuck",
    "nursery/activation.py:ActivationActor.run": SCOPE,
    "nursery/ejection.py:Ejector.quiesce": CALLER,
    "nursery/ejection.py:Ejector.run": SCOPE,
    "nursery/ownership.py:Ownership.free": CALLER,
    "nursery/vcpus.py:_drive": "a vCPU's thread: request_stop and the kick end it, within vcpu_stop",
    "virtio/device.py:WorkerDevice.stop": CALLER,
    "virtio/pmem/device.py:PmemDevice._watch": SCOPE,
    "virtio/pci/msix.py:_readable": "select.poll() makes an object; it is asked with timeout 0",
    "virtio/queue/worker.py:QueueWorker.run": THREAD,
    "signals.py:Told.wait": "waits for a signal as long as the process lives",
    "machine/host.py:MachineHost._aside": "reads local files or frees memory; a hung file system is the kernel's own",
    "vm/vm.py:Vm._control": SCOPE,
    "machine/host.py:MachineHost._machine_task": "ended by its end(), which every way out of open_vm calls",
    "vm/consoles.py:Consoles.console_output.until": CALLER,
    "vm/moves.py:Moves.migrate_to": CORE,
    "vm/core.py:VmCore.wait": CALLER,
    "vmm/core.py:VmmCore._close": "the end of the VM's task, which open_vm bounds",
    "vmm/core.py:VmmCore._live": "a VM's life: ended by delete, a migration or the end of the process",
    "vmm/core.py:VmmCore._watch": SCOPE,
    "vmm/slot.py:Result.get": CALLER,
    "vmm/moves.py:_received": CORE,
}


def _called(node: ast.AST) -> str | None:
    if isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Attribute):
            return function.attr
        if isinstance(function, ast.Name):
            return function.id
    return None


class Finder(ast.NodeVisitor):
    """Collects ``file:function`` of every unbounded wait."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path: list[str] = []
        self.bounded = 0
        self.found: dict[str, list[int]] = {}

    def _note(self, node: ast.AST) -> None:
        if not self.bounded:
            place = f"{self.name}:{'.'.join(self.path)}"
            self.found.setdefault(place, []).append(getattr(node, "lineno", 0))

    def _scope(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self.path.append(node.name)
        before, self.bounded = self.bounded, 0
        self.generic_visit(node)
        self.bounded = before
        self.path.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = _scope

    def _with(self, node: ast.With | ast.AsyncWith) -> None:
        bounds = sum(_called(item.context_expr) in BOUNDS for item in node.items)
        self.bounded += bounds
        self.generic_visit(node)
        self.bounded -= bounds

    visit_With = visit_AsyncWith = _with

    def visit_Await(self, node: ast.Await) -> None:
        if _called(node.value) in WAITS:
            self._note(node)
        self.generic_visit(node)

    def visit_AsyncFor(self, node: ast.AsyncFor) -> None:
        self._note(node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = _called(node)
        if name in BLOCKING and not node.args and not any(word.arg == "timeout" for word in node.keywords):
            self._note(node)
        self.generic_visit(node)


def unbounded_waits() -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for path in sorted(ROOT.rglob("*.py")):
        if path.is_relative_to(ROOT / "testing"):
            continue  # doubles: some of them wait for ever on purpose
        finder = Finder(str(path.relative_to(ROOT)))
        finder.visit(ast.parse(path.read_text(encoding="utf-8")))
        found |= finder.found
    return found


def test_every_wait_is_bounded_or_says_why() -> None:
    found = unbounded_waits()
    unknown = {place: lines for place, lines in found.items() if place not in EXCUSED}
    assert not unknown, f"unbounded waits: {unknown}"
    stale = [place for place in EXCUSED if place not in found]
    assert not stale, f"these excuses excuse nothing: {stale}"
    assert all(EXCUSED.values())


def test_the_finder_finds() -> None:
    source = """
async def bad(event):
    await event.wait()
async def good(event, deadlines):
    with deadlines.enter("pause", "why"):
        await event.wait()
def blocking(thread, lock):
    thread.join()
    lock.acquire(timeout=1)
"""
    finder = Finder("x.py")
    finder.visit(ast.parse(source))
    assert set(finder.found) == {"x.py:bad", "x.py:blocking"}
