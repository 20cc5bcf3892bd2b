#include "kvm.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define POST_PORT 0x80 /* the PC's diagnostic port: Linux writes it to wait a microsecond */

/* The ioctl's result, or -errno. Retries EINTR: for calls that don't wait for a guest. Any thread. */
int tv_ioctl(int fd, unsigned long request, void *argument)
{
    int result;
    do
        result = ioctl(fd, request, argument);
    while (result < 0 && errno == EINTR);
    return result < 0 ? -errno : result;
}

/* 0, or -errno with nothing left behind. */
int tv_vcpu_open(struct tv_vcpu *vcpu, int vm_fd, unsigned long index, uint32_t run_size)
{
    memset(vcpu, 0, sizeof *vcpu);
    vcpu->fd = -1;
    int error = tv_kicker_init(&vcpu->kicker);
    if (error)
        return error;
    int fd = tv_ioctl(vm_fd, KVM_CREATE_VCPU, (void *)index);
    if (fd < 0) {
        tv_kicker_close(&vcpu->kicker);
        return fd;
    }
    void *run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (run == MAP_FAILED) {
        error = -errno;
        close(fd);
        tv_kicker_close(&vcpu->kicker);
        return error;
    }
    vcpu->fd = fd;
    vcpu->run = run;
    vcpu->run_size = run_size;
    return 0;
}

/* After the thread has withdrawn. Idempotent after a successful open; kicks may still come. */
void tv_vcpu_close(struct tv_vcpu *vcpu)
{
    tv_kicker_close(&vcpu->kicker);
    if (vcpu->run)
        munmap(vcpu->run, vcpu->run_size);
    vcpu->run = NULL;
    if (vcpu->assist)
        tv_assist_close(vcpu->assist);
    free(vcpu->assist);
    vcpu->assist = NULL;
    if (vcpu->fd >= 0)
        close(vcpu->fd);
    vcpu->fd = -1;
}

/* Finish what KVM can't emulate, on `memory`, which outlives the vCPU. `sync`: KVM_CAP_SYNC_REGS has both kinds of
 * registers; `watched`: this KVM leaves SYSCALL in ring 3, which wants `sync` (assist_syscall.c). Before the thread
 * starts. 0, or -ENOMEM. */
int tv_vcpu_assist(struct tv_vcpu *vcpu, struct tv_memory *memory, int xsave2, int sync, int watched)
{
    if (!vcpu->assist)
        vcpu->assist = aligned_alloc(64, (sizeof *vcpu->assist + 63) & ~63ul);
    if (!vcpu->assist)
        return -ENOMEM;
    tv_assist_open(vcpu->assist, memory, vcpu->fd, xsave2, sync && watched);
    vcpu->sync = sync ? KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS : 0;
    vcpu->run->kvm_valid_regs = sync && watched ? vcpu->sync : 0;
    return 0;
}

/* The vCPU's thread, first; undone by tv_kicker_withdraw. */
void tv_vcpu_attach(struct tv_vcpu *vcpu)
{
    tv_kicker_publish(&vcpu->kicker, &vcpu->run->immediate_exit);
}

/* Before the thread starts. 0, or -ENOSPC. */
int tv_vcpu_hook(struct tv_vcpu *vcpu, uint16_t base, uint16_t len, tv_pio_fn fn, void *opaque)
{
    if (vcpu->hook_count == TV_MAX_PIO_HOOKS)
        return -ENOSPC;
    vcpu->hooks[vcpu->hook_count++] = (struct tv_pio_hook){base, len, fn, opaque};
    return 0;
}

/* 1 when the port exit in kvm_run needs no Python. */
static int serve_port(struct tv_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    uint32_t port = run->io.port;
    int is_out = run->io.direction == KVM_EXIT_IO_OUT;
    if (port == POST_PORT && is_out) {
        vcpu->post_codes += run->io.count;
        return 1;
    }
    uint8_t *data = (uint8_t *)run + run->io.data_offset;
    for (uint32_t i = 0; i < vcpu->hook_count; i++) {
        struct tv_pio_hook *hook = &vcpu->hooks[i];
        if (port >= hook->base && port - hook->base + run->io.size <= hook->len)
            return !hook->fn(hook->opaque, (uint16_t)(port - hook->base), run->io.size, is_out, data, run->io.count);
    }
    return 0;
}

