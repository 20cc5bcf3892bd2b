/* A small virtio-pci driver by the specification (virtio 1.2): modern devices, split rings, MSI-X. */
#ifndef VIRTIO_H
#define VIRTIO_H
#include "probe.h"

#define QUEUE_SIZE 16
#define ACKNOWLEDGE 1
#define DRIVER 2
#define DRIVER_OK 4
#define FEATURES_OK 8
#define NEEDS_RESET 64
#define VERSION_1 (1ull << 32)
#define EVENT_IDX (1ull << 29)
#define INDIRECT (1ull << 28)
#define DESC_NEXT 1
#define DESC_WRITE 2
#define DESC_INDIRECT 4

struct desc {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};

struct rings {
    struct desc desc[QUEUE_SIZE] __attribute__((aligned(16)));
    struct {
        volatile uint16_t flags, index, ring[QUEUE_SIZE], used_event;
    } avail __attribute__((aligned(4)));
    struct {
        volatile uint16_t flags, index;
        struct {
            volatile uint32_t id, len;
        } ring[QUEUE_SIZE];
        volatile uint16_t avail_event;
    } used __attribute__((aligned(4096)));
    struct desc indirect[4] __attribute__((aligned(16)));
};

struct vdev {
    uint32_t slot; /* PCI device number; 0: absent */
    uint32_t vector; /* of configuration changes; those of its queues follow */
    uint32_t bar_of_common;
    uint32_t common_offset, window_cap;
    volatile uint8_t *common, *notify, *isr, *config;
    uint32_t notify_multiplier;
    uint32_t notify_off;
    volatile uint32_t *msix;
    struct rings *rings;
    uint16_t queue; /* whose rings these are */
    uint16_t size;  /* of them: the device's, where that is less than ours */
    struct vdev *next; /* the same device as its next queue, or NULL */
    uint64_t features;
    uint16_t next_used;
    uint32_t irq_seen;
    int through_window; /* this cycle's common-register accesses go through the config-access capability */
};

uint32_t pci_read(uint32_t slot, uint32_t offset, uint32_t size);
void pci_write(uint32_t slot, uint32_t offset, uint32_t size, uint32_t value);
int vdev_at(struct vdev *dev, uint32_t slot);
int vdev_find(struct vdev *dev, uint16_t device_id, uint32_t nth);
uint32_t common_read(struct vdev *dev, uint32_t offset, uint32_t size);
void common_write(struct vdev *dev, uint32_t offset, uint32_t size, uint32_t value);
int vdev_reset(struct vdev *dev);
int vdev_start(struct vdev *dev, uint64_t wanted);
void vdev_submit(struct vdev *dev, uint32_t count);
int vdev_finished(struct vdev *dev, uint32_t *length);

#endif
