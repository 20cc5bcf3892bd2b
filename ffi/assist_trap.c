/* What an instruction raises instead of ending: #BP by hand, since KVM's way to inject a software exception wants an
 * instruction length that nobody can give it; the others by KVM_SET_VCPU_EVENTS. */
#include "assist.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#define BREAKPOINT 3
#define INTERRUPT_GATE 14
#define TRAP_GATE 15
#define PROTECTION 13
#define NOT_PRESENT 11
#define FLAG_TF (1ull << 8)
#define FLAG_IF (1ull << 9)
#define FLAG_NT (1ull << 14)
#define FLAG_RF (1ull << 16)
#define SOFTWARE_ERROR(vector) ((vector) * 8 + 2)

/* The code segment of the handler, from the guest's GDT. */
static int load_code(struct tv_assist *assist, uint16_t selector, struct kvm_segment *code)
{
    uint64_t raw;
    int cpl = assist->sregs.cs.selector & 3;
    uint32_t error = selector & 0xfffcu;
    if (!error || selector & 4 || (selector | 7u) > assist->sregs.gdt.limit)
        return tv_assist_raise(assist, PROTECTION, error);
    int problem = tv_assist_read(assist, assist->sregs.gdt.base + (selector & ~7u), &raw, sizeof raw);
    if (problem)
        return problem;
    int type = (int)(raw >> 40 & 15), dpl = (int)(raw >> 45 & 3);
    if (!(raw >> 44 & 1) || !(type & 8) || dpl > cpl || !(raw >> 53 & 1) || raw >> 54 & 1)
        return tv_assist_raise(assist, PROTECTION, error);
    if (!(raw >> 47 & 1))
        return tv_assist_raise(assist, NOT_PRESENT, error);
    int new_cpl = type & 4 ? cpl : dpl; /* conforming: the caller's */
    *code = (struct kvm_segment){.base = 0, .limit = 0xffffffff, .selector = (uint16_t)((selector & ~3) | new_cpl),
                                 .type = (uint8_t)(type | 1), .present = 1, .dpl = (uint8_t)dpl, .s = 1, .l = 1, .g = 1};
    return 0;
}

/* The stack that the handler starts on: of the gate's IST entry, of the inner ring, or as it is. */
static int find_stack(struct tv_assist *assist, unsigned ist, int inner, uint64_t *rsp)
{
    uint32_t at = ist ? 28 + ist * 8 : 4;
    *rsp = assist->regs.rsp;
    if (!ist && !inner)
        return 0;
    if (at + 7 > assist->sregs.tr.limit)
        return tv_assist_raise(assist, 10, assist->sregs.tr.selector & 0xfffc);
    return tv_assist_read(assist, assist->sregs.tr.base + at, rsp, 8);
}

/* INT3 in 64-bit mode: Intel SDM volume 3, sections 6.12 and 6.14. Only into a handler of the ring that it came from, or
 * from ring 3 into ring 0; other rings are refused. */
int tv_assist_breakpoint(struct tv_assist *assist)
{
    struct kvm_regs *regs = &assist->regs;
    struct kvm_sregs *sregs = &assist->sregs;
    struct tv_gate gate;
    struct kvm_segment code;
    uint64_t rsp;
    int cpl = sregs->cs.selector & 3;
    if (cpl == 1 || cpl == 2)
        return -2;
    if (BREAKPOINT * 16 + 15 > sregs->idt.limit)
        return tv_assist_raise(assist, PROTECTION, SOFTWARE_ERROR(BREAKPOINT));
    assist->implicit = 1; /* tables and stack are reached as ring 0 does, whatever the guest's ring */
    int problem = tv_assist_read(assist, sregs->idt.base + BREAKPOINT * 16, &gate, sizeof gate);
    if (problem)
        return problem;
    int type = gate.type & 31;
    if ((type != INTERRUPT_GATE && type != TRAP_GATE) || (gate.type >> 5 & 3) < cpl)
        return tv_assist_raise(assist, PROTECTION, SOFTWARE_ERROR(BREAKPOINT));
    if (!(gate.type & 0x80))
        return tv_assist_raise(assist, NOT_PRESENT, SOFTWARE_ERROR(BREAKPOINT));
    problem = load_code(assist, gate.selector, &code);
    if (problem)
        return problem;
    int inner = (code.selector & 3) < cpl;
    if (inner && (code.selector & 3) != 0)
        return -2;
    problem = find_stack(assist, gate.ist & 7, inner, &rsp);
    if (problem)
        return problem;
    uint64_t frame[5] = {regs->rip + assist->insn.length, sregs->cs.selector, regs->rflags, regs->rsp,
                         sregs->ss.selector};
    rsp = (rsp & ~15ull) - sizeof frame;
    problem = tv_assist_write(assist, rsp, frame, sizeof frame);
    if (problem)
        return problem;
    sregs->cs = code;
    if (inner)
        sregs->ss = (struct kvm_segment){.selector = 0, .dpl = 0, .unusable = 1};
    regs->rsp = rsp;
    regs->rip = tv_gate_offset(&gate);
    regs->rflags &= ~(FLAG_TF | FLAG_NT | FLAG_RF | (type == INTERRUPT_GATE ? FLAG_IF : 0));
    return 0;
}

/* Give the guest assist->fault. 0, or -errno. */
int tv_assist_inject(struct tv_assist *assist)
{
    struct kvm_vcpu_events events;
    if (ioctl(assist->fd, KVM_GET_VCPU_EVENTS, &events) < 0)
        return -errno;
    if (assist->fault.vector == 14) {
        assist->sregs.cr2 = assist->fault.cr2;
        if (ioctl(assist->fd, KVM_SET_SREGS, &assist->sregs) < 0)
            return -errno;
    }
    memset(&events.exception, 0, sizeof events.exception);
    events.exception.injected = 1;
    events.exception.nr = assist->fault.vector;
    events.exception.has_error_code = assist->fault.has_error;
    events.exception.error_code = assist->fault.error;
    events.exception_has_payload = 0;
    return ioctl(assist->fd, KVM_SET_VCPU_EVENTS, &events) < 0 ? -errno : 0;
}
