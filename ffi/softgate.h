/* The gate of the soft CPU: asked before every emulated instruction whether to go on.
 *
 * Why it exists: stopping the unicorn engine from another thread, or from inside a memory or port callback, leaves
 * a read-modify-write instruction half done (its store made, its instruction pointer not advanced), so that it runs
 * twice. Only a stop asked for *between* two instructions is exact. The gate is that place.
 *
 * Invariants
 *  - `struct tv_soft_gate` is allocated by Python and outlives the engine that has tv_soft_gate_hook installed.
 *  - `request` and `code` may be set by any thread at any time and are cleared by the vCPU's thread only.
 *  - `budget`, `stopped` and `stop` belong to the vCPU's thread.
 */
#ifndef TV_SOFTGATE_H
#define TV_SOFTGATE_H
#include <stdint.h>

struct tv_soft_gate {
    int32_t request; /* non-zero: stop before the next instruction */
    int32_t code;    /* non-zero: guest memory that may hold code was written; translate it anew */
    int32_t stopped; /* set by the hook when it stopped the engine: tells a stop from a HLT */
    int64_t budget;  /* instructions left in this slice */
    int (*stop)(void *engine);
};

void tv_soft_gate_hook(void *engine, uint64_t address, uint32_t size, void *gate);
uint64_t tv_tsc(void);
uintptr_t tv_soft_gate_address(void);
void tv_soft_gate_init(struct tv_soft_gate *gate, uintptr_t stop);
void tv_soft_gate_ask(struct tv_soft_gate *gate);
void tv_soft_gate_clear(struct tv_soft_gate *gate);
void tv_soft_gate_code(void *gate);
int tv_soft_gate_take_code(struct tv_soft_gate *gate);

#endif
