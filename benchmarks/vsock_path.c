/* What the device's own path costs: a guest's packets through its rings and hooks into a unix socket, and back, in one
 * thread with the peer, against the same bytes in the same pieces through a plain socket pair in one thread.
 *
 *   vsock_path to_host|to_guest PIECE MIB    prints MiB/s of the device, and of the socket pair
 *
 * Linked with ffi/vsock*.c, ring.c, worker.c and park.c. Pieces come in bursts of what a socket holds. */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "vsock_table.h"

#define RAM (8u << 20)
#define SIZE 256
#define CID 3
#define PORT 5
#define DATA 0x100000
#define PACKET 4096 /* of a receive buffer, as Linux's driver offers them */
#define HEADER sizeof(struct tv_vsock_header)
#define BURST 65536 /* bytes under way: both kinds of socket hold them */

static struct tv_memory memory;
static uint32_t isr;
static struct tv_irq irq = {.fd = -1, .isr = &isr};
static struct tv_vsock *vsock;
static struct tv_vsock_worker *worker;
static uint16_t avail[TV_VSOCK_QUEUES], used[TV_VSOCK_QUEUES];
static uint32_t host_port, received, forwarded;
static uint8_t bytes[BURST];

static void *at(uint64_t gpa)
{
    return memory.regions[0].hva + gpa;
}

static uint64_t ring(int queue, int part)
{
    return 0x10000ull + 0x8000ull * (uint64_t)queue + 0x2000ull * (uint64_t)part;
}

static void offer(int queue, uint32_t slot, uint64_t gpa, uint32_t length, int writable)
{
    struct {
        uint64_t addr;
        uint32_t len;
        uint16_t flags, next;
    } desc = {gpa, length, writable ? 2 : 0, 0};
    uint16_t head = (uint16_t)slot;
    memcpy((uint8_t *)at(ring(queue, 0)) + 16 * slot, &desc, sizeof desc);
    memcpy((uint8_t *)at(ring(queue, 1)) + 4 + 2 * (avail[queue] % SIZE), &head, 2);
    avail[queue]++;
    memcpy((uint8_t *)at(ring(queue, 1)) + 2, &avail[queue], 2);
}

static void run(uint32_t due)
{
    struct pollfd wait = {vsock->epoll_fd, POLLIN, 0};
    worker->worker.due |= due;
    for (;;) {
        if (poll(&wait, 1, 0) > 0)
            worker->worker.due |= 1u << TV_WORKER_QUEUES;
        uint32_t now = worker->worker.due;
        worker->worker.due = 0;
        if (!now)
            return;
        for (uint32_t bit = 0; bit <= TV_WORKER_QUEUES; bit++)
            if (now >> bit & 1)
                worker->worker.on_ready(&worker->worker, bit);
    }
}

static void send_packet(uint32_t slot, uint16_t op, uint32_t length)
{
    struct tv_vsock_header header = {CID, TV_VSOCK_HOST_CID, PORT, host_port, length, TV_VSOCK_STREAM, op, 0,
                                     1u << 20, forwarded};
    uint64_t gpa = DATA + (uint64_t)slot * (BURST + 4096);
    memcpy(at(gpa), &header, sizeof header);
    offer(TV_VSOCK_TRANSMIT, slot, gpa, (uint32_t)HEADER + length, 0);
}

/* Every packet that came; its buffer is offered again. */
static void take_packets(void)
{
    uint16_t index;
    memcpy(&index, (uint8_t *)at(ring(TV_VSOCK_RECEIVE, 2)) + 2, 2);
    for (; used[TV_VSOCK_RECEIVE] != index; used[TV_VSOCK_RECEIVE]++) {
        uint32_t element[2];
        struct tv_vsock_header header;
        memcpy(element, (uint8_t *)at(ring(TV_VSOCK_RECEIVE, 2)) + 4 + 8 * (used[TV_VSOCK_RECEIVE] % SIZE), 8);
        uint64_t gpa = DATA + 0x300000 + (uint64_t)PACKET * element[0];
        memcpy(&header, at(gpa), sizeof header);
        host_port = header.src_port;
        received += header.len;
        forwarded += header.len;
        offer(TV_VSOCK_RECEIVE, element[0], gpa, PACKET, 1);
    }
}

