/* virtio-blk (virtio 1.2 section 5.2) over a raw file or block device. One worker a queue; I/O in its thread. */
#ifndef TV_BLOCK_H
#define TV_BLOCK_H
#include "ring.h"

/* One direction's requests that succeeded. Written by the worker alone, read by others while it runs, each field whole
 * but the fields not as one: see tv_block_count. Nanoseconds; `least_ns` is UINT64_MAX before the first one. */
struct tv_flow {
    uint64_t ops, bytes, total_ns, least_ns, most_ns;
};

struct tv_block_counts {
    struct tv_flow read, write;
    uint64_t flush_ops, errors;
};

struct tv_block {
    struct tv_worker worker;
    int fd;
    uint8_t readonly;
    uint8_t write_through; /* the driver did not take FLUSH: a write is on the medium before it is answered */
    uint64_t sectors;      /* capacity in 512-byte sectors */
    uint8_t id[20];
    struct tv_block_counts counts;
};

void tv_block_init(struct tv_block *block);
void tv_block_count(const struct tv_block *block, struct tv_block_counts *into);

#endif
