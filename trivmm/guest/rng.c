/* The entropy device: what comes must be new each time. */
#include "driver.h"

#define RNG_BYTES 64
#define RNG_ID 0x1044
#define RACE_MS 20

extern struct driver rng_driver;

static struct device_counters counters_of_rng;
static struct rings rings __attribute__((aligned(4096)));
static volatile uint8_t entropy[RNG_BYTES];
static uint64_t last_entropy;
static uint32_t rng_id;

static void submit(struct cycle *cycle)
{
    for (uint32_t i = 0; i < RNG_BYTES; i++)
        entropy[i] = 0;
    describe(&cycle->dev, 0, entropy, RNG_BYTES, DESC_WRITE);
    vdev_submit(&cycle->dev, 1);
}

static void check(struct cycle *cycle, uint32_t length)
{
    uint64_t first = *(volatile uint64_t *)entropy;
    (void)cycle;
    if (!length || length > RNG_BYTES || first == last_entropy)
        device_error("LOST entropy", length, 0, first);
    last_entropy = first;
}

static struct cycle rng = {
    .dev = {.rings = &rings}, .counters = &counters_of_rng, .submit = submit, .check = check,
};

static void find(void)
{
    if (vdev_find(&rng.dev, (uint16_t)(rng_id ? rng_id : RNG_ID), 0))
        return;
    rng_driver.wanted = 0;
    put_absent("rng");
}

static void step(void)
{
    cycle_step(&rng);
}

/* With race=1, reset it while the other CPU is somewhere in activating it; race=2: without a pause. Through the BAR
 * only: CF8 has one owner. */
static void disturb(uint64_t now)
{
    static uint64_t last;
    if (options.race == 1 && now - last < milliseconds(RACE_MS))
        return;
    last = now;
    rng.dev.common[0x14] = 0;
}

static void report(void)
{
    report_counters("rng", &counters_of_rng);
}

static const struct word words[] = {{"rng_id=", &rng_id}, {NULL, NULL}};

struct driver rng_driver = {
    .name = "rng", .words = words, .find = find, .step = step, .disturb = disturb, .report = report,
};
