/* Reading: data in place, clusters that are compressed, and what comes from the backing file. */
#define _GNU_SOURCE
#include "qcow2_image.h"

#include <errno.h>
#include <stdlib.h>

/* Reads give how many bytes they have put into [offset, offset + length) of `iov`: all, but with TV_IMAGE_NOWAIT, or -1
 * with errno. Here from a file at `from`; zeros past its end. */
static int64_t read_file(int fd, const struct iovec *iov, int count, uint64_t offset, uint64_t length, uint64_t from,
                         int flags)
{
    struct iovec part[QCOW2_IOV];
    int nowait = flags & TV_IMAGE_NOWAIT ? RWF_NOWAIT : 0;
    for (uint64_t done = 0; done < length;) {
        int parts = qcow2_slice(iov, count, offset + done, length - done, part, QCOW2_IOV);
        ssize_t got = preadv2(fd, part, parts, (off_t)(from + done), nowait);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return nowait && done ? (int64_t)done : -1;
        if (!got) {
            qcow2_zero_iov(iov, count, offset + done, length - done);
            break;
        }
        done += (uint64_t)got;
    }
    return (int64_t)length;
}

/* What the images behind have there, and zeros past their end. */
static int64_t read_backing(struct tv_qcow2 *image, const struct iovec *iov, int count, uint64_t offset,
                            uint64_t length, uint64_t at, int flags)
{
    uint64_t there = at < image->backing_size ? image->backing_size - at : 0, done = 0;
    if (there > length)
        there = length;
    while (image->backing && done < there) {
        struct iovec part[QCOW2_IOV];
        int parts = qcow2_slice(iov, count, offset + done, there - done, part, QCOW2_IOV);
        int64_t got = qcow2_read_image(&image->backing->image, part, parts, at + done, flags);
        if (got < 0)
            return done && flags & TV_IMAGE_NOWAIT ? (int64_t)done : -1;
        done += (uint64_t)got;
    }
    if (!image->backing && there) {
        int64_t got = read_file(image->backing_fd, iov, count, offset, there, at, flags);
        if (got < (int64_t)there)
            return got;
    }
    qcow2_zero_iov(iov, count, offset + there, length - there);
    return (int64_t)length;
}

/* A compressed cluster, whole, in a buffer that stays until the next call; `inflating` is held. NULL with errno. */
static const uint8_t *inflated(struct tv_qcow2 *image, uint64_t entry)
{
    uint32_t bits = image->header.cluster_bits, shift = 62 - (bits - 8);
    uint64_t from = entry & ((1ull << shift) - 1), sectors = (entry >> shift & ((1ull << (bits - 8)) - 1)) + 1;
    uint64_t length = 512 * sectors - (from & 511);
    uint64_t limit = QCOW2_INFLATED_BYTES / image->cluster_size;
    if (limit > QCOW2_INFLATED)
        limit = QCOW2_INFLATED;
    struct qcow2_inflated *slot = &image->inflated[0];
    for (uint64_t at = 0; at < limit; at++) {
        struct qcow2_inflated *each = &image->inflated[at];
        if (each->descriptor == entry) {
            each->used = ++image->inflated_clock;
            return each->bytes;
        }
        if (each->used < slot->used)
            slot = each;
    }
    if (from >= QCOW2_HOST_MAX || from >> bits >= image->end || from >> bits == 0) {
        qcow2_spoilt(image);
        return NULL;
    }
    if (!image->squeezed)
        image->squeezed = malloc(2 * (size_t)image->cluster_size + 512);
    if (!slot->bytes)
        slot->bytes = malloc(image->cluster_size);
    if (!image->squeezed || !slot->bytes)
        return NULL;
    slot->descriptor = 0;
    if (qcow2_read_all(image->fd, image->squeezed, length, from))
        return NULL;
    if (qcow2_inflate(image->header.compression, image->squeezed, length, slot->bytes, image->cluster_size)) {
        qcow2_spoilt(image);
        return NULL;
    }
    slot->descriptor = entry;
    slot->used = ++image->inflated_clock;
    qcow2_add(&image->counts.inflated, 1);
    return slot->bytes;
}

static int64_t read_squeezed(struct tv_qcow2 *image, uint64_t entry, const struct iovec *iov, int count,
                             uint64_t offset, uint64_t length, uint64_t in)
{
    pthread_mutex_lock(&image->inflating);
    const uint8_t *bytes = inflated(image, entry);
    for (uint64_t done = 0; bytes && done < length;) {
        struct iovec part[16];
        int parts = qcow2_slice(iov, count, offset + done, length - done, part, 16);
        for (int at = 0; at < parts; at++) {
            memcpy(part[at].iov_base, bytes + in + done, part[at].iov_len);
            done += part[at].iov_len;
        }
    }
    pthread_mutex_unlock(&image->inflating);
    return bytes ? (int64_t)length : -1;
}

/* Where `length` is at most the run's. */
static int64_t read_run(struct tv_qcow2 *image, const struct qcow2_run *run, const struct iovec *iov, int count,
                        uint64_t offset, uint64_t length, uint64_t at, int flags)
{
    switch (run->kind) {
    case QCOW2_DATA:
        return read_file(image->fd, iov, count, offset, length, run->host, flags);
    case QCOW2_SQUEEZED:
        if (!(flags & TV_IMAGE_NOWAIT))
            return read_squeezed(image, run->entry, iov, count, offset, length, at & (image->cluster_size - 1));
        errno = EAGAIN;
        return -1;
    case QCOW2_HOLE:
        return read_backing(image, iov, count, offset, length, at, flags);
    default:
        qcow2_zero_iov(iov, count, offset, length);
        return (int64_t)length;
    }
}

/* With `map` held. */
static int64_t read_all(struct tv_qcow2 *image, const struct iovec *iov, int count, uint64_t length, uint64_t at,
                        int flags)
{
    uint64_t done = 0;
    while (done < length) {
        struct qcow2_run run;
        int64_t got = qcow2_find(image, at + done, length - done, flags, &run);
        if (!got)
            got = read_run(image, &run, iov, count, done, run.length, at + done, flags);
        if (got < 0)
            return done && flags & TV_IMAGE_NOWAIT ? (int64_t)done : -1;
        done += (uint64_t)got;
        if ((uint64_t)got < run.length)
            break;
    }
    return (int64_t)done;
}

int qcow2_read_here(struct tv_qcow2 *image, void *to, uint64_t length, uint64_t at)
{
    struct iovec iov = {.iov_base = to, .iov_len = length};
    return read_all(image, &iov, 1, length, at, 0) < 0 ? -1 : 0;
}

int64_t qcow2_read_image(struct tv_image *seam, const struct iovec *iov, int count, uint64_t at, int flags)
{
    struct tv_qcow2 *image = (struct tv_qcow2 *)seam;
    uint64_t length = 0;
    for (int each = 0; each < count; each++)
        length += iov[each].iov_len;
    if (at > image->header.size || length > image->header.size - at || length > INT64_MAX) {
        errno = EINVAL;
        return -1;
    }
    errno = EAGAIN;
    if (!(flags & TV_IMAGE_NOWAIT))
        pthread_rwlock_rdlock(&image->map);
    else if (pthread_rwlock_tryrdlock(&image->map))
        return -1;
    int64_t result = read_all(image, iov, count, length, at, flags);
    pthread_rwlock_unlock(&image->map);
    return result;
}
