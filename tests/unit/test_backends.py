"""Back ends tell the truth: what one can do is declared in ``hypervisor/base.py``, and nobody probes for it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import trivmm
from trivmm.hypervisor.base import Hypervisor, TaskVcpu, ThreadVcpu, VmBackend
from trivmm.hypervisor.kvm.system import KvmHypervisor
from trivmm.hypervisor.kvm.vcpu import KvmVcpu
from trivmm.hypervisor.kvm.vm import KvmVm
from trivmm.hypervisor.soft import SoftHypervisor
from trivmm.testing.scripted import ScriptedHypervisor, ScriptedVcpu, ScriptedVm

ROOT = Path(trivmm.__file__).parent
PROBES = {"getattr", "hasattr", "setattr"}


def probes(source: str) -> list[int]:
    """Lines that look whether an object happens to have something."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id in PROBES]


@pytest.mark.parametrize("folder", ["machine", "nursery"])
def test_nothing_is_probed_for(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = {path.name: lines for path in files if (lines := probes(path.read_text(encoding="utf-8")))}
    assert not found


def test_the_probe_for_probes_finds_one() -> None:
    assert probes("gate = getattr(cpu, 'gate', None)\nif hasattr(vm, 'x'):\n    pass\n") == [1, 2]


def test_every_back_end_derives_from_what_it_implements() -> None:
    """So what it does not say has the documented default."""
    for hypervisor, threads in ((KvmHypervisor, True), (SoftHypervisor, True), (ScriptedHypervisor, False)):
        assert Hypervisor in hypervisor.__mro__
        assert hypervisor.threads is threads
    assert ThreadVcpu in KvmVcpu.__mro__
    assert TaskVcpu in ScriptedVcpu.__mro__
    assert VmBackend in KvmVm.__mro__
    assert VmBackend in ScriptedVm.__mro__


def test_what_a_back_end_lacks_has_a_default() -> None:
    hypervisor = ScriptedHypervisor()
    vm = hypervisor.open_vm()
    cpu = vm.create_vcpu(0)
    assert hypervisor.note == ""
    assert vm.live_copy
    vm.attach_pio_hook(0x3F8, 8, None, None)  # an offer that it does not take
    assert cpu.write_hook is None
    assert cpu.counters() == {}
    soft = SoftHypervisor("no /dev/kvm")
    assert (soft.note, soft.max_vcpus, soft.needs_payload) == ("no /dev/kvm", 8, True)
