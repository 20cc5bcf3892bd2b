#include "virtio.h"

#define CAP_VENDOR 0x09
#define CAP_MSIX 0x11
#define CFG_COMMON 1
#define CFG_NOTIFY 2
#define CFG_ISR 3
#define CFG_DEVICE 4
#define CFG_PCI 5
#define MAX_CAPS 48 /* all that fit into 256 bytes: a list that bites its tail ends */
#define MSI_ADDRESS 0xfee00000u

static void pci_select(uint32_t slot, uint32_t offset)
{
    outl(0xcf8, 1u << 31 | slot << 11 | (offset & 0xfc));
}

uint32_t pci_read(uint32_t slot, uint32_t offset, uint32_t size)
{
    pci_select(slot, offset);
    uint16_t port = (uint16_t)(0xcfc + (offset & 3));
    return size == 1 ? inb(port) : size == 2 ? inw(port) : inl(port);
}

void pci_write(uint32_t slot, uint32_t offset, uint32_t size, uint32_t value)
{
    pci_select(slot, offset);
    uint16_t port = (uint16_t)(0xcfc + (offset & 3));
    if (size == 1)
        outb(port, (uint8_t)value);
    else if (size == 2)
        outw(port, (uint16_t)value);
    else
        outl(port, value);
}

static volatile uint8_t *bar(uint32_t slot, uint32_t index)
{
    uint32_t low = pci_read(slot, 0x10 + 4 * index, 4);
    uint64_t address = low & ~0xfu;
    if ((low & 6) == 4)
        address |= (uint64_t)pci_read(slot, 0x14 + 4 * index, 4) << 32;
    return map_mmio(address);
}

static uint32_t queues_of(const struct vdev *dev)
{
    uint32_t count = 1;
    while ((dev = dev->next))
        count++;
    return count;
}

/* Locate the structures of the modern device in a slot; 1 done. It has vectors of its own, which stay its `dev`'s. */
int vdev_at(struct vdev *dev, uint32_t slot)
{
    static uint32_t vectors_used;
    if (!dev->vector) {
        if (vectors_used + 1 + queues_of(dev) > IRQ_COUNT)
            return 0;
        dev->vector = IRQ_BASE + vectors_used;
        vectors_used += 1 + queues_of(dev);
    }
    pci_write(slot, 4, 2, pci_read(slot, 4, 2) | 6); /* memory, bus master */
    dev->common = dev->notify = dev->isr = dev->config = NULL;
    dev->msix = NULL;
    uint32_t budget = MAX_CAPS;
    for (uint32_t cap = pci_read(slot, 0x34, 1); cap && budget--; cap = pci_read(slot, cap + 1, 1)) {
        uint32_t id = pci_read(slot, cap, 1);
        if (id == CAP_MSIX) {
            uint32_t table = pci_read(slot, cap + 4, 4);
            dev->msix = (volatile uint32_t *)(bar(slot, table & 7) + (table & ~7u));
            pci_write(slot, cap + 2, 2, 0x8000); /* enable, function not masked */
        }
        if (id != CAP_VENDOR)
            continue;
        uint32_t kind = pci_read(slot, cap + 3, 1), index = pci_read(slot, cap + 4, 1);
        uint32_t offset = pci_read(slot, cap + 8, 4);
        if (kind == CFG_PCI) {
            dev->window_cap = cap;
            continue;
        }
        volatile uint8_t *at = bar(slot, index) + offset;
        if (kind == CFG_COMMON) {
            dev->common = at;
            dev->bar_of_common = index;
            dev->common_offset = offset;
        } else if (kind == CFG_NOTIFY) {
            dev->notify = at;
            dev->notify_multiplier = pci_read(slot, cap + 16, 4);
        } else if (kind == CFG_ISR) {
            dev->isr = at;
        } else if (kind == CFG_DEVICE) {
            dev->config = at;
        }
    }
    dev->slot = slot;
    return dev->common && dev->notify && dev->msix;
}

