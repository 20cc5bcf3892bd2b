/* Reading: data in place, clusters that are compressed, and what comes from the backing file. */
#define _GNU_SOURCE
#include "qcow2_image.h"

#include <errno.h>
#include <stdlib.h>

/* `length` bytes of a file at `from`, into [offset, offset + length) of `iov`; zeros past its end. */
static int read_file(int fd, const struct iovec *iov, int count, uint64_t offset, uint64_t length, uint64_t from)
{
    struct iovec part[QCOW2_IOV];
    while (length) {
        int parts = qcow2_slice(iov, count, offset, length, part, QCOW2_IOV);
        ssize_t got = preadv(fd, part, parts, (off_t)from);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return -1;
        if (!got) {
            qcow2_zero_iov(iov, count, offset, length);
            return 0;
        }
        offset += (uint64_t)got;
        from += (uint64_t)got;
        length -= (uint64_t)got;
    }
    return 0;
}

/* What the images behind have there, and zeros past their end. */
static int read_backing(struct tv_qcow2 *image, const struct iovec *iov, int count, uint64_t offset, uint64_t length,
                        uint64_t at)
{
    uint64_t there = at < image->backing_size ? image->backing_size - at : 0;
    if (there > length)
        there = length;
    if (there < length)
        qcow2_zero_iov(iov, count, offset + there, length - there);
    if (!there)
        return 0;
    if (!image->backing)
        return read_file(image->backing_fd, iov, count, offset, there, at);
    struct iovec part[QCOW2_IOV];
    while (there) {
        int parts = qcow2_slice(iov, count, offset, there, part, QCOW2_IOV);
        int64_t got = qcow2_read_image(&image->backing->image, part, parts, at, 0);
        if (got < 0)
            return -1;
        offset += (uint64_t)got;
        at += (uint64_t)got;
        there -= (uint64_t)got;
    }
    return 0;
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

static int read_squeezed(struct tv_qcow2 *image, uint64_t entry, const struct iovec *iov, int count, uint64_t offset,
                         uint64_t length, uint64_t in)
{
    pthread_mutex_lock(&image->inflating);
    const uint8_t *bytes = inflated(image, entry);
    while (bytes && length) {
        struct iovec part[16];
        int parts = qcow2_slice(iov, count, offset, length, part, 16);
        for (int at = 0; at < parts; at++) {
            memcpy(part[at].iov_base, bytes + in, part[at].iov_len);
            in += part[at].iov_len;
            offset += part[at].iov_len;
            length -= part[at].iov_len;
        }
    }
    pthread_mutex_unlock(&image->inflating);
    return bytes ? 0 : -1;
}

/* Into [offset, offset + length) of `iov`, where `length` is at most the run's. */
static int read_run(struct tv_qcow2 *image, const struct qcow2_run *run, const struct iovec *iov, int count,
                    uint64_t offset, uint64_t length, uint64_t at)
{
    switch (run->kind) {
    case QCOW2_DATA:
        return read_file(image->fd, iov, count, offset, length, run->host);
    case QCOW2_SQUEEZED:
        return read_squeezed(image, run->entry, iov, count, offset, length, at & (image->cluster_size - 1));
    case QCOW2_HOLE:
        return read_backing(image, iov, count, offset, length, at);
    default:
        qcow2_zero_iov(iov, count, offset, length);
        return 0;
    }
}

/* All of it, with `map` held. */
static int read_all(struct tv_qcow2 *image, const struct iovec *iov, int count, uint64_t length, uint64_t at)
{
    for (uint64_t done = 0; done < length;) {
        struct qcow2_run run;
        if (qcow2_find(image, at + done, length - done, &run) ||
            read_run(image, &run, iov, count, done, run.length, at + done))
            return -1;
        done += run.length;
    }
    return 0;
}

int qcow2_read_here(struct tv_qcow2 *image, void *to, uint64_t length, uint64_t at)
{
    struct iovec iov = {.iov_base = to, .iov_len = length};
    return read_all(image, &iov, 1, length, at);
}

int64_t qcow2_read_image(struct tv_image *seam, const struct iovec *iov, int count, uint64_t at, int flags)
{
    struct tv_qcow2 *image = (struct tv_qcow2 *)seam;
    uint64_t length = 0;
    if (flags & TV_IMAGE_NOWAIT) {
        errno = EAGAIN;
        return -1;
    }
    for (int each = 0; each < count; each++)
        length += iov[each].iov_len;
    if (at > image->header.size || length > image->header.size - at || length > INT64_MAX) {
        errno = EINVAL;
        return -1;
    }
    pthread_rwlock_rdlock(&image->map);
    int result = read_all(image, iov, count, length, at);
    pthread_rwlock_unlock(&image->map);
    return result ? -1 : (int64_t)length;
}
