/* A raw image: its sectors are those of a file or block device. For direct I/O it is open twice: what is not aligned as
 * the medium wants it goes through an aligned buffer, or, where not even whole blocks of the medium are meant, through
 * the page cache, which the kernel keeps in step with direct I/O as long as both don't write the same block at the same
 * time: that is what `blocks` is for. */
#ifndef TV_RAW_H
#define TV_RAW_H
#include <pthread.h>

#include "image.h"

struct tv_raw {
    struct tv_image image;
    int fd;
    int direct_fd; /* -1: not direct */
    uint8_t block_device;
    uint8_t in_memory; /* its file system has no medium but the page cache */
    uint32_t memory_align, block_align; /* of direct I/O: powers of two, at most 65536 */
    pthread_rwlock_t blocks; /* read: direct writes; write: others. Only if blocks are larger than sectors */
};

void tv_raw_init(struct tv_raw *raw);
int tv_raw_alignment(int fd, uint32_t *memory, uint32_t *block);

#endif