static int connect_guest(const char *path)
{
    struct sockaddr_un where = {.sun_family = AF_UNIX};
    char line[32];
    snprintf(where.sun_path, sizeof where.sun_path, "%s", path);
    int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0), fd = socket(AF_UNIX, SOCK_STREAM, 0);
    vsock = tv_vsock_new(CID, path);
    if (vsock)
        tv_vsock_set_patience(vsock, 2000000000ull, 30000000000ull);
    if (!vsock || bind(listener, (struct sockaddr *)&where, sizeof where) || listen(listener, 8) ||
        tv_vsock_listen(vsock, listener) || connect(fd, (struct sockaddr *)&where, sizeof where))
        exit(1);
    unlink(path);
    worker = calloc(1, sizeof *worker);
    worker->worker.kick_fd = -1;
    tv_vsock_worker_init(worker, vsock);
    for (uint16_t queue = 0; queue < TV_VSOCK_QUEUES; queue++) {
        struct tv_queue made = {.memory = &memory, .irq = &irq, .index = queue, .size = SIZE};
        made.desc_gpa = ring(queue, 0);
        made.avail_gpa = ring(queue, 1);
        made.used_gpa = ring(queue, 2);
        if (tv_worker_add(&worker->worker, &made, -1) < 0)
            exit(1);
    }
    for (uint32_t slot = 0; slot < SIZE; slot++)
        offer(TV_VSOCK_RECEIVE, slot, DATA + 0x300000 + (uint64_t)PACKET * slot, PACKET, 1);
    dprintf(fd, "CONNECT %d\n", PORT);
    run(7);
    take_packets();
    send_packet(0, TV_VSOCK_RESPONSE, 0);
    run(7);
    if (recv(fd, line, sizeof line, MSG_DONTWAIT) <= 0)
        exit(1);
    return fd;
}

static void receive_burst(int fd)
{
    for (uint32_t left = BURST; left;) {
        ssize_t got = recv(fd, bytes, left, 0);
        if (got <= 0)
            exit(1);
        left -= (uint32_t)got;
    }
}

static void through_device(int fd, int to_host, uint32_t piece)
{
    if (to_host) {
        for (uint32_t slot = 0; slot < BURST / piece; slot++)
            send_packet(slot % 16, TV_VSOCK_RW, piece); /* slots are read before the next burst */
        run(1u << TV_VSOCK_TRANSMIT);
        receive_burst(fd);
        take_packets();
        return;
    }
    uint32_t before = received;
    for (uint32_t done = 0; done < BURST; done += piece)
        if (send(fd, bytes, piece, 0) != (ssize_t)piece)
            exit(1);
    run(0);
    take_packets();
    send_packet(0, TV_VSOCK_CREDIT_UPDATE, 0);
    run(1u << TV_VSOCK_TRANSMIT);
    if (received - before != BURST)
        exit(1);
}

static void through_pair(const int *pair, uint32_t piece)
{
    for (uint32_t done = 0; done < BURST; done += piece)
        if (send(pair[0], bytes, piece, 0) != (ssize_t)piece)
            exit(1);
    receive_burst(pair[1]);
}

int main(int argc, char **argv)
{
    char path[] = "/tmp/vsock-path-XXXXXX";
    int pair[2];
    if (argc != 4 || mkstemp(path) < 0 || unlink(path) || socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
        return 2;
    struct tv_region *region = &memory.regions[0];
    *region = (struct tv_region){.size = RAM, .hva = aligned_alloc(TV_PAGE_SIZE, RAM)};
    region->dirty = calloc(RAM / TV_PAGE_SIZE / 64, 8);
    memset(region->hva, 0, RAM);
    memory.count = 1;
    int to_host = !strcmp(argv[1], "to_host"), fd = connect_guest(path);
    uint32_t piece = (uint32_t)atoi(argv[2]), bursts = (uint32_t)atoi(argv[3]) * ((1u << 20) / BURST);
    uint64_t device = 0, plain = 0;
    for (uint32_t i = 0; i < bursts; i++) { /* taking turns: what else runs here is fair to both */
        uint64_t began = tv_now_ns();
        through_device(fd, to_host, piece);
        uint64_t middle = tv_now_ns();
        through_pair(pair, piece);
        device += middle - began;
        plain += tv_now_ns() - middle;
    }
    printf("%.1f %.1f\n", atof(argv[3]) * 1e9 / (double)device, atof(argv[3]) * 1e9 / (double)plain);
    return 0;
}
