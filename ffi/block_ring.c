#include "block.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "uring.h"

/* Requests of one queue that are under way at once, where each waits for the medium: reads that the page cache does not
 * have, and everything of an image that is open for direct I/O. What the page cache has is moved by the worker itself:
 * a system call a request costs less there than a request's way through the ring (benchmarks/disks.py). */

#define SLOTS 64
#define SEGMENTS 128             /* of one request; one with more is served in the thread */
#define FLYING_BYTES (8u << 20)  /* a stop waits for these */
#define OWN_RING 0               /* descriptor of the worker's own */
#define SUBMIT_AT 16             /* queued: the medium begins while the worker goes on */
#define PAUSE_NS 1000000         /* the kernel has no memory for the moment */

/* A request that is under way. Its memory is the guest's, checked; the chain it came in is gone. */
struct slot {
    struct iovec iov[SEGMENTS];
    uint64_t gpa[SEGMENTS];
    uint32_t segments;
    uint32_t length;
    uint8_t write;
    uint16_t head;
    uint32_t used; /* the length that is told */
    uint64_t at;   /* in the image */
    uint8_t *status;
    uint64_t status_gpa;
    uint64_t since_ns;
};

struct tv_block_ring {
    struct tv_uring uring;
    struct slot slots[SLOTS];
    uint8_t unused[SLOTS]; /* a stack of slots */
    uint32_t unused_count;
    uint64_t bytes; /* under way */
};

static uint32_t flying(const struct tv_block_ring *ring)
{
    return SLOTS - ring->unused_count;
}

/* The rest of a move that ended early, in the thread, as far as it goes: 0, or -1 with errno. */
static int finish(struct tv_block *block, struct slot *slot, uint64_t moved)
{
    struct tv_image *image = block->image;
    while (moved < slot->length) {
        struct iovec rest[SEGMENTS];
        uint64_t skip = moved;
        int count = 0;
        for (uint32_t i = 0; i < slot->segments; i++) {
            uint64_t size = slot->iov[i].iov_len, gone = skip < size ? skip : size;
            skip -= gone;
            if (gone < size)
                rest[count++] = (struct iovec){(uint8_t *)slot->iov[i].iov_base + gone, size - gone};
        }
        int64_t more = slot->write ? image->ops->write(image, rest, count, slot->at + moved)
                                   : image->ops->read(image, rest, count, slot->at + moved, 0);
        if (more < 0 && errno == EINTR)
            continue;
        if (more <= 0) {
            if (!more)
                errno = EIO;
            return -1;
        }
        moved += (uint64_t)more;
    }
    return 0;
}

static void answer(struct tv_block *block, struct slot *slot, int32_t result)
{
    struct tv_queue *queue = &block->worker.queues[0];
    int failed = 0;
    if (result == -EAGAIN || result == -EINTR)
        result = 0;
    else if (result == 0)
        result = -EIO; /* the image has shrunk under us */
    if (result < 0) {
        errno = -result;
        failed = 1;
    } else if ((uint32_t)result < slot->length) {
        failed = finish(block, slot, (uint32_t)result);
    }
    uint8_t status = TV_BLOCK_OK;
    if (failed) {
        status = (uint8_t)tv_block_fail(block, slot->write ? TV_BLOCK_WRITE : TV_BLOCK_READ);
        tv_block_add(&block->counts.errors, 1);
    } else {
        tv_block_count_flow(slot->write ? &block->counts.write : &block->counts.read, slot->length, slot->since_ns);
    }
    if (!slot->write)
        for (uint32_t i = 0; i < slot->segments; i++)
            tv_mark_dirty(queue->memory, slot->gpa[i], slot->iov[i].iov_len);
    *slot->status = status;
    tv_mark_dirty(queue->memory, slot->status_gpa, 1);
    tv_queue_push(queue, slot->head, failed && !slot->write ? 0 : slot->used);
}

/* Everything that is done. */
static void reap(struct tv_block *block)
{
    struct tv_block_ring *ring = block->ring;
    uint64_t tag;
    int32_t result;
    while (tv_uring_next(&ring->uring, &tag, &result)) {
        struct slot *slot = &ring->slots[tag];
        answer(block, slot, result);
        ring->bytes -= slot->length;
        ring->unused[ring->unused_count++] = (uint8_t)tag;
    }
}

/* Let the kernel have what is queued, wait until at least so many are done, and answer those that are. */
static void enter(struct tv_block *block, uint32_t wait_for)
{
    if (tv_uring_enter(&block->ring->uring, wait_for)) {
        struct timespec pause = {0, PAUSE_NS};
        nanosleep(&pause, NULL);
    }
    reap(block);
}

