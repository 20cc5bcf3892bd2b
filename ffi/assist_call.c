/* The instruction's bytes are the guest's, and some are no instruction: the CPU then raises an exception in our thread. The
 * kernel makes a signal of it, whose handler looks whether the thread is in such a call, with RIP in the page of the call;
 * then it notes the vector and goes on behind the instruction. Every other signal is left to who had it before. */
#define _GNU_SOURCE
#include "assist_call.h"

#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <ucontext.h>

_Static_assert(offsetof(struct tv_frame, flags) == 128 && offsetof(struct tv_frame, code) == 136, "the assembly knows them");

#define UNDEFINED 6
#define PROTECTION 13
#define SIMD_ERROR 19

/* void tv_assist_call(struct tv_frame *frame): all registers from the frame, the code, all registers into the frame. The
 * code is jumped to and ends with a jump to tv_assist_back; RSP stays ours, with the frame on top. */
__asm__(
    "    .text\n"
    "    .globl tv_assist_call, tv_assist_back\n"
    "    .hidden tv_assist_call, tv_assist_back\n"
    "    .type tv_assist_call, @function\n"
    "tv_assist_call:\n"
    "    push %rbx\n    push %rbp\n    push %r12\n    push %r13\n    push %r14\n    push %r15\n"
    "    push %rdi\n"
    "    mov 136(%rdi), %rax\n"
    "    mov %rax, -16(%rsp)\n" /* in the red zone, which signals leave alone */
    "    push 128(%rdi)\n"
    "    popfq\n"
    "    mov 0(%rdi), %rax\n    mov 8(%rdi), %rcx\n    mov 16(%rdi), %rdx\n    mov 24(%rdi), %rbx\n"
    "    mov 40(%rdi), %rbp\n    mov 48(%rdi), %rsi\n    mov 64(%rdi), %r8\n    mov 72(%rdi), %r9\n"
    "    mov 80(%rdi), %r10\n    mov 88(%rdi), %r11\n    mov 96(%rdi), %r12\n    mov 104(%rdi), %r13\n"
    "    mov 112(%rdi), %r14\n    mov 120(%rdi), %r15\n    mov 56(%rdi), %rdi\n"
    "    jmp *-16(%rsp)\n"
    "    .type tv_assist_back, @function\n"
    "tv_assist_back:\n"
    "    xchg %rdi, (%rsp)\n"
    "    mov %rax, 0(%rdi)\n    mov %rcx, 8(%rdi)\n    mov %rdx, 16(%rdi)\n    mov %rbx, 24(%rdi)\n"
    "    mov %rbp, 40(%rdi)\n    mov %rsi, 48(%rdi)\n    mov %r8, 64(%rdi)\n    mov %r9, 72(%rdi)\n"
    "    mov %r10, 80(%rdi)\n    mov %r11, 88(%rdi)\n    mov %r12, 96(%rdi)\n    mov %r13, 104(%rdi)\n"
    "    mov %r14, 112(%rdi)\n    mov %r15, 120(%rdi)\n"
    "    pushfq\n    pop 128(%rdi)\n"
    "    pop 56(%rdi)\n" /* what XCHG has left: the guest's RDI */
    "    cld\n"
    "    pop %r15\n    pop %r14\n    pop %r13\n    pop %r12\n    pop %rbp\n    pop %rbx\n"
    "    ret\n"
    "    .size tv_assist_call, . - tv_assist_call\n");


void tv_assist_call(struct tv_frame *frame);

static const struct {
    int signal;
    uint32_t vector;
} TRAPS[] = {{SIGILL, UNDEFINED}, {SIGSEGV, PROTECTION}, {SIGFPE, SIMD_ERROR}};

#define TRAP_COUNT (sizeof TRAPS / sizeof TRAPS[0])

static struct sigaction before[TRAP_COUNT];
static __thread struct tv_frame *volatile current __attribute__((tls_model("initial-exec")));

static void on_trap(int signal, siginfo_t *info, void *context)
{
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    struct tv_frame *frame = current;
    unsigned at = 0;
    while (at + 1 < TRAP_COUNT && TRAPS[at].signal != signal)
        at++;
    if (frame && (uint64_t)registers[REG_RIP] - frame->code < TV_CODE_BYTES) {
        frame->trapped = TRAPS[at].vector;
        registers[REG_RIP] = (greg_t)tv_assist_back;
        return;
    }
    if (before[at].sa_flags & SA_SIGINFO)
        before[at].sa_sigaction(signal, info, context);
    else if (before[at].sa_handler != SIG_DFL && before[at].sa_handler != SIG_IGN)
        before[at].sa_handler(signal);
    else
        sigaction(signal, &before[at], NULL); /* it comes again, and ends the process as it would have */
}

static void install(void)
{
    struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    sigemptyset(&action.sa_mask);
    for (unsigned at = 0; at < TRAP_COUNT; at++)
        sigaction(TRAPS[at].signal, &action, &before[at]);
}

/* Once a process, before the first call. Any thread. */
void tv_assist_guard(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, install);
}

/* Blocked, such a signal would end the process. Once a thread. */
static void unblock(void)
{
    static __thread int done;
    sigset_t traps;
    if (done)
        return;
    done = 1;
    sigemptyset(&traps);
    for (unsigned at = 0; at < TRAP_COUNT; at++)
        sigaddset(&traps, TRAPS[at].signal);
    pthread_sigmask(SIG_UNBLOCK, &traps, NULL);
}

void tv_assist_guarded(struct tv_frame *frame)
{
    unblock();
    current = frame;
    tv_assist_call(frame);
    current = NULL;
}
