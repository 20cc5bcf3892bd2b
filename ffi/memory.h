/* Guest RAM as the C side sees it: a small table of regions, each one mapped file.
 *
 * Invariants
 *  - The table and the hook are set by Python before any worker or vCPU thread starts and not changed while one runs.
 *  - Regions are sorted by gpa, do not overlap, and gpa, size and hva are 4 KiB aligned.
 *  - Every pointer handed out lies, with its whole length, inside ONE region.
 *  - `dirty` has one bit per 4 KiB page of the region; it is set with atomic OR by any thread *after* the bytes
 *    are written (and before the guest is told), and cleared by the migration sender *before* it copies.
 */
#ifndef TV_MEMORY_H
#define TV_MEMORY_H
#include <stddef.h>
#include <stdint.h>

#define TV_PAGE_SHIFT 12
#define TV_PAGE_SIZE 4096ull
#define TV_HUGE_SIZE (2ull << 20) /* of a huge page; mappings and files are aligned to it alike */
#define TV_MAX_REGIONS 8

struct tv_region {
    uint64_t gpa;
    uint64_t size;
    uint8_t *hva;
    uint64_t *dirty;
    uint32_t given_back; /* atomic: its guest has given memory of it back (tv_memory_give_back) */
    uint8_t rom; /* of the CPUs alone: a device, or the VMM on its behalf, finds nothing there */
};

/* Called before the guest can learn of what a device wrote, in the device's thread: by whoever publishes a used ring's
 * index (tv_queue_publish). For a CPU that keeps copies of what it reads, as one that translates code does. */
typedef void (*tv_memory_hook)(void *argument);

struct tv_memory {
    uint32_t count;
    struct tv_region regions[TV_MAX_REGIONS];
    tv_memory_hook before_told; /* NULL: nobody asks */
    void *before_told_argument;
};

/* The region that holds [gpa, gpa + len), or NULL. Never wraps: the arithmetic is done on offsets. */
static inline struct tv_region *tv_region_of(struct tv_memory *mem, uint64_t gpa, uint64_t len)
{
    for (uint32_t i = 0; i < mem->count; i++) {
        struct tv_region *region = &mem->regions[i];
        if (gpa < region->gpa || region->rom)
            continue;
        uint64_t offset = gpa - region->gpa;
        if (offset <= region->size && len <= region->size - offset)
            return region;
    }
    return NULL;
}

/* Host address of [gpa, gpa + len), or NULL when any byte of it is outside RAM. */
static inline void *tv_ptr(struct tv_memory *mem, uint64_t gpa, uint64_t len)
{
    struct tv_region *region = tv_region_of(mem, gpa, len);
    return region ? region->hva + (gpa - region->gpa) : NULL;
}

/* Mark the pages of [gpa, gpa + len) dirty. Call after the write; a range outside RAM is ignored. */
static inline void tv_mark_dirty(struct tv_memory *mem, uint64_t gpa, uint64_t len)
{
    struct tv_region *region = tv_region_of(mem, gpa, len);
    if (!region || !len)
        return;
    uint64_t first = (gpa - region->gpa) >> TV_PAGE_SHIFT;
    uint64_t last = (gpa - region->gpa + len - 1) >> TV_PAGE_SHIFT;
    for (uint64_t page = first; page <= last; page++)
        __atomic_fetch_or(&region->dirty[page / 64], 1ull << (page % 64), __ATOMIC_RELEASE);
}

static inline void tv_memory_before_told(struct tv_memory *mem)
{
    if (mem->before_told)
        mem->before_told(mem->before_told_argument);
}

int tv_memory_give_back(struct tv_region *region, uint64_t offset, uint64_t len);
void *tv_memory_map(int memfd, uint64_t size);
void *tv_memory_map_private(int fd, uint64_t size);
void tv_memory_unmap(void *mapped, uint64_t size);
int tv_memory_write(struct tv_memory *mem, uint64_t gpa, const uint8_t *from, uint64_t len);
int tv_memory_read(struct tv_memory *mem, uint64_t gpa, uint8_t *to, uint64_t len);
void tv_dirty_take(uint64_t *log, uint64_t *into, uint64_t words);

#endif
