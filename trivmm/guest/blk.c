/* Disks, each cycled by itself: what was written must be read back, also after a reset and after a move. */
#include "driver.h"

#define BLK_ID 0x1042
#define SECTOR 512
#define MAX_DISKS 8
#define MAX_QUEUES 4
#define MAX_SECTORS 4096
#define CLEARED 8 /* sectors of a discard or write-zeroes: a block of the host's file system, where it is aligned */
#define T_IN 0
#define T_OUT 1
#define T_DISCARD 11
#define T_WRITE_ZEROES 13
#define F_DISCARD (1ull << 13)
#define F_WRITE_ZEROES (1ull << 14)
#define F_MQ (1ull << 12)
#define NUM_QUEUES 34 /* in the configuration space */

/* What a sector holds: its generation's words, or what became of it since. */
enum content { WRITTEN, IN_DOUBT /* what was to change it did not end */, ZEROED, DISCARDED /* zeroes, or as it was */ };

enum turn { TURN_WRITE, TURN_READ, TURN_CLEAR, TURN_LOOK, TURNS };

struct disk {
    struct cycle cycle; /* first: a cycle's disk is at the same address */
    struct {
        uint32_t type, reserved;
        uint64_t sector;
    } header;
    struct {
        uint64_t sector;
        uint32_t sectors, flags;
    } range;
    uint64_t data[SECTOR / 8];
    struct vdev more[MAX_QUEUES - 1]; /* its queues but the first */
    uint32_t queues, queue;
    volatile uint8_t status;
    uint32_t generation[MAX_SECTORS];
    uint8_t content[MAX_SECTORS]; /* enum content */
    uint32_t sectors, sector;
    uint32_t number;
    enum turn turn;
};

extern struct driver blk_driver;

static struct device_counters counters_of_blk;
static struct rings rings[MAX_DISKS][MAX_QUEUES] __attribute__((aligned(4096)));
static struct disk disks[MAX_DISKS];
static uint32_t sectors = 256, wanted_disks = 1, wanted_queues = 1, clears;
static volatile uint64_t discards, zeroings, queues_used; /* queues_used: bits */

/* Differs from disk to disk, so that a sector of the wrong one is seen. */
static uint64_t sector_word(const struct disk *disk, uint32_t sector, uint32_t generation, uint32_t word)
{
    uint64_t seed = (uint64_t)generation << 32 | (uint64_t)disk->number << 24 | sector;
    return seed * 0x9e3779b97f4a7c15ull + word;
}

/* The next queue, in turn. */
static struct vdev *next_queue(struct disk *disk)
{
    disk->queue = (disk->queue + 1) % disk->queues;
    disk->cycle.asked = disk->queue ? &disk->more[disk->queue - 1] : &disk->cycle.dev;
    return disk->cycle.asked;
}

static uint32_t first_cleared(const struct disk *disk)
{
    uint32_t first = disk->sector - disk->sector % CLEARED;
    return first + CLEARED <= disk->sectors ? first : 0;
}

static int can_clear(const struct disk *disk)
{
    return disk->sectors >= CLEARED && disk->cycle.dev.features & (F_DISCARD | F_WRITE_ZEROES);
}

/* Discard or zero a block, the one and the other in turn. */
static void submit_clear(struct disk *disk, struct vdev *dev)
{
    uint64_t features = disk->cycle.dev.features;
    int zeroes = !(features & F_DISCARD) || (features & F_WRITE_ZEROES && (discards + zeroings) % 2);
    disk->range.sector = first_cleared(disk);
    disk->range.sectors = CLEARED;
    disk->range.flags = zeroes && zeroings % 2; /* unmap */
    disk->header.type = zeroes ? T_WRITE_ZEROES : T_DISCARD;
    disk->header.sector = 0;
    for (uint32_t i = 0; i < CLEARED; i++)
        disk->content[disk->range.sector + i] = IN_DOUBT;
    describe(dev, 1, &disk->range, sizeof disk->range, 0);
}

/* Write a sector with a new generation, or read back one. */
static void submit_data(struct disk *disk, struct vdev *dev)
{
    if (disk->turn == TURN_WRITE)
        disk->sector = (disk->sector + 7) % disk->sectors;
    uint32_t sector = disk->turn == TURN_LOOK ? first_cleared(disk) + disk->sector % CLEARED : disk->sector;
    uint32_t earlier = (sector + disk->sectors - 7 * 5 % disk->sectors) % disk->sectors;
    if (disk->turn == TURN_READ && disk->generation[earlier])
        sector = earlier;
    int writing = disk->turn == TURN_WRITE;
    if (writing)
        disk->content[sector] = IN_DOUBT; /* until its status says otherwise */
    disk->header.type = writing ? T_OUT : T_IN;
    disk->header.sector = sector;
    for (uint32_t i = 0; i < SECTOR / 8; i++)
        disk->data[i] = writing ? sector_word(disk, sector, disk->generation[sector] + 1, i) : ~0ull;
    describe(dev, 1, disk->data, SECTOR, writing ? 0 : DESC_WRITE);
}

