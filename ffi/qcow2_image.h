/* What the files of qcow2 share: the image in memory, and numbers as they lie on disk. */
#ifndef TV_QCOW2_IMAGE_H
#define TV_QCOW2_IMAGE_H
#include <pthread.h>
#include <stddef.h>
#include <string.h>

#include "qcow2.h"

/* --- the format ------------------------------------------------------------------------------------------------- */

#define QCOW2_MAGIC 0x514649fbu
#define QCOW2_DIRTY 1ull
#define QCOW2_CORRUPT 2ull
#define QCOW2_EXTERNAL_DATA 4ull
#define QCOW2_COMPRESSION 8ull
#define QCOW2_EXTENDED_L2 16ull
#define QCOW2_BITMAPS 1ull /* of the automatic features */
#define QCOW2_OFFSET 0x00fffffffffffe00ull /* bits 9 to 55 of an L1, L2 entry */
#define QCOW2_COPIED (1ull << 63)
#define QCOW2_COMPRESSED (1ull << 62)
#define QCOW2_ZERO 1ull
#define QCOW2_L1_RESERVED 0x7f000000000001ffull
#define QCOW2_L2_RESERVED 0x3f000000000001feull /* of a standard descriptor */
#define QCOW2_AT_INCOMPATIBLE 72
#define QCOW2_AT_AUTOCLEAR 88
#define QCOW2_AT_REFTABLE 48

/* --- bounds ----------------------------------------------------------------------------------------------------- */

#define QCOW2_L1_BYTES (32u << 20)      /* QEMU's own limits: no image that it makes is beyond them */
#define QCOW2_REFTABLE_BYTES (8u << 20)
#define QCOW2_HOST_MAX (1ull << 56)     /* no table can point further */
#define QCOW2_L2_CACHE (16u << 20)      /* bytes: maps 128 GiB at clusters of 64 KiB */
#define QCOW2_BACKING_CACHE (4u << 20)
#define QCOW2_REF_CACHE (4u << 20)
#define QCOW2_TABLES_LEAST 8            /* tables a cache holds however large they are */
#define QCOW2_RUN_BYTES (1u << 20)      /* that one step allocates at most */
#define QCOW2_RUN_MAX (QCOW2_RUN_BYTES >> 9) /* clusters of one step, however small they are */
#define QCOW2_RESTING (8 * QCOW2_RUN_MAX) /* clusters that may wait for a flush; one step adds three a cluster */
#define QCOW2_INFLATED_BYTES (4u << 20) /* of clusters that are kept inflated */
#define QCOW2_SEARCH 64                 /* refcount blocks that one allocation looks through */
#define QCOW2_IOV 1024                  /* the kernel's limit */
#define QCOW2_DEPTH 10                  /* images in a chain behind the first: Cloud Hypervisor's limit */

struct qcow2_table {
    uint64_t offset; /* in the file; 0: free */
    uint64_t used;   /* the cache's clock at its last use */
    uint8_t *bytes;  /* a cluster */
};

struct qcow2_cache {
    struct qcow2_table *slots;
    uint32_t limit, count; /* slots there may be; that have a buffer */
    uint32_t last;
    uint64_t clock;
};

/* Cluster numbers. Open addressing; 0 is free, so the header's own cluster is known apart. */
struct qcow2_set {
    uint64_t *keys;
    uint64_t mask, used;
};

struct qcow2_inflated {
    uint64_t descriptor; /* of a compressed cluster; 0: none */
    uint64_t used;
    uint8_t *bytes;
};

#define QCOW2_INFLATED 8

struct tv_qcow2 {
    struct tv_image image;
    int fd;
    int writable;
    struct tv_qcow2_header header;
    uint32_t cluster_size;
    uint32_t l2_bits;       /* of the index into an L2 table */
    uint32_t block_bits;    /* of the index into a refcount block */
    uint64_t reftable_size; /* entries */
    uint64_t *l1, *reftable; /* in the host's order */
    uint64_t end;           /* clusters of the file, those included that are allocated and not written yet */
    uint64_t hint;          /* no free cluster below it */
    int marked;             /* the dirty bit is in the file */
    uint64_t steps;         /* that changed something since it was opened */
    uint64_t flushed_steps; /* of these, those that the last flush made durable */
    int flushing;           /* somebody makes `given_up` durable */
    int lost;               /* a flush failed: what is durable is not known any more, so the mark stays */
    struct qcow2_set metadata;          /* clusters that hold tables, which no guest's data may lie on */
    struct qcow2_set resting, given_up; /* free clusters, but not durably so: since the last flush began, and before */
    struct qcow2_cache l2, blocks;
    struct tv_qcow2 *backing;
    int backing_fd; /* raw; -1: none */
    uint64_t backing_size;
    uint8_t *bounce;        /* two clusters: old content around a write that does not fill its clusters */
    uint8_t *squeezed;      /* what a compressed cluster is read into */
    struct qcow2_inflated inflated[QCOW2_INFLATED];
    uint64_t inflated_clock;
    pthread_rwlock_t map;
    pthread_mutex_t tables;
    pthread_mutex_t inflating;
    struct tv_qcow2_counts counts; /* atomic */
};

static inline uint64_t qcow2_get64(const void *from)
{
    uint64_t value;
    memcpy(&value, from, 8);
    return __builtin_bswap64(value);
}

static inline uint32_t qcow2_get32(const void *from)
{
    uint32_t value;
    memcpy(&value, from, 4);
    return __builtin_bswap32(value);
}

