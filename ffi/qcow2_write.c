/* Writing: in place where a cluster is ours alone, else into new clusters, with what was around it before. */
#define _GNU_SOURCE
#include "qcow2_image.h"

#include <errno.h>

#define SEGMENTS (QCOW2_IOV - 2) /* two are for what is around the data */

static int write_file(int fd, struct iovec *iov, int count, uint64_t at)
{
    while (count) {
        if (!iov->iov_len) {
            iov++;
            count--;
            continue;
        }
        ssize_t put = pwritev(fd, iov, count, (off_t)at);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0) {
            if (!put)
                errno = EIO;
            return -1;
        }
        at += (uint64_t)put;
        for (; count && (size_t)put >= iov->iov_len; iov++, count--)
            put -= (ssize_t)iov->iov_len;
        if (count) {
            iov->iov_base = (uint8_t *)iov->iov_base + put;
            iov->iov_len -= (size_t)put;
        }
    }
    return 0;
}

/* Segments of [offset, offset + *length) of the data; *length becomes what they hold. */
static int cut(const struct iovec *iov, int count, uint64_t offset, uint64_t *length, struct iovec *into)
{
    int parts = qcow2_slice(iov, count, offset, *length, into, SEGMENTS);
    *length = 0;
    for (int at = 0; at < parts; at++)
        *length += into[at].iov_len;
    return parts;
}

static int reads_zero(const struct tv_qcow2 *image, enum qcow2_kind kind, uint64_t cluster_at)
{
    return kind == QCOW2_ZEROS || (kind == QCOW2_HOLE && cluster_at >= image->backing_size);
}

/* How an L2 entry is written to. */
enum way { IN_PLACE, PREPARED, ANEW }; /* PREPARED: a cluster is ours, but reads as zeros so far */

static int way_of(struct tv_qcow2 *image, uint64_t entry, enum qcow2_kind *kind, enum way *way)
{
    if (qcow2_classify(image, entry, kind))
        return -1;
    int ours = (entry & QCOW2_COPIED) && (entry & QCOW2_OFFSET);
    *way = ours && *kind == QCOW2_DATA ? IN_PLACE : ours && *kind == QCOW2_ZEROS ? PREPARED : ANEW;
    return 0;
}

/* Clusters from `index` on, of `most`, that are all written anew. */
static uint64_t anew(struct tv_qcow2 *image, const struct qcow2_table *table, uint64_t index, uint64_t most)
{
    uint64_t count = 1;
    enum qcow2_kind kind;
    enum way way;
    while (count < most && !way_of(image, qcow2_get64(table->bytes + 8 * (index + count)), &kind, &way) && way == ANEW)
        count++;
    return count;
}

/* Some of [offset, offset + length) of `iov` to `at`: *done bytes. `map` is held for writing. */
static int step(struct tv_qcow2 *image, const struct iovec *iov, int count, uint64_t offset, uint64_t length,
                uint64_t at, uint64_t *done)
{
    uint32_t bits = image->header.cluster_bits;
    uint64_t size = image->cluster_size, in = at & (size - 1), index = at >> bits & ((1ull << image->l2_bits) - 1);
    struct qcow2_table *table;
    if (qcow2_l2_for_write(image, at, &table))
        return -1;
    enum qcow2_kind kind;
    enum way way;
    uint64_t entry = qcow2_get64(table->bytes + 8 * index);
    if (way_of(image, entry, &kind, &way))
        return -1;
    uint64_t most = (1ull << image->l2_bits) - index, bound = size > QCOW2_RUN_BYTES ? 1 : QCOW2_RUN_BYTES / size;
    if (most > bound)
        most = bound;
    if (way != ANEW)
        most = 1;
    struct iovec part[QCOW2_IOV];
    uint64_t span = length < (most << bits) - in ? length : (most << bits) - in;
    int parts = cut(iov, count, offset, &span, part + 1);
    uint64_t clusters = (in + span + size - 1) >> bits, first = (entry & QCOW2_OFFSET) >> bits;
    int virgin = 0;
    if (way == ANEW && qcow2_pick(image, anew(image, table, index, clusters), &first, &clusters, &virgin))
        return -1;
    if (span > (clusters << bits) - in) {
        span = (clusters << bits) - in;
        parts = cut(iov, count, offset, &span, part + 1);
        clusters = (in + span + size - 1) >> bits;
    }
    uint64_t tail = (clusters << bits) - in - span, start = at - in, end = at + span;
    uint64_t last_entry = qcow2_get64(table->bytes + 8 * (index + clusters - 1));
    enum qcow2_kind last_kind;
    int failed = qcow2_classify(image, last_entry, &last_kind);
    int with_head = way != IN_PLACE && in && !(virgin && reads_zero(image, kind, start));
    int with_tail = way != IN_PLACE && tail &&
                    !(virgin && reads_zero(image, last_kind, start + ((clusters - 1) << bits)));
    part[0] = (struct iovec){.iov_base = image->bounce, .iov_len = with_head ? in : 0};
    part[1 + parts] = (struct iovec){.iov_base = image->bounce + size, .iov_len = with_tail ? tail : 0};
    failed = failed || (with_head && qcow2_read_here(image, image->bounce, in, start)) ||
             (with_tail && qcow2_read_here(image, image->bounce + size, tail, end)) ||
             write_file(image->fd, part, parts + 2, (first << bits) + (with_head ? 0 : in));
    if (failed)
        return -1;
    *done = span;
    if (way == IN_PLACE)
        return 0;
    uint64_t made[QCOW2_RUN_MAX];
    for (uint64_t each = 0; each < clusters; each++)
        made[each] = (first + each) << bits | QCOW2_COPIED;
    if (way == ANEW && qcow2_take(image, first, clusters))
        return -1;
    return qcow2_replace(image, table, index, made, clusters); /* leaked if it fails: some may have been entered */
}

/* As long as clusters are ours alone. `map` is held for reading. */
static int write_in_place(struct tv_qcow2 *image, const struct iovec *iov, int count, uint64_t length, uint64_t at,
                          uint64_t *done)
{
    while (*done < length) {
        struct qcow2_run run;
        if (qcow2_find(image, at + *done, length - *done, 0, &run))
            return -1;
        if (!run.ours)
            return 0;
        struct iovec part[QCOW2_IOV];
        uint64_t span = run.length;
        int parts = cut(iov, count, *done, &span, part);
        if (write_file(image->fd, part, parts, run.host))
            return -1;
        *done += span;
    }
    return 0;
}

int64_t qcow2_write_image(struct tv_image *seam, const struct iovec *iov, int count, uint64_t at)
{
    struct tv_qcow2 *image = (struct tv_qcow2 *)seam;
    uint64_t length = 0, done = 0;
    for (int each = 0; each < count; each++)
        length += iov[each].iov_len;
    if (at > image->header.size || length > image->header.size - at || length > INT64_MAX || !image->writable) {
        errno = image->writable ? EINVAL : EROFS;
        return -1;
    }
    while (done < length) {
        pthread_rwlock_rdlock(&image->map);
        int failed = write_in_place(image, iov, count, length, at, &done);
        pthread_rwlock_unlock(&image->map);
        if (failed)
            return -1;
        if (done == length)
            break;
        uint64_t more = 0;
        pthread_rwlock_wrlock(&image->map);
        failed = qcow2_begin(image) || step(image, iov, count, done, length - done, at + done, &more);
        pthread_rwlock_unlock(&image->map);
        if (failed)
            return -1;
        done += more;
    }
    return (int64_t)length;
}
