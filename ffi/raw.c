#define _GNU_SOURCE
#include "raw.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SECTOR 512u
#define CLEAR_PIECE (64ull << 20) /* a medium that can't unmap is written with zeroes: a fraction of device_stop */

static struct tv_raw *raw_of(struct tv_image *image)
{
    return (struct tv_raw *)image;
}

/* --- direct I/O: alignment --------------------------------------------------------------------------------------- */

static uint64_t length_of(const struct iovec *iov, int count)
{
    uint64_t length = 0;
    for (int i = 0; i < count; i++)
        length += iov[i].iov_len;
    return length;
}

/* Whole blocks of the medium are meant. */
static int has_whole_blocks(const struct tv_raw *raw, const struct iovec *iov, int count, uint64_t at)
{
    return !((at | length_of(iov, count)) & (raw->block_align - 1));
}

/* Segments that are not aligned in memory, or that end within a block, can't be moved in place. */
static int is_aligned(const struct tv_raw *raw, const struct iovec *iov, int count)
{
    uint64_t bases = 0, lengths = 0;
    for (int i = 0; i < count; i++) {
        bases |= (uint64_t)(uintptr_t)iov[i].iov_base;
        lengths |= iov[i].iov_len;
    }
    return !((bases | lengths) & (raw->memory_align - 1)) && !(lengths & (raw->block_align - 1));
}

static void copy(const struct iovec *iov, int count, uint8_t *flat, uint64_t length, int gather)
{
    for (int i = 0; i < count && length; i++) {
        uint64_t part = iov[i].iov_len < length ? iov[i].iov_len : length;
        if (gather)
            memcpy(flat, iov[i].iov_base, part);
        else
            memcpy(iov[i].iov_base, flat, part);
        flat += part;
        length -= part;
    }
}

/* Whole blocks, by an aligned buffer. At most TV_BLOCK_PIECE, as every move. */
static int64_t bounce(const struct tv_raw *raw, const struct iovec *iov, int count, uint64_t at, int write)
{
    uint64_t length = length_of(iov, count), align = raw->memory_align;
    void *flat;
    if (posix_memalign(&flat, align < raw->block_align ? raw->block_align : align, length)) {
        errno = ENOMEM;
        return -1;
    }
    if (write)
        copy(iov, count, flat, length, 1);
    int64_t moved = write ? pwrite(raw->direct_fd, flat, length, (off_t)at)
                          : pread(raw->direct_fd, flat, length, (off_t)at);
    int error = errno;
    if (!write && moved > 0)
        copy(iov, count, flat, (uint64_t)moved, 0);
    free(flat);
    errno = error;
    return moved;
}

static int64_t direct(const struct tv_raw *raw, const struct iovec *iov, int count, uint64_t at, int write)
{
    if (!is_aligned(raw, iov, count))
        return bounce(raw, iov, count, at, write);
    return write ? pwritev(raw->direct_fd, iov, count, (off_t)at) : preadv(raw->direct_fd, iov, count, (off_t)at);
}

static int64_t direct_write(struct tv_raw *raw, const struct iovec *iov, int count, uint64_t at)
{
    int whole = has_whole_blocks(raw, iov, count, at), guarded = raw->block_align > SECTOR;
    if (guarded && whole)
        pthread_rwlock_rdlock(&raw->blocks);
    else if (guarded)
        pthread_rwlock_wrlock(&raw->blocks);
    int64_t moved = whole ? direct(raw, iov, count, at, 1) : pwritev(raw->fd, iov, count, (off_t)at);
    int error = errno;
    if (guarded)
        pthread_rwlock_unlock(&raw->blocks);
    errno = error;
    return moved;
}

/* STATX_DIOALIGN (Linux 6.1), which headers may not have: struct statx from its stx_dio_mem_align on. 0, or -1 where the
 * kernel does not say. */
int tv_raw_alignment(int fd, uint32_t *memory, uint32_t *block)
{
    struct {
        uint32_t mask, words[63];
    } about = {0};
    const uint32_t dioalign = 0x2000;
    if (syscall(__NR_statx, fd, "", AT_EMPTY_PATH, dioalign, &about) || !(about.mask & dioalign))
        return -1;
    *memory = about.words[37]; /* at 0x98 */
    *block = about.words[38];
    return 0;
}

/* --- the operations ---------------------------------------------------------------------------------------------- */

static int64_t read_at(struct tv_image *image, const struct iovec *iov, int count, uint64_t at, int flags)
{
    const struct tv_raw *raw = raw_of(image);
    if (raw->direct_fd >= 0 && flags & TV_IMAGE_NOWAIT) {
        errno = EAGAIN;
        return -1;
    }
    if (raw->direct_fd >= 0 && has_whole_blocks(raw, iov, count, at))
        return direct(raw, iov, count, at, 0);
    return preadv2(raw->fd, iov, count, (off_t)at, flags & TV_IMAGE_NOWAIT && !raw->in_memory ? RWF_NOWAIT : 0);
}

static int64_t write_at(struct tv_image *image, const struct iovec *iov, int count, uint64_t at)
{
    struct tv_raw *raw = raw_of(image);
    return raw->direct_fd >= 0 ? direct_write(raw, iov, count, at) : pwritev(raw->fd, iov, count, (off_t)at);
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
    static const uint8_t zeroes[1 << 16];
    struct iovec iov[16];
    int count = 0;
    for (; length && count < 16; count++) {
        uint64_t part = length < sizeof zeroes ? length : sizeof zeroes;
        iov[count] = (struct iovec){(void *)zeroes, part};
        length -= part;
    }
    return pwritev(raw->fd, iov, count, (off_t)at);
}

static int64_t zero(const struct tv_raw *raw, uint64_t at, uint64_t length, int unmap)
{
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

static int64_t write_zeroes(struct tv_image *image, uint64_t at, uint64_t length, int unmap)
{
    struct tv_raw *raw = raw_of(image);
    int guarded = raw->direct_fd >= 0 && raw->block_align > SECTOR;
    if (guarded)
        pthread_rwlock_wrlock(&raw->blocks);
    int64_t done = zero(raw, at, length, unmap);
    int error = errno;
    if (guarded)
        pthread_rwlock_unlock(&raw->blocks);
    errno = error;
    return done;
}

static int where(struct tv_image *image, const struct iovec *iov, int count, uint64_t at, int write, int *fd,
                 uint64_t *offset)
{
    const struct tv_raw *raw = raw_of(image);
    *offset = at;
    *fd = raw->fd;
    if (raw->direct_fd < 0)
        return 1;
    *fd = raw->direct_fd;
    if (write && raw->block_align > SECTOR)
        return 0; /* `blocks` can't be held as long */
    return has_whole_blocks(raw, iov, count, at) && is_aligned(raw, iov, count);
}

static const struct tv_image_ops OPS = {read_at, write_at, flush, discard, write_zeroes, where};
static const struct tv_image_ops IN_MEMORY = {read_at, write_at, flush, discard, write_zeroes, NULL};

/* All other fields are set. */
void tv_raw_init(struct tv_raw *raw)
{
    raw->image.ops = raw->in_memory && raw->direct_fd < 0 ? &IN_MEMORY : &OPS;
    raw->image.waits = raw->direct_fd >= 0;
    pthread_rwlock_init(&raw->blocks, NULL);
}
