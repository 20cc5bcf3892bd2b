#include "softgate.h"

#include <x86intrin.h>

/* The host's time stamp counter, which is the guest's as well: the engine's RDTSC reads it. Any thread. */
uint64_t tv_tsc(void)
{
    return __rdtsc();
}

/* Called by the engine before each instruction, on the vCPU's thread, without the GIL: touches no Python. */
void tv_soft_gate_hook(void *engine, uint64_t address, uint32_t size, void *opaque)
{
    struct tv_soft_gate *gate = opaque;
    (void)address;
    (void)size;
    if (__builtin_expect(__atomic_load_n(&gate->request, __ATOMIC_RELAXED) || --gate->budget < 0, 0)) {
        gate->stopped = 1;
        gate->stop(engine);
    }
}

/* The hook as a number, for a library that takes callbacks by address. */
uintptr_t tv_soft_gate_address(void)
{
    return (uintptr_t)tv_soft_gate_hook;
}

/* `stop` is the address of the engine's stop function; called on the vCPU's thread only. */
void tv_soft_gate_init(struct tv_soft_gate *gate, uintptr_t stop)
{
    gate->request = 0;
    gate->stopped = 0;
    gate->budget = 0;
    gate->stop = (int (*)(void *))stop;
}

/* Ask for a stop. Any thread, any time. */
void tv_soft_gate_ask(struct tv_soft_gate *gate)
{
    __atomic_store_n(&gate->request, 1, __ATOMIC_SEQ_CST);
}

/* The vCPU's thread only, before it looks at what was asked: a request that comes later sets it again. */
void tv_soft_gate_clear(struct tv_soft_gate *gate)
{
    __atomic_store_n(&gate->request, 0, __ATOMIC_SEQ_CST);
}
