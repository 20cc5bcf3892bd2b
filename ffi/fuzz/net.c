/* Hostile drivers and hostile peers of a network interface (ffi/net*.c).
 *
 * A case is an interface with a pair of queues and commands, over one end of a socket pair (a stream, or datagrams) whose
 * other end is ours, or over a pair whose frames have headers, as a tap's do. The driver offers frames that are none,
 * headers that lie, buffers that are too small, commands that are cut; the peer sends frames, halves of frames, lengths
 * that can't be, or hangs up; in any order, with turns between. Then:
 *  - what arrives at the peer are whole frames, each of a length that may be, with a header that points into it and asks
 *    for nothing that was not negotiated;
 *  - what the driver is given fits what it offered: lengths, and the number of buffers that the header says;
 *  - every turn ends and owes nothing; a peer that said what can't be is hung up on.
 * Buffers lie at the end of a heap block, so that the sanitizer sees a byte outside.
 *
 * Over 400 lines: one program, and what each of its two liars says is told beside how the other sees it.
 *
 * links: net.c net_receive.c net_link.c net_header.c net_control.c ring.c worker.c park.c
 * short: 4000
 * full: 250000
 */
#define _GNU_SOURCE
#include "fuzz.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include "net.h"

#define RAM 0x100000ull
#define BUFFERS 0x4000ull /* each that is received into has a place of its own */
#define BUFFER 0x12000ull
#define REST (BUFFERS + SIZE * BUFFER)
#define SIZE 8 /* of a queue */
#define STEPS 24
#define FEATURES                                                                                                       \
    (TV_NET_F_CSUM | TV_NET_F_GUEST_CSUM | TV_NET_F_CTRL_GUEST_OFFLOADS | TV_NET_F_GUEST_TSO4 | TV_NET_F_GUEST_TSO6 |  \
     TV_NET_F_GUEST_ECN | TV_NET_F_GUEST_UFO | TV_NET_F_HOST_TSO4 | TV_NET_F_HOST_TSO6 | TV_NET_F_HOST_ECN |           \
     TV_NET_F_HOST_UFO | TV_NET_F_MRG_RXBUF | TV_NET_F_CTRL_VQ | TV_NET_F_GUEST_ANNOUNCE | TV_NET_F_MQ |               \
     TV_NET_F_CTRL_MAC_ADDR)

enum { RX, TX, CONTROL, QUEUES };
enum { NEXT = 1, WRITE = 2 };

static struct tv_memory memory;
static struct tv_net net;
static struct tv_net_worker *self;
static struct tv_net_link *nic;
static struct tv_irq irq = {.fd = -1};
static uint32_t isr;
static uint16_t offered[QUEUES], seen[QUEUES];
static int peer, kind, strict; /* the driver has kept to the rules of its rings until now */
static uint64_t now_ns = 1000000000;
static struct fuzz *random_of;
static uint8_t reading[1 << 19], scratch[1 << 17];
static size_t read_end;
static struct {
    uint64_t sent, refused, received, long_, malformed, hung_up, commands, broken;
} met;

int clock_gettime(clockid_t clock, struct timespec *now)
{
    (void)clock;
    now_ns += random_of && fuzz_one_in(random_of, 64) ? fuzz_below(random_of, 400000000) : 200;
    *now = (struct timespec){(time_t)(now_ns / 1000000000u), (long)(now_ns % 1000000000u)};
    return 0;
}

/* No interface of this host is asked for anything. */
int ioctl(int fd, unsigned long request, ...)
{
    (void)fd;
    (void)request;
    return 0;
}

static uint8_t *at_gpa(uint64_t gpa)
{
    return memory.regions[0].hva + gpa;
}

static uint64_t ring_gpa(int queue, int which)
{
    return 0x1000ull * (uint64_t)queue + 0x400ull * (uint64_t)which;
}

static uint32_t some_length(struct fuzz *fuzz)
{
    static const uint32_t lengths[] = {0, 1, 11, 12, 13, 14, 25, 26, 27, 60, 1514, 65549, 65550, 65551, 65562, 65563};
    if (fuzz_one_in(fuzz, 4))
        return lengths[fuzz_below(fuzz, sizeof lengths / sizeof *lengths)];
    return (uint32_t)fuzz_below(fuzz, fuzz_one_in(fuzz, 16) ? 70000 : 400);
}

/* --- the driver ---------------------------------------------------------------------------------------------------- */

static void describe(int queue, uint16_t at, uint64_t gpa, uint32_t length, uint16_t flags, uint16_t next)
{
    uint8_t *desc = at_gpa(ring_gpa(queue, 0) + 16ull * at);
    memcpy(desc, &gpa, 8);
    memcpy(desc + 8, &length, 4);
    memcpy(desc + 12, &flags, 2);
    memcpy(desc + 14, &next, 2);
}

