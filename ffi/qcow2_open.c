/* An image in memory: its L1 and refcount tables read and checked, all that they point to known as metadata. */
#define _GNU_SOURCE
#include "qcow2_image.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static const char REPAIR[] = "mend it (qemu-img check -r all IMAGE), or give an intact copy";

static int no_memory(struct tv_qcow2_error *error)
{
    return qcow2_wrong(error, "size", "free some", 0, "no memory for its tables");
}

static int unreadable(struct tv_qcow2_error *error, const char *field)
{
    return qcow2_wrong(error, field, "look after its storage", 0, "can't be read (%s)", strerror(errno));
}

/* Clusters [first, first + count) hold metadata, and nothing else does. */
static int claim(struct tv_qcow2 *image, const char *field, uint64_t index, uint64_t offset, uint64_t count,
                 struct tv_qcow2_error *error)
{
    uint64_t first = offset >> image->header.cluster_bits;
    for (uint64_t at = first; at < first + count; at++) {
        if (!at)
            return qcow2_wrong(error, field, REPAIR, offset, "entry %llu lies on the header",
                               (unsigned long long)index);
        int added = qcow2_set_add(&image->metadata, at);
        if (added < 0)
            return no_memory(error);
        if (!added)
            return qcow2_wrong(error, field, REPAIR, offset, "entry %llu lies on another table",
                               (unsigned long long)index);
    }
    return 0;
}

/* A table of offsets, in the host's order. */
static uint64_t *read_table(struct tv_qcow2 *image, const char *field, uint64_t offset, uint64_t count,
                            struct tv_qcow2_error *error)
{
    uint64_t *table = malloc(count ? 8 * count : 8);
    if (!table) {
        no_memory(error);
        return NULL;
    }
    if (qcow2_read_all(image->fd, table, 8 * count, offset)) {
        unreadable(error, field);
        free(table);
        return NULL;
    }
    for (uint64_t at = 0; at < count; at++)
        table[at] = __builtin_bswap64(table[at]);
    return table;
}

static int check_entry(struct tv_qcow2 *image, const char *field, uint64_t index, uint64_t offset, uint64_t reserved,
                       struct tv_qcow2_error *error)
{
    if (reserved)
        return qcow2_wrong(error, field, REPAIR, reserved, "reserved bits are set in entry %llu",
                           (unsigned long long)index);
    if (offset & (image->cluster_size - 1))
        return qcow2_wrong(error, field, REPAIR, offset, "entry %llu is not the beginning of a cluster",
                           (unsigned long long)index);
    if (offset >> image->header.cluster_bits >= image->end)
        return qcow2_wrong(error, field, REPAIR, offset, "entry %llu goes past the end of the file",
                           (unsigned long long)index);
    return claim(image, field, index, offset, 1, error);
}

static int load_l1(struct tv_qcow2 *image, struct tv_qcow2_error *error)
{
    uint64_t per_cluster = image->cluster_size / 8, count = image->header.l1_size;
    if (claim(image, "l1_table_offset", 0, image->header.l1_offset, (count + per_cluster - 1) / per_cluster, error))
        return -1;
    image->l1 = read_table(image, "l1_table", image->header.l1_offset, count, error);
    if (!image->l1)
        return -1;
    for (uint64_t at = 0; at < count; at++) {
        uint64_t entry = image->l1[at];
        if (!(entry & QCOW2_OFFSET) && !(entry & QCOW2_L1_RESERVED))
            image->l1[at] = 0;
        else if (check_entry(image, "l1_table", at, entry & QCOW2_OFFSET, entry & QCOW2_L1_RESERVED, error))
            return -1;
    }
    return 0;
}

static int load_reftable(struct tv_qcow2 *image, struct tv_qcow2_error *error)
{
    uint64_t count = (uint64_t)image->header.reftable_clusters << (image->header.cluster_bits - 3);
    if (claim(image, "refcount_table_offset", 0, image->header.reftable_offset, image->header.reftable_clusters, error))
        return -1;
    image->reftable = read_table(image, "refcount_table", image->header.reftable_offset, count, error);
    if (!image->reftable)
        return -1;
    image->reftable_size = count;
    for (uint64_t at = 0; at < count; at++)
        if (image->reftable[at] &&
            check_entry(image, "refcount_table", at, image->reftable[at], image->reftable[at] & 511, error))
            return -1;
    return 0;
}

static int load_end(struct tv_qcow2 *image, struct tv_qcow2_error *error)
{
    struct stat about;
    off_t end = fstat(image->fd, &about) ? -1 : S_ISBLK(about.st_mode) ? lseek(image->fd, 0, SEEK_END) : about.st_size;
    if (end < 0)
        return unreadable(error, "header");
    image->end = ((uint64_t)end + image->cluster_size - 1) >> image->header.cluster_bits;
    return 0;
}

/* Whoever writes to an image says which features it keeps up: none of the automatic ones. */
static int clear_auto(struct tv_qcow2 *image, struct tv_qcow2_error *error)
{
    uint8_t none[8] = {0};
    if (!image->header.autoclear)
        return 0;
    if (qcow2_write_all(image->fd, none, sizeof none, QCOW2_AT_AUTOCLEAR))
        return qcow2_wrong(error, "autoclear_features", "look after its storage", image->header.autoclear,
                           "can't be cleared (%s)", strerror(errno));
    image->header.autoclear = 0;
    return 0;
}

