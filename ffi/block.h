/* virtio-blk (virtio 1.2 section 5.2) over an image of any format (image.h). One worker a queue, for requests side by
 * side. A request is served in the worker's thread, in pieces: between two of them a stop is seen, and the request goes
 * back to be done as a whole by whoever serves the queue next. Doing it twice is harmless: the driver, which has not
 * heard of the first time, touches neither buffer nor sectors meanwhile. Where the medium has to be waited for, many
 * requests of a queue are under way at once instead (block_ring.c); these a worker finishes before it ends.
 *
 * block.c: requests and what is moved · block_clear.c: discard and write zeroes · block_ring.c: io_uring ·
 * block_counts.c: what is counted, and faults of the medium. */
#ifndef TV_BLOCK_H
#define TV_BLOCK_H
#include "image.h"
#include "limit.h"
#include "worker.h"

#define TV_BLOCK_SECTOR 512u
#define TV_BLOCK_PIECE (1u << 20) /* a fraction of device_stop even at a few MB/s; SIZE_MAX says it to the driver */
#define TV_BLOCK_CLEAR_SEGMENTS 32        /* ranges of one discard or write-zeroes */
#define TV_BLOCK_CLEAR_SECTORS (1u << 21) /* of one range: a request that is given back does not begin for ever anew */
#define TV_BLOCK_FAULTS 16                /* kinds of faults that are told apart */
#define TV_BLOCK_FAULT_NS 60000000000ull  /* one of the same kind is told again after this */

#define TV_BLOCK_F_FLUSH (1ull << 9)
#define TV_BLOCK_F_DISCARD (1ull << 13)
#define TV_BLOCK_F_WRITE_ZEROES (1ull << 14)

#define TV_BLOCK_OK 0 /* the status byte */
#define TV_BLOCK_IOERR 1
#define TV_BLOCK_UNSUPP 2

enum tv_block_op { TV_BLOCK_READ, TV_BLOCK_WRITE, TV_BLOCK_FLUSH, TV_BLOCK_DISCARD, TV_BLOCK_WRITE_ZEROES };

/* One direction's requests that succeeded. Written by the worker alone, read by others while it runs, each field whole
 * but the fields not as one: see tv_block_count. Nanoseconds; `least_ns` is UINT64_MAX before the first one. */
struct tv_flow {
    uint64_t ops, bytes, total_ns, least_ns, most_ns;
};

/* `errors`: requests answered with another status than OK. `io_errors`: of these, the image's fault. */
struct tv_block_counts {
    struct tv_flow read, write;
    uint64_t flush_ops, discard_ops, write_zeroes_ops, errors, io_errors, limited;
};

/* An image's error, of a kind that was not told lately. */
struct tv_block_fault {
    uint32_t op;
    int error;
    uint64_t at_ns;
    uint8_t fresh;
};

struct tv_block_ring;

struct tv_block {
    struct tv_worker worker;
    struct tv_image *image; /* all workers' of the disk */
    struct tv_limiter *limiter; /* likewise; NULL: none */
    uint64_t features;      /* negotiated */
    uint8_t readonly;
    uint8_t keeps_room;     /* write-zeroes never unmaps, whatever the driver says */
    uint8_t no_ring;        /* no io_uring, please; or there is none */
    uint64_t sectors;       /* capacity; atomic: a disk may be resized */
    uint8_t id[20];
    struct tv_block_counts counts;
    struct tv_block_fault faults[TV_BLOCK_FAULTS];
    uint32_t fault_count;
    struct tv_block_ring *ring; /* NULL: nothing has been under way yet */
};

void tv_block_init(struct tv_block *block);
void tv_block_count(const struct tv_block *block, struct tv_block_counts *into);
int tv_block_next_fault(struct tv_block *block, struct tv_block_fault *into);
void tv_block_set_sectors(struct tv_block *block, uint64_t sectors);

/* Among its files. */
int tv_block_in_range(const struct tv_block *block, uint64_t sector, uint64_t length);
int tv_block_sync(struct tv_block *block);
int tv_block_clear(struct tv_block *block, struct tv_chain *chain, uint64_t offset, int zeroes);
void tv_block_add(uint64_t *count, uint64_t more);
void tv_block_count_flow(struct tv_flow *flow, uint64_t bytes, uint64_t since_ns);
int tv_block_fail(struct tv_block *block, enum tv_block_op op);
int tv_block_start(struct tv_block *block, const struct tv_chain *chain, int write, uint64_t at, uint64_t length);
void tv_block_ready(struct tv_worker *worker, uint32_t at);
void tv_block_leave(struct tv_worker *worker);

#endif
