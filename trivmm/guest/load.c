/* Load on a disk: requests at random places, as many at once as a queue holds, taken from the used ring without
 * interrupts. For benchmarks. Each block of the image holds its own number in its first word; so it is checked that what
 * is read is what was asked for. */
#include "driver.h"

#define BLK_ID 0x1042
#define SECTOR 512
#define BLOCK 4096
#define MAX_KIB 64 /* of a request */
#define ALL_KIB 256 /* of all that are under way */
#define TAKEN 64 /* at most in one step */

extern struct driver load_driver;

static struct request {
    struct desc table[3] __attribute__((aligned(16)));
    struct {
        uint32_t type, reserved;
        uint64_t sector;
    } header;
    volatile uint8_t status;
} requests[QUEUE_SIZE];

static uint8_t data[ALL_KIB << 10] __attribute__((aligned(4096)));
static struct rings rings __attribute__((aligned(4096)));
static struct vdev dev = {.rings = &rings};
static uint32_t kib = 4, writing, depth = QUEUE_SIZE;
static uint64_t blocks, began, ended, ios, seed = 88172645463325252ull;
static int started;

/* Of a slot's block number i. */
static volatile uint64_t *first_word(uint32_t slot, uint64_t i)
{
    return (volatile uint64_t *)(data + (uint64_t)slot * (kib << 10) + i * BLOCK);
}

static uint64_t next_random(void)
{
    seed ^= seed << 13;
    seed ^= seed >> 7;
    seed ^= seed << 17;
    return seed;
}

static void offer(uint32_t slot)
{
    struct request *request = &requests[slot];
    uint64_t each = (kib << 10) / BLOCK, first = next_random() % (blocks / each) * each;
    request->header.type = writing ? 1 : 0;
    request->header.sector = first * (BLOCK / SECTOR);
    request->status = 0xff;
    for (uint64_t i = 0; i < each; i++)
        *first_word(slot, i) = writing ? first + i : ~0ull;
    request->table[0] = (struct desc){(uint64_t)&request->header, 16, DESC_NEXT, 1};
    request->table[1] = (struct desc){(uint64_t)first_word(slot, 0), kib << 10, (uint16_t)(DESC_NEXT | (writing ? 0 : DESC_WRITE)), 2};
    request->table[2] = (struct desc){(uint64_t)&request->status, 1, DESC_WRITE, 0};
    rings.desc[slot] = (struct desc){(uint64_t)request->table, sizeof request->table, DESC_INDIRECT, 0};
    rings.avail.ring[rings.avail.index % QUEUE_SIZE] = (uint16_t)slot;
    barrier();
    rings.avail.index++;
}

static void check(uint32_t slot)
{
    uint64_t first = requests[slot].header.sector / (BLOCK / SECTOR);
    if (requests[slot].status)
        device_error("LOAD status, block", first, 0, requests[slot].status);
    for (uint64_t i = 0; i < (kib << 10) / BLOCK; i++)
        if (*first_word(slot, i) != first + i)
            device_error("LOST block", first + i, first + i, *first_word(slot, i));
}

/* From `before` on there is more. */
static void kick(uint16_t before)
{
    barrier();
    uint16_t now = rings.avail.index, event = rings.used.avail_event;
    int wanted = dev.features & EVENT_IDX ? (uint16_t)(now - event - 1) < (uint16_t)(now - before)
                                          : !(rings.used.flags & 1);
    if (now != before && wanted)
        *(volatile uint16_t *)(dev.notify + dev.notify_off) = dev.queue;
}

static void start(void)
{
    started = 1;
    if (!vdev_reset(&dev) || !vdev_start(&dev, ring_features() | INDIRECT | EVENT_IDX)) {
        device_error("LOAD start, slot", dev.slot, 0, 0);
        load_driver.wanted = 0;
        return;
    }
    rings.avail.flags = 1;
    rings.avail.used_event = 0xffff;
    began = rdtsc();
    for (uint32_t slot = 0; slot < depth; slot++)
        offer(slot);
    kick(0);
}

static void step(void)
{
    if (!started) {
        start();
        return;
    }
    uint16_t before = rings.avail.index;
    for (uint32_t left = TAKEN; left && rings.used.index != dev.next_used; left--) {
        barrier();
        uint32_t slot = rings.used.ring[dev.next_used++ % QUEUE_SIZE].id;
        if (slot >= depth) {
            device_error("LOAD id", slot, depth, slot);
            return;
        }
        check(slot);
        ios++;
        offer(slot);
    }
    rings.avail.used_event = (uint16_t)(dev.next_used - 1);
    kick(before);
    ended = rdtsc();
}

static void find(void)
{
    if (!kib || kib > MAX_KIB || kib % 4)
        kib = 4;
    if (!depth || depth > QUEUE_SIZE)
        depth = QUEUE_SIZE;
    if (depth > ALL_KIB / kib)
        depth = ALL_KIB / kib;
    if (vdev_find(&dev, BLK_ID, 0)) {
        uint64_t low = *(volatile uint32_t *)dev.config, high = *(volatile uint32_t *)(dev.config + 4);
        blocks = (low | high << 32) / (BLOCK / SECTOR);
    }
    if (blocks >= MAX_KIB / 4)
        return;
    load_driver.wanted = 0;
    put_absent("load");
}

static void report(void)
{
    put_number(" load_ios=", ios);
    put_number(" load_us=", (ended - began) / (milliseconds(1) / 1000));
}

static const struct word words[] = {{"load_kib=", &kib}, {"load_write=", &writing}, {"load_depth=", &depth}, {NULL, NULL}};

struct driver load_driver = {.name = "load", .words = words, .find = find, .step = step, .report = report};
