/* Discard and write-zeroes: whole clusters lose their place in the file, or say that they read as zeros; parts of a
 * cluster are written. */
#include "qcow2_image.h"

#include <errno.h>

#define STEP QCOW2_RUN_MAX /* clusters between two looks at what else wants the lock */
#define PIECE (64ull << 20) /* of a request in one call; a multiple of every cluster's size */

static uint8_t nothing[64 << 10]; /* zeros to write */

/* The entry a cluster gets. `keep`: its place in the file is to be kept. */
static uint64_t emptied(const struct tv_qcow2 *image, uint64_t entry, enum qcow2_kind kind, uint64_t at, int keep)
{
    int ours = entry & QCOW2_COPIED && entry & QCOW2_OFFSET && kind != QCOW2_SQUEEZED;
    if (image->header.version < 3)
        return 0;
    if (keep && ours)
        return (entry & QCOW2_OFFSET) | QCOW2_COPIED | QCOW2_ZERO;
    return at < image->backing_size ? QCOW2_ZERO : 0;
}

/* At most STEP whole clusters from `at` on: *done bytes. `map` is held for writing. */
static int step(struct tv_qcow2 *image, uint64_t at, uint64_t length, int keep, uint64_t *done)
{
    uint32_t bits = image->header.cluster_bits;
    uint64_t index = at >> bits & ((1ull << image->l2_bits) - 1), count = length >> bits;
    uint64_t l1_index = at >> (bits + image->l2_bits);
    if (count > (1ull << image->l2_bits) - index)
        count = (1ull << image->l2_bits) - index;
    if (l1_index >= image->header.l1_size)
        return qcow2_spoilt(image);
    if (!(image->l1[l1_index] & QCOW2_OFFSET) && at >= image->backing_size) {
        *done = count << bits; /* all of it reads as zeros */
        return 0;
    }
    if (count > STEP)
        count = STEP;
    struct qcow2_table *table;
    if (qcow2_l2_for_write(image, at, &table))
        return -1;
    uint64_t made[STEP];
    for (uint64_t each = 0; each < count; each++) {
        enum qcow2_kind kind;
        made[each] = qcow2_get64(table->bytes + 8 * (index + each));
        if (qcow2_classify(image, made[each], &kind))
            return -1;
        if (kind != QCOW2_ZEROS || (!keep && made[each] & QCOW2_OFFSET))
            made[each] = emptied(image, made[each], kind, at + (each << bits), keep);
    }
    *done = count << bits;
    return qcow2_replace(image, table, index, made, count);
}

static int whole_clusters(struct tv_qcow2 *image, uint64_t at, uint64_t length, int keep)
{
    while (length) {
        uint64_t done = 0;
        pthread_rwlock_wrlock(&image->map);
        int failed = qcow2_begin(image) || step(image, at, length, keep, &done);
        pthread_rwlock_unlock(&image->map);
        if (failed)
            return -1;
        at += done;
        length -= done;
    }
    return 0;
}

/* Where it does not read as zeros already. */
static int write_zeros(struct tv_qcow2 *image, uint64_t at, uint64_t length)
{
    while (length) {
        struct qcow2_run run;
        pthread_rwlock_rdlock(&image->map);
        int failed = qcow2_find(image, at, length, 0, &run);
        pthread_rwlock_unlock(&image->map);
        if (failed)
            return -1;
        uint64_t span = run.length;
        if (run.kind != QCOW2_ZEROS && !(run.kind == QCOW2_HOLE && at >= image->backing_size)) {
            struct iovec iov[16];
            int count = 0;
            for (uint64_t left = span; left && count < 16; count++) {
                iov[count].iov_base = nothing;
                iov[count].iov_len = left < sizeof nothing ? left : sizeof nothing;
                left -= iov[count].iov_len;
            }
            int64_t put = qcow2_write_image(&image->image, iov, count, at);
            if (put < 0)
                return -1;
            span = (uint64_t)put;
        }
        at += span;
        length -= span;
    }
    return 0;
}

/* The whole clusters of a range; the disk's last one is whole however short it is. */
static int split(const struct tv_qcow2 *image, uint64_t at, uint64_t length, uint64_t *first, uint64_t *last)
{
    uint64_t mask = image->cluster_size - 1;
    if (at > image->header.size || length > image->header.size - at || !image->writable) {
        errno = image->writable ? EINVAL : EROFS;
        return -1;
    }
    *first = (at + mask) & ~mask;
    *last = at + length == image->header.size ? (at + length + mask) & ~mask : (at + length) & ~mask;
    if (*last < *first)
        *last = *first;
    return 0;
}

int64_t qcow2_discard_image(struct tv_image *seam, uint64_t at, uint64_t length)
{
    struct tv_qcow2 *image = (struct tv_qcow2 *)seam;
    uint64_t first, last, piece = length < PIECE ? length : PIECE;
    if (split(image, at, piece, &first, &last))
        return -1;
    if (image->header.version < 3 && first < image->backing_size)
        return (int64_t)piece; /* no entry would hide what the backing file has there */
    return whole_clusters(image, first, last - first, 0) ? -1 : (int64_t)piece;
}

int64_t qcow2_zero_image(struct tv_image *seam, uint64_t at, uint64_t length, int unmap)
{
    struct tv_qcow2 *image = (struct tv_qcow2 *)seam;
    uint64_t first, last, piece = length < PIECE ? length : PIECE, end = at + piece;
    if (split(image, at, piece, &first, &last))
        return -1;
    int failed;
    if (first >= last || (image->header.version < 3 && (!unmap || first < image->backing_size)))
        failed = write_zeros(image, at, piece);
    else
        failed = write_zeros(image, at, first - at) || whole_clusters(image, first, last - first, !unmap) ||
                 (last < end && write_zeros(image, last, end - last));
    return failed ? -1 : (int64_t)piece;
}
