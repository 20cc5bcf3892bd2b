/* XSAVE, FXSAVE, MXCSR and their like: between guest memory and the guest's extended state as KVM gives it, which is in
 * the standard format of an XSAVE area (Intel SDM volume 1, chapter 13). Nothing of it is loaded into this CPU. */
#include "assist.h"

#include <cpuid.h>
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#define LEGACY 512
#define HEADER 64
#define X87_BYTES 24   /* FCW to the high half of FDP */
#define MXCSR_AT 24
#define REGISTERS_AT 32
#define ST_BYTES 128
#define XMM_AT 160
#define XMM_BYTES 256
#define FX_BYTES 416 /* what FXSAVE writes of 512 */
#define X87 1ull
#define SSE 2ull
#define AVX 4ull
#define COMPACT (1ull << 63)
#define INIT_FCW 0x37f
#define INIT_MXCSR 0x1f80
#define CR0_TS 8u
#define CR0_EM 4u
#define CR4_OSFXSR (1u << 9)
#define CR4_OSXSAVE (1u << 18)
#define MSR_XSS 0xda0
#define UNDEFINED 6
#define NO_MATH 7
#define PROTECTION 13

struct header {
    uint64_t xstate_bv, xcomp_bv, reserved[6];
};

static uint8_t *state(struct tv_assist *assist)
{
    return (uint8_t *)assist->xstate;
}

static struct header *header_of(uint8_t *area)
{
    return (struct header *)(area + LEGACY);
}

void tv_assist_state_open(struct tv_assist *assist)
{
    for (unsigned part = 2; part < TV_XSTATE_PARTS; part++) {
        uint32_t eax, ebx, ecx, edx;
        if (!__get_cpuid_count(0xd, part, &eax, &ebx, &ecx, &edx) || !eax || ebx + eax > TV_ASSIST_AREA)
            continue;
        assist->parts[part].size = eax;
        assist->parts[part].offset = ebx;
        assist->parts[part].aligned = ecx >> 1 & 1;
    }
}

/* Once, until tv_assist puts it back. 0, or -2: KVM does not give it. */
int tv_assist_load_xstate(struct tv_assist *assist)
{
    unsigned long call = assist->xsave2 ? KVM_GET_XSAVE2 : KVM_GET_XSAVE;
    if (assist->xstate_is != TV_XSTATE_UNKNOWN)
        return 0;
    if (ioctl(assist->fd, call, assist->xstate) < 0)
        return -2;
    assist->xstate_is = TV_XSTATE_KNOWN;
    return 0;
}

/* What is in `xstate` is the guest's from now on. */
int tv_assist_store_xstate(struct tv_assist *assist)
{
    assist->xstate_is = TV_XSTATE_CHANGED;
    return 0;
}

static uint64_t guest_xcr0(struct tv_assist *assist)
{
    struct kvm_xcrs xcrs;
    if (ioctl(assist->fd, KVM_GET_XCRS, &xcrs) < 0)
        return 0;
    for (uint32_t i = 0; i < xcrs.nr_xcrs && i < KVM_MAX_XCRS; i++)
        if (xcrs.xcrs[i].xcr == 0)
            return xcrs.xcrs[i].value;
    return 0;
}

/* Bits that MXCSR may have on this CPU. */
static uint32_t mxcsr_mask(void)
{
    static __thread uint32_t known;
    uint8_t area[LEGACY] __attribute__((aligned(16)));
    if (!known) {
        memset(area, 0, sizeof area);
        __asm__ volatile("fxsave64 %0" : "=m"(area));
        memcpy(&known, area + 28, sizeof known);
        if (!known)
            known = 0xffbf;
    }
    return known;
}

static int bad_mxcsr(const uint8_t *area)
{
    uint32_t mxcsr;
    memcpy(&mxcsr, area + MXCSR_AT, sizeof mxcsr);
    return !!(mxcsr & ~mxcsr_mask());
}

/* --- what is moved of each part ----------------------------------------------------------------------------------- */

