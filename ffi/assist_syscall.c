/* SYSCALL where KVM leaves it half done.
 *
 * KVM without hardware virtualization runs ring 3 on the CPU. A SYSCALL there gets its RCX, R11, RIP and flags, but stays in
 * ring 3: what the guest sees is a page fault at its own entry point, of which ring 3 can't fetch. So the first
 * instruction of the guest's page-fault handler has a breakpoint (it runs in ring 0, on KVM's emulator, which looks at
 * them). Where the fault is such a SYSCALL, it is taken back and the SYSCALL is finished (Intel SDM volume 2, SYSCALL);
 * any other goes on behind the handler's first instruction: that is done here, or by a single step. No process can
 * feign it by a jump to the entry point: flags that SYSCALL clears, IF among them, are not a process's to clear.
 *
 * The handler is looked up before each KVM_RUN, from the IDT register that the last exit has left in kvm_run; writes of
 * LSTAR exit, so that there has been one between a guest's setting up and its first SYSCALL. CR2 keeps what the fault has put
 * there: no handler that still wants an older value is at work while ring 3 runs. */
#include "assist.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#define PAGE_FAULT 14
#define DEBUG_TRAP 1
#define EFER_SCE 1ull
#define EFER_LMA (1ull << 10)
#define ERROR_WRITE 2u
#define ERROR_USER 4u
#define FLAG_TF (1ull << 8)
#define FLAG_IF (1ull << 9)
#define FLAG_DF (1ull << 10)
#define FLAG_RF (1ull << 16)
#define FLAG_AC (1ull << 18)
#define MSR_STAR 0xc0000081u
#define MSR_LSTAR 0xc0000082u
#define MSR_FMASK 0xc0000084u
#define DR6_ALWAYS 0xffff0ff0ull
#define DR7_EXECUTE_0 0x402ull /* the first address, globally, at an instruction's fetch */

struct fault_frame {
    uint64_t error, rip, cs, rflags, rsp, ss;
};

static int debug(struct tv_assist *assist, uint32_t control, uint64_t at)
{
    struct kvm_guest_debug wanted = {.control = control};
    if (at) {
        wanted.arch.debugreg[0] = at;
        wanted.arch.debugreg[7] = DR7_EXECUTE_0;
    }
    return ioctl(assist->fd, KVM_SET_GUEST_DEBUG, &wanted) < 0 ? -errno : 0;
}

static int break_at(struct tv_assist *assist, uint64_t at)
{
    assist->stepping = 0;
    assist->handler = at;
    return debug(assist, at ? KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP : 0, at);
}

/* Of the guest's page-fault gate; 0: it has none. */
static uint64_t find_handler(struct tv_assist *assist)
{
    const struct kvm_sregs *sregs = &assist->sregs;
    struct tv_gate gate;
    if (!(sregs->efer & EFER_LMA) || PAGE_FAULT * 16 + 15 > sregs->idt.limit)
        return 0;
    assist->implicit = 1;
    int problem = tv_assist_read(assist, sregs->idt.base + PAGE_FAULT * 16, &gate, sizeof gate);
    assist->has_fault = assist->implicit = 0;
    return problem || !(gate.type & 0x80) ? 0 : tv_gate_offset(&gate);
}

/* Before KVM_RUN. 0, or -errno. */
int tv_syscall_watch(struct tv_assist *assist, const struct kvm_run *run)
{
    if (!assist->stale)
        memcpy(&assist->sregs, &run->s.regs.sregs, sizeof assist->sregs);
    else if (ioctl(assist->fd, KVM_GET_SREGS, &assist->sregs) < 0)
        return -errno;
    uint64_t handler = find_handler(assist);
    return handler == assist->handler ? 0 : break_at(assist, handler);
}

/* How many of the bytes there the guest may fetch. */
static uint32_t code_at(struct tv_assist *assist, uint64_t va, uint8_t *code, uint32_t length)
{
    uint32_t have = 0;
    for (uint64_t gpa; have < length; have++)
        if (tv_assist_translate(assist, va + have, TV_FETCH, &gpa) ||
            tv_memory_read(assist->memory, gpa, code + have, 1))
            break;
    assist->has_fault = 0;
    return have;
}

static int is_syscall_at(struct tv_assist *assist, uint64_t va)
{
    uint8_t code[2];
    return code_at(assist, va, code, sizeof code) == sizeof code && code[0] == 0x0f && code[1] == 0x05;
}

/* Handlers begin with an instruction that does little: Linux's with CLAC, with a NOP instead, or with CLD. One of those
 * is done here, without a single step's exit. 0: it is another. */
