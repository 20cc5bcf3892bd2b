/* What L2 entries refer to, and changing them. */
#include "qcow2_image.h"

#include <errno.h>

/* The clusters of the file that an entry refers to, whatever they are: unchecked. */
struct qcow2_span qcow2_refers(const struct tv_qcow2 *image, uint64_t entry)
{
    uint32_t bits = image->header.cluster_bits, shift = 62 - (bits - 8);
    struct qcow2_span span = {.first = (entry & QCOW2_OFFSET) >> bits, .count = (entry & QCOW2_OFFSET) != 0};
    if (entry & QCOW2_COMPRESSED) {
        uint64_t from = entry & ((1ull << shift) - 1), sectors = (entry >> shift & ((1ull << (bits - 8)) - 1)) + 1;
        span.first = from >> bits;
        span.count = (((from & ~511ull) + 512 * sectors - 1) >> bits) - span.first + 1;
    }
    return span;
}

/* Give back [span->first, + count), and begin a new span at `next`. What it can't give back is leaked. */
static void give_back(struct tv_qcow2 *image, struct qcow2_span *span, uint64_t next)
{
    if (span->count)
        (void)qcow2_give_back(image, span->first, span->count);
    span->first = next;
    span->count = 0;
}

/* Entries [index, index + count) become `made`; what the old ones referred to, and the new ones don't, loses that
 * reference. At most QCOW2_RUN_MAX. -1 with errno: some may have changed, and nothing was given back. */
int qcow2_replace(struct tv_qcow2 *image, struct qcow2_table *table, uint64_t index, const uint64_t *made,
                  uint64_t count)
{
    uint64_t old[QCOW2_RUN_MAX];
    for (uint64_t at = 0; at < count; at++) {
        old[at] = qcow2_get64(table->bytes + 8 * (index + at));
        qcow2_put64(table->bytes + 8 * (index + at), made[at]);
    }
    if (qcow2_cache_put(image, table, 8 * index, 8 * (index + count)))
        return -1;
    struct qcow2_span lost = {0, 0};
    for (uint64_t at = 0; at < count; at++) {
        struct qcow2_span span = qcow2_refers(image, old[at]), kept = qcow2_refers(image, made[at]);
        if (!(old[at] & QCOW2_COMPRESSED) && kept.count && kept.first == span.first)
            continue;
        for (uint64_t cluster = span.first; cluster < span.first + span.count; cluster++) {
            if (cluster >= image->end || qcow2_set_has(&image->metadata, cluster))
                continue; /* a compressed cluster's lie: no data is there */
            if (cluster != lost.first + lost.count)
                give_back(image, &lost, cluster);
            lost.count++;
        }
    }
    give_back(image, &lost, 0);
    return 0;
}
