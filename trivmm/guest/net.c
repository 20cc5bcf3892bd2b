/* The network: two probe guests that are tied to each other send each other data, frame by frame, each checked word by
 * word, none left out and none twice. A window of frames is on its way; what is not acknowledged in time is sent again,
 * as anybody does whose network loses something while a machine moves. Starts once, never resets, never blocks.
 *
 * Received frames are looked at when an interrupt came, and only then: one that is lost stops the exchange. */
#include "net.h"

#define TYPE 0x88b5 /* for experiments (IEEE 802) */
#define HEADER 12   /* virtio-net's */
#define ALIGNED 4   /* where one begins in a buffer, so that its frame's words are aligned */
#define BEFORE (ALIGNED + HEADER)
#define WINDOW 8
#define SLOTS QUEUE_SIZE
#define RESEND_MS 100
#define MRG_RXBUF (1ull << 15)
#define F_MAC (1ull << 5)
#define F_STATUS (1ull << 16)

struct message {
    uint8_t to[6], from[6];
    uint8_t type[2];
    uint8_t zero[2];
    uint32_t number, expected; /* of this data frame, or NO_DATA; and the next one that is wanted */
    uint32_t total, words;
    uint64_t checksum;
    uint64_t data[];
};

#define NO_DATA 0xffffffffu
#define MOST_WORDS ((65000 - sizeof(struct message)) / 8)

static struct rings in_rings __attribute__((aligned(4096))), out_rings __attribute__((aligned(4096)));
static struct vdev out = {.rings = &out_rings};
static struct vdev in = {.rings = &in_rings, .next = &out};
static uint8_t in_buffers[SLOTS][FRAME_ROOM] __attribute__((aligned(4096)));
static uint8_t out_buffers[SLOTS][FRAME_ROOM] __attribute__((aligned(4096)));
static uint8_t whole[FRAME_ROOM] __attribute__((aligned(16))); /* of a frame that came in several buffers */
static uint32_t out_busy; /* bits: slots that the device has */
static uint32_t out_slot; /* that net_frame gave last */

static uint32_t mebibytes, frame_bytes, buffer_bytes;
static uint32_t total, next, acknowledged, expected, peer_total, answer_due;
static uint64_t progress_at, received_bytes, resent, first_at, last_at; /* last_at: everything had come and gone */
static int running;

uint8_t net_mac[6];
uint32_t net_ip, net_gateway, net_port;

extern struct driver net_driver;

/* --- rings --------------------------------------------------------------------------------------------------------- */

static void offer(struct vdev *dev, uint32_t slot, void *address, uint32_t length, uint16_t flags)
{
    struct rings *rings = dev->rings;
    rings->desc[slot] = (struct desc){(uint64_t)address, length, flags, 0};
    uint16_t before = rings->avail.index;
    rings->avail.ring[before % QUEUE_SIZE] = (uint16_t)slot;
    barrier();
    rings->avail.index = (uint16_t)(before + 1);
    barrier();
    int wanted = dev->features & EVENT_IDX ? rings->used.avail_event == before : !(rings->used.flags & 1);
    if (wanted)
        *(volatile uint16_t *)(dev->notify + dev->notify_off) = dev->queue;
}

static void offer_buffer(uint32_t slot)
{
    offer(&in, slot, in_buffers[slot] + ALIGNED, buffer_bytes, DESC_WRITE);
}

static void reclaim(void)
{
    while (out.rings->used.index != out.next_used) {
        barrier();
        out_busy &= ~(1u << out.rings->used.ring[out.next_used % QUEUE_SIZE].id);
        out.next_used++;
    }
}

uint8_t *net_frame(void)
{
    reclaim();
    for (uint32_t slot = 0; slot < SLOTS; slot++) {
        if (out_busy & 1u << slot)
            continue;
        out_slot = slot;
        return out_buffers[slot] + BEFORE;
    }
    return NULL;
}

