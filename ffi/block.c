#include "block.h"

#include <errno.h>
#include <string.h>

#define SECTOR TV_BLOCK_SECTOR
#define T_IN 0u
#define T_OUT 1u
#define T_FLUSH 4u
#define T_GET_ID 8u
#define T_DISCARD 11u
#define T_WRITE_ZEROES 13u
#define FAILED 1        /* beside TV_STOPPED */
#define FAST (1u << 16) /* bytes whose copying is no reason to publish what was served before */

struct header {
    uint32_t type;
    uint32_t reserved;
    uint64_t sector;
};

/* What is in the page cache is read while others wait to be published; a disk is not waited for with that. */
static int64_t read_piece(struct tv_block *block, const struct iovec *iov, int count, uint64_t at)
{
    struct tv_image *image = block->image;
    if (block->worker.queues[0].pushed) {
        int64_t moved = image->ops->read(image, iov, count, at, TV_IMAGE_NOWAIT);
        if (moved > 0)
            return moved;
        tv_worker_publish(&block->worker);
    }
    return image->ops->read(image, iov, count, at, 0);
}

/* Move [offset, offset + length) of the chain's data from or to the image. 0, TV_STOPPED with some of it moved, or
 * FAILED with errno. */
static int transfer(struct tv_block *block, struct tv_chain *chain, int in, uint64_t at, uint64_t offset,
                    uint64_t length)
{
    struct iovec iov[TV_QUEUE_MAX];
    struct tv_image *image = block->image;
    while (length) {
        if (tv_worker_stopping(&block->worker))
            return TV_STOPPED;
        uint64_t piece = length < TV_BLOCK_PIECE ? length : TV_BLOCK_PIECE;
        int count = (int)tv_chain_slice(chain, in, offset, piece, iov);
        int64_t moved = in ? read_piece(block, iov, count, at) : image->ops->write(image, iov, count, at);
        if (moved < 0 && errno == EINTR)
            continue;
        if (moved <= 0) {
            if (!moved)
                errno = EIO; /* the image has shrunk under us */
            return FAILED;
        }
        at += (uint64_t)moved;
        offset += (uint64_t)moved;
        length -= (uint64_t)moved;
    }
    return 0;
}

/* 0 or FAILED, with errno. */
int tv_block_sync(struct tv_block *block)
{
    int result;
    do
        result = block->image->ops->flush(block->image);
    while (result < 0 && errno == EINTR);
    return result ? FAILED : 0;
}

/* `length` bytes at `sector`: whole sectors inside the capacity, no overflow. */
int tv_block_in_range(const struct tv_block *block, uint64_t sector, uint64_t length)
{
    uint64_t sectors = __atomic_load_n(&block->sectors, __ATOMIC_RELAXED);
    return length % SECTOR == 0 && sector <= sectors && length / SECTOR <= sectors - sector;
}

/* Any thread. What is under way goes on as it was. */
void tv_block_set_sectors(struct tv_block *block, uint64_t sectors)
{
    __atomic_store_n(&block->sectors, sectors, __ATOMIC_RELAXED);
}

/* The whole of a read, if it can be had without waiting. */
static int read_at_once(struct tv_block *block, struct tv_chain *chain, uint64_t at, uint64_t room)
{
    struct iovec iov[TV_QUEUE_MAX];
    struct tv_image *image = block->image;
    int count = (int)tv_chain_slice(chain, 1, 0, room, iov);
    return image->ops->read(image, iov, count, at, TV_IMAGE_NOWAIT) == (int64_t)room;
}

static int read_data(struct tv_block *block, struct tv_chain *chain, uint64_t sector, uint64_t room)
{
    if (!tv_block_in_range(block, sector, room))
        return TV_BLOCK_IOERR;
    uint64_t at = sector * SECTOR;
    int done = 0, failed = 0;
    if (room && room <= TV_BLOCK_PIECE && !block->no_ring && block->image->ops->where) {
        done = !block->image->waits && room <= FAST && read_at_once(block, chain, at, room);
        if (!done && tv_block_start(block, chain, 0, at, room))
            return TV_TAKEN;
    }
    if (!done) {
        if (room > FAST)
            tv_worker_publish(&block->worker);
        failed = transfer(block, chain, 1, at, 0, room);
    }
    int error = errno;
    tv_chain_mark_written(block->worker.queues[0].memory, chain, room); /* one that ended early may have written some */
    errno = error;
    if (failed)
        return failed == TV_STOPPED ? TV_STOPPED : tv_block_fail(block, TV_BLOCK_READ);
    tv_block_count_flow(&block->counts.read, room, block->worker.taken_ns);
    return TV_BLOCK_OK;
}

