/* pvpanic: says the same thing again and again. Its VMM is to hear it once. */
#include "driver.h"

#define PVPANIC 0x00111b36u
#define EVENTS 3 /* a panic, and a crash kernel that was loaded */
#define EVERY_MS 20

extern struct driver pvpanic_driver;

static volatile uint8_t *port;
static uint64_t said, last;

static void find(void)
{
    for (uint32_t slot = 1; slot < 32; slot++) {
        if (pci_read(slot, 0, 4) != PVPANIC)
            continue;
        pci_write(slot, 4, 2, pci_read(slot, 4, 2) | 2); /* memory */
        port = map_mmio(pci_read(slot, 0x10, 4) & ~0xfu);
        if (*port != EVENTS)
            device_error("pvpanic events, slot", slot, EVENTS, *port);
        return;
    }
    pvpanic_driver.wanted = 0;
    put_absent("pvpanic");
}

static void step(void)
{
    uint64_t now = rdtsc();
    if (now - last < milliseconds(EVERY_MS))
        return;
    last = now;
    *port = (uint8_t)pvpanic_driver.wanted;
    said++;
}

static void report(void)
{
    put_number(" pvpanic=", said);
}

static const struct word words[] = {{"pvpanic=", &pvpanic_driver.wanted}, {NULL, NULL}};

struct driver pvpanic_driver = {.name = "pvpanic", .words = words, .find = find, .step = step, .report = report};