static int load_for_writing(struct tv_qcow2 *image, struct tv_qcow2_error *error)
{
    if (image->header.incompatible & QCOW2_CORRUPT)
        return qcow2_wrong(error, "incompatible_features", REPAIR, image->header.incompatible,
                           "somebody found it corrupt, so it is not written to");
    image->marked = (image->header.incompatible & QCOW2_DIRTY) != 0;
    image->bounce = malloc(2 * (size_t)image->cluster_size);
    if (!image->bounce)
        return no_memory(error);
    if (image->header.autoclear & QCOW2_BITMAPS)
        return qcow2_wrong(error, "autoclear_features",
                           "remove them (qemu-img bitmap --remove IMAGE NAME), or give readonly=on",
                           image->header.autoclear, "bitmaps that writes would make wrong, not supported yet");
    if (load_reftable(image, error) || clear_auto(image, error))
        return -1;
    return qcow2_repair(image, error);
}

static int load(struct tv_qcow2 *image, struct tv_qcow2_error *error)
{
    if (tv_qcow2_probe(image->fd, &image->header, error))
        return -1;
    image->cluster_size = 1u << image->header.cluster_bits;
    image->l2_bits = image->header.cluster_bits - 3;
    image->block_bits = image->header.cluster_bits + 3 - image->header.refcount_order;
    const char *missing = qcow2_inflater_missing(image->header.compression);
    if (missing)
        return qcow2_wrong(error, "compression_type", "install it (Debian: apt install zlib1g libzstd1)",
                           image->header.compression, "this system has no %s, which that needs", missing);
    uint32_t bytes = image->writable ? QCOW2_L2_CACHE : QCOW2_BACKING_CACHE;
    if (qcow2_cache_make(&image->l2, bytes, image->cluster_size) ||
        qcow2_cache_make(&image->blocks, QCOW2_REF_CACHE, image->cluster_size))
        return no_memory(error);
    if (load_end(image, error) || load_l1(image, error))
        return -1;
    return image->writable ? load_for_writing(image, error) : 0;
}

static const struct tv_image_ops OPS = {
    .read = qcow2_read_image,
    .write = qcow2_write_image,
    .flush = qcow2_flush_image,
    .discard = qcow2_discard_image,
    .write_zeroes = qcow2_zero_image,
};

/* `fd` stays the caller's, open as long as the image is, and for writing if `writable`; the caller holds a lock that
 * keeps others from writing. NULL, with `error`. May wait for the storage. */
struct tv_qcow2 *tv_qcow2_open(int fd, int writable, struct tv_qcow2_error *error)
{
    memset(error, 0, sizeof *error);
    struct tv_qcow2 *image = calloc(1, sizeof *image);
    if (!image) {
        no_memory(error);
        return NULL;
    }
    pthread_rwlockattr_t kind;
    pthread_rwlockattr_init(&kind);
    pthread_rwlockattr_setkind_np(&kind, PTHREAD_RWLOCK_PREFER_WRITER_NONRECURSIVE_NP);
    pthread_rwlock_init(&image->map, &kind);
    pthread_rwlockattr_destroy(&kind);
    pthread_mutex_init(&image->tables, NULL);
    pthread_mutex_init(&image->inflating, NULL);
    image->image.ops = &OPS;
    image->fd = fd;
    image->writable = writable;
    image->backing_fd = -1;
    if (load(image, error)) {
        tv_qcow2_close(image);
        return NULL;
    }
    return image;
}

/* Before the first request: what is behind the image, another one (its owner stays the caller) or a raw file. */
void tv_qcow2_back(struct tv_qcow2 *image, struct tv_qcow2 *qcow2, int raw_fd, uint64_t raw_size)
{
    image->backing = qcow2;
    image->backing_fd = raw_fd;
    image->backing_size = qcow2 ? qcow2->header.size : raw_size;
}

/* Writes nothing: all is in the file. */
void tv_qcow2_close(struct tv_qcow2 *image)
{
    if (!image)
        return;
    qcow2_cache_free(&image->l2);
    qcow2_cache_free(&image->blocks);
    qcow2_set_free(&image->metadata);
    qcow2_set_free(&image->resting);
    qcow2_set_free(&image->given_up);
    for (uint32_t at = 0; at < QCOW2_INFLATED; at++)
        free(image->inflated[at].bytes);
    free(image->l1);
    free(image->reftable);
    free(image->bounce);
    free(image->squeezed);
    pthread_rwlock_destroy(&image->map);
    pthread_mutex_destroy(&image->tables);
    pthread_mutex_destroy(&image->inflating);
    free(image);
}

struct tv_image *tv_qcow2_image(struct tv_qcow2 *image)
{
    return &image->image;
}

uint64_t tv_qcow2_size(const struct tv_qcow2 *image)
{
    return image->header.size;
}

/* From any thread. */
void tv_qcow2_count(const struct tv_qcow2 *image, struct tv_qcow2_counts *into)
{
    const uint64_t *from = (const uint64_t *)&image->counts;
    for (size_t at = 0; at < sizeof *into / sizeof *from; at++)
        ((uint64_t *)into)[at] = __atomic_load_n(&from[at], __ATOMIC_RELAXED);
}
