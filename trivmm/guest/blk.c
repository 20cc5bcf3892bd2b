/* Disks, each cycled by itself: what was written must be read back, also after a reset and after a move. */
#include "driver.h"

#define BLK_ID 0x1042
#define SECTOR 512
#define MAX_DISKS 8
#define MAX_SECTORS 4096
#define MAX_PLUGGED 4

struct disk {
    struct cycle cycle; /* first: a cycle's disk is at the same address */
    struct {
        uint32_t type, reserved;
        uint64_t sector;
    } header;
    uint64_t data[SECTOR / 8];
    volatile uint8_t status;
    uint32_t generation[MAX_SECTORS];
    uint8_t in_doubt[MAX_SECTORS]; /* a write of it did not end: old or new content */
    uint32_t sectors, sector;
    uint32_t number;
    int writing;
};

extern struct driver blk_driver;

static struct device_counters counters_of_blk;
static struct rings rings[MAX_DISKS + MAX_PLUGGED] __attribute__((aligned(4096)));
static struct disk disks[MAX_DISKS + MAX_PLUGGED]; /* those that came later last */
static uint32_t sectors = 256, wanted_disks = 1;

/* Differs from disk to disk, so that a sector of the wrong one is seen. */
static uint64_t sector_word(const struct disk *disk, uint32_t sector, uint32_t generation, uint32_t word)
{
    uint64_t seed = (uint64_t)generation << 32 | (uint64_t)disk->number << 24 | sector;
    return seed * 0x9e3779b97f4a7c15ull + word;
}

/* Write a sector with a new generation, then read back another that was written some time ago. */
static void submit(struct cycle *cycle)
{
    struct disk *disk = (struct disk *)cycle;
    struct vdev *dev = &cycle->dev;
    disk->writing = !disk->writing;
    if (disk->writing)
        disk->sector = (disk->sector + 7) % disk->sectors;
    uint32_t sector = disk->sector;
    uint32_t earlier = (sector + disk->sectors - 7 * 5 % disk->sectors) % disk->sectors;
    if (!disk->writing && disk->generation[earlier])
        sector = earlier;
    if (disk->writing)
        disk->in_doubt[sector] = 1; /* until its status says otherwise */
    disk->header.type = disk->writing ? 1 : 0;
    disk->header.sector = sector;
    for (uint32_t i = 0; i < SECTOR / 8; i++)
        disk->data[i] = disk->writing ? sector_word(disk, sector, disk->generation[sector] + 1, i) : 0;
    disk->status = 0xff;
    describe(dev, 0, &disk->header, 16, 0);
    describe(dev, 1, disk->data, SECTOR, disk->writing ? 0 : DESC_WRITE);
    describe(dev, 2, &disk->status, 1, DESC_WRITE);
    vdev_submit(dev, 3);
}

static void check(struct cycle *cycle, uint32_t length)
{
    struct disk *disk = (struct disk *)cycle;
    uint32_t sector = (uint32_t)disk->header.sector;
    uint32_t want = disk->generation[sector];
    (void)length;
    if (disk->status) {
        device_error("BLK status, sector", sector, 0, disk->status);
        return;
    }
    if (disk->writing) {
        disk->generation[sector]++;
        disk->in_doubt[sector] = 0;
        return;
    }
    if (disk->in_doubt[sector])
        return;
    for (uint32_t i = 0; i < SECTOR / 8; i++) {
        if (disk->data[i] == sector_word(disk, sector, want, i))
            continue;
        device_error("LOST sector", sector, sector_word(disk, sector, want, i), disk->data[i]);
        return;
    }
}

static struct vdev *disk_init(uint32_t number)
{
    struct disk *disk = &disks[number];
    disk->number = number;
    disk->cycle.counters = &counters_of_blk;
    disk->cycle.submit = submit;
    disk->cycle.check = check;
    disk->cycle.dev.rings = &rings[number];
    return &disk->cycle.dev;
}

static void look_at_size(struct disk *disk)
{
    const struct vdev *dev = &disk->cycle.dev;
    disk->sectors = !sectors || sectors > MAX_SECTORS ? MAX_SECTORS : sectors;
    if (dev->config) {
        uint64_t low = *(volatile uint32_t *)dev->config, high = *(volatile uint32_t *)(dev->config + 4);
        uint64_t capacity = low | high << 32;
        if (capacity && capacity < disk->sectors)
            disk->sectors = (uint32_t)capacity;
    }
}

static int disk_find(uint32_t number)
{
    if (!vdev_find(disk_init(number), BLK_ID, number))
        return 0;
    look_at_size(&disks[number]);
    return 1;
}

static void find(void)
{
    if (!wanted_disks || wanted_disks > MAX_DISKS)
        wanted_disks = MAX_DISKS;
    for (uint32_t number = 0; number < wanted_disks; number++) {
        if (disk_find(number))
            continue;
        put_absent("blk");
        wanted_disks = number;
    }
    blk_driver.wanted = wanted_disks;
}

static void step(void)
{
    for (uint32_t number = 0; number < wanted_disks; number++)
        cycle_step(&disks[number].cycle);
}

/* --- disks that come and go ------------------------------------------------------------------------------------- */

static struct disk *plugged_in(uint32_t slot)
{
    for (uint32_t number = MAX_DISKS; number < MAX_DISKS + MAX_PLUGGED; number++)
        if (disks[number].cycle.dev.slot == slot)
            return &disks[number];
    return NULL;
}

int blk_plug(uint32_t slot)
{
    struct disk *disk = plugged_in(0);
    if (!disk || pci_read(slot, 0, 4) != ((uint32_t)BLK_ID << 16 | 0x1af4))
        return 0;
    if (!vdev_at(disk_init((uint32_t)(disk - disks)), slot)) {
        disk->cycle.dev.slot = 0;
        return 0;
    }
    look_at_size(disk);
    for (uint32_t sector = 0; sector < MAX_SECTORS; sector++)
        disk->generation[sector] = disk->in_doubt[sector] = 0;
    disk->cycle.state = CYCLE_RESET;
    disk->cycle.ios = disk->writing = 0;
    return 1;
}

void blk_step_plugged(void)
{
    for (uint32_t number = MAX_DISKS; number < MAX_DISKS + MAX_PLUGGED; number++)
        if (disks[number].cycle.dev.slot)
            cycle_step(&disks[number].cycle);
}

int blk_unplug(uint32_t slot)
{
    struct disk *disk = plugged_in(slot);
    if (disk && disk->cycle.state != CYCLE_RESET)
        return 0;
    blk_forget(slot);
    return 1;
}

void blk_forget(uint32_t slot)
{
    struct disk *disk = plugged_in(slot);
    if (disk)
        disk->cycle.dev.slot = 0;
}

static void report(void)
{
    report_counters("blk", &counters_of_blk);
}

static const struct word words[] = {{"sectors=", &sectors}, {"disks=", &wanted_disks}, {NULL, NULL}};

struct driver blk_driver = {.name = "blk", .words = words, .find = find, .step = step, .report = report};