static uint64_t place(struct fuzz *fuzz, uint32_t length, int buffer)
{
    if (fuzz_one_in(fuzz, 400)) {
        strict = 0;
        return fuzz_next(fuzz);
    }
    if (buffer >= 0)
        return BUFFERS + ((uint64_t)buffer + 1) * BUFFER - length;
    return RAM - length - (fuzz_one_in(fuzz, 2) ? 0 : fuzz_below(fuzz, RAM - REST - length + 1));
}

static void lie(struct fuzz *fuzz, uint8_t *header)
{
    static const uint16_t numbers[] = {0, 1, 14, 34, 54, 0x7fff, 0x8000, 0xfffe, 0xffff};
    static const uint8_t types[] = {0, 1, 3, 4, 0x81, 0x83, 0x84, 2, 5, 0x80, 0xff};
    memset(header, 0, TV_NET_HEADER);
    if (fuzz_one_in(fuzz, 4))
        return;
    header[0] = fuzz_one_in(fuzz, 8) ? (uint8_t)fuzz_next(fuzz) : 1;
    header[1] = fuzz_one_in(fuzz, 3) ? 0 : types[fuzz_below(fuzz, sizeof types)];
    for (int i = 2; i < 12; i += 2) {
        uint16_t number = fuzz_one_in(fuzz, 2) ? (uint16_t)fuzz_below(fuzz, 120) : numbers[fuzz_below(fuzz, 9)];
        memcpy(header + i, &number, 2);
    }
}

/* A chain of one to three pieces; as `writable` a buffer, else a frame or a command. */
static void offer(struct fuzz *fuzz, int queue, int writable)
{
    uint16_t index = offered[queue], head = (uint16_t)(index % SIZE), next;
    uint16_t used;
    memcpy(&used, at_gpa(ring_gpa(queue, 2) + 2), 2);
    if ((uint16_t)(index - used) >= SIZE / 4 && queue != RX)
        return; /* two descriptors each, so that chains under way are left alone */
    if ((uint16_t)(index - used) >= SIZE) {
        if (!fuzz_one_in(fuzz, 64))
            return;
        strict = 0;
    }
    uint32_t length = some_length(fuzz);
    uint64_t gpa = place(fuzz, length, writable ? head : -1);
    if (writable) {
        describe(queue, head, gpa, length, fuzz_one_in(fuzz, 64) ? 0 : WRITE, 0);
    } else {
        head = (uint16_t)(2 * (index % (SIZE / 2)));
        next = (uint16_t)(head + 1);
        if (queue == CONTROL) {
            uint8_t command[12];
            fuzz_fill(fuzz, command, sizeof command);
            command[0] = (uint8_t)fuzz_below(fuzz, 7);
            command[1] = (uint8_t)fuzz_below(fuzz, 3);
            command[2] = fuzz_one_in(fuzz, 2) ? command[2] : (uint8_t)fuzz_below(fuzz, 4);
            command[3] = fuzz_one_in(fuzz, 2) ? command[3] : 0;
            length = (uint32_t)fuzz_below(fuzz, sizeof command + 1);
            gpa = RAM - length;
            memcpy(at_gpa(gpa), command, length);
            describe(queue, head, gpa, length, fuzz_one_in(fuzz, 200) ? 0 : NEXT, next);
            describe(queue, next, 0x3f00, fuzz_one_in(fuzz, 200) ? 0 : 1, WRITE, 0);
        } else {
            uint32_t first = length > TV_NET_HEADER && fuzz_one_in(fuzz, 2) ? (uint32_t)fuzz_below(fuzz, length) : length;
            if (length >= TV_NET_HEADER && gpa <= RAM - TV_NET_HEADER)
                lie(fuzz, at_gpa(gpa));
            describe(queue, head, gpa, first, NEXT, next);
            describe(queue, next, gpa + first, length - first, 0, 0);
        }
    }
    if (fuzz_one_in(fuzz, 500)) {
        head = (uint16_t)fuzz_next(fuzz);
        strict = 0;
    }
    memcpy(at_gpa(ring_gpa(queue, 1) + 4 + 2ull * (index % SIZE)), &head, 2);
    offered[queue] = ++index;
    memcpy(at_gpa(ring_gpa(queue, 1) + 2), &index, 2);
}