static void submit(struct cycle *cycle)
{
    struct disk *disk = (struct disk *)cycle;
    struct vdev *dev = next_queue(disk);
    disk->turn = (disk->turn + 1) % TURNS;
    if (disk->turn == TURN_CLEAR && !can_clear(disk))
        disk->turn = TURN_WRITE;
    if (disk->turn == TURN_CLEAR)
        submit_clear(disk, dev);
    else
        submit_data(disk, dev);
    disk->status = 0xff;
    describe(dev, 0, &disk->header, 16, 0);
    describe(dev, 2, &disk->status, 1, DESC_WRITE);
    vdev_submit(dev, 3);
}

static void cleared(struct disk *disk)
{
    int zeroes = disk->header.type == T_WRITE_ZEROES;
    for (uint32_t i = 0; i < CLEARED; i++)
        disk->content[disk->range.sector + i] = zeroes ? ZEROED : DISCARDED;
    if (zeroes)
        zeroings++;
    else
        discards++;
}

/* Whether a sector that was read is all zeroes, or all of its generation; what is at fault is noted. */
static void check_data(struct disk *disk, uint32_t sector)
{
    uint32_t generation = disk->generation[sector], content = disk->content[sector];
    int zeroes = content == ZEROED || (content == DISCARDED && !disk->data[0]);
    if (!generation && !zeroes) /* whatever was there before we came */
        return;
    for (uint32_t i = 0; i < SECTOR / 8; i++) {
        uint64_t want = zeroes ? 0 : sector_word(disk, sector, generation, i);
        if (disk->data[i] == want)
            continue;
        device_error("LOST sector", sector, want, disk->data[i]);
        return;
    }
}

static void check(struct cycle *cycle, uint32_t length)
{
    struct disk *disk = (struct disk *)cycle;
    uint32_t sector = (uint32_t)disk->header.sector;
    (void)length;
    queues_used |= 1u << disk->queue;
    if (disk->status) {
        device_error("BLK status, sector", sector, 0, disk->status);
        return;
    }
    if (disk->turn == TURN_CLEAR) {
        cleared(disk);
    } else if (disk->turn == TURN_WRITE) {
        disk->generation[sector]++;
        disk->content[sector] = WRITTEN;
    } else if (disk->content[sector] != IN_DOUBT) {
        check_data(disk, sector);
    }
}

static struct vdev *disk_init(uint32_t number)
{
    struct disk *disk = &disks[number];
    disk->number = number;
    disk->cycle.counters = &counters_of_blk;
    disk->cycle.submit = submit;
    disk->cycle.check = check;
    struct vdev *dev = &disk->cycle.dev;
    dev->rings = &rings[number][0];
    disk->queues = number < MAX_DISKS ? wanted_queues : 1;
    for (uint32_t i = 1; i < disk->queues; i++) {
        disk->more[i - 1].rings = &rings[number][i];
        (i > 1 ? &disk->more[i - 2] : dev)->next = &disk->more[i - 1];
    }
    disk->cycle.features = (clears ? F_DISCARD | F_WRITE_ZEROES : 0) | (disk->queues > 1 ? F_MQ : 0);
    return dev;
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
    const struct disk *disk = &disks[number];
    if (disk->queues == 1)
        return 1;
    uint32_t there = *(volatile uint16_t *)(disk->cycle.dev.config + NUM_QUEUES);
    if (there < disk->queues)
        device_error("BLK queues of disk", number, disk->queues, there);
    return there >= disk->queues;
}

static void find(void)
{
    if (!wanted_disks || wanted_disks > MAX_DISKS)
        wanted_disks = MAX_DISKS;
    if (!wanted_queues || wanted_queues > MAX_QUEUES)
        wanted_queues = MAX_QUEUES;
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

/* --- disks that come and go, beside those that were there from boot ---------------------------------------------- */

static struct disk *plugged_in(uint32_t slot)
{
    for (uint32_t number = wanted_disks; number < MAX_DISKS; number++)
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
        disk->generation[sector] = disk->content[sector] = 0;
    disk->cycle.state = CYCLE_RESET;
    disk->cycle.ios = disk->queue = 0;
    disk->cycle.asked = NULL;
    disk->turn = TURN_WRITE;
    return 1;
}

void blk_step_plugged(void)
{
    for (uint32_t number = wanted_disks; number < MAX_DISKS; number++)
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
    put_number(" blk_discards=", discards);
    put_number(" blk_zeroings=", zeroings);
    put_number(" blk_queues_used=", queues_used);
}

static const struct word words[] = {
    {"sectors=", &sectors}, {"disks=", &wanted_disks}, {"blk_queues=", &wanted_queues}, {"blk_clear=", &clears},
    {NULL, NULL},
};

struct driver blk_driver = {.name = "blk", .words = words, .find = find, .step = step, .report = report};
