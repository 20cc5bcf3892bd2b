/* What a driver of the probe guest is to the rest of it. A driver is a file with a `struct driver`, and a line in
 * drivers.c; one that cycles its device (reset, activate, use, verify, again) is a `struct cycle` (cycle.c). */
#ifndef DRIVER_H
#define DRIVER_H
#include "virtio.h"

struct word {
    const char *name; /* with its "=" */
    uint32_t *value;
};

struct driver {
    const char *name;
    uint32_t wanted;                /* set by `cycle=` with its name, or by a word of its own; 0 again where it has no device */
    const struct word *words;       /* its own on the command line, the last one without a name; may be NULL */
    void (*find)(void);             /* CPU 0, once */
    void (*step)(void);             /* the CPU that drives devices, again and again: does one thing and returns */
    void (*disturb)(uint64_t now);  /* CPU 0, with race=: what another CPU may do to it; may be NULL */
    void (*report)(void);           /* " word=number"... into the report; may be NULL */
};

extern struct driver *const drivers[]; /* ends with NULL */

/* blk.c: a disk that has come to a slot; 1 it is one. Each is cycled by blk_step_plugged. */
int blk_plug(uint32_t slot);
void blk_step_plugged(void);
int blk_unplug(uint32_t slot); /* 1 it is at rest, and forgotten */
void blk_forget(uint32_t slot);

/* What a driver of its own kind counts; `cycle` adds all of its kind. */
struct device_counters {
    volatile uint64_t activations, ios, stuck, needs_reset, raced;
};

enum cycle_state { CYCLE_RESET, CYCLE_START, CYCLE_SUBMIT, CYCLE_WAIT };

/* A device that is cycled. `submit` offers one request; `check` looks at what came back of it, `length` bytes. */
struct cycle {
    struct vdev dev;
    struct vdev *asked; /* set by `submit`: the queue that has the request, where it is not the first */
    struct device_counters *counters;
    void (*submit)(struct cycle *cycle);
    void (*check)(struct cycle *cycle, uint32_t length);
    uint64_t features; /* of the device's own, to be negotiated beside the ring's */
    enum cycle_state state;
    uint32_t ios;
    uint64_t submitted;
    uint64_t rounds;
};

void cycle_step(struct cycle *cycle);
void describe(struct vdev *dev, uint32_t at, volatile void *address, uint32_t length, uint16_t flags);
uint64_t ring_features(void);
void device_error(const char *what, uint64_t which, uint64_t want, uint64_t got);
void put_absent(const char *name);
void report_counters(const char *name, const struct device_counters *counters);

extern volatile uint64_t device_errors, activations, requests_stuck, resets_needed, resets_raced; /* all cycles' */

#endif
