/* Cycling devices: reset, activate, use, verify, and again, without rest and without ever blocking the caller.
 *
 * Each device is a small state machine that one CPU steps; a step does one thing and returns. A completion counts
 * only when its interrupt came. What does not complete in STUCK_SECONDS is reported and counted, with whether the
 * used ring had it (a lost interrupt) or not (a lost request). */
#include "virtio.h"

#define RNG_BYTES 64
#define IOS_A_CYCLE 2
#define SECTOR 512
#define RACE_MS 20

enum state { RESET, START, SUBMIT, WAIT };

struct cycle {
    struct vdev *dev;
    struct device_counters *counters;
    enum state state;
    uint32_t ios;
    uint64_t submitted;
    uint64_t rounds;
};

struct device_counters rng_counters, blk_counters;
volatile uint64_t device_errors;

static struct rings rng_rings __attribute__((aligned(4096))), blk_rings __attribute__((aligned(4096)));
static struct vdev rng = {.name = "rng", .vector = IRQ_BASE, .rings = &rng_rings};
static struct vdev blk = {.name = "blk", .vector = IRQ_BASE + 4, .rings = &blk_rings};
static struct cycle rng_cycle = {.dev = &rng, .counters = &rng_counters};
static struct cycle blk_cycle = {.dev = &blk, .counters = &blk_counters};

static volatile uint8_t entropy[RNG_BYTES];
static uint64_t last_entropy;
static struct {
    uint32_t type, reserved;
    uint64_t sector;
} blk_header;
static uint64_t blk_data[SECTOR / 8];
static volatile uint8_t blk_status;
static uint32_t sector_generation[4096];
static uint8_t sector_in_doubt[4096]; /* a write of it did not end: old or new content */
static uint32_t blk_sector;
static int blk_writing;

void devices_find(void)
{
    if (options.cycle_rng && !vdev_find(&rng, (uint16_t)(options.rng_id ? options.rng_id : 0x1044))) {
        options.cycle_rng = 0;
        put("PROBE absent dev=rng\n");
    }
    if (options.cycle_blk && !vdev_find(&blk, 0x1042)) {
        options.cycle_blk = 0;
        put("PROBE absent dev=blk\n");
    }
    if (!options.sectors || options.sectors > 4096)
        options.sectors = 4096;
    if (options.cycle_blk && blk.config) {
        uint64_t capacity = *(volatile uint32_t *)blk.config | (uint64_t)*(volatile uint32_t *)(blk.config + 4) << 32;
        if (capacity && capacity < options.sectors)
            options.sectors = (uint32_t)capacity;
    }
}

uint64_t wanted_features(void)
{
    return VERSION_1 | (options.event_idx ? EVENT_IDX : 0) | (options.indirect ? INDIRECT : 0);
}

static void device_error(const char *what, uint64_t which, uint64_t want, uint64_t got)
{
    __atomic_fetch_add(&device_errors, 1, __ATOMIC_SEQ_CST);
    note_problem(what, which, want, got);
}

static void describe(struct vdev *dev, uint32_t at, volatile void *address, uint32_t length, uint16_t flags)
{
    dev->rings->desc[at] = (struct desc){(uint64_t)address, length, flags, 0};
}

static void rng_submit(void)
{
    for (uint32_t i = 0; i < RNG_BYTES; i++)
        entropy[i] = 0;
    describe(&rng, 0, entropy, RNG_BYTES, DESC_WRITE);
    vdev_submit(&rng, 1);
}

static void rng_check(uint32_t length)
{
    uint64_t first = *(volatile uint64_t *)entropy;
    if (!length || length > RNG_BYTES || first == last_entropy) {
        device_error("LOST entropy", length, 0, first);
    }
    last_entropy = first;
}

static uint64_t sector_word(uint32_t sector, uint32_t generation, uint32_t word)
{
    return ((uint64_t)generation << 32 | sector) * 0x9e3779b97f4a7c15ull + word;
}

