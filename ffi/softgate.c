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
    gate->request = gate->code = 0;
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

/* Memory that may hold code was written, and the guest has not been told of it yet. Any thread, any time. The order
 * makes it exact: the guest learns of the write by reading memory, and before its next instruction the gate stops. A
 * tv_memory_hook of guest memory. */
void tv_soft_gate_code(void *opaque)
{
    struct tv_soft_gate *gate = opaque;
    __atomic_store_n(&gate->code, 1, __ATOMIC_SEQ_CST);
    tv_soft_gate_ask(gate);
}

/* Whether code is to be translated anew. The vCPU's thread only, after tv_soft_gate_clear. */
int tv_soft_gate_take_code(struct tv_soft_gate *gate)
{
    return __atomic_exchange_n(&gate->code, 0, __ATOMIC_SEQ_CST);
}
