/* One instruction of the guest's, executed by this CPU: on a copy of the guest's registers and FPU state, with its memory
 * operand bounced through `area`.
 *
 * The instruction is written into a page of this process with its ModRM pointing at [a register that it does not use]
 * and called. What may come here is decided by assist_table.c: nothing that traps by design or reaches other memory.
 * What it raises (an encoding that is none, a misaligned operand, a floating-point exception) traps in our hands
 * (assist_call.c) and is the guest's. */
#define _GNU_SOURCE
#include "assist_call.h"

#include <cpuid.h>
#include <string.h>
#include <sys/mman.h>

#define CODE_BYTES TV_CODE_BYTES
#define UNDEFINED 6
#define PROTECTION 13
#define MATH_ERROR 16
#define SIMD_ERROR 19
#define CR4_OSXMMEXCPT (1u << 10)
#define XSTATE_BV (512 / 8) /* in the XSAVE area */
#define X87_IP (8 / 8)
#define X87_DP (16 / 8)
#define TOUCHED 832 /* bytes of the area that x87, SSE and AVX have, with the header */
#define NO_REGISTER 16u
#define ARITHMETIC 0x8d5ull /* CF PF AF ZF SF OF */

/* At the first instruction that wants it: a page to execute in. A host that forbids such a page, and one where the guest
 * never needs it, have the rest of the assist, and this process's signals as they were. */
static int native_open(struct tv_assist *assist)
{
    uint32_t low, high, eax, ebx, edx;
    if (assist->opened)
        return !!assist->code;
    assist->opened = 1;
    if (!__get_cpuid(1, &eax, &ebx, &assist->ecx1, &edx) || !(assist->ecx1 & bit_OSXSAVE))
        return 0;
    __get_cpuid_count(7, 0, &eax, &assist->ebx7, &assist->ecx7, &edx);
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    assist->host_xcr0 = low | (uint64_t)high << 32;
    void *page = mmap(NULL, CODE_BYTES, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED)
        return 0;
    assist->code = page;
    tv_assist_guard();
    return 1;
}

void tv_assist_native_close(struct tv_assist *assist)
{
    if (assist->code)
        munmap(assist->code, CODE_BYTES);
    assist->code = NULL;
}

/* This CPU has what the instruction wants: what KVM's guest sees is what the host has, and SSE4.2 is the oldest here. */
static int is_there(const struct tv_assist *assist, const struct tv_insn *insn)
{
    uint32_t ecx = assist->ecx1, ebx7 = assist->ebx7, ecx7 = assist->ecx7;
    if (!(ecx & bit_SSE4_2))
        return 0;
    if (insn->vex && (!(assist->host_xcr0 & 4) || !(ebx7 & bit_AVX2)))
        return 0;
    if (insn->map == 1)
        return insn->opcode == 0xbc || insn->opcode == 0xbd ? !!(ebx7 & bit_BMI) : 1;
    if (insn->map == 2) {
        uint8_t opcode = insn->opcode;
        if (opcode >= 0xc8 && opcode <= 0xcd)
            return !!(ebx7 & bit_SHA);
        if (opcode == 0xcf)
            return !!(ecx7 & bit_GFNI);
        if (opcode >= 0xdb && opcode <= 0xdf)
            return !!(ecx & bit_AES) && (!insn->vex_l || ecx7 & bit_VAES);
        if (opcode >= 0x96 && opcode <= 0xbf)
            return !!(ecx & bit_FMA);
        if (opcode == 0xf0 || opcode == 0xf1)
            return insn->rep == 0xf2 || ecx & bit_MOVBE;
        if (opcode == 0xf6 && !insn->vex)
            return !!(ebx7 & bit_ADX);
        if (opcode >= 0xf2)
            return (ebx7 & (bit_BMI | bit_BMI2)) == (bit_BMI | bit_BMI2);
    }
    if (insn->map == 3) {
        if (insn->opcode == 0xce || insn->opcode == 0xcf)
            return !!(ecx7 & bit_GFNI);
        if (insn->opcode == 0xcc)
            return !!(ebx7 & bit_SHA);
        if (insn->opcode == 0x44)
            return !!(ecx & bit_PCLMUL) && (!insn->vex_l || ecx7 & bit_VPCLMULQDQ);
        if (insn->opcode == 0xdf)
            return !!(ecx & bit_AES);
        if (insn->opcode == 0xf0)
            return !!(ebx7 & bit_BMI2);
    }
    return 1;
}

/* A register that the instruction neither names nor implies, for the address of the bounced operand; the REX bit B and
 * ModRM alone can say it. RSP and RBP, R12 and R13 have meanings of their own there. */
