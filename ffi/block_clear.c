#include "block.h"

#include <errno.h>

#define UNMAP 1u

/* virtio 1.2 section 5.2.6: struct virtio_blk_discard_write_zeroes */
struct range {
    uint64_t sector;
    uint32_t sectors;
    uint32_t flags;
};

/* 0, TV_STOPPED with some of it done, or the status of an error. */
static int clear(struct tv_block *block, const struct range *range, int zeroes)
{
    struct tv_image *image = block->image;
    uint64_t at = range->sector * TV_BLOCK_SECTOR, left = (uint64_t)range->sectors * TV_BLOCK_SECTOR;
    int unmap = range->flags & UNMAP && !block->keeps_room;
    while (left) {
        if (tv_worker_stopping(&block->worker))
            return TV_STOPPED;
        int64_t done = zeroes ? image->ops->write_zeroes(image, at, left, unmap) : image->ops->discard(image, at, left);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0) {
            if (!done)
                errno = EIO;
            return tv_block_fail(block, zeroes ? TV_BLOCK_WRITE_ZEROES : TV_BLOCK_DISCARD);
        }
        at += (uint64_t)done;
        left -= (uint64_t)done;
    }
    return TV_BLOCK_OK;
}

/* Section 5.2.6.2: the flags that a device MUST not take, then what is no range of this disk. */
static int check(const struct tv_block *block, const struct range *range, int zeroes)
{
    if (range->flags & ~UNMAP || (range->flags & UNMAP && !zeroes))
        return TV_BLOCK_UNSUPP;
    if (range->sectors > TV_BLOCK_CLEAR_SECTORS)
        return TV_BLOCK_IOERR;
    return tv_block_in_range(block, range->sector, (uint64_t)range->sectors * TV_BLOCK_SECTOR) ? TV_BLOCK_OK
                                                                                                : TV_BLOCK_IOERR;
}

/* The ranges of a discard (or write-zeroes), which are the readable bytes from `offset` on. Nothing is done before all
 * of them are good. Gives the status, or TV_STOPPED. */
int tv_block_clear(struct tv_block *block, struct tv_chain *chain, uint64_t offset, int zeroes)
{
    struct range ranges[TV_BLOCK_CLEAR_SEGMENTS];
    uint64_t bytes = chain->readable_bytes - offset;
    if (!(block->features & (zeroes ? TV_BLOCK_F_WRITE_ZEROES : TV_BLOCK_F_DISCARD)))
        return TV_BLOCK_UNSUPP;
    if (block->readonly || !bytes || bytes % sizeof *ranges || bytes > sizeof ranges)
        return TV_BLOCK_IOERR;
    tv_chain_read(chain, offset, ranges, bytes);
    uint64_t count = bytes / sizeof *ranges;
    for (uint64_t i = 0; i < count; i++) {
        int wrong = check(block, &ranges[i], zeroes);
        if (wrong)
            return wrong;
    }
    tv_worker_publish(&block->worker);
    for (uint64_t i = 0; i < count; i++) {
        int status = clear(block, &ranges[i], zeroes);
        if (status)
            return status;
    }
    if (zeroes && !(block->features & TV_BLOCK_F_FLUSH) && tv_block_sync(block))
        return tv_block_fail(block, TV_BLOCK_WRITE_ZEROES); /* a write like others, and written through like them */
    tv_block_add(zeroes ? &block->counts.write_zeroes_ops : &block->counts.discard_ops, 1);
    return TV_BLOCK_OK;
}