static void copy_x87(uint8_t *to, const uint8_t *from)
{
    memcpy(to, from, X87_BYTES);
    memcpy(to + REGISTERS_AT, from + REGISTERS_AT, ST_BYTES);
}

static void init_x87(uint8_t *area)
{
    static const uint16_t FCW = INIT_FCW;
    memset(area, 0, X87_BYTES);
    memcpy(area, &FCW, sizeof FCW);
    memset(area + REGISTERS_AT, 0, ST_BYTES);
}

/* Without REX.W, pointers have 32 bits and the selectors beside them read 0 on every CPU of today. */
static void narrow_pointers(uint8_t *area)
{
    memset(area + 12, 0, 4);
    memset(area + 20, 0, 4);
}

/* Where each part of `mask` lies in a compacted area; gives the area's size. */
static uint32_t compact_offsets(const struct tv_assist *assist, uint64_t mask, uint32_t offsets[TV_XSTATE_PARTS])
{
    uint32_t at = LEGACY + HEADER;
    for (unsigned part = 2; part < TV_XSTATE_PARTS; part++) {
        if (!(mask >> part & 1))
            continue;
        if (assist->parts[part].aligned)
            at = (at + 63) & ~63u;
        offsets[part] = at;
        at += assist->parts[part].size;
    }
    return at;
}

static uint32_t standard_offsets(const struct tv_assist *assist, uint64_t mask, uint32_t offsets[TV_XSTATE_PARTS])
{
    uint32_t end = LEGACY + HEADER;
    for (unsigned part = 2; part < TV_XSTATE_PARTS; part++) {
        if (!(mask >> part & 1))
            continue;
        offsets[part] = assist->parts[part].offset;
        if (end < offsets[part] + assist->parts[part].size)
            end = offsets[part] + assist->parts[part].size;
    }
    return end;
}

static int unknown_parts(const struct tv_assist *assist, uint64_t mask)
{
    for (unsigned part = 2; part < TV_XSTATE_PARTS; part++)
        if (mask >> part & 1 && !assist->parts[part].size)
            return 1;
    return 0;
}

/* --- the instructions --------------------------------------------------------------------------------------------- */

/* The parts that EDX:EAX and XCR0 have in common. */
static uint64_t requested(const struct tv_assist *assist, uint64_t xcr0)
{
    return ((assist->regs.rax & 0xffffffffu) | assist->regs.rdx << 32) & xcr0;
}

static int xsave(struct tv_assist *assist, uint64_t xcr0, int compact)
{
    uint64_t mask = requested(assist, xcr0), used = header_of(state(assist))->xstate_bv;
    uint32_t offsets[TV_XSTATE_PARTS] = {0}, mxcsr;
    uint32_t size = (compact ? compact_offsets : standard_offsets)(assist, mask, offsets);
    if (size > TV_ASSIST_AREA || unknown_parts(assist, mask))
        return -2;
    int problem = tv_assist_read(assist, assist->insn.address, assist->area, size); /* what is not written stays */
    if (problem)
        return problem;
    struct header *header = header_of(assist->area);
    memcpy(&mxcsr, state(assist) + MXCSR_AT, sizeof mxcsr);
    if (mxcsr != INIT_MXCSR)
        used |= SSE;
    uint64_t written = compact ? mask & used : mask;
    if (written & X87) {
        copy_x87(assist->area, state(assist));
        if (!(assist->insn.rex & 8))
            narrow_pointers(assist->area);
    }
    if (mask & (compact ? SSE & used : SSE | AVX))
        memcpy(assist->area + MXCSR_AT, state(assist) + MXCSR_AT, 8);
    if (written & SSE)
        memcpy(assist->area + XMM_AT, state(assist) + XMM_AT, XMM_BYTES);
    for (unsigned part = 2; part < TV_XSTATE_PARTS; part++)
        if (written >> part & 1)
            memcpy(assist->area + offsets[part], state(assist) + assist->parts[part].offset, assist->parts[part].size);
    if (compact)
        *header = (struct header){.xstate_bv = mask & used, .xcomp_bv = mask | COMPACT};
    else
        header->xstate_bv = (header->xstate_bv & ~mask) | (mask & used);
    return tv_assist_write(assist, assist->insn.address, assist->area, size);
}