void net_send(uint32_t length)
{
    uint8_t *header = out_buffers[out_slot] + ALIGNED;
    for (uint32_t i = 0; i < HEADER; i++)
        header[i] = 0;
    out_busy |= 1u << out_slot;
    out.rings->avail.used_event = (uint16_t)(out.next_used - 1); /* with EVENT_IDX: do not tell */
    offer(&out, out_slot, header, HEADER + length, 0);
}

/* --- the exchange -------------------------------------------------------------------------------------------------- */

static uint64_t word_of(uint32_t who, uint32_t number, uint32_t at)
{
    return ((uint64_t)who << 40 ^ (uint64_t)number << 8) * 0x9e3779b97f4a7c15ull + at * 0xd1b54a32d192ed03ull;
}

static int send_message(uint32_t number)
{
    struct message *message = (struct message *)net_frame();
    if (!message)
        return 0;
    for (uint32_t i = 0; i < 6; i++)
        message->to[i] = 0xff;
    copy_bytes(message->from, net_mac, 6);
    put16(message->type, TYPE);
    message->zero[0] = message->zero[1] = 0;
    message->number = number;
    message->expected = expected;
    message->total = total;
    message->words = number == NO_DATA ? 0 : frame_bytes / 8;
    message->checksum = 0;
    for (uint32_t i = 0; i < message->words; i++)
        message->checksum += message->data[i] = word_of(net_mac[5], number, i);
    answer_due = 0;
    net_send(sizeof *message + 8 * message->words);
    return 1;
}

static void check(const struct message *message)
{
    uint64_t checksum = 0;
    for (uint32_t i = 0; i < message->words; i++) {
        checksum += message->data[i];
        if (message->data[i] == word_of(message->from[5], message->number, i))
            continue;
        device_error("LOST frame", message->number, word_of(message->from[5], message->number, i), message->data[i]);
        return;
    }
    if (checksum != message->checksum)
        device_error("LOST checksum", message->number, message->checksum, checksum);
}

static void message_received(const struct message *message, uint32_t length)
{
    if (length < sizeof *message || message->words > MOST_WORDS || length < sizeof *message + 8 * message->words) {
        device_error("LOST length", message->number, sizeof *message + 8 * message->words, length);
        return;
    }
    peer_total = message->total;
    if (!first_at)
        first_at = rdtsc();
    if (message->expected > acknowledged && message->expected <= total) {
        acknowledged = message->expected;
        progress_at = rdtsc();
        if (next < acknowledged)
            next = acknowledged;
    }
    if (message->number == NO_DATA)
        return;
    answer_due = 1;
    if (message->number != expected)
        return; /* it has been here, or one before it was lost */
    check(message);
    expected++;
    received_bytes += 8ull * message->words;
}

static void frame_received(const uint8_t *frame, uint32_t length)
{
    if (get16(frame + 12) == TYPE)
        message_received((const struct message *)frame, length);
    else
        ip_received(frame, length);
}

/* The next used buffer: its slot, with its length. Those of one frame come all at once. */
static uint32_t take(uint32_t *length)
{
    uint32_t slot = in.rings->used.ring[in.next_used % QUEUE_SIZE].id;
    *length = in.rings->used.ring[in.next_used % QUEUE_SIZE].len;
    in.next_used++;
    return slot % SLOTS;
}

static void look_at_frame(void)
{
    uint32_t length, slots[SLOTS], taken = 1;
    slots[0] = take(&length);
    uint8_t *header = in_buffers[slots[0]] + ALIGNED, *frame = header + HEADER;
    uint32_t count = in.features & MRG_RXBUF ? header[10] | (uint32_t)header[11] << 8 : 1;
    if (length < HEADER || !count || count > SLOTS) {
        device_error("LOST header", length, 1, count);
        count = 1;
        length = HEADER;
    }
    uint32_t at = length - HEADER;
    if (count > 1)
        copy_bytes(whole, frame, at);
    for (; taken < count && in.rings->used.index != in.next_used; taken++) {
        slots[taken] = take(&length);
        if (at + length > FRAME_ROOM)
            length = 0;
        copy_bytes(whole + at, in_buffers[slots[taken]] + ALIGNED, length);
        at += length;
    }
    if (taken < count)
        device_error("LOST buffer", taken, count, at);
    else if (at >= 14)
        frame_received(count > 1 ? whole : frame, at);
    for (uint32_t i = 0; i < taken; i++)
        offer_buffer(slots[i]);
}

