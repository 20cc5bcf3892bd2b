/* Refcounts: which clusters are free. Called with `map` held for writing, and after qcow2_begin. */
#include "qcow2_image.h"

#include <errno.h>

/* Entry `index` of a refcount block whose entries are 1 << order bits wide. */
uint64_t qcow2_entry(const uint8_t *block, uint32_t order, uint64_t index)
{
    if (order < 3)
        return block[index << order >> 3] >> ((index << order) & 7) & ((1u << (1u << order)) - 1);
    if (order == 3)
        return block[index];
    if (order == 4)
        return (uint64_t)block[2 * index] << 8 | block[2 * index + 1];
    return order == 5 ? qcow2_get32(block + 4 * index) : qcow2_get64(block + 8 * index);
}

static void set_entry(uint8_t *block, uint32_t order, uint64_t index, uint64_t value)
{
    if (order < 3) {
        uint8_t *at = &block[index << order >> 3];
        uint32_t shift = (uint32_t)((index << order) & 7), mask = (1u << (1u << order)) - 1;
        *at = (uint8_t)((*at & ~(mask << shift)) | (uint32_t)value << shift);
    } else if (order == 3) {
        block[index] = (uint8_t)value;
    } else if (order == 4) {
        block[2 * index] = (uint8_t)(value >> 8);
        block[2 * index + 1] = (uint8_t)value;
    } else if (order == 5) {
        qcow2_put32(block + 4 * index, (uint32_t)value);
    } else {
        qcow2_put64(block + 8 * index, value);
    }
}

static uint64_t entries(const struct tv_qcow2 *image)
{
    return 1ull << image->block_bits;
}

/* `count` clusters from `first` on, all in `block`, have `value` references from now on. */
static int put(struct tv_qcow2 *image, struct qcow2_table *block, uint64_t first, uint64_t count, uint64_t value)
{
    uint32_t order = image->header.refcount_order;
    uint64_t index = first & (entries(image) - 1);
    for (uint64_t at = index; at < index + count; at++)
        set_entry(block->bytes, order, at, value);
    return qcow2_cache_put(image, block, index << order >> 3, (((index + count) << order) + 7) >> 3);
}

/* The block with a cluster's refcount: *block is NULL where there is none, so that it is 0. */
static int find_block(struct tv_qcow2 *image, uint64_t cluster, struct qcow2_table **block)
{
    uint64_t index = cluster >> image->block_bits;
    *block = NULL;
    if (index >= image->reftable_size || !image->reftable[index])
        return 0;
    *block = qcow2_cache_get(image, &image->blocks, image->reftable[index], 0);
    return *block ? 0 : -1;
}

int qcow2_refcount(struct tv_qcow2 *image, uint64_t cluster, uint64_t *count)
{
    struct qcow2_table *block;
    if (find_block(image, cluster, &block))
        return -1;
    *count = block ? qcow2_entry(block->bytes, image->header.refcount_order, cluster & (entries(image) - 1)) : 0;
    return 0;
}

/* Of clusters that have blocks. */
int qcow2_set_refcounts(struct tv_qcow2 *image, uint64_t first, uint64_t count, uint64_t value)
{
    while (count) {
        struct qcow2_table *block;
        uint64_t here = entries(image) - (first & (entries(image) - 1));
        if (here > count)
            here = count;
        if (find_block(image, first, &block))
            return -1;
        if (!block)
            return qcow2_spoilt(image);
        if (put(image, block, first, here, value))
            return -1;
        first += here;
        count -= here;
    }
    return 0;
}

/* Cluster `at` becomes the block that holds its own refcount, and those of its neighbours, which are 0. It counts once
 * the refcount table names it. */
static int new_block(struct tv_qcow2 *image, uint64_t at)
{
    uint64_t index = at >> image->block_bits;
    uint8_t entry[8];
    if (qcow2_set_has(&image->metadata, at))
        return qcow2_spoilt(image);
    struct qcow2_table *block = qcow2_cache_get(image, &image->blocks, at << image->header.cluster_bits, 1);
    if (!block)
        return -1;
    set_entry(block->bytes, image->header.refcount_order, at & (entries(image) - 1), 1);
    if (qcow2_cache_put(image, block, 0, image->cluster_size))
        return -1;
    qcow2_put64(entry, at << image->header.cluster_bits);
    if (qcow2_set_add(&image->metadata, at) < 0)
        return -1;
    if (qcow2_write_all(image->fd, entry, sizeof entry, image->header.reftable_offset + 8 * index)) {
        qcow2_set_drop(&image->metadata, at);
        block->offset = 0;
        return -1;
    }
    image->reftable[index] = at << image->header.cluster_bits;
    if (image->end <= at)
        image->end = at + 1;
    return 0;
}

