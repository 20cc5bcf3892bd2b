"""The whole machine on the soft CPU: a small PVH guest that finds virtio-rng on PCI, drives it and sleeps for it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from trivmm.config import CpusConfig, MemoryConfig, PayloadConfig, VmConfig
from trivmm.hypervisor.soft import SoftHypervisor
from trivmm.incoming import open_incoming
from trivmm.vm import open_vm

HERE = Path(__file__).parent
BOUND_S = 60.0
pytestmark = [
    pytest.mark.soft,
    pytest.mark.skipif(importlib.util.find_spec("unicorn") is None, reason="the soft extra is not installed"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc to build guests"),
]

GUEST = r"""
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32; typedef unsigned long u64;
static inline void outl(u16 p, u32 v) { asm volatile("outl %0,%1" ::"a"(v), "Nd"(p)); }
static inline u32 inl(u16 p) { u32 v; asm volatile("inl %1,%0" : "=a"(v) : "Nd"(p)); return v; }
static inline void outb(u16 p, u8 v) { asm volatile("outb %0,%1" ::"a"(v), "Nd"(p)); }
static inline u8 inb(u16 p) { u8 v; asm volatile("inb %1,%0" : "=a"(v) : "Nd"(p)); return v; }
static void put(char c) { while (!(inb(0x3fd) & 0x20)) ; outb(0x3f8, c); }
static void say(const char *s) { while (*s) put(*s++); }
static void hex(u64 v) { for (int i = 60; i >= 0; i -= 4) put("0123456789abcdef"[v >> i & 15]); }
static u32 cfg(u32 slot, u32 at) { outl(0xcf8, 0x80000000u | slot << 11 | (at & ~3u)); return inl(0xcfc); }
static void setcfg(u32 slot, u32 at, u32 v) { outl(0xcf8, 0x80000000u | slot << 11 | at); outl(0xcfc, v); }
#define R8(a) (*(volatile u8 *)(a))
#define R16(a) (*(volatile u16 *)(a))
#define R32(a) (*(volatile u32 *)(a))
extern u64 pml4[], far_pdpt[], far_pd[];
volatile u32 interrupts;
static struct { u64 gpa; u32 len; u16 flags, next; } desc[4] __attribute__((aligned(4096)));
static volatile struct { u16 flags, idx, ring[4], event; } avail __attribute__((aligned(4096)));
static volatile struct { u16 flags, idx; struct { u32 id, len; } ring[4]; } used __attribute__((aligned(4096)));
static volatile u64 buffer[8] __attribute__((aligned(4096)));
void guest(void)
{
    u32 slot;
    for (slot = 0; slot < 32 && cfg(slot, 0) != 0x10441af4; slot++) ;
    if (slot == 32) { say("no rng\n"); for (;;) asm volatile("cli; hlt"); }
    setcfg(slot, 4, cfg(slot, 4) | 6);
    u64 bar = (cfg(slot, 0x10) & ~0xfu) | (u64)cfg(slot, 0x14) << 32;
    pml4[bar >> 39 & 511] = (u64)far_pdpt | 7;
    if (bar >> 39) { far_pdpt[bar >> 30 & 511] = (u64)far_pd | 7; }
    for (u64 i = 0; i < 512; i++) far_pd[i] = ((bar >> 30 << 30) + (i << 21)) | 0x87;
    asm volatile("mov %%cr3,%%rax; mov %%rax,%%cr3" ::: "rax", "memory");
    for (u32 cap = cfg(slot, 0x34) & 0xff; cap; cap = cfg(slot, cap) >> 8 & 0xff)
        if ((cfg(slot, cap) & 0xff) == 0x11) setcfg(slot, cap, cfg(slot, cap) | 0x80000000u);
    R32(0xfee000f0) = 0x1ff;
    for (u32 round = 0;; round++) {
        R8(bar + 0x14) = 0;
        while (R8(bar + 0x14)) ;
        R8(bar + 0x14) = 1; R8(bar + 0x14) = 3;
        R32(bar + 8) = 1; R32(bar + 12) = 1; R32(bar + 8) = 0; R32(bar + 12) = 0;
        R8(bar + 0x14) = 11;
        R32(bar + 0x8000) = 0xfee00000; R32(bar + 0x8004) = 0; R32(bar + 0x8008) = 0x41; R32(bar + 0x800c) = 0;
        avail.idx = 0; used.idx = 0;
        R16(bar + 0x16) = 0; R16(bar + 0x18) = 4; R16(bar + 0x1a) = 0;
        R32(bar + 0x20) = (u32)(u64)desc; R32(bar + 0x24) = 0;
        R32(bar + 0x28) = (u32)(u64)&avail; R32(bar + 0x2c) = 0;
        R32(bar + 0x30) = (u32)(u64)&used; R32(bar + 0x34) = 0;
        R16(bar + 0x1c) = 1;
        R8(bar + 0x14) = 15;
        for (u16 n = 0; n < 3; n++) {
            desc[0].gpa = (u64)buffer; desc[0].len = 64; desc[0].flags = 2;
            buffer[0] = 0;
            u32 seen = interrupts;
            avail.ring[n & 3] = 0;
            asm volatile("" ::: "memory");
            avail.idx = n + 1;
            R16(bar + 0x6000) = 0;
            for (;;) {
                asm volatile("cli" ::: "memory");
                if (interrupts != seen) break;
                asm volatile("sti; hlt" ::: "memory");
            }
            asm volatile("sti" ::: "memory");
            if (used.idx != (u16)(n + 1) || used.ring[n & 3].len == 0 || !buffer[0]) say("BAD ");
        }
        say("round "); hex(round); say(" random "); hex(buffer[0]); say("\n");
    }
}
"""

ENTRY = r"""
.section .note.pvh, "a", @note
  .long 4, 4, 18
  .asciz "Xen"
  .long _start
