/* The watchdog: so many pings, and then none any more. */
#include "driver.h"

#define EVERY_MS 20

extern struct driver watchdog_driver;

static struct rings rings __attribute__((aligned(4096)));
static struct vdev dev = {.rings = &rings};
static uint8_t answer;
static uint64_t pings, last;
static enum { OFF, IDLE, WAITING } state;

static void find(void)
{
    if (vdev_find(&dev, 0x1063, 0))
        return;
    watchdog_driver.wanted = 0;
    put_absent("watchdog");
}

static void step(void)
{
    uint32_t length;
    uint64_t now = rdtsc();
    switch (state) {
    case OFF:
        if (!vdev_reset(&dev) || !vdev_start(&dev, ring_features())) {
            note_problem("watchdog does not start, slot", dev.slot, 0, common_read(&dev, 0x14, 1));
            watchdog_driver.wanted = 0;
            return;
        }
        state = IDLE;
        return;
    case IDLE:
        if (pings >= watchdog_driver.wanted || now - last < milliseconds(EVERY_MS))
            return;
        answer = 0;
        describe(&dev, 0, &answer, sizeof answer, DESC_WRITE);
        vdev_submit(&dev, 1);
        last = now;
        state = WAITING;
        return;
    case WAITING:
        if (vdev_finished(&dev, &length)) {
            if (answer != 1 || length != 1)
                device_error("watchdog answer", length, 1, answer);
            pings++;
            state = IDLE;
        } else if (now - last > milliseconds(1000ull * STUCK_SECONDS)) {
            requests_stuck++;
            note_problem("STUCK watchdog, slot", dev.slot, 0, common_read(&dev, 0x14, 1));
            watchdog_driver.wanted = 0;
        }
    }
}

static void report(void)
{
    put_number(" watchdog=", pings);
}

static const struct word words[] = {{"watchdog=", &watchdog_driver.wanted}, {NULL, NULL}};

struct driver watchdog_driver = {.name = "watchdog", .words = words, .find = find, .step = step, .report = report};
