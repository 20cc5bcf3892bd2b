/* A small guest RAM for a harness: what it holds if no device writes, and where a device may write.
 *
 * Regions are separate heap blocks, so that the sanitizer sees a byte outside one: two that touch, one with a hole around
 * it, and a large one that is there only so that a chain can name more than TV_CHAIN_BYTES, and is not compared. */
#ifndef TV_FUZZ_RAM_H
#define TV_FUZZ_RAM_H
#include <sys/mman.h>

#include "fuzz.h"
#include "memory.h"

#define REGIONS 4
#define LARGE 3

static const struct {
    uint64_t gpa, size;
} LAYOUT[REGIONS] = {{0, 0x8000}, {0x8000, 0x2000}, {0x100000, 0x1000}, {0x100000000, 1u << 30}};

static struct tv_memory memory;
static uint8_t *expected[LARGE]; /* what RAM holds if no device writes */
static uint8_t *allowed[LARGE];  /* bytes that a device may write */

static inline void make_ram(void)
{
    for (int at = 0; at < REGIONS; at++) {
        struct tv_region *region = &memory.regions[at];
        *region = (struct tv_region){.gpa = LAYOUT[at].gpa, .size = LAYOUT[at].size};
        region->dirty = calloc((LAYOUT[at].size / TV_PAGE_SIZE + 63) / 64, 8);
        if (at == LARGE) {
            region->hva = mmap(NULL, LAYOUT[at].size, PROT_READ | PROT_WRITE,
                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            continue;
        }
        region->hva = aligned_alloc(TV_PAGE_SIZE, LAYOUT[at].size);
        expected[at] = malloc(LAYOUT[at].size);
        allowed[at] = malloc(LAYOUT[at].size);
    }
}

/* All zeros, clean, and no device may write anywhere. */
static inline void reset_ram(void)
{
    for (int at = 0; at < LARGE; at++) {
        memset(memory.regions[at].hva, 0, LAYOUT[at].size);
        memset(expected[at], 0, LAYOUT[at].size);
        memset(allowed[at], 0, LAYOUT[at].size);
        memory.regions[at].dirty[0] = 0;
    }
}

/* What devices wrote into the large one, and would pile up. */
static inline void forget_large(void)
{
    madvise(memory.regions[LARGE].hva, LAYOUT[LARGE].size, MADV_DONTNEED);
}

/* Which of LAYOUT holds all of [gpa, gpa + length), found the slow way; -1 when none does. */
static inline int region_of(uint64_t gpa, uint64_t length)
{
    for (int i = 0; i < (int)memory.count; i++) {
        unsigned __int128 end = (unsigned __int128)gpa + length;
        if (gpa >= LAYOUT[i].gpa && end <= (unsigned __int128)LAYOUT[i].gpa + LAYOUT[i].size)
            return i;
    }
    return -1;
}

static inline void guest_writes(uint64_t gpa, const void *from, uint64_t length)
{
    int at = region_of(gpa, length);
    if (at < 0 || at >= LARGE)
        return;
    memcpy(memory.regions[at].hva + (gpa - LAYOUT[at].gpa), from, length);
    memcpy(expected[at] + (gpa - LAYOUT[at].gpa), from, length);
}

static inline void allow(uint64_t gpa, uint64_t length)
{
    int at = region_of(gpa, length);
    if (at >= 0 && at < LARGE)
        memset(allowed[at] + (gpa - LAYOUT[at].gpa), 1, length);
}

/* Nothing has changed but what a device might write, and that is marked dirty. */
static inline void check_memory(void)
{
    for (int at = 0; at < LARGE; at++) {
        const uint8_t *now = memory.regions[at].hva;
        if (!memcmp(now, expected[at], LAYOUT[at].size))
            continue;
        for (uint64_t i = 0; i < LAYOUT[at].size; i++) {
            if (now[i] == expected[at][i])
                continue;
            uint64_t page = i >> TV_PAGE_SHIFT;
            FUZZ_CHECK(allowed[at][i]);
            FUZZ_CHECK(memory.regions[at].dirty[page / 64] >> page % 64 & 1);
        }
    }
}

#endif
