/* virtio-blk (virtio 1.2 section 5.2) over an image of any format (image.h). One worker a queue, for requests side by side;
 * I/O in its thread, in pieces: between two of them a stop is seen, and the request goes back to be done as a whole by
 * whoever serves the queue next. Reading twice is harmless, and so is writing the same bytes twice: the driver, which
 * has not heard of the first time, touches neither buffer nor sectors meanwhile. */
#ifndef TV_BLOCK_H
#define TV_BLOCK_H
#include "image.h"
#include "worker.h"

#define TV_BLOCK_PIECE (1u << 20) /* a fraction of device_stop even at a few MB/s; SIZE_MAX says it to the driver */

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
    struct tv_image *image; /* all workers' of the disk */
    uint8_t readonly;
    uint8_t write_through; /* the driver did not take FLUSH: a write is on the medium before it is answered */
    uint64_t sectors;      /* capacity in 512-byte sectors */
    uint8_t id[20];
    struct tv_block_counts counts;
};

void tv_block_init(struct tv_block *block);
void tv_block_count(const struct tv_block *block, struct tv_block_counts *into);

#endif