static uint32_t first_done(struct tv_assist *assist)
{
    static const struct {
        uint8_t length, code[4];
        uint64_t clears;
    } KNOWN[] = {
        {1, {0x90}, 0},
        {2, {0x66, 0x90}, 0},
        {3, {0x0f, 0x1f, 0x00}, 0},
        {4, {0xf3, 0x0f, 0x1e, 0xfa}, 0}, /* ENDBR64 */
        {3, {0x0f, 0x01, 0xca}, FLAG_AC}, /* CLAC */
        {1, {0xfc}, FLAG_DF},             /* CLD */
    };
    uint8_t code[4];
    uint32_t have = code_at(assist, assist->regs.rip, code, sizeof code);
    for (uint32_t i = 0; i < sizeof KNOWN / sizeof *KNOWN; i++)
        if (KNOWN[i].length <= have && !memcmp(code, KNOWN[i].code, KNOWN[i].length)) {
            assist->regs.rflags &= ~(KNOWN[i].clears | FLAG_RF);
            return KNOWN[i].length;
        }
    return 0;
}

/* At the handler's first instruction: 1 when the fault was a SYSCALL's, and that is finished. */
static int finish_syscall(struct tv_assist *assist)
{
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry[3];
    } msrs = {.head.nmsrs = 3, .entry = {{.index = MSR_STAR}, {.index = MSR_LSTAR}, {.index = MSR_FMASK}}};
    struct kvm_sregs *sregs = &assist->sregs;
    struct fault_frame frame;
    assist->implicit = 1;
    int problem = tv_assist_read(assist, assist->regs.rsp, &frame, sizeof frame);
    assist->has_fault = assist->implicit = 0;
    if (problem || sregs->cs.selector & 3 || !(sregs->efer & EFER_SCE) || !(frame.error & ERROR_USER) ||
        frame.error & ERROR_WRITE || frame.rip != sregs->cr2 || ioctl(assist->fd, KVM_GET_MSRS, &msrs) != 3)
        return 0;
    uint64_t star = msrs.entry[0].data, mask = msrs.entry[2].data & ~FLAG_RF;
    uint16_t user = (uint16_t)((star >> 48) + 16) | 3, kernel = (uint16_t)(star >> 32) & 0xfffc;
    if (frame.rip != msrs.entry[1].data || frame.cs != user || frame.rflags & mask)
        return 0;
    if (!(mask & FLAG_IF)) {
        sregs->cs.selector |= 3; /* what ring 3 may fetch */
        int genuine = is_syscall_at(assist, assist->regs.rcx - 2);
        sregs->cs.selector &= (uint16_t)~3;
        if (!genuine)
            return 0;
    }
    sregs->cs = (struct kvm_segment){.limit = 0xffffffff, .selector = kernel, .type = 11, .present = 1, .s = 1, .l = 1,
                                     .g = 1};
    sregs->ss = (struct kvm_segment){.limit = 0xffffffff, .selector = (uint16_t)(kernel + 8), .type = 3, .present = 1,
                                     .s = 1, .db = 1, .g = 1};
    assist->regs.rip = frame.rip;
    assist->regs.rsp = frame.rsp;
    assist->regs.rflags = frame.rflags & ~FLAG_RF;
    assist->by_kind[TV_ASSIST_SYSCALL]++;
    return 1;
}

/* A guest that steps itself: its own trap, which KVM gives to who watches. */
static int give_back(struct tv_assist *assist, uint64_t dr6)
{
    struct kvm_debugregs registers;
    if (ioctl(assist->fd, KVM_GET_DEBUGREGS, &registers) < 0)
        return -errno;
    registers.dr6 = dr6 | DR6_ALWAYS;
    if (ioctl(assist->fd, KVM_SET_DEBUGREGS, &registers) < 0)
        return -errno;
    assist->fault = (struct tv_exception){.vector = DEBUG_TRAP};
    return tv_assist_inject(assist);
}

/* After KVM_EXIT_DEBUG. 1: the guest goes on; 0: this is nothing of ours, or KVM refuses. */
int tv_syscall_trap(struct tv_assist *assist, struct kvm_run *run)
{
    if (!assist->handler || tv_assist_registers(assist, run))
        return 0;
    if (assist->stepping)
        return !break_at(assist, assist->handler);
    if (assist->regs.rip != assist->handler)
        return !give_back(assist, run->debug.arch.dr6);
    if (finish_syscall(assist))
        return !tv_assist_put_registers(assist, run, 1);
    assist->page_faults++;
    uint32_t done = assist->regs.rflags & FLAG_TF ? 0 : first_done(assist);
    if (done) {
        assist->regs.rip += done;
        return !tv_assist_put_registers(assist, run, 0);
    }
    assist->stepping = 1;
    return !debug(assist, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP, 0);
}

/* After KVM_EXIT_X86_WRMSR: what the guest has written is written. */
void tv_syscall_msr(struct tv_assist *assist, struct kvm_run *run)
{
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry;
    } msr = {.head.nmsrs = 1, .entry = {.index = run->msr.index, .data = run->msr.data}};
    run->msr.error = run->msr.index != MSR_LSTAR || ioctl(assist->fd, KVM_SET_MSRS, &msr) != 1;
}
