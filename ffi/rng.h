/* virtio-rng (virtio 1.2 section 5.4): fills what the driver offers from a source. */
#ifndef TV_RNG_H
#define TV_RNG_H
#include "worker.h"

struct tv_rng {
    struct tv_worker worker;
    int source_fd; /* O_NONBLOCK */
    uint64_t bytes;
    uint64_t errors;
};

void tv_rng_init(struct tv_rng *rng);

#endif
