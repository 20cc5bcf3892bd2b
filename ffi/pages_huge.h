/* Huge pages under RAM in which pages land: taken where the host has them at hand, and never for a guest of few pages.
 *
 * A chunk is 2 MiB of a region, aligned in file and mapping. A frame that fills a good part of one says that the guest
 * uses that memory; then the whole chunk is made one huge page, which costs a seventh of 512 small ones (one fault, one
 * page to account for), and its pages are received in place. What the guest never touched stays unallocated: elsewhere
 * pages land one by one.
 *
 * The way is MADV_COLLAPSE, which asks for the page here and now, whatever the host's shmem_enabled says short of
 * "deny": that knob is about pages that the kernel takes by itself. The host may have none at hand. It then compacts
 * memory, or gets memory from its own host, for longer than small pages would take: so what a chunk costs either way is
 * measured, and the cheaper way taken, with a look at the other one now and then.
 */
#ifndef TV_PAGES_HUGE_H
#define TV_PAGES_HUGE_H
#include <stdint.h>

#include "pages.h"

#define TV_CHUNK_PAGES (TV_HUGE_SIZE / TV_PAGE_SIZE)

enum tv_chunk {
    TV_CHUNK_UNKNOWN = 0,
    TV_CHUNK_HUGE = 1,  /* all of its memory is there */
    TV_CHUNK_SMALL = 2, /* pages land one by one; not asked again */
};

uint64_t tv_cpu_ns(void);
int tv_huge_is_wanted(struct tv_landing *landing);
void tv_huge_take(struct tv_landing *landing, uint32_t slot, uint64_t chunk);
void tv_huge_small_cost(struct tv_landing *landing, uint64_t pages, uint64_t cost_ns);

/* Whether the memory of a page is there as part of a huge one. */
static inline int tv_huge_is_there(const struct tv_landing *landing, uint32_t slot, uint64_t page)
{
    uint64_t chunk = page / TV_CHUNK_PAGES;
    return chunk < landing->chunk_count[slot] && landing->chunks[slot][chunk] == TV_CHUNK_HUGE;
}

#endif
