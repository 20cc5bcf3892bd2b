#define _GNU_SOURCE
#include "pages_huge.h"

#include <errno.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* since Linux 6.1 */
#endif

#define CHEAP_NS 400000u  /* a huge page at hand takes 120 us, of which zeroing is most; small ones 700 */
#define LOOK_AGAIN 32u /* chunks that land small between two looks at what a huge one costs */

/* CPU time of this thread: other threads that want the CPU don't make a page dear. */
uint64_t tv_cpu_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* A moving mean: one in four is new. 0: nothing known yet. */
static uint64_t mean(uint64_t before, uint64_t now)
{
    return before ? (3 * before + now) / 4 : now + !now;
}

/* What `pages` fresh small pages cost. By the thread that lands. */
void tv_huge_small_cost(struct tv_landing *landing, uint64_t pages, uint64_t cost_ns)
{
    uint64_t now = mean(landing->small_ns, cost_ns * TV_CHUNK_PAGES / pages);
    __atomic_store_n(&landing->small_ns, now, __ATOMIC_RELAXED);
}

/* Whether to take the next chunk huge. By the thread that receives. */
int tv_huge_is_wanted(struct tv_landing *landing)
{
    if (landing->no_huge)
        return 0;
    if (landing->huge_ns <= CHEAP_NS || landing->huge_ns <= __atomic_load_n(&landing->small_ns, __ATOMIC_RELAXED))
        return 1;
    if (++landing->passed_over < LOOK_AGAIN)
        return 0;
    landing->passed_over = 0;
    return 1;
}

/* Make a chunk huge, if that can be had; if not it is small from here on. The kernel refuses a chunk that has no page at
 * all (it was truncated, for all it knows), so it gets its first one before. Nothing lands meanwhile. */
void tv_huge_take(struct tv_landing *landing, uint32_t slot, uint64_t chunk)
{
    uint64_t offset = chunk * TV_HUGE_SIZE, began = tv_cpu_ns();
    uint8_t *hva = landing->memory->regions[slot].hva + offset;
    int has_first = landing->landed[slot][offset / TV_PAGE_SIZE / 64] & 1;
    landing->chunks[slot][chunk] = TV_CHUNK_SMALL;
    if (!has_first && pwrite(landing->memfd[slot], "", 1, (off_t)offset) != 1)
        return; /* no memory: whoever lands a page says so */
    if (!madvise(hva, TV_HUGE_SIZE, MADV_COLLAPSE))
        landing->chunks[slot][chunk] = TV_CHUNK_HUGE;
    else if (errno == EINVAL)
        landing->no_huge = 1; /* unknown to this kernel, or denied by its administrator */
    /* A dear one counts with those before it, a cheap one at once: the host has some again. */
    uint64_t cost = tv_cpu_ns() - began;
    landing->huge_ns = cost < landing->huge_ns ? cost : mean(landing->huge_ns, cost);
}
