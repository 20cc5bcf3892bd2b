/* A raw image: its sectors are those of a file or block device. Stateless, so its workers need no lock. */
#ifndef TV_RAW_H
#define TV_RAW_H
#include "image.h"

struct tv_raw {
    struct tv_image image;
    int fd;
    uint8_t block_device;
};

void tv_raw_init(struct tv_raw *raw);

#endif