/* Write a sector with a new generation, then read back another that was written some time ago. */
static void blk_submit(void)
{
    blk_writing = !blk_writing;
    if (blk_writing)
        blk_sector = (blk_sector + 7) % options.sectors;
    uint32_t sector = blk_writing ? blk_sector : (blk_sector + options.sectors - 7 * 5) % options.sectors;
    if (!blk_writing && !sector_generation[sector])
        sector = blk_sector;
    if (blk_writing)
        sector_in_doubt[sector] = 1; /* until its status says otherwise */
    blk_header.type = blk_writing ? 1 : 0;
    blk_header.sector = sector;
    for (uint32_t i = 0; i < SECTOR / 8; i++)
        blk_data[i] = blk_writing ? sector_word(sector, sector_generation[sector] + 1, i) : 0;
    blk_status = 0xff;
    describe(&blk, 0, &blk_header, 16, 0);
    describe(&blk, 1, blk_data, SECTOR, blk_writing ? 0 : DESC_WRITE);
    describe(&blk, 2, &blk_status, 1, DESC_WRITE);
    vdev_submit(&blk, 3);
}

static void blk_check(void)
{
    uint32_t sector = (uint32_t)blk_header.sector;
    uint32_t want = sector_generation[sector];
    if (blk_status) {
        device_error("BLK status, sector", sector, 0, blk_status);
        return;
    }
    if (blk_writing) {
        sector_generation[sector]++;
        sector_in_doubt[sector] = 0;
        return;
    }
    if (sector_in_doubt[sector])
        return;
    for (uint32_t i = 0; i < SECTOR / 8; i++) {
        if (blk_data[i] == sector_word(sector, want, i))
            continue;
        device_error("LOST sector", sector, sector_word(sector, want, i), blk_data[i]);
        return;
    }
}

static void stuck(struct cycle *cycle, const char *what)
{
    struct vdev *dev = cycle->dev;
    cycle->counters->stuck++;
    note_problem(what, dev->slot, irq_count[dev->vector + 1] - dev->irq_seen, dev->rings->used.index - dev->next_used);
    cycle->state = RESET;
}

static void step(struct cycle *cycle)
{
    struct vdev *dev = cycle->dev;
    uint32_t length;
    switch (cycle->state) {
    case RESET:
        cycle->rounds++;
        dev->through_window = options.window && cycle->rounds % 2 && dev->window_cap;
        if (!vdev_reset(dev)) {
            stuck(cycle, "STUCK reset, slot");
            return;
        }
        cycle->state = START;
        return;
    case START:
        if (!vdev_start(dev, wanted_features())) {
            cycle->state = RESET; /* raced by another CPU's reset, or refused */
            cycle->counters->raced++;
            return;
        }
        cycle->counters->activations++;
        cycle->ios = 0;
        cycle->state = SUBMIT;
        return;
    case SUBMIT:
        dev == &rng ? rng_submit() : blk_submit();
        cycle->submitted = rdtsc();
        cycle->state = WAIT;
        return;
    case WAIT:
        if (vdev_finished(dev, &length)) {
            dev == &rng ? rng_check(length) : blk_check();
            cycle->counters->ios++;
            cycle->state = ++cycle->ios < IOS_A_CYCLE ? SUBMIT : RESET;
            return;
        }
        if (rdtsc() - cycle->submitted < milliseconds(5))
            return;
        uint32_t status = common_read(dev, 0x14, 1);
        if (status & NEEDS_RESET) {
            cycle->counters->needs_reset++;
            note_problem("NEEDS_RESET slot", dev->slot, 0, status);
            cycle->state = RESET;
        } else if (!(status & DRIVER_OK)) {
            cycle->counters->raced++; /* another CPU has reset it */
            cycle->state = RESET;
        } else if (rdtsc() - cycle->submitted > milliseconds(1000ull * STUCK_SECONDS)) {
            stuck(cycle, "STUCK request, slot");
        }
    }
}

void devices_step(void)
{
    if (options.cycle_rng)
        step(&rng_cycle);
    if (options.cycle_blk)
        step(&blk_cycle);
    if (options.echo)
        echo_step();
}

/* CPU 0, with race=1: reset the rng while CPU 1 is somewhere in activating it; race=2: without a pause.
 * Through the BAR only: CF8 has one owner. */
void devices_race(uint64_t now)
{
    static uint64_t last;
    if (!options.cycle_rng || (options.race == 1 && now - last < milliseconds(RACE_MS)))
        return;
    last = now;
    rng.common[0x14] = 0;
}
