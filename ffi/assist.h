/* The emulation assist: KVM could not emulate an instruction; it is finished here, and the guest goes on.
 *
 * Where guest code runs on KVM's own emulator (its real mode on some hosts, all of ring 0 on KVM without hardware
 * virtualization), KVM_RUN ends with an internal error at each instruction that the emulator lacks. tv_assist executes
 * that one instruction on the vCPU's registers and on guest memory, or gives the guest the exception that hardware
 * would, or refuses it by name, and then Python reports it as before.
 *
 * Invariants
 *  - The vCPU's thread only, between two KVM_RUNs; no Python, no GIL, no allocation.
 *  - The instruction's bytes, the page tables and all that they lead to are the guest's, and hostile: every byte is
 *    read once into private memory, every address goes through the guest's own tables and then through tv_ptr.
 *  - Registers and memory change only when the whole instruction will succeed: a fault leaves both as they were, but
 *    for accessed and dirty bits, as on hardware.
 *  - 64-bit mode only. What is executed natively (assist_native.c) comes from a table of instructions that can neither
 *    trap nor reach memory but through the one operand that is bounced.
 */
#ifndef TV_ASSIST_H
#define TV_ASSIST_H
#include <linux/kvm.h>
#include <stdint.h>

#include "memory.h"

#define TV_INSN_MAX 15
#define TV_ASSIST_BATCH 1024 /* instructions of one exit: less than a millisecond, in which no interrupt is taken */
#define TV_ASSIST_AREA 16384 /* an XSAVE area with AMX has 11 KiB */
#define TV_XSTATE_PARTS 63
#define TV_XSTATE_WORDS (TV_ASSIST_AREA / 8)

/* What is counted apart. */
enum tv_assist_kind {
    TV_ASSIST_NONE,
    TV_ASSIST_CLAC_STAC,
    TV_ASSIST_INT3,
    TV_ASSIST_WAIT,
    TV_ASSIST_CMPXCHG16B,
    TV_ASSIST_XSAVE, /* and XRSTOR, FXSAVE, FXRSTOR, all variants */
    TV_ASSIST_MXCSR,
    TV_ASSIST_RDPID,
    TV_ASSIST_SYSCALL, /* that KVM left in ring 3 (assist_syscall.c) */
    TV_ASSIST_INTEGER, /* POPCNT, MOVBE, BMI, ADX, CRC32 ... on general registers */
    TV_ASSIST_X87,
    TV_ASSIST_SSE,
    TV_ASSIST_AVX,
    TV_ASSIST_FAULT, /* an exception was raised instead */
    TV_ASSIST_KINDS
};

struct tv_insn {
    uint8_t bytes[TV_INSN_MAX];
    uint32_t available; /* of bytes */
    uint32_t length;
    uint32_t at;       /* the reader's place while it is decoded */
    uint8_t rep;       /* 0, 0xf2 or 0xf3: the prefix, or what VEX says instead */
    uint8_t opsize;    /* 66, likewise */
    uint8_t lock, addr32, segment; /* segment: 0, 0x64 or 0x65 */
    uint8_t rex;       /* as the bits WRXB, from VEX too */
    uint8_t vex, vex_l, vex_vvvv;
    uint8_t vex_at;    /* where the VEX or REX byte lies, 0: none */
    uint8_t map;       /* 0: one byte, 1: 0F, 2: 0F38, 3: 0F3A */
    uint8_t opcode, opcode_at;
    uint8_t has_modrm, modrm, modrm_at;
    uint8_t is_memory; /* the ModRM names memory */
    uint8_t immediate; /* bytes of it */
    uint64_t address;  /* of the memory operand, linear */
};

/* An exception that the instruction raises instead of ending. */
struct tv_exception {
    uint8_t vector, has_error;
    uint32_t error;
    uint64_t cr2;
};