/* What XRSTOR refuses with #GP. */
static int bad_header(const struct header *header, uint64_t xcr0, int compacted_only)
{
    uint64_t valid = header->xcomp_bv & COMPACT ? header->xcomp_bv & ~COMPACT : xcr0;
    if (compacted_only && !(header->xcomp_bv & COMPACT))
        return 1;
    if (!(header->xcomp_bv & COMPACT) && header->xcomp_bv)
        return 1;
    for (unsigned i = 0; i < 6; i++)
        if (header->reserved[i] && (header->xcomp_bv & COMPACT || i == 0))
            return 1;
    return !!(valid & ~xcr0) || !!(header->xstate_bv & ~valid);
}

static int xrstor(struct tv_assist *assist, uint64_t xcr0, int compacted_only)
{
    uint64_t mask = requested(assist, xcr0);
    uint32_t offsets[TV_XSTATE_PARTS] = {0};
    const struct header *header = header_of(assist->area);
    static const uint32_t MXCSR = INIT_MXCSR;
    int problem = tv_assist_read(assist, assist->insn.address, assist->area, LEGACY + HEADER);
    if (problem)
        return problem;
    if (bad_header(header, xcr0, compacted_only))
        return tv_assist_raise(assist, PROTECTION, 0);
    int compact = !!(header->xcomp_bv & COMPACT);
    uint64_t layout = compact ? header->xcomp_bv & ~COMPACT : mask, from = header->xstate_bv & mask;
    uint32_t size = (compact ? compact_offsets : standard_offsets)(assist, layout, offsets);
    if (size > TV_ASSIST_AREA || unknown_parts(assist, layout | mask))
        return -2;
    if (size > LEGACY + HEADER)
        problem = tv_assist_read(assist, assist->insn.address + LEGACY + HEADER, assist->area + LEGACY + HEADER,
                                 size - LEGACY - HEADER);
    if (problem)
        return problem;
    int takes_mxcsr = compact ? !!(from & SSE) : !!(mask & (SSE | AVX));
    if (takes_mxcsr && bad_mxcsr(assist->area))
        return tv_assist_raise(assist, PROTECTION, 0);
    uint8_t *into = state(assist);
    if (from & X87)
        copy_x87(into, assist->area);
    else if (mask & X87)
        init_x87(into);
    if (takes_mxcsr)
        memcpy(into + MXCSR_AT, assist->area + MXCSR_AT, 4);
    else if (mask & SSE)
        memcpy(into + MXCSR_AT, &MXCSR, 4);
    if (from & SSE)
        memcpy(into + XMM_AT, assist->area + XMM_AT, XMM_BYTES);
    else if (mask & SSE)
        memset(into + XMM_AT, 0, XMM_BYTES);
    for (unsigned part = 2; part < TV_XSTATE_PARTS; part++) {
        uint8_t *to = into + assist->parts[part].offset;
        if (from >> part & 1)
            memcpy(to, assist->area + offsets[part], assist->parts[part].size);
        else if (mask >> part & 1)
            memset(to, 0, assist->parts[part].size);
    }
    /* MXCSR alone makes SSE a part that is not in its initial state, for KVM as for the CPU. */
    header_of(into)->xstate_bv = (header_of(into)->xstate_bv & ~mask) | from | (takes_mxcsr ? SSE : 0);
    return tv_assist_store_xstate(assist);
}

static int fxsave(struct tv_assist *assist)
{
    memcpy(assist->area, state(assist), FX_BYTES);
    if (!(assist->insn.rex & 8))
        narrow_pointers(assist->area);
    uint32_t mask = mxcsr_mask();
    memcpy(assist->area + MXCSR_AT + 4, &mask, sizeof mask);
    return tv_assist_write(assist, assist->insn.address, assist->area, FX_BYTES);
}

