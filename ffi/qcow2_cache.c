/* Tables of one cluster each, L2 or refcount blocks, kept in memory as they lie on disk: never newer than there, so the
 * least recently used one makes room at any time. */
#include "qcow2_image.h"

#include <errno.h>
#include <stdlib.h>

int qcow2_cache_make(struct qcow2_cache *cache, uint32_t limit_bytes, uint32_t cluster_size)
{
    cache->limit = limit_bytes / cluster_size;
    if (cache->limit < QCOW2_TABLES_LEAST)
        cache->limit = QCOW2_TABLES_LEAST;
    if (cache->limit > 1024)
        cache->limit = 1024; /* they are looked through one by one */
    cache->slots = calloc(cache->limit, sizeof *cache->slots);
    return cache->slots ? 0 : -1;
}

void qcow2_cache_free(struct qcow2_cache *cache)
{
    for (uint32_t at = 0; at < cache->count; at++)
        free(cache->slots[at].bytes);
    free(cache->slots);
    memset(cache, 0, sizeof *cache);
}

static struct qcow2_table *room(struct tv_qcow2 *image, struct qcow2_cache *cache)
{
    struct qcow2_table *oldest = NULL;
    for (uint32_t at = 0; at < cache->count; at++) {
        struct qcow2_table *table = &cache->slots[at];
        if (!table->offset)
            return table;
        if (!oldest || table->used < oldest->used)
            oldest = table;
    }
    if (cache->count < cache->limit) {
        struct qcow2_table *table = &cache->slots[cache->count];
        table->bytes = malloc(image->cluster_size);
        if (table->bytes) {
            cache->count++;
            return table;
        }
    }
    if (!oldest) {
        errno = ENOMEM;
        return NULL;
    }
    oldest->offset = 0;
    return oldest;
}

static struct qcow2_table *find(const struct qcow2_cache *cache, uint64_t offset)
{
    if (cache->last < cache->count && cache->slots[cache->last].offset == offset)
        return &cache->slots[cache->last];
    for (uint32_t at = 0; at < cache->count; at++)
        if (cache->slots[at].offset == offset)
            return &cache->slots[at];
    return NULL;
}

int qcow2_cache_has(const struct qcow2_cache *cache, uint64_t offset)
{
    return find(cache, offset) != NULL;
}

/* The table at `offset`, or NULL with errno. `fresh`: all zeros, and not in the file yet. It stays where it is until
 * the next call but one; with `map` held for reading, only while `tables` is held. */
struct qcow2_table *qcow2_cache_get(struct tv_qcow2 *image, struct qcow2_cache *cache, uint64_t offset, int fresh)
{
    struct qcow2_table *table = find(cache, offset);
    if (!table) {
        table = room(image, cache);
        if (!table || (!fresh && qcow2_read_all(image->fd, table->bytes, image->cluster_size, offset)))
            return NULL;
        table->offset = offset;
    }
    if (fresh)
        memset(table->bytes, 0, image->cluster_size);
    table->used = ++cache->clock;
    cache->last = (uint32_t)(table - cache->slots);
    return table;
}

/* Bytes [from, to) of a table that were changed go to the file. Where they can't, it is forgotten: the file's count. */
int qcow2_cache_put(struct tv_qcow2 *image, struct qcow2_table *table, uint64_t from, uint64_t to)
{
    if (!qcow2_write_all(image->fd, table->bytes + from, to - from, table->offset + from))
        return 0;
    table->offset = 0;
    return -1;
}