static unsigned free_register(const struct tv_insn *insn, unsigned implicit)
{
    static const uint8_t CANDIDATES[] = {7, 6, 3, 1};
    unsigned named = (insn->modrm >> 3 & 7u) | (insn->rex & 4u) << 1;
    for (unsigned i = 0; i < sizeof CANDIDATES; i++) {
        unsigned each = CANDIDATES[i];
        if (each != named && !(insn->vex && each == insn->vex_vvvv) && !(implicit >> each & 1))
            return each;
    }
    return 0; /* four candidates, at most two named: never reached */
}

/* The instruction with its memory operand at [free], and the way back. */
static void write_code(struct tv_assist *assist, unsigned free)
{
    const struct tv_insn *insn = &assist->insn;
    uint8_t *at = assist->code;
    uint64_t back = (uint64_t)tv_assist_back;
    if (!insn->is_memory) {
        memcpy(at, insn->bytes, insn->length);
        at += insn->length;
    } else {
        for (uint32_t i = 0; i <= insn->modrm_at; i++) {
            uint8_t byte = insn->bytes[i];
            if (i < insn->opcode_at && !(insn->vex_at && i >= insn->vex_at) &&
                (byte == 0x67 || byte == 0x64 || byte == 0x65))
                continue; /* of the address, which is no more */
            if (insn->vex_at && i == insn->vex_at && !insn->vex)
                byte &= 0xfc; /* REX without X and B */
            if (insn->vex == 0xc4 && i == insn->vex_at + 1u)
                byte |= 0x60; /* the same, inverted */
            if (i == insn->modrm_at)
                byte = (uint8_t)((byte & 0x38) | free);
            *at++ = byte;
        }
        for (uint32_t i = 0; i < insn->immediate; i++)
            *at++ = insn->bytes[insn->length - insn->immediate + i];
    }
    static const uint8_t JUMP[6] = {0xff, 0x25, 0, 0, 0, 0};
    memcpy(at, JUMP, sizeof JUMP);
    memcpy(at + sizeof JUMP, &back, sizeof back);
}

static uint64_t usable(const struct tv_assist *assist)
{
    return assist->host_xcr0 & 7; /* x87, SSE, AVX: what is executed here touches no more */
}

/* Both directions touch only these components; the rest of the area stays as it is. */
static void xrstor(const void *area, uint64_t mask)
{
    __asm__ volatile("xrstor64 (%0)" ::"r"(area), "a"((uint32_t)mask), "d"((uint32_t)(mask >> 32)) : "memory");
}

static void xsave(void *area, uint64_t mask)
{
    __asm__ volatile("xsave64 (%0)" ::"r"(area), "a"((uint32_t)mask), "d"((uint32_t)(mask >> 32)) : "memory");
}

static void call_with_state(struct tv_assist *assist, const struct tv_operand *operand, struct tv_frame *frame)
{
    static const uint32_t PLAIN = 0x1f80;
    static const uint16_t X87_PLAIN = 0x37f;
    uint32_t mxcsr;
    uint16_t control;
    __asm__ volatile("stmxcsr %0\n\tfnstcw %1" : "=m"(mxcsr), "=m"(control));
    uint64_t mask = usable(assist), data_pointer = assist->xstate[X87_DP];
    xrstor(assist->xstate, mask);
    tv_assist_guarded(frame);
    xsave(assist->xstate, mask);
    assist->xstate[XSTATE_BV] |= 2; /* of a part in its initial state KVM would forget MXCSR */
    if (operand->kind == TV_ASSIST_X87) { /* where it lay and what it worked on: the guest's addresses, never ours */
        assist->xstate[X87_IP] = assist->regs.rip;
        assist->xstate[X87_DP] = assist->insn.is_memory ? assist->insn.address : data_pointer;
    }
    __asm__ volatile("fninit\n\tldmxcsr %0\n\tfldcw %1" ::"m"(PLAIN), "m"(X87_PLAIN));
    if (mask & 4)
        __asm__ volatile("vzeroupper");
    __asm__ volatile("ldmxcsr %0\n\tfldcw %1" ::"m"(mxcsr), "m"(control));
}

static void from_guest(struct tv_assist *assist, struct tv_frame *frame)
{
    for (unsigned number = 0; number < 16; number++)
        frame->registers[number] = *tv_insn_register(&assist->regs, number);
    frame->flags = (assist->regs.rflags & ARITHMETIC) | 2;
    frame->code = (uint64_t)assist->code;
    frame->trapped = 0;
}

static void to_guest(struct tv_assist *assist, const struct tv_frame *frame)
{
    for (unsigned number = 0; number < 16; number++)
        if (number != 4)
            *tv_insn_register(&assist->regs, number) = frame->registers[number];
    assist->regs.rflags = (assist->regs.rflags & ~ARITHMETIC) | (frame->flags & ARITHMETIC);
}