static inline void qcow2_put64(void *to, uint64_t value)
{
    value = __builtin_bswap64(value);
    memcpy(to, &value, 8);
}

static inline void qcow2_put32(void *to, uint32_t value)
{
    value = __builtin_bswap32(value);
    memcpy(to, &value, 4);
}

static inline void qcow2_add(uint64_t *counter, uint64_t more)
{
    __atomic_fetch_add(counter, more, __ATOMIC_RELAXED);
}

/* qcow2_file.c */
int qcow2_read_all(int fd, void *to, uint64_t length, uint64_t at);
int qcow2_write_all(int fd, const void *from, uint64_t length, uint64_t at);
int qcow2_sync(int fd);
int qcow2_spoilt(struct tv_qcow2 *image);
int qcow2_slice(const struct iovec *iov, int count, uint64_t offset, uint64_t length, struct iovec *into, int room);
void qcow2_zero_iov(const struct iovec *iov, int count, uint64_t offset, uint64_t length);
int qcow2_wrong(struct tv_qcow2_error *error, const char *field, const char *remedy, uint64_t value,
                const char *problem, ...) __attribute__((format(printf, 5, 6)));

/* qcow2_set.c */
int qcow2_set_add(struct qcow2_set *set, uint64_t cluster);
int qcow2_set_has(const struct qcow2_set *set, uint64_t cluster);
void qcow2_set_drop(struct qcow2_set *set, uint64_t cluster);
void qcow2_set_free(struct qcow2_set *set);

/* qcow2_cache.c */
int qcow2_cache_make(struct qcow2_cache *cache, uint32_t limit_bytes, uint32_t cluster_size);
void qcow2_cache_forget(struct qcow2_cache *cache);
void qcow2_cache_free(struct qcow2_cache *cache);
int qcow2_cache_has(const struct qcow2_cache *cache, uint64_t offset);
struct qcow2_table *qcow2_cache_get(struct tv_qcow2 *image, struct qcow2_cache *cache, uint64_t offset, int fresh);
int qcow2_cache_put(struct tv_qcow2 *image, struct qcow2_table *table, uint64_t from, uint64_t to);

/* qcow2_alloc.c: `map` held for writing, after qcow2_begin */
int qcow2_pick(struct tv_qcow2 *image, uint64_t want, uint64_t *first, uint64_t *got, int *virgin);
int qcow2_take(struct tv_qcow2 *image, uint64_t first, uint64_t count);
int qcow2_give_back(struct tv_qcow2 *image, uint64_t first, uint64_t count);
int qcow2_refcount(struct tv_qcow2 *image, uint64_t cluster, uint64_t *count);
int qcow2_set_refcounts(struct tv_qcow2 *image, uint64_t first, uint64_t count, uint64_t value);
uint64_t qcow2_entry(const uint8_t *block, uint32_t order, uint64_t index);

/* qcow2_flush.c: `map` held for writing */
int qcow2_begin(struct tv_qcow2 *image);
int qcow2_mark(struct tv_qcow2 *image, int dirty);
int qcow2_flush_image(struct tv_image *image);

/* qcow2_grow.c */
int qcow2_cover(struct tv_qcow2 *image);

/* qcow2_map.c */
enum qcow2_kind { QCOW2_HOLE, QCOW2_ZEROS, QCOW2_DATA, QCOW2_SQUEEZED };

struct qcow2_run {
    enum qcow2_kind kind;
    uint64_t length; /* bytes of the disk */
    uint64_t host;   /* of DATA: offset in the file of its first byte */
    uint64_t entry;  /* the first cluster's */
    int ours;        /* DATA: may be written in place */
};

int qcow2_find(struct tv_qcow2 *image, uint64_t at, uint64_t length, int flags, struct qcow2_run *run);
int qcow2_classify(struct tv_qcow2 *image, uint64_t entry, enum qcow2_kind *kind);
int qcow2_l2_for_write(struct tv_qcow2 *image, uint64_t at, struct qcow2_table **table);

/* qcow2_entries.c: what L2 entries refer to */
struct qcow2_span {
    uint64_t first, count; /* clusters */
};

struct qcow2_span qcow2_refers(const struct tv_qcow2 *image, uint64_t entry);
int qcow2_replace(struct tv_qcow2 *image, struct qcow2_table *table, uint64_t index, const uint64_t *made,
                  uint64_t count);

/* qcow2_read.c: read_here with `map` held */
int64_t qcow2_read_image(struct tv_image *image, const struct iovec *iov, int count, uint64_t at, int flags);
int qcow2_read_here(struct tv_qcow2 *image, void *to, uint64_t length, uint64_t at);

/* qcow2_write.c, qcow2_zero.c */
int64_t qcow2_write_image(struct tv_image *image, const struct iovec *iov, int count, uint64_t at);
int64_t qcow2_discard_image(struct tv_image *image, uint64_t at, uint64_t length);
int64_t qcow2_zero_image(struct tv_image *image, uint64_t at, uint64_t length, int unmap);

/* qcow2_inflate.c */
const char *qcow2_inflater_missing(uint32_t compression);
int qcow2_inflate(uint32_t compression, const uint8_t *from, uint64_t length, uint8_t *to, uint64_t size);

/* qcow2_repair.c */
int qcow2_repair(struct tv_qcow2 *image, struct tv_qcow2_error *error);

#endif
