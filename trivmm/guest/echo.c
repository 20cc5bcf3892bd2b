/* The virtio console echoes: what comes on its receive queue goes out on its transmit queue, byte for byte, and a new
 * size of the terminal is in the next report. Starts once, never resets, never blocks its caller. */
#include "driver.h"

#define BUFFER 256 /* small: what is typed in one go is many requests */
#define F_SIZE 1ull

static struct rings in_rings __attribute__((aligned(4096))), out_rings __attribute__((aligned(4096)));
static struct vdev out = {.rings = &out_rings};
static struct vdev in = {.rings = &in_rings, .next = &out};

static uint8_t typed[BUFFER];
static uint32_t size_seen;
static enum { OFF, LISTENING, SAYING } state;

static uint64_t echoed, columns, rows;

extern struct driver echo_driver;

static void find(void)
{
    if (vdev_find(&in, 0x1043, 0))
        return;
    echo_driver.wanted = 0;
    put_absent("console");
}

static void submit(struct vdev *dev, uint32_t length, uint16_t flags)
{
    dev->rings->desc[0] = (struct desc){(uint64_t)typed, length, flags, 0};
    vdev_submit(dev, 1);
}

static void listen(void)
{
    submit(&in, BUFFER, DESC_WRITE);
    state = LISTENING;
}

/* Only when told to, as Linux does. */
static void look_at_size(void)
{
    uint32_t changes = irq_count[in.vector];
    if (changes == size_seen || !(in.features & F_SIZE))
        return;
    size_seen = changes;
    columns = *(volatile uint16_t *)in.config;
    rows = *(volatile uint16_t *)(in.config + 2);
}

static void step(void)
{
    uint32_t length;
    switch (state) {
    case OFF:
        if (!vdev_reset(&in) || !vdev_start(&in, ring_features() | F_SIZE)) {
            note_problem("console does not start, slot", in.slot, 0, common_read(&in, 0x14, 1));
            echo_driver.wanted = 0;
            return;
        }
        listen();
        return;
    case LISTENING:
        look_at_size();
        if (!vdev_finished(&in, &length))
            return;
        if (!length || length > BUFFER) {
            note_problem("console length", in.slot, BUFFER, length);
            echo_driver.wanted = 0;
            return;
        }
        echoed += length;
        submit(&out, length, 0);
        state = SAYING;
        return;
    case SAYING:
        if (vdev_finished(&out, &length))
            listen();
    }
}

static void report(void)
{
    put_number(" echoed=", echoed);
    put_number(" cols=", columns);
    put_number(" rows=", rows);
}

static const struct word words[] = {{"echo=", &echo_driver.wanted}, {NULL, NULL}};

struct driver echo_driver = {.name = "echo", .words = words, .find = find, .step = step, .report = report};
