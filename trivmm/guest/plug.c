/* PCI hotplug without an AML interpreter: what the DSDT's methods do, by the registers they use. A disk that comes is
 * found by ECAM, its BAR is sized and put somewhere else, and it is cycled as the others; one that is to go is ejected
 * at rest. */
#include "driver.h"

#define GED 0xfed00000ul
#define HOTPLUG 0xfed01000ul
#define ECAM 0xe8000000ul
#define PCI_DEVICES_CHANGED 4
#define BARS 0xd0000000u /* away from where the VMM begins */
#define BAR_BYTES 0x80000u
#define LOOK_MS 5
#define ANNOUNCED_MS 10000

enum { SERVE = 1, KEEP, SURPRISE }; /* lets go at rest, never, or in the middle of whatever goes on */

extern struct driver blk_driver, plug_driver;

static uint32_t asked;     /* slots whose device is to go */
static uint32_t announced; /* slots whose device is new, read before its turn */
static uint64_t inserted, ejected;

static volatile uint32_t *hotplug(uint32_t offset)
{
    return (volatile uint32_t *)(HOTPLUG + offset);
}

static volatile uint32_t *ecam(uint32_t slot, uint32_t offset)
{
    return (volatile uint32_t *)(ECAM + (slot << 15) + offset);
}

/* BAR 0, with decoding off meanwhile. */
static void place(uint32_t slot)
{
    uint32_t kind = *ecam(slot, 0x10) & 0xf;
    *(volatile uint16_t *)ecam(slot, 4) = 0;
    *ecam(slot, 0x10) = 0xffffffff;
    uint32_t size = ~(*ecam(slot, 0x10) & ~0xfu) + 1;
    if (size != BAR_BYTES)
        device_error("PLUG BAR size, slot", slot, BAR_BYTES, size);
    *ecam(slot, 0x10) = BARS + slot * BAR_BYTES;
    if ((kind & 6) == 4)
        *ecam(slot, 0x14) = 0;
    if (*ecam(slot, 0x10) != ((BARS + slot * BAR_BYTES) | kind))
        device_error("PLUG BAR, slot", slot, (BARS + slot * BAR_BYTES) | kind, *ecam(slot, 0x10));
}

static void come(uint32_t slot)
{
    uint32_t id = *ecam(slot, 0);
    if (id == 0xffffffff || id != pci_read(slot, 0, 4)) {
        device_error("PLUG id, slot", slot, pci_read(slot, 0, 4), id);
        return;
    }
    place(slot);
    inserted++;
    blk_plug(slot);
}

/* Behind an ejection the slot is empty, unless the next device is in it already: then that is announced, soon. */
static void check_gone(uint32_t slot)
{
    uint64_t began = rdtsc();
    if (*ecam(slot, 0) == 0xffffffff && pci_read(slot, 0, 4) == 0xffffffff)
        return;
    while (!(announced >> slot & 1)) {
        if (rdtsc() - began > milliseconds(ANNOUNCED_MS)) {
            device_error("PLUG still there, slot", slot, 0xffffffff, *ecam(slot, 0));
            return;
        }
        announced |= *hotplug(0);
    }
}

static void let_go(uint32_t slot)
{
    if (plug_driver.wanted == SURPRISE)
        blk_forget(slot);
    else if (!blk_unplug(slot))
        return;
    *hotplug(8) = 1u << slot;
    asked &= ~(1u << slot);
    ejected++;
    check_gone(slot);
}

static void look(void)
{
    if (!(*(volatile uint8_t *)GED & PCI_DEVICES_CHANGED) && !announced)
        return;
    uint32_t up = announced | *hotplug(0), down = *hotplug(4);
    announced = 0;
    for (uint32_t slot = 1; slot < 32; slot++)
        if (up >> slot & 1)
            come(slot);
    if (plug_driver.wanted != KEEP)
        asked |= down;
}

static void find(void)
{
}

static void step(void)
{
    static uint64_t last;
    uint64_t now = rdtsc();
    if (now - last >= milliseconds(LOOK_MS)) {
        last = now;
        look();
    }
    blk_step_plugged();
    for (uint32_t slot = 1; asked && slot < 32; slot++)
        if (asked >> slot & 1)
            let_go(slot);
}

static void report(void)
{
    put_number(" inserted=", inserted);
    put_number(" ejected=", ejected);
    if (!blk_driver.wanted) /* it reports by itself otherwise */
        blk_driver.report();
}

static const struct word words[] = {{"plug=", &plug_driver.wanted}, {NULL, NULL}};

struct driver plug_driver = {.name = "plug", .words = words, .find = find, .step = step, .report = report};