static int is_free(struct tv_qcow2 *image, const struct qcow2_table *block, uint64_t cluster)
{
    return !qcow2_entry(block->bytes, image->header.refcount_order, cluster & (entries(image) - 1)) &&
           !(image->resting.used && qcow2_set_has(&image->resting, cluster)) &&
           !(image->given_up.used && qcow2_set_has(&image->given_up, cluster));
}

/* Up to `want` free clusters in a row, inside one block, from `from` on: *got of them at *first, or 0 and *first is
 * where to look on. */
static int search(struct tv_qcow2 *image, uint64_t from, uint64_t want, uint64_t *first, uint64_t *got)
{
    uint64_t at = from;
    *got = 0;
    for (uint32_t looked = 0; looked < QCOW2_SEARCH; looked++) {
        uint64_t index = at >> image->block_bits, last = (index + 1) << image->block_bits;
        if (index >= image->reftable_size || last << image->header.cluster_bits > QCOW2_HOST_MAX)
            break;
        if (!image->reftable[index] && new_block(image, at))
            return -1;
        struct qcow2_table *block;
        if (find_block(image, at, &block) || !block)
            return -1;
        while (at < last && !is_free(image, block, at))
            at++;
        if (at == last)
            continue;
        uint64_t count = 1;
        while (count < want && at + count < last && is_free(image, block, at + count))
            count++;
        if (at < image->end && at + count > image->end)
            count = image->end - at; /* all of them have been in the file, or none */
        for (uint64_t each = at; each < at + count; each++) {
            if (qcow2_set_has(&image->metadata, each)) {
                image->hint = each + 1; /* it says that its own tables are free */
                return qcow2_spoilt(image);
            }
        }
        *got = count;
        break;
    }
    *first = at;
    return 0;
}

/* *got free clusters in a row, from 1 to `want`, from *first on; they stay free until they are taken. *virgin: nothing
 * was ever written there, so they read as zeros. -1 with errno (ENOSPC: its tables have no room for more). */
int qcow2_pick(struct tv_qcow2 *image, uint64_t want, uint64_t *first, uint64_t *got, int *virgin)
{
    if (search(image, image->hint, want, first, got))
        return -1;
    image->hint = *first;
    if (!*got && image->hint < image->end && search(image, image->end, want, first, got))
        return -1;
    if (!*got) {
        errno = ENOSPC;
        return -1;
    }
    *virgin = *first >= image->end;
    if (image->end < *first + *got)
        image->end = *first + *got; /* something will be written there */
    return 0;
}

/* Clusters that were picked: one reference each. */
int qcow2_take(struct tv_qcow2 *image, uint64_t first, uint64_t count)
{
    if (qcow2_set_refcounts(image, first, count, 1))
        return -1;
    if (image->hint == first)
        image->hint = first + count;
    qcow2_add(&image->counts.allocated, count);
    return 0;
}

/* *number clusters from `first` on, of `count`, lie in one block and have *references each. */
static int alike(struct tv_qcow2 *image, uint64_t first, uint64_t count, uint64_t *references, uint64_t *number)
{
    struct qcow2_table *block;
    uint64_t mask = entries(image) - 1;
    if (find_block(image, first, &block))
        return -1;
    *number = 1;
    *references = block ? qcow2_entry(block->bytes, image->header.refcount_order, first & mask) : 0;
    while (block && *number < count && ((first + *number) & mask) &&
           qcow2_entry(block->bytes, image->header.refcount_order, (first + *number) & mask) == *references)
        ++*number;
    return 0;
}

/* One reference less to each. Those that were the last one are free, and used again once that is durable (release). */
int qcow2_give_back(struct tv_qcow2 *image, uint64_t first, uint64_t count)
{
    while (count) {
        uint64_t references, here;
        if (alike(image, first, count, &references, &here))
            return -1;
        if (!references)
            qcow2_add(&image->counts.spoilt, 1); /* used, yet free: it stays so */
        else if (qcow2_set_refcounts(image, first, here, references - 1))
            return -1;
        for (uint64_t at = first; references == 1 && at < first + here; at++) {
            qcow2_set_drop(&image->metadata, at);
            if (qcow2_set_add(&image->resting, at) < 0)
                return -1; /* it is found again when the image is opened next */
        }
        qcow2_add(&image->counts.freed, references == 1 ? here : 0);
        first += here;
        count -= here;
    }
    return 0;
}