struct tv_assist {
    struct tv_memory *memory; /* NULL: off */
    int fd;                   /* the vCPU's */
    int xsave2;               /* KVM_GET_XSAVE2 is there */
    uint64_t host_xcr0;
    uint32_t ecx1, ebx7, ecx7; /* of CPUID leaves 1 and 7, which may be dear to ask for */
    int watched;          /* this KVM leaves SYSCALL in ring 3 */
    int stale;            /* registers were set from outside: kvm_run has older ones */
    int stepping;         /* over the breakpoint at `handler` */
    uint64_t handler;     /* of the guest's page faults, with a breakpoint; 0: none */
    uint64_t page_faults; /* page faults that were no SYSCALL */
    uint64_t by_kind[TV_ASSIST_KINDS];
    uint64_t refused;
    struct {
        uint32_t offset, size, aligned;
    } parts[TV_XSTATE_PARTS]; /* of the XSAVE area, in the standard format; CPUID leaf 0DH */
    int opened;    /* it was tried to have `code` */
    uint8_t *code; /* a page to execute in, or NULL */
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct tv_insn insn;
    struct tv_exception fault;
    int has_fault;
    int implicit; /* accesses are the CPU's own, of its tables and stacks */
    enum { TV_XSTATE_UNKNOWN, TV_XSTATE_KNOWN, TV_XSTATE_CHANGED } xstate_is;
    uint64_t xstate[TV_XSTATE_WORDS] __attribute__((aligned(64))); /* the guest's, in the standard format */
    uint8_t area[TV_ASSIST_AREA] __attribute__((aligned(64)));     /* the bounced operand */
};

void tv_assist_open(struct tv_assist *assist, struct tv_memory *memory, int vcpu_fd, int xsave2, int watched);
void tv_assist_close(struct tv_assist *assist);
int tv_assist(struct tv_assist *assist, struct kvm_run *run);
int tv_assist_registers(struct tv_assist *assist, const struct kvm_run *run);
int tv_assist_put_registers(struct tv_assist *assist, struct kvm_run *run, int system);
int tv_assist_flush(struct tv_assist *assist, struct kvm_run *run);

/* assist_syscall.c */
int tv_syscall_watch(struct tv_assist *assist, const struct kvm_run *run);
int tv_syscall_trap(struct tv_assist *assist, struct kvm_run *run);
void tv_syscall_msr(struct tv_assist *assist, struct kvm_run *run);

/* assist_decode.c */
int tv_insn_decode(struct tv_assist *assist);
uint64_t *tv_insn_register(struct kvm_regs *regs, unsigned number);

/* assist_memory.c: each is 0, or -1 with `fault` set, or -2 where there is no RAM */
enum tv_access { TV_READ, TV_WRITE, TV_FETCH };
int tv_assist_translate(struct tv_assist *assist, uint64_t va, enum tv_access access, uint64_t *gpa);
int tv_assist_read(struct tv_assist *assist, uint64_t va, void *to, uint32_t length);
int tv_assist_check(struct tv_assist *assist, uint64_t va, uint32_t length, enum tv_access access);
int tv_assist_write(struct tv_assist *assist, uint64_t va, const void *from, uint32_t length);
int tv_assist_raise(struct tv_assist *assist, uint8_t vector, int64_t error);

/* Of the IDT in 64-bit mode (Intel SDM volume 3, section 6.14.1). */
struct tv_gate {
    uint16_t offset_low, selector;
    uint8_t ist, type;
    uint16_t offset_middle;
    uint32_t offset_high, reserved;
};

static inline uint64_t tv_gate_offset(const struct tv_gate *gate)
{
    return gate->offset_low | (uint64_t)gate->offset_middle << 16 | (uint64_t)gate->offset_high << 32;
}

/* assist_trap.c */
int tv_assist_breakpoint(struct tv_assist *assist);
int tv_assist_inject(struct tv_assist *assist);

/* assist_state.c */
void tv_assist_state_open(struct tv_assist *assist);
int tv_assist_load_xstate(struct tv_assist *assist);
int tv_assist_store_xstate(struct tv_assist *assist);
int tv_assist_extended(struct tv_assist *assist, enum tv_assist_kind *kind);

/* assist_native.c, assist_table.c */
struct tv_operand {
    uint8_t kind;      /* TV_ASSIST_INTEGER, _X87, _SSE or _AVX; TV_ASSIST_NONE: not in the table */
    uint8_t size;      /* of the memory operand */
    uint8_t writes;
    uint8_t immediate; /* bytes of it */
    uint8_t implicit;  /* bits: registers (by number) that it uses without naming them */
};
struct tv_operand tv_assist_operand(const struct tv_insn *insn);
void tv_assist_native_close(struct tv_assist *assist);
int tv_assist_native(struct tv_assist *assist, const struct tv_operand *operand);

#endif
