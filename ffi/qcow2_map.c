/* From an offset of the disk to what is there: L1, L2, and the entry's checks. */
#include "qcow2_image.h"

#include <errno.h>

/* What an L2 entry says; -1 with EIO where it can't be right. Compressed clusters are looked at when they are read. */
int qcow2_classify(struct tv_qcow2 *image, uint64_t entry, enum qcow2_kind *kind)
{
    if (entry & QCOW2_COMPRESSED) {
        *kind = QCOW2_SQUEEZED;
        return 0;
    }
    uint64_t offset = entry & QCOW2_OFFSET, cluster = offset >> image->header.cluster_bits;
    int zero = image->header.version >= 3 && (entry & QCOW2_ZERO);
    if (entry & QCOW2_L2_RESERVED || (!zero && entry & QCOW2_ZERO))
        return qcow2_spoilt(image);
    if (offset) {
        if (offset & (image->cluster_size - 1) || cluster >= image->end || qcow2_set_has(&image->metadata, cluster))
            return qcow2_spoilt(image);
    } else if (entry & QCOW2_COPIED && !zero) {
        return qcow2_spoilt(image); /* "at 0" is the header */
    }
    *kind = zero ? QCOW2_ZEROS : offset ? QCOW2_DATA : QCOW2_HOLE;
    return 0;
}

/* For a look at `offset`'s table: `tables` is held then. With TV_IMAGE_NOWAIT rather -1 with EAGAIN than wait. */
static int lock_tables(struct tv_qcow2 *image, uint64_t offset, int flags)
{
    if (!(flags & TV_IMAGE_NOWAIT))
        return pthread_mutex_lock(&image->tables) ? -1 : 0;
    errno = EAGAIN;
    if (pthread_mutex_trylock(&image->tables))
        return -1;
    if (qcow2_cache_has(&image->l2, offset))
        return 0;
    pthread_mutex_unlock(&image->tables);
    return -1;
}

/* What is at `at`, and for how much of `length` it goes on like that. `map` is held. */
int qcow2_find(struct tv_qcow2 *image, uint64_t at, uint64_t length, int flags, struct qcow2_run *run)
{
    uint32_t bits = image->header.cluster_bits;
    uint64_t size = image->cluster_size, index = at >> bits & ((1ull << image->l2_bits) - 1);
    uint64_t l1_index = at >> (bits + image->l2_bits);
    uint64_t left = (((1ull << image->l2_bits) - index) << bits) - (at & (size - 1)); /* that this L2 table maps */
    if (length > left)
        length = left;
    memset(run, 0, sizeof *run);
    if (l1_index >= image->header.l1_size)
        return qcow2_spoilt(image);
    uint64_t offset = image->l1[l1_index] & QCOW2_OFFSET;
    if (!offset) {
        run->kind = QCOW2_HOLE;
        run->length = length;
        return 0;
    }
    if (lock_tables(image, offset, flags))
        return -1;
    struct qcow2_table *table = qcow2_cache_get(image, &image->l2, offset, 0);
    int result = table ? 0 : -1;
    if (table) {
        run->entry = qcow2_get64(table->bytes + 8 * index);
        result = qcow2_classify(image, run->entry, &run->kind);
    }
    if (!result) {
        uint64_t covered = size - (at & (size - 1)), host = run->entry & QCOW2_OFFSET;
        run->host = host + (at & (size - 1));
        run->ours = run->kind == QCOW2_DATA && run->entry & QCOW2_COPIED;
        while (run->kind != QCOW2_SQUEEZED && covered < length) {
            uint64_t next = qcow2_get64(table->bytes + 8 * ++index);
            enum qcow2_kind kind;
            host += size;
            if ((next ^ run->entry) & (QCOW2_COMPRESSED | QCOW2_COPIED) || qcow2_classify(image, next, &kind) ||
                kind != run->kind || (kind == QCOW2_DATA && (next & QCOW2_OFFSET) != host))
                break;
            covered += size;
        }
        run->length = covered < length ? covered : length;
    }
    pthread_mutex_unlock(&image->tables);
    return result;
}

/* A cluster of its own for a table, with what is in `old`, or zeros. The L1 entry is not changed. */
static struct qcow2_table *new_table(struct tv_qcow2 *image, const struct qcow2_table *old, uint64_t *cluster)
{
    uint64_t got;
    int virgin;
    if (qcow2_pick(image, 1, cluster, &got, &virgin))
        return NULL;
    struct qcow2_table *table =
        qcow2_cache_get(image, &image->l2, *cluster << image->header.cluster_bits, 1);
    if (!table)
        return NULL;
    if (old)
        memcpy(table->bytes, old->bytes, image->cluster_size);
    if (qcow2_cache_put(image, table, 0, image->cluster_size))
        return NULL;
    /* Where something else was before, an L1 entry must not be durable before the table is. */
    if (((old || !virgin) && qcow2_sync(image->fd)) || qcow2_take(image, *cluster, 1) ||
        qcow2_set_add(&image->metadata, *cluster) < 0) {
        table->offset = 0;
        return NULL;
    }
    return table;
}

/* The L2 table that maps `at`, ours alone to change: made, or copied, where it isn't. `map` is held for writing. */
int qcow2_l2_for_write(struct tv_qcow2 *image, uint64_t at, struct qcow2_table **table)
{
    uint32_t bits = image->header.cluster_bits;
    uint64_t index = at >> (bits + image->l2_bits);
    if (index >= image->header.l1_size)
        return qcow2_spoilt(image);
    uint64_t offset = image->l1[index] & QCOW2_OFFSET, cluster;
    *table = offset ? qcow2_cache_get(image, &image->l2, offset, 0) : NULL;
    if (offset && !*table)
        return -1;
    if (offset && image->l1[index] & QCOW2_COPIED)
        return 0;
    *table = new_table(image, *table, &cluster);
    if (!*table)
        return -1;
    uint8_t entry[8];
    qcow2_put64(entry, cluster << bits | QCOW2_COPIED);
    if (qcow2_write_all(image->fd, entry, sizeof entry, image->header.l1_offset + 8 * index)) {
        qcow2_set_drop(&image->metadata, cluster);
        (*table)->offset = 0;
        return -1; /* and the new table is leaked */
    }
    image->l1[index] = cluster << bits | QCOW2_COPIED;
    if (offset)
        (void)qcow2_give_back(image, offset >> bits, 1);
    return 0;
}
