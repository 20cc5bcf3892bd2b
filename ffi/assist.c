#include "assist.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#define FLAG_AC (1ull << 18)
#define FLAG_RF (1ull << 16)
#define FLAG_TF (1ull << 8)
#define FLAG_ZF (1ull << 6)
#define CR0_MP 2u
#define CR0_EM 4u
#define CR0_TS 8u
#define CR0_NE 32u
#define CR4_OSFXSR (1u << 9)
#define CR4_OSXSAVE (1u << 18)
#define EFER_LMA (1ull << 10)
#define X87_STATUS 2
#define X87_ERROR 0x80u
#define MSR_TSC_AUX 0xc0000103
#define SYNCED (KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS)
#define UNDEFINED 6
#define NO_MATH 7
#define PROTECTION 13
#define MATH_ERROR 16

/* The vCPU's, before its thread starts. `memory` outlives it. */
void tv_assist_open(struct tv_assist *assist, struct tv_memory *memory, int vcpu_fd, int xsave2, int watched)
{
    memset(assist, 0, sizeof *assist);
    assist->memory = memory;
    assist->fd = vcpu_fd;
    assist->xsave2 = xsave2;
    assist->watched = watched;
    assist->stale = 1;
    tv_assist_state_open(assist);
}

void tv_assist_close(struct tv_assist *assist)
{
    tv_assist_native_close(assist);
    assist->memory = NULL;
}

/* As many of its bytes as the guest's tables lead to: KVM's own copy may be shorter than the instruction. */
static int fetch(struct tv_assist *assist)
{
    struct tv_insn *insn = &assist->insn;
    uint64_t va = assist->regs.rip;
    memset(insn, 0, sizeof *insn);
    while (insn->available < TV_INSN_MAX) {
        uint64_t gpa, room = TV_PAGE_SIZE - (va & (TV_PAGE_SIZE - 1)), left = TV_INSN_MAX - insn->available;
        uint64_t piece = left < room ? left : room;
        if (tv_assist_translate(assist, va, TV_FETCH, &gpa) ||
            tv_memory_read(assist->memory, gpa, insn->bytes + insn->available, piece))
            break;
        insn->available += (uint32_t)piece;
        va += piece;
    }
    assist->has_fault = 0; /* behind the instruction, or at the start of one that KVM has read: no fault of its */
    return insn->available ? 0 : -2;
}

static int wait_for_x87(struct tv_assist *assist)
{
    uint64_t cr0 = assist->sregs.cr0;
    if ((cr0 & (CR0_MP | CR0_TS)) == (CR0_MP | CR0_TS))
        return tv_assist_raise(assist, NO_MATH, -1);
    if (tv_assist_load_xstate(assist))
        return -2;
    if (((uint8_t *)assist->xstate)[X87_STATUS] & X87_ERROR)
        return cr0 & CR0_NE ? tv_assist_raise(assist, MATH_ERROR, -1) : -2;
    return 0;
}

static int compare_exchange_16(struct tv_assist *assist)
{
    struct kvm_regs *regs = &assist->regs;
    uint64_t gpa, address = assist->insn.address;
    if (address & 15)
        return tv_assist_raise(assist, PROTECTION, 0);
    int problem = tv_assist_translate(assist, address, TV_WRITE, &gpa);
    if (problem)
        return problem;
    uint64_t *at = tv_ptr(assist->memory, gpa, 16), low = regs->rax, high = regs->rdx;
    uint8_t equal;
    if (!at)
        return -2;
    __asm__ volatile("lock cmpxchg16b %1"
                     : "=@ccz"(equal), "+m"(*(struct { uint64_t half[2]; } *)at), "+a"(low), "+d"(high)
                     : "b"(regs->rbx), "c"(regs->rcx)
                     : "memory");
    tv_mark_dirty(assist->memory, gpa, 16);
    regs->rax = low;
    regs->rdx = high;
    regs->rflags = equal ? regs->rflags | FLAG_ZF : regs->rflags & ~FLAG_ZF;
    return 0;
}

static int processor_id(struct tv_assist *assist)
{
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry;
    } msr = {.head.nmsrs = 1, .entry.index = MSR_TSC_AUX};
    if (ioctl(assist->fd, KVM_GET_MSRS, &msr) != 1)
        return -2;
    unsigned into = (assist->insn.modrm & 7u) | (assist->insn.rex & 1u) << 3;
    *tv_insn_register(&assist->regs, into) = msr.entry.data & 0xffffffffu;
    return 0;
}

