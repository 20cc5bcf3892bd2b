#define _GNU_SOURCE
#include "memory.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

/* Map `size` bytes of a file, without reserving swap, at a multiple of TV_HUGE_SIZE: only then can a huge page of the file
 * be mapped as one. `share` is MAP_SHARED, or MAP_PRIVATE for what is not to reach the file. NULL and errno when that
 * fails. Any thread. */
static void *map_file(int fd, uint64_t size, int share)
{
    uint8_t *room = mmap(NULL, size + TV_HUGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED)
        return NULL;
    uint64_t before = -(uintptr_t)room & (TV_HUGE_SIZE - 1);
    uint8_t *at = room + before;
    void *mapped = mmap(at, size, PROT_READ | PROT_WRITE, share | MAP_NORESERVE | MAP_FIXED, fd, 0);
    if (mapped == MAP_FAILED) {
        int error = errno;
        munmap(room, size + TV_HUGE_SIZE);
        errno = error;
        return NULL;
    }
    if (before)
        munmap(room, before);
    munmap(at + size, TV_HUGE_SIZE - before);
    return mapped;
}

void *tv_memory_map(int memfd, uint64_t size)
{
    return map_file(memfd, size, MAP_SHARED);
}

void *tv_memory_map_private(int fd, uint64_t size)
{
    return map_file(fd, size, MAP_PRIVATE);
}

/* Takes some 40 ms a GiB that was touched, without the GIL (the mmap module unmaps with it). Any thread; nothing may
 * look at the mapping any more. */
void tv_memory_unmap(void *mapped, uint64_t size)
{
    munmap(mapped, size);
}

/* Free the memory of whole pages: they read as zero from then on. Gives 0 or an errno, after which some may be gone.
 * Whoever does it while the guest runs marks them dirty afterwards. Any thread; under the mapping is a memfd, which gets
 * a hole there, and no process has the pages any more. */
int tv_memory_give_back(struct tv_region *region, uint64_t offset, uint64_t len)
{
    int result;
    __atomic_store_n(&region->given_back, 1, __ATOMIC_RELAXED);
    do
        result = madvise(region->hva + offset, len, MADV_REMOVE);
    while (result && errno == EINTR);
    return result ? errno : 0;
}

/* Copy into guest RAM and mark it dirty. 0, or -1 when the range is not inside one region. Any thread. */
int tv_memory_write(struct tv_memory *mem, uint64_t gpa, const uint8_t *from, uint64_t len)
{
    void *to = tv_ptr(mem, gpa, len);
    if (!to)
        return -1;
    memcpy(to, from, len);
    tv_mark_dirty(mem, gpa, len);
    return 0;
}

/* Copy out of guest RAM. 0, or -1 when the range is not inside one region. Any thread. */
int tv_memory_read(struct tv_memory *mem, uint64_t gpa, uint8_t *to, uint64_t len)
{
    void *from = tv_ptr(mem, gpa, len);
    if (!from)
        return -1;
    memcpy(to, from, len);
    return 0;
}

/* Move the bits of a dirty log that other threads may be setting into `into`; the log is left clear. A bit set
 * while this runs stays in the log or arrives in `into`, never neither. */
void tv_dirty_take(uint64_t *log, uint64_t *into, uint64_t words)
{
    for (uint64_t word = 0; word < words; word++) {
        if (__atomic_load_n(&log[word], __ATOMIC_RELAXED))
            into[word] |= __atomic_exchange_n(&log[word], 0, __ATOMIC_ACQ_REL);
    }
}