static void look_at_received(void)
{
    uint32_t interrupts = irq_count[in.vector + 1];
    if (interrupts == in.irq_seen)
        return;
    in.irq_seen = interrupts;
    barrier();
    do {
        while (in.rings->used.index != in.next_used) {
            barrier();
            look_at_frame();
        }
        in.rings->avail.used_event = in.next_used;
        barrier();
    } while (in.features & EVENT_IDX && in.rings->used.index != in.next_used);
}

static void exchange(uint64_t now)
{
    if (acknowledged < next && now - progress_at > milliseconds(RESEND_MS)) {
        resent += next - acknowledged;
        next = acknowledged;
        progress_at = now;
    }
    if (acknowledged == next)
        progress_at = now;
    for (uint32_t i = 0; i < WINDOW && next < total && next < acknowledged + WINDOW; i++) {
        if (!send_message(next))
            break;
        next++;
    }
    if (answer_due)
        send_message(NO_DATA);
}

/* --- the driver ---------------------------------------------------------------------------------------------------- */

static void find(void)
{
    if (vdev_find(&in, 0x1041, 0))
        return;
    net_driver.wanted = 0;
    put_absent("net");
}

static void start(void)
{
    if (!buffer_bytes || buffer_bytes > FRAME_ROOM - ALIGNED)
        buffer_bytes = FRAME_ROOM - ALIGNED;
    if (!frame_bytes || frame_bytes / 8 > MOST_WORDS)
        frame_bytes = 1400;
    total = mebibytes ? (uint32_t)(((uint64_t)mebibytes << 20) / frame_bytes) : 0;
    if (!vdev_reset(&in) || !vdev_start(&in, ring_features() | MRG_RXBUF | F_MAC | F_STATUS)) {
        note_problem("net does not start, slot", in.slot, 0, common_read(&in, 0x14, 1));
        net_driver.wanted = 0;
        return;
    }
    copy_bytes(net_mac, in.config, 6);
    out.rings->avail.flags = 1; /* no interrupts: used buffers are looked for when one is needed */
    in.irq_seen = irq_count[in.vector + 1];
    for (uint32_t slot = 0; slot < SLOTS; slot++)
        offer_buffer(slot);
    progress_at = rdtsc();
    running = 1;
}

static int done(void)
{
    return running && acknowledged == total && peer_total && expected == peer_total;
}

static void step(void)
{
    if (!running) {
        start();
        return;
    }
    uint64_t now = rdtsc();
    look_at_received();
    exchange(now);
    if (!last_at && done())
        last_at = now;
    ip_step(now);
}

static void report(void)
{
    put_number(" net_sent=", (uint64_t)acknowledged * (frame_bytes / 8 * 8));
    put_number(" net_received=", received_bytes);
    put_number(" net_resent=", resent);
    put_number(" net_done=", done());
    put_number(" net_ms=", last_at ? (last_at - first_at) / options.tsc_khz : 0); /* that the exchange took */
    put_number(" net_echoed=", net_echoed);
    put_number(" net_pinged=", net_pinged);
}

static const struct word words[] = {
    {"net=", &net_driver.wanted}, {"net_mib=", &mebibytes},       {"net_frame=", &frame_bytes},
    {"net_buffer=", &buffer_bytes}, {"net_ip=", &net_ip},         {"net_gateway=", &net_gateway},
    {"net_port=", &net_port},     {NULL, NULL},
};

struct driver net_driver = {.name = "net", .words = words, .find = find, .step = step, .report = report};
