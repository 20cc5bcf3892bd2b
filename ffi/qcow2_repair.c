/* References counted anew: what a process that was killed, or a host that lost power, has left behind.
 *
 * Done at opening for writing where the dirty bit asks for it, and for version 2, which has none. All tables are walked
 * and each cluster's references counted; refcounts that say otherwise are put right, unless the tables contradict each
 * other. An image with internal snapshots, or with structures that are not known here, is never judged: what refers to
 * its clusters is not all visible.
 *
 * The walk is bounded: an image with more tables than BYTES is left as it is, or refused if it is dirty. */
#define _GNU_SOURCE
#include "qcow2_image.h"

#include <errno.h>
#include <stdlib.h>

#define BYTES (256ull << 20) /* of tables that are read: 2 TiB of data in clusters of 64 KiB */
#define CLUSTERS (1ull << 26) /* that a count is kept of, two bytes each */
#define MANY UINT16_MAX /* more than this mends: even compressed clusters share one by the hundred only */

static const char REPAIR[] = "mend it (qemu-img check -r all IMAGE), or give an intact copy";

struct walk {
    struct tv_qcow2 *image;
    uint16_t *seen; /* references of each cluster, MANY and more alike */
    int damaged;    /* an entry that can't be right: then nothing is changed */
};

static void refer(struct walk *walk, uint64_t cluster)
{
    if (cluster >= walk->image->end)
        walk->damaged = 1;
    else if (walk->seen[cluster] < MANY)
        walk->seen[cluster]++;
}

static void refer_entry(struct walk *walk, uint64_t entry)
{
    struct qcow2_span span = qcow2_refers(walk->image, entry);
    uint64_t crooked = QCOW2_L2_RESERVED | (QCOW2_OFFSET & (walk->image->cluster_size - 1));
    if (span.count && !(entry & QCOW2_COMPRESSED) && entry & crooked)
        walk->damaged = 1;
    for (uint64_t at = 0; at < span.count; at++)
        refer(walk, span.first + at);
}

static int refer_all(struct walk *walk)
{
    struct tv_qcow2 *image = walk->image;
    uint32_t bits = image->header.cluster_bits;
    uint64_t per_cluster = image->cluster_size / 8, l1 = (image->header.l1_size + per_cluster - 1) / per_cluster;
    refer(walk, 0);
    for (uint64_t at = 0; at < l1; at++)
        refer(walk, (image->header.l1_offset >> bits) + at);
    for (uint64_t at = 0; at < image->header.reftable_clusters; at++)
        refer(walk, (image->header.reftable_offset >> bits) + at);
    for (uint64_t at = 0; at < image->reftable_size; at++)
        if (image->reftable[at])
            refer(walk, image->reftable[at] >> bits);
    uint8_t *table = malloc(image->cluster_size);
    int result = table ? 0 : -1;
    for (uint64_t at = 0; !result && at < image->header.l1_size; at++) {
        uint64_t offset = image->l1[at] & QCOW2_OFFSET;
        if (!offset)
            continue;
        refer(walk, offset >> bits);
        result = qcow2_read_all(image->fd, table, image->cluster_size, offset);
        for (uint64_t index = 0; !result && index < per_cluster; index++)
            refer_entry(walk, qcow2_get64(table + 8 * index));
    }
    free(table);
    return result;
}

/* Whether what is seen may be believed: no entry points past the end, none of the data lies on a table. */
static int believable(struct walk *walk)
{
    const struct qcow2_set *set = &walk->image->metadata;
    if (walk->damaged || walk->seen[0] != 1)
        return 0;
    for (uint64_t at = 0; set->keys && at <= set->mask; at++)
        if (set->keys[at] && (set->keys[at] >= walk->image->end || walk->seen[set->keys[at]] != 1))
            return 0;
    return 1;
}

/* 1 where all counts are right now, 0 where that is more than can be done here, -1 with errno. */
static int settle(struct walk *walk)
{
    struct tv_qcow2 *image = walk->image;
    for (int change = 0; change < 2; change++) { /* first look, then change: all or nothing */
        for (uint64_t cluster = 0; cluster < image->end; cluster++) {
            uint64_t count, seen = walk->seen[cluster];
            uint64_t index = cluster >> image->block_bits;
            if (index >= image->reftable_size || !image->reftable[index]) {
                if (seen)
                    return 0; /* no block to count it in: more than this mends */
                continue;
            }
            if (qcow2_refcount(image, cluster, &count))
                return -1;
            if (count == seen && seen < MANY)
                continue;
            if (seen == MANY || (image->header.refcount_order < 4 && seen >> (1u << image->header.refcount_order)))
                return 0; /* more references than it can count */
            if (!change)
                continue;
            if (qcow2_set_refcounts(image, cluster, 1, seen))
                return -1;
            qcow2_add(&image->counts.mended, 1);
        }
    }
    return 1;
}

static uint64_t table_bytes(const struct tv_qcow2 *image)
{
    return image->metadata.used << image->header.cluster_bits;
}

/* 0, or -1 with `error` where an image that is dirty can't be mended here. */
int qcow2_repair(struct tv_qcow2 *image, struct tv_qcow2_error *error)
{
    int dirty = image->marked, blind = image->header.snapshots || image->header.owns_more;
    if (!dirty && (image->header.version > 2 || blind))
        return 0; /* nobody was interrupted, or it can't be known */
    const char *why = blind ? "it has snapshots, or structures that are not known here" : "it is too large for that";
    int result = 0;
    if (!blind && table_bytes(image) <= BYTES && image->end <= CLUSTERS) {
        struct walk walk = {.image = image, .seen = calloc(image->end + 1, sizeof(uint16_t))};
        result = walk.seen ? refer_all(&walk) : -1;
        if (!result && believable(&walk))
            result = settle(&walk);
        free(walk.seen);
        if (result < 0)
            return qcow2_wrong(error, "refcounts", "look after its storage", 0, "can't be counted (%s)",
                               strerror(errno));
        why = "its tables contradict each other";
    }
    if (dirty && !result)
        return qcow2_wrong(error, "incompatible_features", REPAIR, image->header.incompatible,
                           "it was not closed, and can't be mended here: %s", why);
    return 0;
}
