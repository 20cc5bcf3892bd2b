/* The rings of the vsock driver: packets that come and go, several at a time, so not vdev_submit's. An answer counts
 * only when its interrupt came. */
#include "vsock.h"

#define BUFFER (HEADER + LARGEST)
#define SLOTS 8 /* packets that go */

static struct rings in_rings __attribute__((aligned(4096))), out_rings __attribute__((aligned(4096))),
    event_rings __attribute__((aligned(4096)));
static struct vdev events = {.rings = &event_rings};
static struct vdev out = {.rings = &out_rings, .next = &events};
static struct vdev in = {.rings = &in_rings, .next = &out};

static uint8_t incoming[QUEUE_SIZE][(BUFFER + 7) / 8 * 8];
static uint32_t taken; /* the buffer that link_next gave */
static struct {
    struct header header;
    uint8_t copy[COPIED];
    uint32_t busy;
} slots[SLOTS];
static volatile uint32_t event_id;

uint64_t link_cid;

static void offer(struct vdev *dev, uint16_t head)
{
    struct rings *rings = dev->rings;
    rings->avail.ring[rings->avail.index % QUEUE_SIZE] = head;
    barrier();
    uint16_t before = rings->avail.index;
    rings->avail.index = (uint16_t)(before + 1);
    barrier();
    int wanted = dev->features & EVENT_IDX ? rings->used.avail_event == before : !(rings->used.flags & 1);
    if (wanted)
        *(volatile uint16_t *)(dev->notify + dev->notify_off) = dev->queue;
}

/* 1: the next chain that came back, once an interrupt has told of it. */
static int came_back(struct vdev *dev, uint32_t *head, uint32_t *length)
{
    struct rings *rings = dev->rings;
    uint32_t seen = irq_count[dev->vector + 1];
    if (rings->used.index == dev->next_used || seen == dev->irq_seen)
        return 0;
    barrier();
    *head = rings->used.ring[dev->next_used % QUEUE_SIZE].id;
    *length = rings->used.ring[dev->next_used % QUEUE_SIZE].len;
    dev->next_used++;
    if (rings->used.index != dev->next_used)
        return 1; /* of the same interrupt, or a later one */
    dev->irq_seen = seen;
    rings->avail.used_event = dev->next_used; /* tell me of the next */
    barrier();
    if (rings->used.index != dev->next_used)
        dev->irq_seen = seen - 1; /* it came before the wish */
    return 1;
}

static void listen(uint32_t at)
{
    in.rings->desc[at] = (struct desc){(uint64_t)incoming[at], BUFFER, DESC_WRITE, 0};
    offer(&in, (uint16_t)at);
}

static void listen_for_events(void)
{
    events.rings->desc[0] = (struct desc){(uint64_t)&event_id, sizeof event_id, DESC_WRITE, 0};
    offer(&events, 0);
}

int link_find(void)
{
    return vdev_find(&in, DEVICE_ID, 0);
}

uint32_t link_slot(void)
{
    return in.slot;
}

uint32_t link_status(void)
{
    return common_read(&in, 0x14, 1);
}

static void read_cid(void)
{
    link_cid = *(volatile uint64_t *)in.config;
}

/* 1 when the device works, with every buffer offered. */
int link_start(void)
{
    if (!vdev_reset(&in) || !vdev_start(&in, ring_features()))
        return 0;
    read_cid();
    for (struct vdev *dev = &in; dev; dev = dev->next)
        dev->irq_seen = irq_count[dev->vector + 1];
    for (uint32_t i = 0; i < QUEUE_SIZE; i++)
        listen(i);
    listen_for_events();
    return 1;
}

/* What was sent is sent: its slots are free. */
void link_step(void)
{
    uint32_t head, length;
    while (came_back(&out, &head, &length))
        slots[head / 2 % SLOTS].busy = 0;
}

static uint32_t free_slot(void)
{
    uint32_t at = 0;
    while (at < SLOTS && slots[at].busy)
        at++;
    return at;
}

int link_has_room(void)
{
    return free_slot() < SLOTS;
}

/* Send `header->len` bytes of `data`, which stay as they are until it is sent; or, with `size`, a power of two, those of
 * a ring of that size from `head` on, at most COPIED, which are copied. 0: every slot is on its way. */
int link_send(const struct header *header, const uint8_t *data, uint32_t head, uint32_t size)
{
    uint32_t at = free_slot();
    if (at == SLOTS)
        return 0;
    slots[at].busy = 1;
    slots[at].header = *header;
    slots[at].header.src_cid = link_cid;
    slots[at].header.dst_cid = HOST;
    slots[at].header.type = 1;
    out.rings->desc[2 * at] = (struct desc){(uint64_t)&slots[at].header, HEADER, 0, 0};
    if (header->len) {
        for (uint32_t i = 0; size && i < header->len; i++)
            slots[at].copy[i] = data[(head + i) % size];
        if (size)
            data = slots[at].copy;
        out.rings->desc[2 * at].flags = DESC_NEXT;
        out.rings->desc[2 * at].next = (uint16_t)(2 * at + 1);
        out.rings->desc[2 * at + 1] = (struct desc){(uint64_t)data, header->len, 0, 0};
    }
    offer(&out, (uint16_t)(2 * at));
    return 1;
}

/* The next packet that came, with its data behind it, until link_done; NULL: none. */
const struct header *link_next(uint32_t *length)
{
    uint32_t head;
    if (!came_back(&in, &head, length))
        return NULL;
    taken = head % QUEUE_SIZE;
    return (const struct header *)incoming[taken];
}

void link_done(void)
{
    listen(taken);
}

/* 1: an event came. The address may be another now (virtio 1.2 section 5.10.6.7). */
int link_event(uint32_t *id, uint32_t *length)
{
    uint32_t head;
    if (!came_back(&events, &head, length))
        return 0;
    *id = event_id;
    read_cid();
    listen_for_events();
    return 1;
}