/* What an SSE, AVX or x87 instruction needs of the control registers. */
static int needs_control(struct tv_assist *assist, unsigned kind)
{
    uint64_t cr0 = assist->sregs.cr0, cr4 = assist->sregs.cr4;
    if (kind == TV_ASSIST_INTEGER)
        return 0;
    if (kind == TV_ASSIST_X87) {
        if (cr0 & (CR0_EM | CR0_TS))
            return tv_assist_raise(assist, NO_MATH, -1);
        return cr0 & CR0_NE ? 0 : -2;
    }
    if (kind == TV_ASSIST_AVX ? !(cr4 & CR4_OSXSAVE) : cr0 & CR0_EM || !(cr4 & CR4_OSFXSR))
        return tv_assist_raise(assist, UNDEFINED, -1);
    return cr0 & CR0_TS ? tv_assist_raise(assist, NO_MATH, -1) : 0;
}

/* 0 done, -1 with a fault, -2 refused. `jumped`: RIP is where it shall be, the segments have changed. */
static int execute(struct tv_assist *assist, enum tv_assist_kind *kind, int *jumped)
{
    struct tv_insn *insn = &assist->insn;
    unsigned middle = insn->modrm >> 3 & 7;
    if (insn->map == 0 && insn->opcode == 0xcc && !insn->lock) {
        *kind = TV_ASSIST_INT3;
        *jumped = 1;
        return tv_assist_breakpoint(assist);
    }
    if (insn->map == 0 && insn->opcode == 0x9b && !insn->lock) {
        *kind = TV_ASSIST_WAIT;
        return wait_for_x87(assist);
    }
    if (insn->map == 1 && insn->opcode == 0x01 && (insn->modrm == 0xca || insn->modrm == 0xcb) && !insn->vex) {
        *kind = TV_ASSIST_CLAC_STAC;
        if (assist->sregs.cs.selector & 3 || insn->lock || insn->rep || insn->opsize)
            return tv_assist_raise(assist, UNDEFINED, -1);
        assist->regs.rflags = insn->modrm & 1 ? assist->regs.rflags | FLAG_AC : assist->regs.rflags & ~FLAG_AC;
        return 0;
    }
    if (insn->map == 1 && insn->opcode == 0xc7 && !insn->vex) {
        if (middle == 1 && insn->is_memory && insn->rex & 8 && !insn->rep && !insn->opsize) {
            *kind = TV_ASSIST_CMPXCHG16B;
            return compare_exchange_16(assist);
        }
        if (middle == 7 && !insn->is_memory && insn->rep == 0xf3 && !insn->lock) {
            *kind = TV_ASSIST_RDPID;
            return processor_id(assist);
        }
    }
    if (insn->map == 1 && (insn->opcode == 0xae || insn->opcode == 0xc7))
        return tv_assist_extended(assist, kind);
    struct tv_operand operand = tv_assist_operand(insn);
    *kind = operand.kind;
    if (operand.kind == TV_ASSIST_NONE)
        return -2;
    int problem = needs_control(assist, operand.kind);
    return problem ? problem : tv_assist_native(assist, &operand);
}

static int is_native(enum tv_assist_kind kind)
{
    return kind == TV_ASSIST_INTEGER || kind == TV_ASSIST_X87 || kind == TV_ASSIST_SSE || kind == TV_ASSIST_AVX;
}

/* The instruction at RIP. 0, or -2. */
static int look(struct tv_assist *assist)
{
    assist->has_fault = assist->implicit = 0;
    return fetch(assist) || tv_insn_decode(assist) ? -2 : 0;
}

/* What `look` has found, with the registers in `assist`: 0 done, -1 with a fault, -2 refused. */
static int finish(struct tv_assist *assist, enum tv_assist_kind *kind, int *jumped)
{
    *kind = TV_ASSIST_NONE;
    int result = execute(assist, kind, jumped);
    if (result)
        return result;
    if (!*jumped)
        assist->regs.rip += assist->insn.length;
    assist->regs.rflags &= ~FLAG_RF;
    assist->by_kind[*kind]++;
    return 0;
}

/* What follows is of the same sort often, and an exit costs many times what an instruction does: up to TV_ASSIST_BATCH
 * are done while they are. What is not, is KVM's again. 0, or -1 with the fault of the last one. */