static int open_ring(struct tv_block *block)
{
    struct tv_block_ring *ring = malloc(sizeof *ring);
    if (!ring || tv_uring_open(&ring->uring, SLOTS)) {
        free(ring);
        block->no_ring = 1;
        return -1;
    }
    ring->bytes = 0;
    ring->unused_count = SLOTS;
    for (uint32_t i = 0; i < SLOTS; i++)
        ring->unused[i] = (uint8_t)i;
    block->ring = ring;
    tv_worker_watch(&block->worker, OWN_RING, ring->uring.fd, POLLIN);
    return 0;
}

/* The status byte is the last writable one. */
static void find_status(const struct tv_chain *chain, struct slot *slot)
{
    uint32_t last = chain->readable + chain->writable - 1;
    uint64_t size = chain->iov[last].iov_len;
    slot->status = (uint8_t *)chain->iov[last].iov_base + size - 1;
    slot->status_gpa = chain->gpa[last] + size - 1;
}

/* The segments of [offset, offset + length) of one side, with their addresses; 0 when there are too many. */
static int slice(const struct tv_chain *chain, int writable, uint64_t offset, uint64_t length, struct slot *slot)
{
    uint32_t first = writable ? chain->readable : 0, count = writable ? chain->writable : chain->readable;
    slot->segments = 0;
    for (uint32_t i = first; i < first + count && length; i++) {
        uint64_t size = chain->iov[i].iov_len;
        if (offset >= size) {
            offset -= size;
            continue;
        }
        if (slot->segments == SEGMENTS)
            return 0;
        uint64_t part = size - offset < length ? size - offset : length;
        slot->gpa[slot->segments] = chain->gpa[i] + offset;
        slot->iov[slot->segments++] = (struct iovec){(uint8_t *)chain->iov[i].iov_base + offset, part};
        length -= part;
        offset = 0;
    }
    return 1;
}

/* Begin a move of `length` bytes, at most TV_BLOCK_PIECE, between the chain's data and the image: 1, and it is answered
 * when it is done; 0 where that can't be, and nothing has happened. */
int tv_block_start(struct tv_block *block, const struct tv_chain *chain, int write, uint64_t at, uint64_t length)
{
    struct tv_image *image = block->image;
    if (block->no_ring || !image->ops->where || (!block->ring && open_ring(block)))
        return 0;
    struct tv_block_ring *ring = block->ring;
    while (!ring->unused_count || (ring->bytes && ring->bytes + length > FLYING_BYTES)) {
        if (tv_worker_stopping(&block->worker))
            return 0;
        tv_worker_publish(&block->worker);
        enter(block, 1);
    }
    uint32_t tag = ring->unused[ring->unused_count - 1];
    struct slot *slot = &ring->slots[tag];
    int fd;
    uint64_t offset;
    if (!slice(chain, !write, write ? chain->readable_bytes - length : 0, length, slot) ||
        !image->ops->where(image, slot->iov, (int)slot->segments, at, write, &fd, &offset))
        return 0;
    ring->unused_count--;
    ring->bytes += length;
    slot->length = (uint32_t)length;
    slot->used = !write ? (uint32_t)length + 1 : chain->writable_bytes == 1; /* no gap before the status */
    slot->write = (uint8_t)write;
    slot->head = chain->head;
    slot->at = at;
    slot->since_ns = block->worker.taken_ns;
    find_status(chain, slot);
    tv_uring_move(&ring->uring, write, fd, slot->iov, slot->segments, offset, tag);
    if (ring->uring.queued >= SUBMIT_AT)
        enter(block, 0);
    return 1;
}

/* The turn of a doorbell, or of the ring. */
void tv_block_ready(struct tv_worker *worker, uint32_t at)
{
    struct tv_block *block = (struct tv_block *)worker;
    if (at < worker->queue_count)
        tv_worker_serve(worker, at);
    if (block->ring && flying(block->ring)) {
        enter(block, 0);
        tv_worker_publish(worker);
    }
}

/* The worker's thread goes: what is under way is finished and told, however long the medium takes for it. */
void tv_block_leave(struct tv_worker *worker)
{
    struct tv_block *block = (struct tv_block *)worker;
    if (!block->ring)
        return;
    while (flying(block->ring))
        enter(block, 1);
    tv_worker_publish(worker);
    tv_worker_watch(worker, OWN_RING, -1, 0);
    tv_uring_close(&block->ring->uring);
    free(block->ring);
    block->ring = NULL;
}
