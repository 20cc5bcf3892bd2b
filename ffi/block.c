#include "block.h"

#include <errno.h>
#include <string.h>

#define SECTOR 512u
#define T_IN 0u
#define T_OUT 1u
#define T_FLUSH 4u
#define T_GET_ID 8u
#define S_OK 0
#define S_IOERR 1
#define S_UNSUPP 2
#define FAILED 1      /* beside TV_STOPPED */
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

static int sync_data(struct tv_block *block)
{
    int result;
    do
        result = block->image->ops->flush(block->image);
    while (result < 0 && errno == EINTR);
    return result;
}

/* `length` bytes at `sector`: whole sectors inside the capacity, no overflow. */
static int in_range(const struct tv_block *block, uint64_t sector, uint64_t length)
{
    return length % SECTOR == 0 && sector <= block->sectors && length / SECTOR <= block->sectors - sector;
}

/* --- what it counts: the worker is the only writer, so a plain sum is right and only the store must be whole ----- */

static uint64_t load(const uint64_t *at)
{
    return __atomic_load_n(at, __ATOMIC_RELAXED);
}

static void store(uint64_t *at, uint64_t value)
{
    __atomic_store_n(at, value, __ATOMIC_RELAXED);
}

static void add(uint64_t *at, uint64_t more)
{
    store(at, *at + more);
}

static void count_flow(struct tv_flow *flow, uint64_t bytes, uint64_t since_ns)
{
    uint64_t took = tv_now_ns() - since_ns;
    if (took < flow->least_ns)
        store(&flow->least_ns, took);
    if (took > flow->most_ns)
        store(&flow->most_ns, took);
    add(&flow->total_ns, took);
    add(&flow->bytes, bytes);
    add(&flow->ops, 1);
}

static void read_flow(const struct tv_flow *flow, struct tv_flow *into)
{
    into->ops = load(&flow->ops);
    into->bytes = load(&flow->bytes);
    into->total_ns = load(&flow->total_ns);
    into->least_ns = load(&flow->least_ns);
    into->most_ns = load(&flow->most_ns);
}

/* From any thread, while the worker runs or after it. A request that ends meanwhile may be in some fields only. */
void tv_block_count(const struct tv_block *block, struct tv_block_counts *into)
{
    read_flow(&block->counts.read, &into->read);
    read_flow(&block->counts.write, &into->write);
    into->flush_ops = load(&block->counts.flush_ops);
    into->errors = load(&block->counts.errors);
}

static int read_data(struct tv_block *block, struct tv_chain *chain, uint64_t sector, uint64_t room)
{
    if (!in_range(block, sector, room))
        return S_IOERR;
    if (room > FAST)
        tv_worker_publish(&block->worker);
    int failed = transfer(block, chain, 1, sector * SECTOR, 0, room);
    tv_chain_mark_written(block->worker.queues[0].memory, chain, room); /* one that ended early may have written some */
    if (failed)
        return failed == TV_STOPPED ? TV_STOPPED : S_IOERR;
    count_flow(&block->counts.read, room, block->worker.taken_ns);
    return S_OK;
}

static int write_data(struct tv_block *block, struct tv_chain *chain, uint64_t sector, uint64_t out)
{
    if (block->readonly || !in_range(block, sector, out))
        return S_IOERR;
    if (out > FAST || block->write_through)
        tv_worker_publish(&block->worker);
    int failed = transfer(block, chain, 0, sector * SECTOR, sizeof(struct header), out);
    if (failed == TV_STOPPED)
        return TV_STOPPED;
    if (failed || (block->write_through && sync_data(block)))
        return S_IOERR;
    count_flow(&block->counts.write, out, block->worker.taken_ns);
    return S_OK;
}

/* Gives the status, or TV_STOPPED; *written counts the data bytes put into the driver's buffers, from the first on. */
static int serve_request(struct tv_block *block, struct tv_chain *chain, const struct header *header, uint64_t room,
                         uint64_t *written)
{
    int status;
    switch (header->type) {
    case T_IN:
        status = read_data(block, chain, header->sector, room);
        *written = status == S_OK ? room : 0;
        return status;
    case T_OUT:
        return write_data(block, chain, header->sector, chain->readable_bytes - sizeof *header);
    case T_FLUSH:
        tv_worker_publish(&block->worker);
        add(&block->counts.flush_ops, 1);
        return sync_data(block) ? S_IOERR : S_OK;
    case T_GET_ID:
        *written = room < sizeof block->id ? room : sizeof block->id;
        tv_chain_write(block->worker.queues[0].memory, chain, 0, block->id, *written);
        return S_OK;
    default:
        return S_UNSUPP;
    }
}

static int64_t serve(struct tv_worker *worker, struct tv_queue *queue, struct tv_chain *chain)
{
    struct tv_block *block = (struct tv_block *)worker;
    struct header header;
    if (!chain->writable_bytes) {
        queue->broken = TV_BROKEN_REQUEST; /* no room for the status byte */
        return 0;
    }
    uint64_t room = chain->writable_bytes - 1, written = 0;
    int status = S_IOERR;
    if (tv_chain_read(chain, 0, &header, sizeof header) == sizeof header)
        status = serve_request(block, chain, &header, room, &written);
    if (status == TV_STOPPED)
        return TV_STOPPED;
    if (status != S_OK)
        add(&block->counts.errors, 1);
    uint8_t said = (uint8_t)status;
    tv_chain_write(queue->memory, chain, room, &said, 1);
    return (int64_t)(written == room ? room + 1 : written); /* no gap in it (virtio 1.2 section 2.7.8.2) */
}

void tv_block_init(struct tv_block *block)
{
    block->worker.serve = serve;
    block->counts.read.least_ns = block->counts.write.least_ns = UINT64_MAX;
}
