"""Several vCPUs on the soft CPU, woken as kernels wake them: INIT, STARTUP, a real-mode trampoline below 1 MiB."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from trivmm.hypervisor.base import PvhEntry
from trivmm.memory.guest import GuestMemory
from trivmm.testing.recording import NOTED, RecordingBus
from trivmm.testing.scripted import IoOut

pytest.importorskip("unicorn", reason="the soft extra is not installed")
pytestmark = [
    pytest.mark.soft,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc to assemble guests"),
]

from trivmm.hypervisor.soft import SoftHypervisor  # noqa: E402
from trivmm.hypervisor.soft.vcpu import SoftVcpu  # noqa: E402

from .test_soft_cpu import BOUND_S, DATA, ENTRY, PRELUDE, RAM, assemble  # noqa: E402

ROUNDS = 2000
# The trampoline finds its data by DS, which is CS, as Linux's does: no absolute address but the last jump's.
GUEST = """
main:
  APIC 0xf0, 0x1ff
  mov $trampoline, %esi
  mov $0x8000, %edi
  mov $trampoline_end - trampoline, %ecx
  rep movsb
  APIC 0x310, 0
  APIC 0x300, 0xc4500
  APIC 0x300, 0xc4608
  jmp both

trampoline:
.code16
  cli
  mov %cs, %ax
  mov %ax, %ds
  data32 lgdt tramp_gdtr - trampoline
  mov $1, %ax
  lmsw %ax
  data32 ljmp *(tramp_far - trampoline)
.balign 8
tramp_gdt: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
tramp_gdtr: .word 23
  .long 0x8000 + tramp_gdt - trampoline
tramp_far: .long protected
  .word 8
trampoline_end:

.code32
protected:
  mov $0x10, %eax
  mov %eax, %ds
  mov %eax, %es
  mov %eax, %ss
  INTO_LONG_MODE both
.code64
both:
  xor %esp, %esp
  mov $1, %eax
  cpuid
  shr $24, %ebx
  mov %ebx, %ebp
  bts %ebx, present
  mov $COUNT, %ecx
1: lock incl counter

  mov %ebp, %eax
  pause
  loop 1b
  lock incl done
2: pause
  cmpl $CPUS, done
  jne 2b
  test %ebp, %ebp
  jnz 3f
  mov present, %eax
  out %eax, $0x80
  mov counter, %eax
  out %eax, $0x81
3: cli
  hlt
  jmp 3b
.balign 64
counter: .long 0
done: .long 0
present: .long 0
"""


@pytest.mark.parametrize("count", [2, 4])
def test_cpus_woken_by_init_and_startup_lose_no_locked_add(tmp_path: Path, count: int) -> None:
    source = GUEST.replace("COUNT", str(ROUNDS)).replace("CPUS", str(count))
    code = assemble(tmp_path, PRELUDE + source + DATA)
    memory = GuestMemory(((0, RAM),))
    vm = SoftHypervisor().open_vm()
    for region in memory.regions:
        vm.add_memory(region.slot, region.gpa, region.size, region.hva)
    memory.write(ENTRY, code)
    seen: list[IoOut] = []
    ended = threading.Event()
    cpus = [vm.create_vcpu(index) for index in range(count)]

    def drive(cpu: SoftVcpu) -> None:
        bus = RecordingBus()
        cpu.attach_thread()
        try:
            while not ended.is_set():
                outcome = cpu.run(bus)
                if outcome is NOTED:
                    write = bus.writes[-1]
                    assert isinstance(write, IoOut)
                    seen.append(write)
                    if write.port == 0x81:
                        ended.set()
                        for other in cpus:
                            other.kick()
                elif not ended.is_set():
                    seen.append(IoOut(0, 0, repr(outcome).encode()))
                    ended.set()
        finally:
            cpu.detach_thread()

    try:
        cpus[0].set_boot_state(PvhEntry(ENTRY, 0x6000))
        threads = [threading.Thread(target=drive, args=(cpu,)) for cpu in cpus]
        for thread in threads:
            thread.start()
        assert ended.wait(BOUND_S)
        for cpu in cpus:
            cpu.kick()
        for thread in threads:
            thread.join(BOUND_S)
            assert not thread.is_alive()
    finally:
        for cpu in cpus:
            cpu.close()
        vm.close()
        memory.close()
    assert [int.from_bytes(write.data, "little") for write in seen] == [(1 << count) - 1, ROUNDS * count]
