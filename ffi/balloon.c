#include "balloon.h"

#define PFN_SHIFT 12 /* of the interface, whatever the host's pages are */

_Static_assert(PFN_SHIFT == TV_PAGE_SHIFT, "a page of the list is a page of the dirty bitmap");

static void add(uint64_t *counter, uint64_t more)
{
    __atomic_store_n(counter, *counter + more, __ATOMIC_RELAXED); /* the worker is the only writer */
}

/* Give back [gpa, gpa + len), whole pages, as far as it is RAM, in pieces. Gives how many pages were none, or
 * TV_STOPPED when asked to stop. */
static int64_t give_back(struct tv_balloon *balloon, struct tv_memory *mem, uint64_t gpa, uint64_t len)
{
    int64_t refused = 0;
    while (len) {
        if (tv_worker_stopping(&balloon->worker))
            return TV_STOPPED;
        struct tv_region *region = tv_region_of(mem, gpa, TV_PAGE_SIZE);
        uint64_t piece = len < TV_BALLOON_PIECE ? len : TV_BALLOON_PIECE;
        if (!region) { /* a list may name 16 TiB, but no more than TV_BALLOON_LIST pages in a row */
            refused++;
            piece = TV_PAGE_SIZE;
        } else {
            uint64_t left = region->size - (gpa - region->gpa);
            piece = piece < left ? piece : left;
            int error = tv_memory_give_back(region, gpa - region->gpa, piece);
            tv_mark_dirty(mem, gpa, piece);
            add(error ? &balloon->failed : &balloon->released, piece >> PFN_SHIFT);
            add(&balloon->ranges, 1);
        }
        gpa += piece;
        len -= piece;
    }
    return refused;
}

/* Shell's sort: in place, without a worst case that a guest could choose. */
static void sort(uint32_t *list, uint32_t count)
{
    static const uint32_t gaps[] = {701, 301, 132, 57, 23, 10, 4, 1};
    for (uint32_t g = 0; g < sizeof gaps / sizeof gaps[0]; g++) {
        uint32_t gap = gaps[g];
        for (uint32_t i = gap; i < count; i++) {
            uint32_t value = list[i], at = i;
            for (; at >= gap && list[at - gap] > value; at -= gap)
                list[at] = list[at - gap];
            list[at] = value;
        }
    }
}

/* The pages of `list`, in ranges as long as they are. As give_back. */
static int64_t inflate(struct tv_balloon *balloon, struct tv_memory *mem, uint32_t *list, uint32_t count)
{
    int64_t refused = 0;
    sort(list, count);
    for (uint32_t i = 0, run; i < count; i += run) {
        uint64_t first = list[i], after = first + 1;
        for (run = 1; i + run < count && list[i + run] <= after; run++) /* equal ones: given twice */
            after = (uint64_t)list[i + run] + 1;
        int64_t none = give_back(balloon, mem, first << PFN_SHIFT, (after - first) << PFN_SHIFT);
        if (none < 0)
            return none;
        refused += none;
    }
    return refused;
}

static int64_t deflate(struct tv_memory *mem, const uint32_t *list, uint32_t count)
{
    int64_t refused = 0;
    for (uint32_t i = 0; i < count; i++)
        refused += !tv_region_of(mem, (uint64_t)list[i] << PFN_SHIFT, TV_PAGE_SIZE);
    return refused; /* nothing else to do: the next touch brings memory */
}

/* Section 5.5.6: an array of 32-bit page numbers, in one readable buffer or several. */
static int64_t serve_list(struct tv_balloon *balloon, struct tv_queue *queue, struct tv_chain *chain)
{
    uint64_t bytes = chain->readable_bytes, limit = 4ull * TV_BALLOON_LIST * TV_BALLOON_LISTS;
    int inflating = queue->index == TV_BALLOON_INFLATE;
    uint64_t refused = chain->writable_bytes || bytes % 4 || !bytes;
    if (bytes > limit) {
        add(&balloon->refused, bytes / 4);
        return 0;
    }
    for (uint64_t offset = 0; offset + 4 <= bytes; offset += 4ull * TV_BALLOON_LIST) {
        uint64_t left = (bytes - offset) / 4;
        uint32_t count = left < TV_BALLOON_LIST ? (uint32_t)left : TV_BALLOON_LIST;
        tv_chain_read(chain, offset, balloon->list, 4ull * count);
        if (inflating)
            queue->wrote = 1; /* it may have been code */
        int64_t none = inflating ? inflate(balloon, queue->memory, balloon->list, count)
                                 : deflate(queue->memory, balloon->list, count);
        if (none < 0)
            return none;
        refused += (uint64_t)none;
    }
    add(inflating ? &balloon->inflated : &balloon->deflated, bytes / 4);
    add(&balloon->refused, refused);
    return 0;
}

/* Section 5.5.6.7: the buffers themselves are the free pages. What is not a whole page of them stays. */
static int64_t serve_report(struct tv_balloon *balloon, struct tv_queue *queue, struct tv_chain *chain)
{
    uint64_t refused = !!chain->readable_bytes, pages = 0;
    for (uint32_t i = chain->readable; i < chain->readable + chain->writable; i++) {
        uint64_t first = (chain->gpa[i] + TV_PAGE_SIZE - 1) & ~(TV_PAGE_SIZE - 1);
        uint64_t after = (chain->gpa[i] + chain->iov[i].iov_len) & ~(TV_PAGE_SIZE - 1);
        refused += first != chain->gpa[i] || after != chain->gpa[i] + chain->iov[i].iov_len;
        if (first >= after)
            continue;
        queue->wrote = 1;
        if (give_back(balloon, queue->memory, first, after - first) < 0)
            return TV_STOPPED;
        pages += (after - first) >> PFN_SHIFT;
    }
    add(&balloon->reported, pages);
    add(&balloon->refused, refused);
    return 0; /* nothing was written, as its driver sees it */
}

static int64_t serve(struct tv_worker *worker, struct tv_queue *queue, struct tv_chain *chain)
{
    struct tv_balloon *balloon = (struct tv_balloon *)worker;
    return queue->index == TV_BALLOON_REPORT ? serve_report(balloon, queue, chain)
                                             : serve_list(balloon, queue, chain);
}

void tv_balloon_init(struct tv_balloon *balloon)
{
    balloon->worker.serve = serve;
}
