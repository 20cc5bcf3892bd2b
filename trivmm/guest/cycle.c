/* Cycling a device: reset, activate, use, verify, and again, without rest and without ever blocking the caller.
 *
 * Each device is a small state machine that one CPU steps; a step does one thing and returns. A completion counts
 * only when its interrupt came. What does not complete in STUCK_SECONDS is reported and counted, with whether the
 * used ring had it (a lost interrupt) or not (a lost request). */
#include "driver.h"

#define IOS_A_CYCLE 2

volatile uint64_t device_errors, activations, requests_stuck, resets_needed, resets_raced;

uint64_t ring_features(void)
{
    return VERSION_1 | (options.event_idx ? EVENT_IDX : 0) | (options.indirect ? INDIRECT : 0);
}

void device_error(const char *what, uint64_t which, uint64_t want, uint64_t got)
{
    __atomic_fetch_add(&device_errors, 1, __ATOMIC_SEQ_CST);
    note_problem(what, which, want, got);
}

void put_absent(const char *name)
{
    put("PROBE absent dev=");
    put(name);
    put_line();
}

void report_counters(const char *name, const struct device_counters *counters)
{
    put(" ");
    put(name);
    put_number("_act=", counters->activations);
    put(" ");
    put(name);
    put_number("_ios=", counters->ios);
}

void describe(struct vdev *dev, uint32_t at, volatile void *address, uint32_t length, uint16_t flags)
{
    dev->rings->desc[at] = (struct desc){(uint64_t)address, length, flags, 0};
}

/* The queue that has the request. */
static struct vdev *asked(struct cycle *cycle)
{
    return cycle->asked ? cycle->asked : &cycle->dev;
}

static void stuck(struct cycle *cycle, const char *what)
{
    struct vdev *dev = asked(cycle);
    cycle->counters->stuck++;
    requests_stuck++;
    note_problem(what, dev->slot, irq_count[dev->vector + 1] - dev->irq_seen, dev->rings->used.index - dev->next_used);
    cycle->state = CYCLE_RESET;
}

/* Another CPU's reset, or a refusal. */
static void raced(struct cycle *cycle)
{
    cycle->counters->raced++;
    resets_raced++;
    cycle->state = CYCLE_RESET;
}

static void look_why_it_waits(struct cycle *cycle)
{
    uint32_t status = common_read(&cycle->dev, 0x14, 1);
    if (status & NEEDS_RESET) {
        cycle->counters->needs_reset++;
        resets_needed++;
        note_problem("NEEDS_RESET slot", cycle->dev.slot, 0, status);
        cycle->state = CYCLE_RESET;
    } else if (!(status & DRIVER_OK)) {
        raced(cycle);
    } else if (rdtsc() - cycle->submitted > milliseconds(1000ull * STUCK_SECONDS)) {
        stuck(cycle, "STUCK request, slot");
    }
}

void cycle_step(struct cycle *cycle)
{
    struct vdev *dev = &cycle->dev;
    uint32_t length;
    switch (cycle->state) {
    case CYCLE_RESET:
        cycle->rounds++;
        dev->through_window = options.window && cycle->rounds % 2 && dev->window_cap;
        if (!vdev_reset(dev)) {
            stuck(cycle, "STUCK reset, slot");
            return;
        }
        cycle->state = CYCLE_START;
        return;
    case CYCLE_START:
        if (!vdev_start(dev, ring_features() | cycle->features)) {
            raced(cycle);
            return;
        }
        cycle->counters->activations++;
        activations++;
        cycle->ios = 0;
        cycle->state = CYCLE_SUBMIT;
        return;
    case CYCLE_SUBMIT:
        cycle->submit(cycle);
        cycle->submitted = rdtsc();
        cycle->state = CYCLE_WAIT;
        return;
    case CYCLE_WAIT:
        if (vdev_finished(asked(cycle), &length)) {
            cycle->check(cycle, length);
            cycle->counters->ios++;
            cycle->state = ++cycle->ios < IOS_A_CYCLE ? CYCLE_SUBMIT : CYCLE_RESET;
        } else if (rdtsc() - cycle->submitted >= milliseconds(5)) {
            look_why_it_waits(cycle);
        }
    }
}
