/* virtio-watchdog, Cloud Hypervisor's (no specification has it): a driver that lives offers a buffer again and again, and
 * gets it back with a 1 in it. Who looks when the last one came, and what is to become of a guest that has stopped, is
 * Python's (trivmm/virtio/watchdog). */
#ifndef TV_WATCHDOG_H
#define TV_WATCHDOG_H
#include "worker.h"

struct tv_watchdog {
    struct tv_worker worker;
    /* Atomic: any thread may read them. The time is stored first. */
    uint64_t last_ns; /* when the last ping was taken (tv_now_ns) */
    uint64_t pings;
    uint64_t errors;
};

void tv_watchdog_init(struct tv_watchdog *watchdog);

#endif
