/* A driver that lies: with hostile=SEED the entropy device has one, and suffers. It is set up well, then misused in one
 * of the ways below, looked at for a moment, and reset, without rest. Whatever it does may cost that device alone: the
 * other drivers check their data meanwhile.
 *
 * Descriptors point outside RAM, or into `scratch`, where a device may write what it likes. */
#include "driver.h"

#define RNG_ID 0x1044
#define LOOK_MS 2
#define RAM_HOLE 0xd0000000ull /* no RAM, nor a BAR that a device put there by itself */
#define QUEUE_REGISTERS 6

extern struct driver hostile_driver;

static struct rings rings __attribute__((aligned(4096)));
static struct vdev dev = {.rings = &rings};
static uint8_t scratch[8192] __attribute__((aligned(4096)));
static uint32_t seed;
static uint64_t attacks, hurt, served, began;
static uint16_t used_before;
static enum { RESET, ATTACK, LOOK } state;

static uint32_t some(uint32_t below)
{
    seed = seed * 1664525u + 1013904223u;
    return (uint32_t)(((uint64_t)seed * below) >> 32);
}

static uint64_t some_address(uint32_t length)
{
    switch (some(6)) {
    case 0:
        return 0 - (uint64_t)some(length + 2); /* wraps */
    case 1:
        return RAM_HOLE + some(4096);
    case 2:
        return 1ull << (40 + some(24));
    case 3:
        return ~0ull - some(16);
    case 4:
        return (uint64_t)dev.common + some(0x100); /* registers are no RAM */
    default:
        return (uint64_t)scratch + some(sizeof scratch - 64);
    }
}

static void describe_any(struct desc *at)
{
    static const uint32_t lengths[] = {0, 1, 17, 4096, 1u << 30, 0x7fffffff, 0xfffffff0, 0xffffffff};
    at->len = some(3) ? some(64) : lengths[some(8)];
    at->addr = some(3) ? (uint64_t)scratch : some_address(at->len);
    if (at->addr >= (uint64_t)scratch && at->addr < (uint64_t)scratch + sizeof scratch && at->len > 64 && at->len < 1u << 30)
        at->len = 64; /* what is in RAM stays in scratch; what is longer than RAM is refused */
    at->flags = (uint16_t)(some(4) ? DESC_WRITE : 0) | (some(3) ? 0 : DESC_NEXT);
    at->next = (uint16_t)(some(4) ? some(QUEUE_SIZE) : some(0x10000));
}

static void ring_bell(void)
{
    barrier();
    *(volatile uint16_t *)(dev.notify + dev.notify_off) = (uint16_t)(some(8) ? 0 : some(0x10000));
}

static void offer(uint16_t head, uint16_t steps)
{
    rings.avail.ring[rings.avail.index % QUEUE_SIZE] = head;
    barrier();
    rings.avail.index = (uint16_t)(rings.avail.index + steps);
    ring_bell();
}

static void a_loop(void)
{
    for (uint16_t i = 0; i < QUEUE_SIZE; i++)
        rings.desc[i] = (struct desc){(uint64_t)scratch, 8, DESC_WRITE | DESC_NEXT, (uint16_t)((i + 1) % QUEUE_SIZE)};
    offer(0, 1);
}

static void any_chain(void)
{
    for (uint32_t i = 0; i < QUEUE_SIZE; i++)
        describe_any(&rings.desc[i]);
    offer((uint16_t)some(QUEUE_SIZE), 1);
}

static void twice(void)
{
    rings.desc[3] = (struct desc){(uint64_t)scratch, 64, DESC_WRITE, 0};
    for (uint32_t i = 0; i < 2 + some(2 * QUEUE_SIZE); i++)
        offer(3, 1);
}

static void indices_jump(void)
{
    offer((uint16_t)some(0x10000), (uint16_t)(some(2) ? some(0x10000) : QUEUE_SIZE + 1));
}

static void indirect_in_indirect(void)
{
    struct desc *table = (struct desc *)scratch;
    for (uint32_t i = 0; i < 4; i++)
        table[i] = (struct desc){(uint64_t)scratch, 16 * some(6) + some(2), (uint16_t)(DESC_INDIRECT | some(4)), 1};
    rings.desc[0] = (struct desc){some(4) ? (uint64_t)scratch : some_address(64), 16 * some(300), DESC_INDIRECT, 0};
    offer(0, 1);
}

static void events_lie(void)
{
    for (uint32_t i = 0; i < 16; i++) {
        rings.desc[0] = (struct desc){(uint64_t)scratch, 8, DESC_WRITE, 0};
        rings.avail.used_event = (uint16_t)some(0x10000);
        rings.avail.flags = (uint16_t)some(0x10000);
        rings.used.index = (uint16_t)some(0x10000); /* the device's own */
        offer(0, 1);
    }
}

