/* What a disk's sectors are kept in: the seam between virtio-blk (block.c) and the formats of images (raw.c, …).
 *
 * A format is a struct that begins with struct tv_image, and a table of operations. Python makes it, and closes it when
 * no worker runs (trivmm/virtio/block/image.py says what it does there). All queue workers of a disk call the operations
 * of one image at the same time, without the GIL: what they share is guarded by the format's own lock, and none is held
 * between two calls.
 *
 * Invariants
 *  - [at, at + length) lies in the image's capacity and, if readonly, nothing but `read` and `flush` is called.
 *    A move's first call has `at` and length in whole sectors of 512 bytes; after one that moved fewer, what is left.
 *    `iov` has at most TV_QUEUE_MAX segments, of any length and alignment, in all at most TV_BLOCK_PIECE. They are guest
 *    memory, which changes while it is looked at: what is checked is a copy.
 *  - An operation may do less than it was asked for, and is called again for the rest, since between two calls the
 *    worker looks whether it is to stop: one call is a fraction of device_stop even on a slow disk.
 *  - A request that is stopped between two calls is done again as a whole later, perhaps by another process: whatever
 *    an operation has done, doing it again with the same arguments is harmless.
 *  - It gives the bytes done, more than 0, or -1 with errno. EINTR: the same call again. Everything else is an I/O error
 *    to the guest: the image stays usable and what was there before stays intact. 0 means that there is nothing there,
 *    since the image has shrunk: an I/O error too.
 *  - Nothing waits in memory for a flush, or for the close: what a call has done is in the files, perhaps not on the
 *    medium, when it returns. So a process that dies loses nothing, and closing an image writes nothing.
 */
#ifndef TV_IMAGE_H
#define TV_IMAGE_H
#include <stdint.h>
#include <sys/uio.h>

#define TV_IMAGE_NOWAIT 1 /* rather -1 with EAGAIN than wait for the medium; a format may always say so */

struct tv_image;

struct tv_image_ops {
    int64_t (*read)(struct tv_image *image, const struct iovec *iov, int count, uint64_t at, int flags);
    int64_t (*write)(struct tv_image *image, const struct iovec *iov, int count, uint64_t at);
    /* What was written before the call is on the medium after it, with all that is needed to find it. 0, or -1. */
    int (*flush)(struct tv_image *image);
    /* A hint: the sectors are not needed any more. Whatever is read there later, it is what was there or zeroes. */
    int64_t (*discard)(struct tv_image *image, uint64_t at, uint64_t length);
    /* Zeroes are read there from now on. `unmap`: they need not take room. */
    int64_t (*write_zeroes)(struct tv_image *image, uint64_t at, uint64_t length, int unmap);
    /* May be NULL: never. Where all of a move lies as it is in a file, so that the kernel may make it while the worker
     * goes on: 1, with descriptor and offset. What is there stays there until it is done, also if sectors are discarded
     * meanwhile. 0: not so, or not with such segments; a read or write it is then. Never waits. */
    int (*where)(struct tv_image *image, const struct iovec *iov, int count, uint64_t at, int write, int *fd,
                 uint64_t *offset);
};

struct tv_image {
    const struct tv_image_ops *ops;
    uint8_t waits; /* every move waits for the medium: no page cache is between */
};

#endif
