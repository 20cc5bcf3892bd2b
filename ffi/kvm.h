/* KVM: ioctls with EINTR retried, and the vCPU run loop that keeps what needs no Python away from Python.
 *
 * Invariants
 *  - A struct tv_vcpu is run by one thread at a time; only the kicker inside is for everybody.
 *  - `run` is mapped from open to close. Hooks are added before the thread starts; what they call outlives it.
 *  - tv_vcpu_run runs without the GIL (cffi releases it) and calls no Python.
 *  - The counters are written by the vCPU's thread alone; other threads may read values that are a little old.
 */
#ifndef TV_KVM_H
#define TV_KVM_H
#include <linux/kvm.h>
#include <stdint.h>

#include "assist.h"
#include "park.h"

#define TV_MAX_PIO_HOOKS 8   /* serial is one; a scan of eight costs nothing beside an exit */
#define TV_EXIT_COUNTERS 64  /* KVM_EXIT_ reasons known today end at 40; higher ones share the last counter */
#define TV_RUN_INTERRUPTED 1000

/* A port range served in C. Return 0: done, `data` holds the answer of a read; anything else: Python handles the
 * whole access. `data` is `count` elements of `size` bytes: a string instruction has many. Any vCPU's thread. */
typedef int (*tv_pio_fn)(void *opaque, uint16_t offset, uint8_t size, int is_out, uint8_t *data, uint32_t count);

struct tv_pio_hook {
    uint16_t base;
    uint16_t len;
    tv_pio_fn fn;
    void *opaque;
};

struct tv_vcpu {
    int fd;
    uint32_t run_size;
    struct kvm_run *run;
    uint64_t exits;
    uint64_t python_exits;
    uint64_t post_codes;
    uint64_t by_reason[TV_EXIT_COUNTERS];
    uint32_t hook_count;
    struct tv_pio_hook hooks[TV_MAX_PIO_HOOKS];
    struct tv_kicker kicker;
    uint64_t sync;            /* kvm_run may hold the registers */
    struct tv_assist *assist; /* NULL: what KVM can't emulate ends the vCPU */
};

int tv_ioctl(int fd, unsigned long request, void *argument);
int tv_vcpu_open(struct tv_vcpu *vcpu, int vm_fd, unsigned long index, uint32_t run_size);
void tv_vcpu_close(struct tv_vcpu *vcpu);
void tv_vcpu_attach(struct tv_vcpu *vcpu);
int tv_vcpu_assist(struct tv_vcpu *vcpu, struct tv_memory *memory, int xsave2, int sync, int watched);
int tv_vcpu_hook(struct tv_vcpu *vcpu, uint16_t base, uint16_t len, tv_pio_fn fn, void *opaque);
int tv_vcpu_run(struct tv_vcpu *vcpu, int finish_only);
void tv_bits_or(uint64_t *into, const uint64_t *from, uint64_t words);

#endif
