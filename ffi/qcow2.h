/* qcow2 images, versions 2 and 3 (QEMU's docs/interop/qcow2.txt): read, written, flushed and mended.
 *
 * An image is hostile until proven otherwise: each number in it is checked before it is used, every walk and every
 * allocation has a bound, and nothing but the image's own file is ever written. What is wrong at opening is told by
 * field, value and remedy; what turns up later is an I/O error (EIO) to the guest, and `spoilt` counts it.
 *
 * Order of writing. What a call has done is in the file when it returns. A write into a new cluster writes the data
 * first, while the cluster counts as free; then its refcount; then the L2 entry. One that is given up loses its L2
 * entry first and its refcount then. Each is one write of a few bytes inside one page, so a process that is killed at
 * any instant leaves, between two of these, a cluster that is counted and not used (a leak), and never one that is used
 * and not counted.
 *
 * A host that loses power may have kept any part of that. So the first step after a flush that changes a refcount marks
 * the image dirty (version 3), and makes that durable: whoever opens it next counts the references anew
 * (qcow2_repair.c), QEMU does too. A flush without such steps since the last one takes the mark off. A cluster that was
 * given up is not used again before that is durable.
 *
 * Locks. `map` is held for reading by requests that change no mapping, for their I/O too: so no cluster is given back
 * under a write that is on its way to it. All that changes a mapping holds it for writing. `tables` guards the caches
 * among readers, and is only held while memory is looked at or a table read.
 *
 * Bounds. L1 and refcount table as large as QEMU takes them; cached tables, clusters that were inflated, and clusters
 * that wait for a flush within the limits of qcow2_image.h. */
#ifndef TV_QCOW2_H
#define TV_QCOW2_H
#include <stdint.h>
#include <sys/uio.h>

#include "image.h"

#define TV_QCOW2_NAME_MAX 1024 /* a backing file's name has at most 1023 bytes */

/* What is wrong with an image, for a user to read: `problem` is empty where nothing is. */
struct tv_qcow2_error {
    char field[40];
    char value[40];
    char problem[200];
    char remedy[200];
};

/* What its header says, checked. */
struct tv_qcow2_header {
    uint32_t version;
    uint32_t cluster_bits;
    uint32_t refcount_order;
    uint32_t compression; /* 0 zlib, 1 zstd */
    uint64_t size;        /* bytes of the virtual disk */
    uint64_t l1_offset;
    uint32_t l1_size;
    uint64_t reftable_offset;
    uint32_t reftable_clusters;
    uint32_t snapshots;
    uint64_t incompatible, autoclear;
    uint8_t owns_more;                     /* an extension that is not known here, and may have clusters of its own */
    char backing_name[TV_QCOW2_NAME_MAX];  /* empty: none */
    char backing_format[16];               /* empty: not said */
};

struct tv_qcow2_counts {
    uint64_t spoilt;    /* accesses that failed because the image contradicts itself */
    uint64_t allocated; /* clusters */
    uint64_t freed;
    uint64_t inflated;
    uint64_t mended;    /* leaks that were found and freed at opening, and refcounts that were put right */
};

struct tv_qcow2;

int tv_qcow2_probe(int fd, struct tv_qcow2_header *into, struct tv_qcow2_error *error);
struct tv_qcow2 *tv_qcow2_open(int fd, int writable, struct tv_qcow2_error *error);
void tv_qcow2_back(struct tv_qcow2 *image, struct tv_qcow2 *qcow2, int raw_fd, uint64_t raw_size);
void tv_qcow2_close(struct tv_qcow2 *image);
uint64_t tv_qcow2_size(const struct tv_qcow2 *image);
void tv_qcow2_count(const struct tv_qcow2 *image, struct tv_qcow2_counts *into);

struct tv_image *tv_qcow2_image(struct tv_qcow2 *image);
/* All that was written is durable, by way of a descriptor of the caller's, and the image is not marked dirty any more.
 * 0, or -1 with errno. Any thread, while workers run. */
int tv_qcow2_settle(struct tv_qcow2 *image, int sync_fd);
/* Open a file for reading whose path, symbolic links and all, stays beneath a folder. -1 with errno, EXDEV: it leaves
 * it. */
int tv_open_beneath(int folder_fd, const char *path);

#endif
