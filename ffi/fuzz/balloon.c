/* Hostile lists and reports of pages through the balloon (ffi/balloon.c), with the real ring under it.
 *
 * A case is a small RAM of memfds, with a ROM in the hole between them, and one to three chains for a queue: page numbers
 * inside, outside, at the edges, in the ROM, many times over, in lists that are cut, split or far too long; reports of
 * ranges that begin and end anywhere. Now and then the worker is to stop. Then:
 *  - a page that is zero and was not is one that a chain named, whole, in RAM, and it is marked dirty;
 *  - every page that a well-formed chain named is zero;
 *  - the ROM, and all other pages, are as they were;
 *  - a chain that went back left its queue where it was.
 *
 * links: balloon.c ring.c memory.c worker.c park.c
 * short: 2000
 * full: 200000
 */
#define _GNU_SOURCE
#include "fuzz.h"

#include <sys/eventfd.h>
#include <sys/mman.h>

#include "balloon.h"

#define REGIONS 3
#define ROM 1
#define PAGES 64u /* of each region */
#define RING 0x0 /* in the first region: pages 0 to 2 are rings, 3 to 6 the lists */
#define LIST 0x3000
#define LIST_BYTES 0x4000u
#define FIRST 7u /* the first page that is compared */
#define SIZE 8u
#define BYTES (PAGES * TV_PAGE_SIZE)

static const uint64_t AT[REGIONS] = {0, 0x80000, 0x100000000};

static struct tv_memory memory;
static struct tv_balloon *balloon;
static uint32_t isr;
static struct tv_irq irq = {.fd = -1, .isr = &isr};
static uint8_t named[REGIONS][PAGES]; /* by a chain */
static struct {
    uint64_t lists, reports, gone, kept, back;
} met;

static void name_page(uint64_t pfn)
{
    for (uint32_t at = 0; at < REGIONS; at++)
        if (pfn >= AT[at] / TV_PAGE_SIZE && pfn < AT[at] / TV_PAGE_SIZE + PAGES)
            named[at][pfn - AT[at] / TV_PAGE_SIZE] = 1;
}

static uint32_t some_pfn(struct fuzz *fuzz)
{
    uint64_t first = AT[fuzz_below(fuzz, REGIONS)] / TV_PAGE_SIZE;
    switch (fuzz_below(fuzz, 24)) {
    case 0:
        return (uint32_t)fuzz_next(fuzz);
    case 1:
        return (uint32_t)(first + PAGES); /* behind it */
    case 2:
        return (uint32_t)(first ? first - 1 : UINT32_MAX);
    case 3:
        return UINT32_MAX - (uint32_t)fuzz_below(fuzz, 4);
    default:
        return (uint32_t)(first + (first ? 0 : FIRST) + fuzz_below(fuzz, PAGES - (first ? 0 : FIRST)));
    }
}

static void put_descriptor(uint32_t at, uint64_t gpa, uint32_t length, uint16_t flags)
{
    uint8_t *to = memory.regions[0].hva + RING + 16 * at;
    uint16_t next = (uint16_t)(at + 1);
    memcpy(to, &gpa, 8);
    memcpy(to + 8, &length, 4);
    memcpy(to + 12, &flags, 2);
    memcpy(to + 14, &next, 2);
}

/* A list in one to four buffers, some of which may be the device's to write. Gives how many descriptors. */
static uint32_t make_list(struct fuzz *fuzz, int inflating)
{
    uint32_t count = (uint32_t)fuzz_below(fuzz, fuzz_one_in(fuzz, 4) ? LIST_BYTES / 4 : 64), parts = 0;
    uint32_t *list = (uint32_t *)(memory.regions[0].hva + LIST);
    for (uint32_t i = 0; i < count; i++)
        list[i] = i && list[i - 1] != UINT32_MAX && fuzz_one_in(fuzz, 3) ? list[i - 1] + 1 : some_pfn(fuzz);
    uint32_t bytes = 4 * count + (fuzz_one_in(fuzz, 8) ? (uint32_t)fuzz_below(fuzz, 4) : 0), done = 0;
    bytes = bytes < LIST_BYTES ? bytes : LIST_BYTES;
    while (parts < 3 && done < bytes && !fuzz_one_in(fuzz, 3)) {
        uint32_t part = 1 + (uint32_t)fuzz_below(fuzz, bytes - done);
        put_descriptor(parts++, LIST + done, part, 1);
        done += part;
    }
    put_descriptor(parts++, LIST + done, bytes - done, 0);
    if (inflating)
        for (uint32_t i = 0; i < bytes / 4; i++)
            name_page(list[i]);
    met.lists++;
    return parts;
}