/* After DRIVER_OK: enabled twice, other sizes, other addresses, at odd widths and offsets. */
static void registers(void)
{
    static const uint16_t at[] = {0x18, 0x1c, 0x20, 0x28, 0x30, 0x1a};
    for (uint32_t i = 0; i < 24; i++) {
        common_write(&dev, 0x16, 2, some(3) ? 0 : some(0x10000));
        uint32_t offset = some(3) ? at[some(QUEUE_REGISTERS)] : 0x16 + some(0x30);
        common_write(&dev, offset, 1u << some(3), some(2) ? some(0x10000) : 0xffffffff);
    }
    common_write(&dev, 0x16, 2, 0);
    offer(0, 1);
}

/* Before DRIVER_OK: what a queue is set up with makes no sense. */
static void a_queue_that_cannot_be(void)
{
    vdev_reset(&dev);
    common_write(&dev, 0x14, 1, ACKNOWLEDGE | DRIVER);
    common_write(&dev, 0x08, 4, 1);
    common_write(&dev, 0x0c, 4, 1);
    common_write(&dev, 0x14, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    common_write(&dev, 0x18, 2, some(2) ? some(0x10000) : 3);
    for (uint32_t offset = 0x20; offset < 0x38; offset += 8) {
        uint64_t where = some_address(64);
        common_write(&dev, offset, 4, (uint32_t)where);
        common_write(&dev, offset + 4, 4, (uint32_t)(where >> 32));
    }
    common_write(&dev, 0x1a, 2, some(0x10000));
    for (uint32_t i = 0; i < 3; i++)
        common_write(&dev, 0x1c, 2, 1);
    common_write(&dev, 0x14, 1, some(4) ? 15 : some(256) | 1);
    ring_bell();
}

/* Vectors that are not there, and messages that go nowhere: to no interrupt controller. */
static void vectors(void)
{
    for (uint32_t i = 0; i < 8; i++) {
        common_write(&dev, some(2) ? 0x10 : 0x1a, 2, some(0x10000));
        volatile uint32_t *entry = dev.msix + 4 * (2 + some(2046)); /* two are real */
        entry[0] = 0xfee00000;
        entry[2] = some(256);
        entry[3] = 0;
    }
    dev.msix[4] = some(2) ? 0 : 0x12345678;
    dev.msix[5] = some(2) ? 0 : 0xffffffff;
    offer(0, 1);
}

/* The configuration-access window, pointed anywhere. */
static void window(void)
{
    uint32_t cap = dev.window_cap;
    for (uint32_t i = 0; cap && i < 16; i++) {
        pci_write(dev.slot, cap + 4, 1, some(3) ? 0 : some(256));
        pci_write(dev.slot, cap + 8, 4, some(2) ? some(0x80000) : some(2) ? 0x7ffff : 0xffffffff - some(16));
        pci_write(dev.slot, cap + 12, 4, some(3) ? 1u << some(4) : some(0x10000));
        if (some(2))
            pci_read(dev.slot, cap + 16, 1u << some(3));
        else
            pci_write(dev.slot, cap + 16, 1u << some(3), some(0x10000));
    }
}

static void (*const ways[])(void) = {
    a_loop, any_chain, any_chain, twice, indices_jump, indirect_in_indirect, events_lie, registers,
    a_queue_that_cannot_be, vectors, window,
};

static void find(void)
{
    if (vdev_find(&dev, RNG_ID, 0))
        return;
    hostile_driver.wanted = 0;
    put_absent("hostile");
}

static void step(void)
{
    switch (state) {
    case RESET:
        if (!seed)
            seed = hostile_driver.wanted;
        if (!vdev_reset(&dev)) {
            note_problem("STUCK reset of a hostile driver, slot", dev.slot, 0, common_read(&dev, 0x14, 1));
            hostile_driver.wanted = 0;
            return;
        }
        state = ATTACK;
        return;
    case ATTACK:
        if (!vdev_start(&dev, VERSION_1 | (some(2) ? EVENT_IDX : 0) | (some(2) ? INDIRECT : 0))) {
            note_problem("hostile driver's good start, slot", dev.slot, 0, common_read(&dev, 0x14, 1));
            hostile_driver.wanted = 0;
            return;
        }
        used_before = rings.used.index;
        ways[attacks++ % (sizeof ways / sizeof *ways)]();
        began = rdtsc();
        state = LOOK;
        return;
    case LOOK: {
        uint32_t status = common_read(&dev, 0x14, 1);
        if (!(status & NEEDS_RESET) && rdtsc() - began < milliseconds(LOOK_MS))
            return;
        hurt += !!(status & NEEDS_RESET);
        served += rings.used.index != used_before;
        state = RESET;
    }
    }
}

static void report(void)
{
    put_number(" attacks=", attacks);
    put_number(" hurt=", hurt);
    put_number(" served=", served);
}

static const struct word words[] = {{"hostile=", &hostile_driver.wanted}, {NULL, NULL}};

struct driver hostile_driver = {.name = "hostile", .words = words, .find = find, .step = step, .report = report};
