/* The balloon: pages that are given away, taken back and reported as free, and what must be in them.
 *
 * Each page of a pool of its own behind the tested memory has a generation, and words made from both; generation 0 is a
 * page of zeros, which is what a page that was given away must be when it is touched again. A page is looked at before it
 * is given and after it was taken back, never while it is away: that would bring its memory back. As many pages are away
 * as the device asks for, and some always on their way, in turns: the pool is a ring, given at one end of what is away
 * and taken back at the other. */
#include "driver.h"

#define PAGE 4096ul
#define WORDS (PAGE / 8)
#define MAX_PAGES 8192u
#define BATCH 64u
#define REPORTED 64u /* pages behind the pool that are reported as free and used again */
#define SEGMENTS 4u
#define F_DEFLATE_ON_OOM (1ull << 2)
#define F_REPORTING (1ull << 5)

extern struct driver balloon_driver;

static struct rings inflate_rings __attribute__((aligned(4096))), deflate_rings __attribute__((aligned(4096)));
static struct rings report_rings __attribute__((aligned(4096)));
static struct vdev report_queue = {.rings = &report_rings};
static struct vdev deflate_queue = {.rings = &deflate_rings};
static struct vdev inflate_queue = {.rings = &inflate_rings, .next = &deflate_queue};

static uint32_t generations[MAX_PAGES + REPORTED];
static uint32_t list[BATCH];
static uint32_t reporting, pool, tail, away, first, count, serial, turns; /* away: from `tail` on */
static uint64_t given, taken, reported, began;
static enum { OFF, IDLE, INFLATING, DEFLATING, REPORTING } state;

static volatile uint64_t *page_at(uint32_t page)
{
    return (volatile uint64_t *)(TEST_BASE + options.mem_mib * 0x100000ul + page * PAGE);
}

static uint64_t word_of(uint32_t page, uint32_t generation, uint64_t word)
{
    return generation ? ((uint64_t)generation << 32 | page) * 0x9e3779b97f4a7c15ull + word : 0;
}

static void verify(uint32_t page)
{
    volatile uint64_t *words = page_at(page);
    for (uint64_t word = 0; word < WORDS; word++) {
        if (words[word] == word_of(page, generations[page], word))
            continue;
        device_error("LOST balloon page", page, word_of(page, generations[page], word), words[word]);
        return;
    }
}

static void fill(uint32_t page)
{
    generations[page] = ++serial;
    for (uint64_t word = 0; word < WORDS; word++)
        page_at(page)[word] = word_of(page, serial, word);
}

static void find(void)
{
    pool = balloon_driver.wanted * 256;
    if (pool > MAX_PAGES)
        pool = MAX_PAGES;
    if (reporting)
        deflate_queue.next = &report_queue;
    if (options.mem_mib && vdev_find(&inflate_queue, 0x1045, 0))
        return;
    balloon_driver.wanted = 0;
    put_absent("balloon");
}

static void tell_actual(void)
{
    *(volatile uint32_t *)(inflate_queue.config + 4) = away;
}

/* Of `first` and those after it in the ring. */
static uint32_t nth(uint32_t i)
{
    return (first + i) % pool;
}

static void submit_list(struct vdev *queue)
{
    for (uint32_t i = 0; i < count; i++) /* backwards, as an allocator might */
        list[i] = (uint32_t)((uint64_t)page_at(nth(count - 1 - i)) / PAGE);
    describe(queue, 0, list, 4 * count, 0);
    vdev_submit(queue, 1);
}

static void give(uint32_t wanted)
{
    first = tail + away;
    count = wanted - away < BATCH ? wanted - away : BATCH;
    for (uint32_t i = 0; i < count; i++) {
        verify(nth(i));
        if (!generations[nth(i)])
            fill(nth(i)); /* else it is as it was taken back: a migration may have sent it, and must not believe in it */
    }
    submit_list(&inflate_queue);
    state = INFLATING;
}

static void take_back(void)
{
    count = away < BATCH ? away : BATCH;
    first = tail;
    submit_list(&deflate_queue);
    state = DEFLATING;
}

static void report_free(void)
{
    for (uint32_t page = pool; page < pool + REPORTED; page++) {
        verify(page);
        fill(page);
    }
    for (uint32_t i = 0; i < SEGMENTS; i++)
        describe(&report_queue, i, page_at(pool + i * (REPORTED / SEGMENTS)), REPORTED / SEGMENTS * PAGE, DESC_WRITE);
    vdev_submit(&report_queue, SEGMENTS);
    state = REPORTING;
}

static void begin(void)
{
    uint32_t wanted = *(volatile uint32_t *)inflate_queue.config;
    if (wanted > pool)
        wanted = pool;
    began = rdtsc();
    if (reporting && ++turns % 4 == 0)
        report_free();
    else if (away < wanted)
        give(wanted);
    else if (away)
        take_back();
}

static int finished(struct vdev *queue)
{
    uint32_t length;
    if (vdev_finished(queue, &length))
        return 1;
    if (rdtsc() - began > milliseconds(1000ull * STUCK_SECONDS)) {
        requests_stuck++;
        note_problem("STUCK balloon, state", state, 0, common_read(&inflate_queue, 0x14, 1));
        balloon_driver.wanted = 0;
    }
    return 0;
}

static void step(void)
{
    switch (state) {
    case OFF:
        if (!vdev_reset(&inflate_queue) ||
            !vdev_start(&inflate_queue, ring_features() | F_DEFLATE_ON_OOM | (reporting ? F_REPORTING : 0))) {
            note_problem("balloon does not start, slot", inflate_queue.slot, 0, common_read(&inflate_queue, 0x14, 1));
            balloon_driver.wanted = 0;
            return;
        }
        state = IDLE;
        return;
    case IDLE:
        begin();
        return;
    case INFLATING:
        if (!finished(&inflate_queue))
            return;
        for (uint32_t i = 0; i < count; i++)
            generations[nth(i)] = 0;
        away += count;
        given += count;
        break;
    case DEFLATING:
        if (!finished(&deflate_queue))
            return;
        for (uint32_t i = 0; i < count; i++) {
            verify(nth(i));
            fill(nth(i));
        }
        tail = nth(count);
        away -= count;
        taken += count;
        break;
    case REPORTING:
        if (!finished(&report_queue))
            return;
        for (uint32_t page = pool; page < pool + REPORTED; page++) {
            generations[page] = 0;
            verify(page);
        }
        reported += REPORTED;
    }
    tell_actual();
    state = IDLE;
}

static void report(void)
{
    put_number(" balloon=", away);
    put_number(" balloon_given=", given);
    put_number(" balloon_taken=", taken);
    put_number(" balloon_reported=", reported);
}

static const struct word words[] = {
    {"balloon=", &balloon_driver.wanted}, {"balloon_report=", &reporting}, {NULL, NULL},
};

struct driver balloon_driver = {.name = "balloon", .words = words, .find = find, .step = step, .report = report};
