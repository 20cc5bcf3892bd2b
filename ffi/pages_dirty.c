#define _GNU_SOURCE
#include "pages.h"

#include <errno.h>
#include <unistd.h>

/* Bitmaps of pages: a bit a page, in 64-bit words, the lowest page in the lowest bit. Each belongs to one thread for
 * the length of a call. */

/* The number of bits set in `words` 64-bit words. */
uint64_t tv_pages_count(const uint64_t *bitmap, uint64_t words)
{
    uint64_t count = 0;
    for (uint64_t i = 0; i < words; i++)
        count += (uint64_t)__builtin_popcountll(bitmap[i]);
    return count;
}

/* Set the bits of every page of a memfd that was ever touched (holes read as zero, and so does the destination's
 * fresh RAM). The dirty log must be on before. 0 or -errno; where holes can't be asked for, every bit is set. */
int tv_pages_mark_data(int memfd, uint64_t size, uint64_t *dirty)
{
    off_t end = 0;
    while ((uint64_t)end < size) {
        off_t start = lseek(memfd, end, SEEK_DATA);
        if (start < 0 && errno == ENXIO)
            return 0;
        if (start < 0)
            start = end, end = (off_t)size;
        else if ((end = lseek(memfd, start, SEEK_HOLE)) < 0)
            end = (off_t)size;
        if ((uint64_t)end > size)
            end = (off_t)size;
        uint64_t last = ((uint64_t)end + TV_PAGE_SIZE - 1) >> TV_PAGE_SHIFT;
        for (uint64_t page = (uint64_t)start >> TV_PAGE_SHIFT; page < last; page++)
            dirty[page / 64] |= 1ull << (page % 64);
    }
    return 0;
}