static int fxrstor(struct tv_assist *assist)
{
    int problem = tv_assist_read(assist, assist->insn.address, assist->area, LEGACY);
    if (problem)
        return problem;
    if (bad_mxcsr(assist->area))
        return tv_assist_raise(assist, PROTECTION, 0);
    memcpy(state(assist), assist->area, FX_BYTES);
    header_of(state(assist))->xstate_bv |= X87 | SSE;
    return tv_assist_store_xstate(assist);
}

static int mxcsr(struct tv_assist *assist, int load)
{
    uint8_t *at = state(assist) + MXCSR_AT;
    if (!load)
        return tv_assist_write(assist, assist->insn.address, at, 4);
    int problem = tv_assist_read(assist, assist->insn.address, assist->area + MXCSR_AT, 4);
    if (problem)
        return problem;
    if (bad_mxcsr(assist->area))
        return tv_assist_raise(assist, PROTECTION, 0);
    memcpy(at, assist->area + MXCSR_AT, 4);
    header_of(state(assist))->xstate_bv |= SSE;
    return tv_assist_store_xstate(assist);
}

static int extended_supervisor_state(struct tv_assist *assist)
{
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry;
    } msr = {.head.nmsrs = 1, .entry.index = MSR_XSS};
    return ioctl(assist->fd, KVM_GET_MSRS, &msr) == 1 && msr.entry.data;
}

/* 0F AE with a memory operand, and 0F C7 /3 /4 /5. 0, or why not; -2 also for what is not among them. */
int tv_assist_extended(struct tv_assist *assist, enum tv_assist_kind *kind)
{
    const struct tv_insn *insn = &assist->insn;
    unsigned which = insn->modrm >> 3 & 7, is_ae = insn->opcode == 0xae;
    int supervisor = !is_ae && which != 4;
    if (insn->vex || insn->rep || insn->opsize || insn->lock || !insn->is_memory || (is_ae ? which == 7 : which < 3 || which > 5))
        return -2;
    int is_xsave = !is_ae || which >= 4;
    *kind = is_ae && (which == 2 || which == 3) ? TV_ASSIST_MXCSR : TV_ASSIST_XSAVE;
    if (is_xsave ? !(assist->sregs.cr4 & CR4_OSXSAVE) : !(assist->sregs.cr4 & CR4_OSFXSR) && *kind == TV_ASSIST_MXCSR)
        return tv_assist_raise(assist, UNDEFINED, -1);
    if (assist->sregs.cr0 & CR0_EM && !is_xsave)
        return tv_assist_raise(assist, *kind == TV_ASSIST_MXCSR ? UNDEFINED : NO_MATH, -1);
    if (assist->sregs.cr0 & CR0_TS)
        return tv_assist_raise(assist, NO_MATH, -1);
    if (supervisor && assist->sregs.cs.selector & 3)
        return tv_assist_raise(assist, PROTECTION, 0);
    if (*kind == TV_ASSIST_XSAVE && insn->address % (is_xsave ? 64 : 16))
        return tv_assist_raise(assist, PROTECTION, 0);
    if (tv_assist_load_xstate(assist) || (supervisor && extended_supervisor_state(assist)))
        return -2;
    uint64_t xcr0 = is_xsave ? guest_xcr0(assist) : 0;
    if (is_ae) {
        switch (which) {
        case 0:
            return fxsave(assist);
        case 1:
            return fxrstor(assist);
        case 2:
        case 3:
            return mxcsr(assist, which == 2);
        case 5:
            return xrstor(assist, xcr0, 0);
        default: /* XSAVEOPT may write what it need not */
            return xsave(assist, xcr0, 0);
        }
    }
    return which == 3 ? xrstor(assist, xcr0, 1) : xsave(assist, xcr0, 1);
}