/* A floating-point exception that the guest has not masked traps in our hands; its flags stay set in MXCSR, as they do
 * where the CPU itself delivers it. */
static int float_exception(struct tv_assist *assist, const struct tv_operand *operand)
{
    if (operand->kind == TV_ASSIST_X87)
        return tv_assist_raise(assist, MATH_ERROR, -1);
    if (tv_assist_store_xstate(assist))
        return -2;
    return tv_assist_raise(assist, assist->sregs.cr4 & CR4_OSXMMEXCPT ? SIMD_ERROR : UNDEFINED, -1);
}

/* RSP as an operand: while the instruction runs, ours is not the guest's. */
static int uses_rsp(const struct tv_insn *insn, const struct tv_operand *operand)
{
    int reg = (insn->modrm >> 3 & 7) == 4 && !(insn->rex & 4), rm = (insn->modrm & 7) == 4 && !(insn->rex & 1);
    uint8_t opcode = insn->opcode;
    if (insn->is_memory)
        rm = 0;
    if (operand->kind == TV_ASSIST_X87)
        return 0;
    if (operand->kind == TV_ASSIST_INTEGER)
        return reg || rm || (insn->vex && insn->vex_vvvv == 4);
    switch (insn->map) {
    case 1: /* the others name vector registers only */
        if (opcode == 0x6e || (opcode == 0x7e && insn->rep != 0xf3) || opcode == 0xc4 || (opcode == 0x2a && insn->rep))
            return rm;
        return (opcode == 0x50 || opcode == 0xd7 || opcode == 0xc5 || ((opcode == 0x2c || opcode == 0x2d) && insn->rep)) &&
               reg;
    case 3:
        return ((opcode >= 0x14 && opcode <= 0x17) || opcode == 0x20 || opcode == 0x22) && rm;
    }
    return 0;
}

/* On copies of everything. 0, or -1 with what hardware raises of the instruction itself. */
static int run(struct tv_assist *assist, const struct tv_operand *operand, struct tv_frame *frame, uint8_t *at)
{
    const struct tv_insn *insn = &assist->insn;
    unsigned free = insn->is_memory ? free_register(insn, operand->implicit) : NO_REGISTER;
    int problem = 0;
    write_code(assist, free);
    from_guest(assist, frame);
    if (insn->is_memory)
        frame->registers[free] = (uint64_t)at;
    if (operand->kind == TV_ASSIST_INTEGER)
        tv_assist_guarded(frame);
    else if (!(problem = tv_assist_load_xstate(assist)))
        call_with_state(assist, operand, frame);
    if (insn->is_memory)
        frame->registers[free] = *tv_insn_register(&assist->regs, free);
    if (frame->trapped == UNDEFINED)
        return tv_assist_raise(assist, UNDEFINED, -1);
    if (frame->trapped == PROTECTION) /* its operand is not aligned as it wants it */
        return tv_assist_raise(assist, PROTECTION, 0);
    return frame->trapped ? float_exception(assist, operand) : problem;
}

int tv_assist_native(struct tv_assist *assist, const struct tv_operand *operand)
{
    const struct tv_insn *insn = &assist->insn;
    struct tv_frame frame;
    uint64_t before[TOUCHED / 8];
    uint8_t *at = assist->area + (insn->address & 63); /* aligned as the guest's is */
    int absent = 0;
    if (!native_open(assist) || !is_there(assist, insn) || uses_rsp(insn, operand))
        return -2;
    if (insn->is_memory && operand->writes)
        absent = tv_assist_check(assist, insn->address, operand->size, TV_WRITE);
    if (!absent && insn->is_memory) /* a store too: one that an x87 exception holds back leaves what is there */
        absent = tv_assist_read(assist, insn->address, at, operand->size);
    struct tv_exception fault = assist->fault;
    int known = assist->xstate_is != TV_XSTATE_UNKNOWN;
    if (insn->is_memory && known)
        memcpy(before, assist->xstate, TOUCHED);
    int problem = run(assist, operand, &frame, at);
    if (problem) /* an undefined encoding and a misaligned operand come before the page fault of the operand */
        return problem;
    if (absent)
        assist->fault = fault;
    else if (insn->is_memory && operand->writes)
        absent = tv_assist_write(assist, insn->address, at, operand->size);
    if (absent) { /* it has not been: nor has what it did to the FPU's state */
        if (known)
            memcpy(assist->xstate, before, TOUCHED);
        else
            assist->xstate_is = TV_XSTATE_UNKNOWN;
        return absent;
    }
    to_guest(assist, &frame);
    return operand->kind == TV_ASSIST_INTEGER ? 0 : tv_assist_store_xstate(assist);
}
