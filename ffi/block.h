/* virtio-blk (virtio 1.2 section 5.2) over a raw file or block device. One worker a queue; I/O in its thread. */
#ifndef TV_BLOCK_H
#define TV_BLOCK_H
#include "ring.h"

struct tv_block {
    struct tv_worker worker;
    int fd;
    uint8_t readonly;
    uint8_t write_through; /* the driver did not take FLUSH: a write is on the medium before it is answered */
    uint64_t sectors;      /* capacity in 512-byte sectors */
    uint8_t id[20];
    uint64_t read_ops, write_ops, flush_ops, read_bytes, write_bytes, errors;
};

void tv_block_init(struct tv_block *block);

#endif