/* 1 when an instruction that KVM could not emulate is done, or the guest has the exception that it raises. */
static int finished_it(struct tv_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    if (!vcpu->assist || run->internal.suberror != KVM_INTERNAL_ERROR_EMULATION || !tv_assist(vcpu->assist, run))
        return 0;
    run->kvm_valid_regs = vcpu->sync; /* there will be more: from now on the exits bring the registers */
    return 1;
}

/* 1 when the exit in kvm_run needs no Python. */
static int served(struct tv_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    switch (run->exit_reason) {
    case KVM_EXIT_INTR:
        return 1;
    case KVM_EXIT_IO:
        return serve_port(vcpu);
    case KVM_EXIT_INTERNAL_ERROR:
        return finished_it(vcpu);
    case KVM_EXIT_DEBUG:
        return vcpu->assist && tv_syscall_trap(vcpu->assist, run);
    case KVM_EXIT_X86_WRMSR:
        if (vcpu->assist)
            tv_syscall_msr(vcpu->assist, run);
        return !!vcpu->assist;
    }
    return 0;
}

/* KVM_RUN, with what the assist has to say before. 0, or -errno. */
static int enter(struct tv_vcpu *vcpu)
{
    struct tv_assist *assist = vcpu->assist;
    if (assist && assist->watched) {
        int problem = tv_syscall_watch(assist, vcpu->run);
        if (problem)
            return problem;
    }
    int result = ioctl(vcpu->fd, KVM_RUN, 0) < 0 ? -errno : 0;
    if (assist && vcpu->run->kvm_valid_regs)
        assist->stale = 0;
    return result;
}

/* What Python gets: every ioctl of its sees the registers as they are. */
static int leave(struct tv_vcpu *vcpu, int code)
{
    int problem = vcpu->assist ? tv_assist_flush(vcpu->assist, vcpu->run) : 0;
    return problem ? problem : code;
}

/* Run the guest until an exit that Python must handle: its KVM_EXIT_ number, TV_RUN_INTERRUPTED after a kick, or
 * -errno. With finish_only no further instruction is started: what the last one still asks for comes out as exits,
 * and then TV_RUN_INTERRUPTED. The vCPU's thread only.
 *
 * No kick is lost: a kick stores `kicked` and then immediate_exit; here immediate_exit is cleared and then `kicked`
 * is taken, all sequentially consistent, so a kick that the take misses leaves immediate_exit set for KVM_RUN. */
int tv_vcpu_run(struct tv_vcpu *vcpu, int finish_only)
{
    struct kvm_run *run = vcpu->run;
    for (;;) {
        __atomic_store_n(&run->immediate_exit, (uint8_t)!!finish_only, __ATOMIC_SEQ_CST);
        if (!finish_only && __atomic_exchange_n(&vcpu->kicker.kicked, 0, __ATOMIC_SEQ_CST))
            return leave(vcpu, TV_RUN_INTERRUPTED);
        int problem = enter(vcpu);
        if (problem) {
            /* EAGAIN: an application processor that was woken and looks for its start-up message */
            if (problem != -EINTR && problem != -EAGAIN)
                return problem;
            if (finish_only)
                return leave(vcpu, TV_RUN_INTERRUPTED);
            continue;
        }
        uint32_t reason = run->exit_reason;
        vcpu->exits++;
        vcpu->by_reason[reason < TV_EXIT_COUNTERS ? reason : TV_EXIT_COUNTERS - 1]++;
        if (served(vcpu))
            continue;
        vcpu->python_exits++;
        return leave(vcpu, (int)reason);
    }
}

/* into |= from. No other thread writes `into` meanwhile. */
void tv_bits_or(uint64_t *into, const uint64_t *from, uint64_t words)
{
    for (uint64_t i = 0; i < words; i++)
        into[i] |= from[i];
}
