#define _GNU_SOURCE
#include "raw.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define CLEAR_PIECE (64ull << 20) /* a medium that can't unmap is written with zeroes: a fraction of device_stop */

static const struct tv_raw *raw_of(const struct tv_image *image)
{
    return (const struct tv_raw *)image;
}

static int64_t read_at(struct tv_image *image, const struct iovec *iov, int count, uint64_t at, int flags)
{
    return preadv2(raw_of(image)->fd, iov, count, (off_t)at, flags & TV_IMAGE_NOWAIT ? RWF_NOWAIT : 0);
}

static int64_t write_at(struct tv_image *image, const struct iovec *iov, int count, uint64_t at)
{
    return pwritev2(raw_of(image)->fd, iov, count, (off_t)at, 0);
}

static int flush(struct tv_image *image)
{
    return fdatasync(raw_of(image)->fd);
}

/* Of a file or a block device alike: the kernel turns it into what the medium has. */
static int64_t clear(const struct tv_raw *raw, int mode, uint64_t at, uint64_t length)
{
    uint64_t piece = length < CLEAR_PIECE ? length : CLEAR_PIECE;
    return fallocate(raw->fd, mode, (off_t)at, (off_t)piece) ? -1 : (int64_t)piece;
}

static int is_unknown(int error)
{
    return error == EOPNOTSUPP || error == ENOSYS || error == ENOTTY || error == EINVAL || error == ENODEV;
}

/* Not every medium can: it stays a hint then. */
static int64_t discard(struct tv_image *image, uint64_t at, uint64_t length)
{
    const struct tv_raw *raw = raw_of(image);
    uint64_t piece = length < CLEAR_PIECE ? length : CLEAR_PIECE, range[2] = {at, piece};
    int64_t done = raw->block_device ? (ioctl(raw->fd, BLKDISCARD, range) ? -1 : (int64_t)piece)
                                     : clear(raw, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, length);
    return done < 0 && is_unknown(errno) ? (int64_t)length : done;
}

static int64_t write_plain_zeroes(const struct tv_raw *raw, uint64_t at, uint64_t length)
{
    static const uint8_t zeroes[1 << 16] __attribute__((aligned(4096)));
    struct iovec iov[16];
    int count = 0;
    for (; length && count < 16; count++) {
        uint64_t part = length < sizeof zeroes ? length : sizeof zeroes;
        iov[count] = (struct iovec){(void *)zeroes, part};
        length -= part;
    }
    return pwritev2(raw->fd, iov, count, (off_t)at, 0);
}

static int64_t write_zeroes(struct tv_image *image, uint64_t at, uint64_t length, int unmap)
{
    const struct tv_raw *raw = raw_of(image);
    int64_t done = -1;
    errno = EOPNOTSUPP;
    if (unmap)
        done = clear(raw, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, length);
    if (done < 0 && is_unknown(errno))
        done = clear(raw, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, at, length);
    if (done < 0 && is_unknown(errno)) /* tmpfs has no ZERO_RANGE */
        done = write_plain_zeroes(raw, at, length);
    return done;
}

static const struct tv_image_ops OPS = {read_at, write_at, flush, discard, write_zeroes};

void tv_raw_init(struct tv_raw *raw)
{
    raw->image.ops = &OPS;
}