/* What the driver finds on its receive queue: frames, each in as many buffers as its first one says. */
static void look_at_received(void)
{
    uint16_t used;
    memcpy(&used, at_gpa(ring_gpa(RX, 2) + 2), 2);
    FUZZ_CHECK((uint16_t)(used - seen[RX]) <= SIZE);
    if (!strict)
        seen[RX] = used;
    while (seen[RX] != used) {
        uint32_t left = 1;
        for (uint32_t first = 1; left; first = 0, left--) {
            uint32_t element[2], length;
            uint64_t gpa;
            uint16_t buffers;
            FUZZ_CHECK(seen[RX] != used); /* all of a frame comes at once */
            memcpy(element, at_gpa(ring_gpa(RX, 2) + 4 + 8ull * (seen[RX]++ % SIZE)), 8);
            FUZZ_CHECK(element[0] < SIZE && element[1]);
            memcpy(&gpa, at_gpa(ring_gpa(RX, 0) + 16ull * element[0]), 8);
            memcpy(&length, at_gpa(ring_gpa(RX, 0) + 16ull * element[0] + 8), 4);
            FUZZ_CHECK(element[1] <= length);
            if (!first)
                continue;
            memcpy(&buffers, at_gpa(gpa + 10), 2);
            FUZZ_CHECK(element[1] >= TV_NET_HEADER && buffers);
            FUZZ_CHECK(net.features & TV_NET_F_MRG_RXBUF || (buffers == 1 && element[1] >= TV_NET_HEADER + TV_NET_FRAME_MIN));
            left = buffers;
            met.received++;
        }
    }
}

/* --- the peer ------------------------------------------------------------------------------------------------------ */

static void check_sent(const uint8_t *data, size_t length)
{
    if (kind == TV_NET_TAP) {
        struct tv_vnet_header header, before;
        struct tv_vnet_allowed all = tv_vnet_from_driver(net.features);
        FUZZ_CHECK(length >= TV_NET_HEADER);
        memcpy(&header, data, sizeof header);
        before = header;
        data += TV_NET_HEADER;
        length -= TV_NET_HEADER;
        if (header.flags & 1)
            FUZZ_CHECK(all.checksum && (size_t)header.csum_start + header.csum_offset + 2 <= length);
        if (header.gso_type)
            FUZZ_CHECK(header.flags & 1 && header.gso_size && header.hdr_len <= length);
        FUZZ_CHECK(!tv_vnet_check(&header, length, &all) && !memcmp(&header, &before, sizeof header));
    }
    FUZZ_CHECK(length >= TV_NET_FRAME_MIN && length <= TV_NET_FRAME_MAX);
    met.sent++;
}

static void peer_reads(void)
{
    if (peer < 0)
        return;
    ssize_t got;
    if (kind != TV_NET_STREAM) {
        while ((got = recv(peer, reading, sizeof reading, MSG_DONTWAIT)) >= 0)
            check_sent(reading, (size_t)got);
        return;
    }
    while ((got = recv(peer, reading + read_end, sizeof reading - read_end, MSG_DONTWAIT)) > 0) {
        size_t at = 0;
        read_end += (size_t)got;
        while (read_end - at >= TV_NET_LENGTH) {
            uint32_t big, length;
            memcpy(&big, reading + at, 4);
            length = ntohl(big);
            FUZZ_CHECK(length <= TV_NET_FRAME_MAX);
            if (read_end - at - TV_NET_LENGTH < length)
                break;
            check_sent(reading + at + TV_NET_LENGTH, length);
            at += TV_NET_LENGTH + length;
        }
        memmove(reading, reading + at, read_end -= at);
    }
}

static void peer_says(struct fuzz *fuzz)
{
    if (peer < 0)
        return;
    uint32_t length = some_length(fuzz), sent = length;
    uint8_t *at = scratch;
    if (kind == TV_NET_STREAM) {
        uint32_t said = fuzz_one_in(fuzz, 100) ? (uint32_t)fuzz_next(fuzz) : length, big = htonl(said);
        memcpy(at, &big, 4);
        at += 4;
        sent = fuzz_one_in(fuzz, 50) ? (uint32_t)fuzz_below(fuzz, sent + 4) : sent + 4;
    } else if (kind == TV_NET_TAP) {
        lie(fuzz, at);
        at += TV_NET_HEADER;
        sent = fuzz_one_in(fuzz, 50) ? (uint32_t)fuzz_below(fuzz, sent + TV_NET_HEADER) : sent + TV_NET_HEADER;
    }
    fuzz_fill(fuzz, at, length < 64 ? length : 64);
    ssize_t written = send(peer, scratch, sent, MSG_DONTWAIT | MSG_NOSIGNAL);
    (void)written;
}