/* Find the nth modern device with this id (from 0); 1 found, see vdev_at. */
int vdev_find(struct vdev *dev, uint16_t device_id, uint32_t nth)
{
    for (uint32_t slot = 1; slot < 32; slot++)
        if (pci_read(slot, 0, 4) == ((uint32_t)device_id << 16 | 0x1af4) && !nth--)
            return vdev_at(dev, slot);
    return 0;
}

static void window_set(struct vdev *dev, uint32_t offset, uint32_t size)
{
    pci_write(dev->slot, dev->window_cap + 4, 1, dev->bar_of_common);
    pci_write(dev->slot, dev->window_cap + 8, 4, dev->common_offset + offset);
    pci_write(dev->slot, dev->window_cap + 12, 4, size);
}

uint32_t common_read(struct vdev *dev, uint32_t offset, uint32_t size)
{
    if (dev->through_window) {
        window_set(dev, offset, size);
        return pci_read(dev->slot, dev->window_cap + 16, size);
    }
    volatile uint8_t *at = dev->common + offset;
    return size == 1 ? *at : size == 2 ? *(volatile uint16_t *)at : *(volatile uint32_t *)at;
}

void common_write(struct vdev *dev, uint32_t offset, uint32_t size, uint32_t value)
{
    if (dev->through_window) {
        window_set(dev, offset, size);
        pci_write(dev->slot, dev->window_cap + 16, size, value);
        return;
    }
    volatile uint8_t *at = dev->common + offset;
    if (size == 1)
        *at = (uint8_t)value;
    else if (size == 2)
        *(volatile uint16_t *)at = (uint16_t)value;
    else
        *(volatile uint32_t *)at = value;
}

static void common_write64(struct vdev *dev, uint32_t offset, uint64_t value)
{
    common_write(dev, offset, 4, (uint32_t)value);
    common_write(dev, offset + 4, 4, (uint32_t)(value >> 32));
}

/* 1 when the status reads 0 within STUCK_SECONDS. */
int vdev_reset(struct vdev *dev)
{
    uint64_t began = rdtsc();
    common_write(dev, 0x14, 1, 0);
    while (common_read(dev, 0x14, 1)) {
        pause();
        if (rdtsc() - began > milliseconds(1000ull * STUCK_SECONDS))
            return 0;
    }
    return 1;
}

/* MSI-X entry `entry` to CPU 0: any CPU sees the count. */
static void route(struct vdev *dev, uint32_t entry)
{
    volatile uint32_t *at = dev->msix + 4 * entry;
    at[0] = MSI_ADDRESS;
    at[1] = 0;
    at[2] = dev->vector + entry;
    at[3] = 0;
}

/* Rings, an interrupt and a doorbell for one queue; its interrupt is `vector` + 1, after configuration changes. */
static int queue_start(struct vdev *dev)
{
    struct rings *rings = dev->rings;
    for (uint64_t i = 0; i < sizeof *rings / 8; i++)
        ((volatile uint64_t *)rings)[i] = 0;
    dev->next_used = 0;
    common_write(dev, 0x16, 2, dev->queue);
    uint32_t most = common_read(dev, 0x18, 2);
    dev->size = most < QUEUE_SIZE ? (uint16_t)most : QUEUE_SIZE;
    if (!dev->size)
        return 0;
    common_write(dev, 0x18, 2, dev->size);
    common_write(dev, 0x1a, 2, dev->queue + 1u);
    if (common_read(dev, 0x1a, 2) != dev->queue + 1u)
        return 0;
    dev->notify_off = common_read(dev, 0x1e, 2) * dev->notify_multiplier;
    common_write64(dev, 0x20, (uint64_t)rings->desc);
    common_write64(dev, 0x28, (uint64_t)&rings->avail);
    common_write64(dev, 0x30, (uint64_t)&rings->used);
    common_write(dev, 0x1c, 2, 1);
    return 1;
}