.text
on_msi:
  push %rax
  incl interrupts
  mov $0xfee000b0, %eax
  movl $0, (%rax)
  pop %rax
  iretq
main:
  GATE 0x41, on_msi
  call guest
.balign 4096
.globl pml4, far_pdpt, far_pd
far_pdpt: .fill 4096, 1, 0
far_pd: .fill 4096, 1, 0
"""


def build_guest(where: Path) -> Path:
    spec = importlib.util.spec_from_file_location("soft_cpu_parts", HERE / "test_soft_cpu.py")
    assert spec is not None
    assert spec.loader is not None
    parts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(parts)
    (where / "entry.S").write_text('.section .text, "awx"\n' + parts.PRELUDE + ENTRY + parts.DATA)
    (where / "guest.c").write_text(GUEST)
    flags = [
        "-m64",
        "-O1",
        "-ffreestanding",
        "-fno-pic",
        "-mno-red-zone",
        "-mgeneral-regs-only",
        "-fcf-protection=none",
    ]
    flags += ["-fno-stack-protector", "-fno-asynchronous-unwind-tables", "-fno-builtin"]
    subprocess.run(["gcc", *flags, "-c", "guest.c", "entry.S"], cwd=where, check=True, timeout=60)
    link = ["ld", "-N", "-no-pie", "-Ttext", "0x100000", "-e", "_start", "-o", "guest.elf", "entry.o", "guest.o"]
    subprocess.run(link, cwd=where, check=True, timeout=60)
    return where / "guest.elf"


async def test_a_guest_drives_virtio_rng_and_moves(tmp_path: Path) -> None:
    guest = await trio.to_thread.run_sync(build_guest, tmp_path)
    config = VmConfig(PayloadConfig(kernel=str(guest)), cpus=CpusConfig(1), memory=MemoryConfig(64 << 20))
    with trio.fail_after(BOUND_S):
        async with AsyncExitStack() as stack:
            vm = await stack.enter_async_context(open_vm(config, hypervisor=SoftHypervisor()))
            await vm.boot()
            await vm.wait_for_console("round 0000000000000003")
            await vm.pause()
            await vm.resume()
            assert b"BAD" not in vm.console_tail
            listening = open_incoming(f"unix:{tmp_path}/m.sock", hypervisor=SoftHypervisor())
            incoming = await stack.enter_async_context(listening)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(incoming.receive)
                await vm.migrate_to(incoming.url, downtime_ms=30_000)
            rounds = re.findall(rb"round ([0-9a-f]{16})", vm.console_tail)
            await incoming.vm.wait_for_console(f"round {int(rounds[-1], 16) + 5:016x} random")
            assert b"BAD" not in incoming.vm.console_tail
