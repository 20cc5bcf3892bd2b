/* Memory that checks itself for ever.
 *
 * Every test page carries its number, its generation and words made from both, spread over the page. What the
 * generation must be stands in a table elsewhere, so a page that a migration lost shows as LOST (its content is not
 * a page's) and one that it left behind as STALE (an older generation's content). Each CPU has its own pages. */
#include "probe.h"

#define PAGE 4096ul
#define MAGIC 0x70726f6265706721ull /* "!gpeborp" */
#define STEP_CHECKS 64 /* pages a step: a step stays short, so that beats and devices get their turn */
#define NEVER_AGAIN 8  /* every 8th page is written once only, so that round 0's copy is checked for ever */

struct region {
    uint64_t first, count; /* pages */
    uint64_t next_check, next_dirty;
    uint64_t dirty_from, dirty_done;
};

static struct region regions[MAX_CPUS];
static volatile uint32_t *const generations = (volatile uint32_t *)GENERATIONS;
static const uint16_t spots[] = {2, 3, 63, 64, 127, 255, 256, 383, 509, 510, 511};
#define SPOTS (sizeof spots / sizeof spots[0])

static uint64_t mix(uint64_t page, uint64_t generation, uint64_t word)
{
    uint64_t x = MAGIC ^ page * 0x9e3779b97f4a7c15ull ^ generation * 0xc2b2ae3d27d4eb4full ^ word << 48;
    x ^= x >> 31;
    x *= 0xbf58476d1ce4e5b9ull;
    return x ^ x >> 29;
}

static volatile uint64_t *page_at(uint64_t page)
{
    return (volatile uint64_t *)(TEST_BASE + page * PAGE);
}

static void write_page(uint64_t page, uint32_t generation)
{
    volatile uint64_t *words = page_at(page);
    words[0] = MAGIC ^ page;
    words[1] = generation;
    for (uint32_t i = 0; i < SPOTS; i++)
        words[spots[i]] = mix(page, generation, spots[i]);
    generations[page] = generation;
}

static int is_generation(volatile uint64_t *words, uint64_t page, uint64_t generation)
{
    if (words[0] != (MAGIC ^ page) || words[1] != generation)
        return 0;
    for (uint32_t i = 0; i < SPOTS; i++)
        if (words[spots[i]] != mix(page, generation, spots[i]))
            return 0;
    return 1;
}

static void check_page(uint32_t cpu, uint64_t page)
{
    volatile uint64_t *words = page_at(page);
    uint32_t want = generations[page];
    counters[cpu].checked++;
    if (is_generation(words, page, want))
        return;
    uint64_t got = words[1];
    counters[cpu].errors++;
    note_problem(words[0] == (MAGIC ^ page) && got < want ? "STALE page" : "LOST page", page, want, got);
    write_page(page, want); /* count each fault once */
}

void memory_start(uint32_t cpu, uint32_t cpus, uint64_t pages)
{
    struct region *region = &regions[cpu];
    region->first = pages * cpu / cpus;
    region->count = pages * (cpu + 1) / cpus - region->first;
    for (uint64_t i = 0; i < region->count; i++)
        write_page(region->first + i, 1);
    region->dirty_from = rdtsc();
}

/* The self-test: spoil a page behind the checker's back, once as lost and once as stale. */
static void corrupt(struct region *region)
{
    uint64_t lost = region->first, stale = region->first + 1;
    write_page(stale, 7);
    generations[stale] = 9;
    page_at(lost)[0] = 0;
}

void memory_step(uint32_t cpu, uint64_t now)
{
    struct region *region = &regions[cpu];
    if (!region->count)
        return;
    if (options.corrupt && cpu == 0) {
        options.corrupt = 0;
        corrupt(region);
    }
    /* dirty at the asked rate, catching up at most a tenth of a second after a stop */
    uint64_t due = (now - region->dirty_from) / 1000 * options.rate / options.tsc_khz / options.cpus;
    if (due > region->dirty_done + options.rate / 10 + 1) {
        region->dirty_from = now;
        region->dirty_done = due = 0;
    }
    for (uint32_t budget = STEP_CHECKS; budget && region->dirty_done < due; budget--) {
        uint64_t page = region->first + region->next_dirty;
        region->next_dirty = (region->next_dirty + 1) % region->count;
        if (page % NEVER_AGAIN == 0)
            continue;
        check_page(cpu, page);
        write_page(page, generations[page] + 1);
        region->dirty_done++;
        counters[cpu].dirtied++;
    }
    for (uint32_t budget = STEP_CHECKS; budget; budget--) {
        check_page(cpu, region->first + region->next_check);
        region->next_check = (region->next_check + 1) % region->count;
    }
}