static uint32_t make_report(struct fuzz *fuzz)
{
    uint32_t parts = 1 + (uint32_t)fuzz_below(fuzz, 4);
    for (uint32_t i = 0; i < parts; i++) {
        uint32_t at = (uint32_t)fuzz_below(fuzz, 2) * 2;
        uint64_t low = at ? 0 : FIRST * TV_PAGE_SIZE;
        uint64_t offset = low + fuzz_below(fuzz, BYTES - low), length = fuzz_below(fuzz, BYTES - offset + 1);
        if (!fuzz_one_in(fuzz, 3)) {
            offset &= ~(TV_PAGE_SIZE - 1);
            length = (length + TV_PAGE_SIZE - 1) & ~(TV_PAGE_SIZE - 1);
        }
        int fits = offset + length <= BYTES;
        if (fuzz_one_in(fuzz, 64))
            put_descriptor(i, AT[ROM] + offset, (uint32_t)length, 2); /* breaks the queue */
        else
            put_descriptor(i, AT[at] + offset, (uint32_t)length, (uint16_t)(2 | (i + 1 < parts)));
        for (uint64_t page = (offset + TV_PAGE_SIZE - 1) / TV_PAGE_SIZE; fits && page < (offset + length) / TV_PAGE_SIZE;
             page++)
            named[at][page] = 1;
    }
    met.reports++;
    return parts;
}

static void fill(uint32_t at)
{
    for (uint32_t page = at ? 0 : FIRST; page < PAGES; page++)
        memset(memory.regions[at].hva + page * TV_PAGE_SIZE, (int)(1 + page), TV_PAGE_SIZE);
    memset(memory.regions[at].dirty, 0, PAGES / 8);
}

static void check(uint32_t at, int all)
{
    for (uint32_t page = at ? 0 : FIRST; page < PAGES; page++) {
        const uint8_t *bytes = memory.regions[at].hva + page * TV_PAGE_SIZE;
        uint8_t first = bytes[0];
        FUZZ_CHECK(first == 0 || first == 1 + page);
        FUZZ_CHECK(!memcmp(bytes, bytes + 1, TV_PAGE_SIZE - 1)); /* all of it, or nothing */
        if (first) {
            FUZZ_CHECK(!all || at == ROM || !named[at][page]);
            met.kept++;
        } else {
            FUZZ_CHECK(at != ROM && named[at][page]);
            FUZZ_CHECK(memory.regions[at].dirty[page / 64] >> page % 64 & 1);
            met.gone++;
        }
    }
}

static void one(struct fuzz *fuzz)
{
    uint32_t which = (uint32_t)fuzz_below(fuzz, 3);
    int kick = balloon->worker.kick_fd;
    memset(balloon, 0, sizeof *balloon);
    memset(named, 0, sizeof named);
    balloon->worker.kick_fd = kick;
    tv_balloon_init(balloon);
    for (uint32_t at = 0; at < REGIONS; at++)
        fill(at);
    memset(memory.regions[0].hva, 0, FIRST * TV_PAGE_SIZE);
    struct tv_queue queue = {.memory = &memory, .irq = &irq, .index = (uint16_t)which, .size = SIZE};
    queue.desc_gpa = RING;
    queue.avail_gpa = RING + 0x1000;
    queue.used_gpa = RING + 0x2000;
    FUZZ_CHECK(tv_worker_add(&balloon->worker, &queue, -1) == 0);
    which == TV_BALLOON_REPORT ? (void)make_report(fuzz) : (void)make_list(fuzz, which == TV_BALLOON_INFLATE);
    uint16_t offered = 1;
    memcpy(memory.regions[0].hva + 0x1002, &offered, 2);
    int stopped = fuzz_one_in(fuzz, 16);
    if (stopped)
        tv_worker_stop(&balloon->worker);
    struct tv_queue *mine = &balloon->worker.queues[0];
    struct tv_chain *chain = &balloon->worker.chain;
    if (tv_queue_pop(mine, chain) == 1) {
        int64_t length = balloon->worker.serve(&balloon->worker, mine, chain);
        if (length < 0) {
            FUZZ_CHECK(stopped && length == TV_STOPPED);
            tv_queue_rewind(mine, 1);
            FUZZ_CHECK(mine->next_avail == 0 && mine->taken == 0);
            met.back++;
        } else {
            FUZZ_CHECK(length == 0);
            tv_queue_push(mine, chain->head, 0);
            tv_queue_publish(mine);
        }
    }
    int whole = !mine->broken && !stopped;
    for (uint32_t at = 0; at < REGIONS; at++)
        check(at, whole);
    FUZZ_CHECK(balloon->failed == 0);
}

static void summarize(char *into, size_t size)
{
    snprintf(into, size, "%llu lists, %llu reports, %llu given back to the driver; pages gone %llu, kept %llu",
             (unsigned long long)met.lists, (unsigned long long)met.reports, (unsigned long long)met.back,
             (unsigned long long)met.gone, (unsigned long long)met.kept);
}

int main(int argc, char **argv)
{
    memory.count = REGIONS;
    for (uint32_t at = 0; at < REGIONS; at++) {
        int memfd = memfd_create("fuzz", MFD_CLOEXEC);
        if (memfd < 0 || ftruncate(memfd, (off_t)BYTES))
            return 2;
        memory.regions[at] = (struct tv_region){.gpa = AT[at], .size = BYTES, .rom = at == ROM};
        memory.regions[at].hva = tv_memory_map(memfd, BYTES);
        memory.regions[at].dirty = calloc(PAGES / 64 + 1, 8);
    }
    balloon = calloc(1, sizeof *balloon);
    balloon->worker.kick_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    return fuzz_main(argc, argv, one, summarize);
}
