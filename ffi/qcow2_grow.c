/* A refcount table that covers more. Rare: with clusters of 64 KiB one cluster of it covers 16 TiB; with clusters of
 * 512 bytes, 8 MiB.
 *
 * The new table and the blocks for where it lies go behind all that there is, under block numbers that the old one does
 * not reach; the header is changed when they are durable, in one write; then the old table's clusters are free. Cut
 * short before that write nothing has changed, and after it the old table is leaked. */
#include "qcow2_image.h"

#include <errno.h>
#include <stdlib.h>

/* Blocks and table as they will lie: `blocks` clusters from `start` on, then `table` clusters. */
struct place {
    uint64_t start, blocks, table;
};

static int write_place(struct tv_qcow2 *image, const struct place *place, const uint64_t *entries)
{
    uint32_t order = image->header.refcount_order, bits = image->header.cluster_bits;
    uint64_t left = place->blocks + place->table;
    uint8_t *bytes = malloc(image->cluster_size);
    int result = bytes ? 0 : -1;
    for (uint64_t at = 0; !result && at < place->blocks; at++) {
        memset(bytes, 0, image->cluster_size);
        for (uint64_t index = 0; left && index < 1ull << image->block_bits; index++, left--) {
            uint64_t bit = index << order; /* a count of 1, at any width */
            uint64_t low = order > 3 ? (bit >> 3) + (1u << (order - 3)) - 1 : bit >> 3;
            bytes[low] |= (uint8_t)(1u << (order > 3 ? 0 : bit & 7));
        }
        result = qcow2_write_all(image->fd, bytes, image->cluster_size, (place->start + at) << bits);
    }
    uint64_t per_cluster = image->cluster_size / 8;
    for (uint64_t at = 0; !result && at < place->table; at++) {
        for (uint64_t index = 0; index < per_cluster; index++)
            qcow2_put64(bytes + 8 * index, entries[at * per_cluster + index]);
        result = qcow2_write_all(image->fd, bytes, image->cluster_size, (place->start + place->blocks + at) << bits);
    }
    free(bytes);
    return result;
}

static int write_header(struct tv_qcow2 *image, const struct place *place)
{
    uint8_t bytes[12];
    qcow2_put64(bytes, (place->start + place->blocks) << image->header.cluster_bits);
    qcow2_put32(bytes + 8, (uint32_t)place->table);
    return qcow2_sync(image->fd) || qcow2_write_all(image->fd, bytes, sizeof bytes, QCOW2_AT_REFTABLE);
}

static int grow(struct tv_qcow2 *image, uint64_t clusters)
{
    uint64_t per_block = 1ull << image->block_bits, first_index = (clusters + per_block - 1) >> image->block_bits;
    if (first_index < image->reftable_size)
        first_index = image->reftable_size;
    uint32_t bits = image->header.cluster_bits;
    struct place place = {.start = first_index << image->block_bits,
                          .table = image->header.reftable_clusters + image->header.reftable_clusters / 2 + 1};
    uint64_t size;
    for (;;) {
        for (place.blocks = 1; place.blocks * per_block < place.blocks + place.table;)
            place.blocks++;
        size = place.table * (image->cluster_size / 8);
        if (place.table << bits > QCOW2_REFTABLE_BYTES ||
            (place.start + place.blocks + place.table) << bits > QCOW2_HOST_MAX) {
            errno = ENOSPC;
            return -1;
        }
        if (size > first_index + place.blocks + 1)
            break;
        place.table++;
    }
    uint64_t *entries = calloc(size, sizeof *entries);
    if (!entries)
        return -1;
    memcpy(entries, image->reftable, image->reftable_size * sizeof *entries);
    for (uint64_t at = 0; at < place.blocks; at++)
        entries[first_index + at] = (place.start + at) << bits;
    int failed = write_place(image, &place, entries);
    for (uint64_t at = 0; !failed && at < place.blocks + place.table; at++)
        failed = qcow2_set_add(&image->metadata, place.start + at) < 0;
    if (failed || write_header(image, &place)) {
        int error = errno;
        for (uint64_t at = 0; at < place.blocks + place.table; at++)
            qcow2_set_drop(&image->metadata, place.start + at);
        free(entries);
        errno = error;
        return -1;
    }
    /* The file names the new table now, durably or not: so does memory. */
    uint64_t old = image->header.reftable_offset >> bits, old_clusters = image->header.reftable_clusters;
    free(image->reftable);
    image->reftable = entries;
    image->reftable_size = size;
    image->header.reftable_offset = (place.start + place.blocks) << bits;
    image->header.reftable_clusters = (uint32_t)place.table;
    image->end = place.start + place.blocks + place.table;
    if (qcow2_sync(image->fd))
        return -1; /* the old table stays: a host that loses power may still need it */
    (void)qcow2_give_back(image, old, old_clusters);
    return 0;
}

/* The table covers what one step may allocate. Where it can't grow, what is free in it may still do. */
int qcow2_cover(struct tv_qcow2 *image)
{
    uint64_t wanted = image->end + QCOW2_RUN_BYTES / image->cluster_size + 8;
    if (wanted >> image->block_bits < image->reftable_size || !grow(image, wanted) || errno == ENOSPC)
        return 0;
    return -1;
}