static void set_nonblocking(int fd)
{
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

/* One that was not there, or another one. */
static void connect_peer(void)
{
    int pair[2];
    if (peer >= 0)
        close(peer);
    if (socketpair(AF_UNIX, kind == TV_NET_STREAM ? SOCK_STREAM : SOCK_DGRAM, 0, pair))
        abort();
    tv_net_hang_up(nic);
    set_nonblocking(pair[0]);
    nic->fd = pair[0];
    peer = pair[1];
    read_end = 0;
}

/* --- a case -------------------------------------------------------------------------------------------------------- */

static void turn(struct fuzz *fuzz)
{
    uint32_t at = (uint32_t)fuzz_below(fuzz, QUEUES + 4);
    uint32_t which = at < QUEUES ? at : TV_WORKER_QUEUES + at - QUEUES;
    if (which == TV_WORKER_QUEUES + 2)
        return; /* nobody listens */
    self->worker.due = 0;
    self->worker.on_ready(&self->worker, which);
    for (int queue = 0; queue < QUEUES; queue++)
        FUZZ_CHECK(!self->worker.queues[queue].taken && !self->worker.queues[queue].pushed);
    if (nic->fd < 0 && peer >= 0) { /* given up, or a tap that can't be: never one that is */
        FUZZ_CHECK(kind == TV_NET_STREAM);
        met.hung_up++;
        close(peer);
        peer = -1;
    }
}

static void one(struct fuzz *fuzz)
{
    static const int kinds[] = {TV_NET_STREAM, TV_NET_STREAM, TV_NET_DGRAM, TV_NET_TAP};
    static const uint8_t mac[6] = {2, 0, 0, 0, 0, 1};
    int doorbell = eventfd(0, EFD_NONBLOCK);
    uint64_t features = fuzz_next(fuzz) & FEATURES;
    random_of = fuzz;
    strict = 1;
    if (fuzz_one_in(fuzz, 2))
        features |= TV_NET_F_CSUM | TV_NET_F_GUEST_CSUM | TV_NET_F_CTRL_VQ;
    kind = kinds[fuzz_below(fuzz, 4)];
    memset(at_gpa(0), 0, 0x4000);
    memset(&net, 0, sizeof net);
    memset(offered, 0, sizeof offered);
    memset(seen, 0, sizeof seen);
    tv_net_init(&net, mac, 1);
    tv_net_begin(&net, features, fuzz_one_in(fuzz, 2));
    nic->kind = kind;
    peer = -1;
    connect_peer();
    net.links[0] = nic;
    memset(self, 0, sizeof *self);
    if (tv_net_worker_init(self, &net, 0))
        abort();
    self->announce = (uint32_t)fuzz_below(fuzz, 4);
    self->worker.kick_fd = doorbell;
    for (int queue = 0; queue < QUEUES; queue++) {
        struct tv_queue made = {.memory = &memory, .irq = &irq, .index = (uint16_t)queue, .size = SIZE,
                                .desc_gpa = ring_gpa(queue, 0), .avail_gpa = ring_gpa(queue, 1),
                                .used_gpa = ring_gpa(queue, 2), .event_idx = features & 1, .indirect = 1};
        if (tv_worker_add(&self->worker, &made, doorbell) < 0)
            abort();
    }
    for (int step = 0; step < STEPS; step++) {
        switch (fuzz_below(fuzz, 10)) {
        case 0:
        case 1:
            offer(fuzz, RX, 1);
            offer(fuzz, RX, 1);
            break;
        case 2:
        case 3:
            offer(fuzz, TX, 0);
            break;
        case 4:
            offer(fuzz, CONTROL, 0);
            break;
        case 5:
        case 6:
            peer_says(fuzz);
            break;
        case 7:
            if (!fuzz_one_in(fuzz, 4))
                peer_reads();
            else if (fuzz_one_in(fuzz, 4))
                connect_peer();
            break;
        default:
            break;
        }
        turn(fuzz);
        look_at_received();
    }
    peer_reads();
    met.refused += self->counts.tx_malformed;
    met.malformed += self->counts.rx_malformed;
    met.long_ += self->counts.rx_long;
    met.commands += self->counts.commands - self->counts.refused;
    for (int queue = 0; queue < QUEUES; queue++)
        met.broken += !!self->worker.queues[queue].broken;
    tv_net_worker_free(self);
    tv_net_link_drop(nic);
    if (peer >= 0)
        close(peer);
    close(doorbell);
}

static void summarize(char *into, size_t size)
{
    snprintf(into, size,
             "%llu frames sent, %llu refused; %llu received, %llu malformed, %llu too long; %llu peers hung up on, "
             "%llu commands, %llu queues broken",
             (unsigned long long)met.sent, (unsigned long long)met.refused, (unsigned long long)met.received,
             (unsigned long long)met.malformed, (unsigned long long)met.long_, (unsigned long long)met.hung_up,
             (unsigned long long)met.commands, (unsigned long long)met.broken);
}

int main(int argc, char **argv)
{
    irq.isr = &isr;
    memory.count = 1;
    memory.regions[0] = (struct tv_region){0, RAM, malloc(RAM), calloc(RAM / 4096 / 64 + 1, 8)};
    nic = tv_net_link_new(TV_NET_STREAM, -1, -1);
    self = malloc(sizeof *self);
    if (!memory.regions[0].hva || !memory.regions[0].dirty || !nic || !self)
        return 2;
    return fuzz_main(argc, argv, one, summarize);
}