/* From reset to DRIVER_OK with as many queues as `next` has; 0 where the device does not go along. */
int vdev_start(struct vdev *dev, uint64_t wanted)
{
    common_write(dev, 0x14, 1, ACKNOWLEDGE);
    common_write(dev, 0x14, 1, ACKNOWLEDGE | DRIVER);
    common_write(dev, 0x00, 4, 0);
    uint64_t offered = common_read(dev, 0x04, 4);
    common_write(dev, 0x00, 4, 1);
    offered |= (uint64_t)common_read(dev, 0x04, 4) << 32;
    dev->features = offered & wanted;
    common_write(dev, 0x08, 4, 0);
    common_write(dev, 0x0c, 4, (uint32_t)dev->features);
    common_write(dev, 0x08, 4, 1);
    common_write(dev, 0x0c, 4, (uint32_t)(dev->features >> 32));
    common_write(dev, 0x14, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    if (!(common_read(dev, 0x14, 1) & FEATURES_OK))
        return 0;
    /* Another CPU's reset between the two halves leaves one of them, which is acceptable, and not what we go by. */
    common_write(dev, 0x08, 4, 0);
    uint64_t acked = common_read(dev, 0x0c, 4);
    common_write(dev, 0x08, 4, 1);
    acked |= (uint64_t)common_read(dev, 0x0c, 4) << 32;
    if (acked != dev->features)
        return 0;
    for (uint32_t entry = 0; entry <= queues_of(dev); entry++) /* 0: configuration changes, then the queues */
        route(dev, entry);
    common_write(dev, 0x10, 2, 0);
    if (!queue_start(dev))
        return 0;
    for (struct vdev *last = dev, *next = dev->next; next; last = next, next = next->next) {
        struct rings *rings = next->rings;
        struct vdev *after = next->next;
        *next = *last;
        next->rings = rings;
        next->queue = (uint16_t)(last->queue + 1);
        next->vector = last->vector + 1;
        next->next = after;
        if (!queue_start(next))
            return 0;
    }
    common_write(dev, 0x14, 1, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    return 1;
}

/* Behind a ring of the device's size (sections 2.7.6 and 2.7.8). */
static volatile uint16_t *used_event(struct vdev *dev)
{
    return dev->rings->avail.ring + dev->size;
}

static volatile uint16_t *avail_event(struct vdev *dev)
{
    return (volatile uint16_t *)(dev->rings->used.ring + dev->size);
}

/* Offer the chain that starts at descriptor 0 (count descriptors) and ring the doorbell. */
void vdev_submit(struct vdev *dev, uint32_t count)
{
    struct rings *rings = dev->rings;
    for (uint32_t i = 0; i + 1 < count; i++) {
        rings->desc[i].flags |= DESC_NEXT;
        rings->desc[i].next = (uint16_t)(i + 1);
    }
    if (dev->features & INDIRECT) {
        for (uint32_t i = 0; i < count; i++)
            rings->indirect[i] = rings->desc[i];
        rings->desc[0].addr = (uint64_t)rings->indirect;
        rings->desc[0].len = count * sizeof(struct desc);
        rings->desc[0].flags = DESC_INDIRECT;
    }
    *used_event(dev) = rings->used.index; /* with EVENT_IDX: tell me of the next */
    rings->avail.ring[rings->avail.index % dev->size] = 0;
    dev->irq_seen = irq_count[dev->vector + 1];
    barrier();
    uint16_t before = rings->avail.index;
    rings->avail.index = (uint16_t)(before + 1);
    barrier();
    int wanted = dev->features & EVENT_IDX ? *avail_event(dev) == before : !(rings->used.flags & 1);
    if (wanted)
        *(volatile uint16_t *)(dev->notify + dev->notify_off) = dev->queue;
}

/* 1 once the interrupt has come and the chain is on the used ring. */
int vdev_finished(struct vdev *dev, uint32_t *length)
{
    struct rings *rings = dev->rings;
    if (irq_count[dev->vector + 1] == dev->irq_seen || rings->used.index == dev->next_used)
        return 0;
    barrier();
    *length = rings->used.ring[dev->next_used % dev->size].len;
    dev->next_used++;
    return 1;
}