static int some_more(struct tv_assist *assist)
{
    enum tv_assist_kind kind;
    int jumped = 0;
    for (uint32_t done = 1; done < TV_ASSIST_BATCH && !(assist->regs.rflags & FLAG_TF); done++) {
        if (look(assist) || !tv_assist_operand(&assist->insn).kind)
            break;
        int result = finish(assist, &kind, &jumped);
        if (result)
            return result == -1 ? -1 : 0;
    }
    return 0;
}

/* The vCPU's registers, from kvm_run where the last exit has left them there: an ioctl costs as much as an exit on some
 * hosts. `run` may be NULL. 0, or -errno. */
int tv_assist_registers(struct tv_assist *assist, const struct kvm_run *run)
{
    if (run && !assist->stale && (run->kvm_valid_regs & SYNCED) == SYNCED) {
        assist->regs = run->s.regs.regs;
        assist->sregs = run->s.regs.sregs;
        return 0;
    }
    if (ioctl(assist->fd, KVM_GET_REGS, &assist->regs) < 0 || ioctl(assist->fd, KVM_GET_SREGS, &assist->sregs) < 0)
        return -errno;
    return 0;
}

/* The other way: KVM takes them from kvm_run when it runs next, or tv_assist_flush gives them. `system`: those too. */
int tv_assist_put_registers(struct tv_assist *assist, struct kvm_run *run, int system)
{
    if (run && !assist->stale && (run->kvm_valid_regs & SYNCED) == SYNCED) {
        run->s.regs.regs = assist->regs;
        run->kvm_dirty_regs |= KVM_SYNC_X86_REGS;
        if (system) {
            run->s.regs.sregs = assist->sregs;
            run->kvm_dirty_regs |= KVM_SYNC_X86_SREGS;
        }
        return 0;
    }
    if (system && ioctl(assist->fd, KVM_SET_SREGS, &assist->sregs) < 0)
        return -errno;
    return ioctl(assist->fd, KVM_SET_REGS, &assist->regs) < 0 ? -errno : 0;
}

/* So that the vCPU's ioctls see what kvm_run still holds: before anything but KVM_RUN. 0, or -errno. */
int tv_assist_flush(struct tv_assist *assist, struct kvm_run *run)
{
    uint64_t dirty = run->kvm_dirty_regs;
    run->kvm_dirty_regs = 0;
    if (dirty & KVM_SYNC_X86_SREGS && ioctl(assist->fd, KVM_SET_SREGS, &run->s.regs.sregs) < 0)
        return -errno;
    return dirty & KVM_SYNC_X86_REGS && ioctl(assist->fd, KVM_SET_REGS, &run->s.regs.regs) < 0 ? -errno : 0;
}

/* The registers as they are after all that was done, and the fault of what came then. 0, or -errno. */
static int put_back(struct tv_assist *assist, struct kvm_run *run, int jumped, int fault)
{
    if (assist->xstate_is == TV_XSTATE_CHANGED && ioctl(assist->fd, KVM_SET_XSAVE, assist->xstate) < 0)
        return -errno;
    int problem = tv_assist_put_registers(assist, run, jumped);
    if (problem || !fault)
        return problem;
    assist->by_kind[TV_ASSIST_FAULT]++;
    if (run && (problem = tv_assist_flush(assist, run)) < 0)
        return problem;
    return tv_assist_inject(assist);
}

/* After KVM_RUN gave an emulation failure, with its kvm_run, or NULL: the registers come by ioctls. 1: the guest goes on,
 * with the instruction done, and perhaps some behind it, or with the exception that it raises; 0: refused, nothing has
 * changed. */
int tv_assist(struct tv_assist *assist, struct kvm_run *run)
{
    enum tv_assist_kind kind;
    int jumped = 0;
    assist->xstate_is = TV_XSTATE_UNKNOWN;
    assist->insn.available = 0; /* a refusal is reported with these bytes */
    if (!assist->memory || tv_assist_registers(assist, run))
        return 0;
    int result = assist->sregs.efer & EFER_LMA && assist->sregs.cs.l ? look(assist) : -2;
    if (!result)
        result = finish(assist, &kind, &jumped);
    if (!result && is_native(kind))
        result = some_more(assist);
    if (result == -2 || put_back(assist, run, jumped, result)) {
        assist->refused++;
        return 0;
    }
    return 1;
}
