/* The dirty mark, flushes, and when clusters that were given up may be used again: qcow2.h says why. */
#define _GNU_SOURCE
#include "qcow2_image.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>

/* The dirty bit: whoever opens the image next is to count its references. Not durable yet. */
int qcow2_mark(struct tv_qcow2 *image, int dirty)
{
    uint8_t bits[8];
    if (image->header.version < 3 || image->marked == dirty)
        return 0;
    qcow2_put64(bits, dirty ? image->header.incompatible | QCOW2_DIRTY : image->header.incompatible & ~QCOW2_DIRTY);
    if (qcow2_write_all(image->fd, bits, sizeof bits, QCOW2_AT_INCOMPATIBLE))
        return -1;
    image->marked = dirty;
    return 0;
}

static void punch(struct tv_qcow2 *image, uint64_t first, uint64_t count)
{
    uint32_t bits = image->header.cluster_bits;
    if (count) /* where that can't be done the room stays taken until the cluster is used again */
        (void)fallocate(image->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)(first << bits),
                        (off_t)(count << bits));
}

static int compare(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return a < b ? -1 : a > b;
}

/* It is durable that nothing uses these clusters: they may be used again, and take no room until then. */
static void release(struct tv_qcow2 *image, struct qcow2_set *set)
{
    uint64_t first = 0, run = 0, slots = set->keys ? set->mask + 1 : 0;
    if (set->used)
        qsort(set->keys, slots, sizeof *set->keys, compare);
    for (uint64_t at = 0; set->used && at < slots; at++) {
        if (!set->keys[at])
            continue;
        if (image->hint > set->keys[at])
            image->hint = set->keys[at];
        if (set->keys[at] != first + run) {
            punch(image, first, run);
            first = set->keys[at];
            run = 0;
        }
        run++;
    }
    punch(image, first, run);
    qcow2_set_free(set);
}

/* Before a step that changes refcounts: the mark is durable, and there is room for what one step does. */
int qcow2_begin(struct tv_qcow2 *image)
{
    image->steps++;
    if (image->header.version > 2 && !image->marked) {
        if (qcow2_mark(image, 1))
            return -1;
        if (qcow2_sync(image->fd)) {
            (void)qcow2_mark(image, 0);
            return -1;
        }
    }
    if (image->resting.used * 2 >= QCOW2_RESTING) {
        if (qcow2_sync(image->fd))
            return -1;
        release(image, &image->resting);
    }
    return qcow2_cover(image);
}

/* The waiting is done without the lock: other queues go on meanwhile. */
int qcow2_flush_image(struct tv_image *seam)
{
    struct tv_qcow2 *image = (struct tv_qcow2 *)seam;
    if (!image->writable)
        return 0;
    pthread_rwlock_wrlock(&image->map);
    uint64_t steps = image->steps;
    int mine = !image->flushing;
    if (mine && !image->given_up.used) {
        struct qcow2_set empty = image->given_up;
        image->given_up = image->resting;
        image->resting = empty;
    }
    image->flushing = 1;
    pthread_rwlock_unlock(&image->map);
    int result = qcow2_sync(image->fd), number = errno;
    pthread_rwlock_wrlock(&image->map);
    if (mine)
        image->flushing = 0;
    if (mine && !result)
        release(image, &image->given_up);
    if (result)
        image->lost = 1; /* the kernel tells of it once */
    if (!result && !image->lost && image->steps == steps && image->flushed_steps == steps)
        (void)qcow2_mark(image, 0); /* if that fails, or is lost, somebody counts for nothing */
    if (!result)
        image->flushed_steps = steps;
    pthread_rwlock_unlock(&image->map);
    errno = number;
    return result;
}

int tv_qcow2_settle(struct tv_qcow2 *image, int sync_fd)
{
    if (!image->writable)
        return 0;
    if (qcow2_sync(sync_fd)) /* the bulk of it without the lock */
        return -1;
    pthread_rwlock_wrlock(&image->map);
    int result = qcow2_sync(sync_fd);
    if (!result && image->lost) {
        errno = EIO;
        result = -1;
    }
    if (!result && !image->flushing) {
        release(image, &image->resting);
        release(image, &image->given_up);
    }
    if (!result && image->marked)
        result = qcow2_mark(image, 0) || qcow2_sync(sync_fd);
    if (!result)
        image->flushed_steps = image->steps;
    pthread_rwlock_unlock(&image->map);
    return result ? -1 : 0;
}
