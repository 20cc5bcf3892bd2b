/* Persistent memory: pages of a file, stored to and checked as RAM is, with a flush now and then.
 *
 * A page carries its number, its generation and words made from both, spread over it. What it is found with at the begin
 * may be an earlier guest's: its generation goes on from there, and a page that is neither zero nor one is LOST. The first
 * page has, last of all, the number of the flush that has ended: it is in the file for whoever looks. */
#include "driver.h"

#define PAGE 4096ul
#define MAGIC 0x6d656d70746e6975ull
#define MAX_PAGES 4096u
#define STEP 16u
#define FLUSH_EVERY 8u

extern struct driver pmem_driver;

static struct rings rings __attribute__((aligned(4096)));
static struct vdev dev = {.rings = &rings};
static uint32_t request, answer; /* request 0: flush */
static volatile uint8_t *start;
static uint32_t generations[MAX_PAGES];
static uint32_t next, steps;
static uint64_t stored, flushed, found, began;
static enum { OFF, RUN, FLUSHING } state;

static volatile uint64_t *page_at(uint32_t page)
{
    return (volatile uint64_t *)(start + page * PAGE);
}

static uint64_t word_of(uint32_t page, uint32_t generation, uint32_t word)
{
    return ((uint64_t)generation << 32 | page) * 0x9e3779b97f4a7c15ull + word;
}

static const uint16_t spots[] = {3, 64, 255, 400, 511};

static void store(uint32_t page, uint32_t generation)
{
    volatile uint64_t *words = page_at(page);
    words[0] = MAGIC ^ page;
    words[1] = generation;
    for (uint32_t i = 0; i < sizeof spots / sizeof *spots; i++)
        words[spots[i]] = word_of(page, generation, spots[i]);
    generations[page] = generation;
    stored++;
}

static void check(uint32_t page)
{
    volatile uint64_t *words = page_at(page);
    uint32_t want = generations[page];
    if (words[0] != (MAGIC ^ page) || words[1] != want) {
        device_error("LOST pmem page", page, want, words[1]);
        return;
    }
    for (uint32_t i = 0; i < sizeof spots / sizeof *spots; i++)
        if (words[spots[i]] != word_of(page, want, spots[i])) {
            device_error("LOST pmem word of page", page, word_of(page, want, spots[i]), words[spots[i]]);
            return;
        }
}

static void find(void)
{
    if (pmem_driver.wanted > MAX_PAGES)
        pmem_driver.wanted = MAX_PAGES;
    if (!vdev_find(&dev, 0x105b, 0)) {
        pmem_driver.wanted = 0;
        put_absent("pmem");
        return;
    }
    uint64_t at = *(volatile uint32_t *)dev.config | (uint64_t)*(volatile uint32_t *)(dev.config + 4) << 32;
    uint64_t size = *(volatile uint32_t *)(dev.config + 8) | (uint64_t)*(volatile uint32_t *)(dev.config + 12) << 32;
    if (size / PAGE < pmem_driver.wanted)
        pmem_driver.wanted = (uint32_t)(size / PAGE);
    for (uint64_t offset = 0; offset < size && offset < MAX_PAGES * PAGE; offset += 0x200000)
        map_mmio(at + offset);
    start = (volatile uint8_t *)at;
    for (uint32_t page = 0; page < pmem_driver.wanted; page++) {
        volatile uint64_t *words = page_at(page);
        if (words[0] == (MAGIC ^ page)) {
            generations[page] = (uint32_t)words[1];
            found++;
            check(page);
        } else if (words[0]) {
            device_error("LOST pmem page at the begin", page, MAGIC ^ page, words[0]);
        }
    }
}

static void flush(void)
{
    describe(&dev, 0, &request, sizeof request, 0);
    describe(&dev, 1, &answer, sizeof answer, DESC_WRITE);
    answer = 0xff;
    began = rdtsc();
    vdev_submit(&dev, 2);
    state = FLUSHING;
}

static void step(void)
{
    uint32_t length;
    switch (state) {
    case OFF:
        if (!vdev_reset(&dev) || !vdev_start(&dev, ring_features())) {
            note_problem("pmem does not start, slot", dev.slot, 0, common_read(&dev, 0x14, 1));
            pmem_driver.wanted = 0;
            return;
        }
        state = RUN;
        return;
    case RUN:
        for (uint32_t i = 0; i < STEP; i++) {
            if (generations[next])
                check(next);
            store(next, generations[next] + 1);
            next = (next + 1) % pmem_driver.wanted;
        }
        if (++steps % FLUSH_EVERY == 0)
            flush();
        return;
    case FLUSHING:
        if (vdev_finished(&dev, &length)) {
            if (answer || length != sizeof answer)
                device_error("pmem flush", length, 0, answer);
            page_at(0)[2] = ++flushed;
            state = RUN;
        } else if (rdtsc() - began > milliseconds(1000ull * STUCK_SECONDS)) {
            requests_stuck++;
            note_problem("STUCK pmem flush, slot", dev.slot, 0, common_read(&dev, 0x14, 1));
            pmem_driver.wanted = 0;
        }
    }
}

static void report(void)
{
    put_number(" pmem_found=", found);
    put_number(" pmem_stored=", stored);
    put_number(" pmem_flushed=", flushed);
}

static const struct word words[] = {{"pmem=", &pmem_driver.wanted}, {NULL, NULL}};

struct driver pmem_driver = {.name = "pmem", .words = words, .find = find, .step = step, .report = report};