static int write_data(struct tv_block *block, struct tv_chain *chain, uint64_t sector, uint64_t out)
{
    if (block->readonly || !tv_block_in_range(block, sector, out))
        return TV_BLOCK_IOERR;
    int write_through = !(block->features & TV_BLOCK_F_FLUSH);
    uint64_t at = sector * SECTOR;
    if (out && out <= TV_BLOCK_PIECE && !write_through && block->image->waits &&
        tv_block_start(block, chain, 1, at, out))
        return TV_TAKEN;
    if (out > FAST || write_through)
        tv_worker_publish(&block->worker);
    int failed = transfer(block, chain, 0, at, sizeof(struct header), out);
    if (failed == TV_STOPPED)
        return TV_STOPPED;
    if (failed || (write_through && tv_block_sync(block)))
        return tv_block_fail(block, TV_BLOCK_WRITE);
    tv_block_count_flow(&block->counts.write, out, block->worker.taken_ns);
    return TV_BLOCK_OK;
}

/* Section 5.2.5.2: what was answered before is on the medium afterwards; what is under way need not be. */
static int flush_data(struct tv_block *block)
{
    tv_worker_publish(&block->worker);
    if (tv_block_sync(block))
        return tv_block_fail(block, TV_BLOCK_FLUSH);
    tv_block_add(&block->counts.flush_ops, 1);
    return TV_BLOCK_OK;
}

/* Gives the status, TV_TAKEN or TV_STOPPED; *written counts the data bytes put into the driver's buffers, from the
 * first on. */
static int serve_request(struct tv_block *block, struct tv_chain *chain, const struct header *header, uint64_t room,
                         uint64_t *written)
{
    int status;
    switch (header->type) {
    case T_IN:
        status = read_data(block, chain, header->sector, room);
        *written = status == TV_BLOCK_OK ? room : 0;
        return status;
    case T_OUT:
        return write_data(block, chain, header->sector, chain->readable_bytes - sizeof *header);
    case T_FLUSH:
        return flush_data(block);
    case T_GET_ID:
        *written = room < sizeof block->id ? room : sizeof block->id;
        tv_chain_write(block->worker.queues[0].memory, chain, 0, block->id, *written);
        return TV_BLOCK_OK;
    case T_DISCARD:
    case T_WRITE_ZEROES:
        return tv_block_clear(block, chain, sizeof *header, header->type == T_WRITE_ZEROES);
    default:
        return TV_BLOCK_UNSUPP;
    }
}

/* 1: not before its turn comes, for which the worker wakes up. */
static int is_limited(struct tv_block *block, const struct header *header, uint64_t room, uint64_t out)
{
    if (!block->limiter)
        return 0;
    uint64_t bytes = header->type == T_IN ? room : header->type == T_OUT ? out : 0;
    uint64_t wait = tv_limiter_take(block->limiter, bytes, 1, tv_now_ns());
    if (!wait)
        return 0;
    tv_block_add(&block->counts.limited, 1);
    tv_worker_later(&block->worker, 0, wait);
    return 1;
}

static int64_t serve(struct tv_worker *worker, struct tv_queue *queue, struct tv_chain *chain)
{
    struct tv_block *block = (struct tv_block *)worker;
    struct header header;
    worker->taken_ns = tv_now_ns();
    if (!chain->writable_bytes) {
        queue->broken = TV_BROKEN_REQUEST; /* no room for the status byte */
        return 0;
    }
    uint64_t room = chain->writable_bytes - 1, written = 0;
    int status = TV_BLOCK_IOERR;
    if (tv_chain_read(chain, 0, &header, sizeof header) == sizeof header) {
        if (is_limited(block, &header, room, chain->readable_bytes - sizeof header))
            return TV_NOT_NOW;
        status = serve_request(block, chain, &header, room, &written);
    }
    if (status < 0)
        return status;
    if (status != TV_BLOCK_OK)
        tv_block_add(&block->counts.errors, 1);
    uint8_t said = (uint8_t)status;
    tv_chain_write(queue->memory, chain, room, &said, 1);
    return (int64_t)(written == room ? room + 1 : written); /* no gap in it (virtio 1.2 section 2.7.8.2) */
}

void tv_block_init(struct tv_block *block)
{
    block->worker.serve = serve;
    block->worker.on_ready = tv_block_ready;
    block->worker.on_leave = tv_block_leave;
    block->counts.read.least_ns = block->counts.write.least_ns = UINT64_MAX;
}
