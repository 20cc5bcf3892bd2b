/* The two sides of fuzz/vsock.c: a guest that lays packets and buffers into its memory, and peers with sockets. Both do
 * mostly what could come next, and else what nobody should. */
#ifndef VSOCK_SIDES_H
#define VSOCK_SIDES_H
#include <errno.h>
#include <sys/socket.h>
#include <sys/un.h>

#include "fuzz.h"
#include "vsock_table.h"

#define RAM 0x200000
#define SIZE 16 /* of each queue */
#define RINGS 0x1000
#define SENDING 0x100000 /* where packets of the guest lie */
#define SENT_MAX 0x30000
#define BUFFERS 0x10000 /* where its buffers lie, each in the middle of its room */
#define ROOM 0x2000
#define CANARY 0xa5
#define CID 3
#define PEERS 12
#define KNOWN 8

static struct tv_memory memory;
static struct tv_vsock *vsock;
static struct tv_vsock_worker *worker;
static struct tv_queue state[TV_VSOCK_QUEUES];
static uint16_t avail[TV_VSOCK_QUEUES], used[TV_VSOCK_QUEUES];
static uint32_t buffer_size[SIZE];
static uint32_t isr;
static struct tv_irq irq = {.fd = -1, .isr = &isr};
static struct sockaddr_un address;
static int listener = -1, service = -1, peers[PEERS];
static struct known {
    uint32_t guest, host;
} known[KNOWN];
static uint64_t packets, given;
static uint64_t offered; /* bytes behind headers, in this case */

/* --- the guest's memory ------------------------------------------------------------------------------------------ */

static uint8_t *at(uint64_t gpa)
{
    return memory.regions[0].hva + gpa;
}

static uint64_t ring(int queue, int part)
{
    return RINGS + 0x3000ull * (uint64_t)queue + 0x1000ull * (uint64_t)part;
}

static void describe(int queue, uint32_t number, uint64_t gpa, uint32_t length, uint16_t flags, uint16_t next)
{
    struct {
        uint64_t addr;
        uint32_t len;
        uint16_t flags, next;
    } desc = {gpa, length, flags, next};
    memcpy(at(ring(queue, 0) + 16ull * number), &desc, sizeof desc);
}

static void offer(int queue, uint16_t head)
{
    memcpy(at(ring(queue, 1) + 4 + 2 * (avail[queue] % SIZE)), &head, 2);
    avail[queue]++;
    memcpy(at(ring(queue, 1) + 2), &avail[queue], 2);
    worker->worker.due |= 1u << queue;
}

static uint64_t buffer_of(uint32_t number)
{
    return BUFFERS + (uint64_t)ROOM * number;
}

static void listen_with(struct fuzz *fuzz, uint32_t number)
{
    static const uint32_t sizes[] = {45, 46, 64, 100, 300, 1000, 4000, 4096};
    uint32_t size = fuzz_one_in(fuzz, 2000) ? (uint32_t)fuzz_below(fuzz, 45) : sizes[fuzz_below(fuzz, 8)];
    memset(at(buffer_of(number)), CANARY, ROOM);
    buffer_size[number] = size;
    uint64_t gpa = buffer_of(number) + ROOM / 2 - size / 2;
    if (size > 60 && fuzz_one_in(fuzz, 2)) { /* its header in a buffer of its own, or cut somewhere */
        uint32_t cut = fuzz_one_in(fuzz, 2) ? 44 : 1 + (uint32_t)fuzz_below(fuzz, size - 1);
        describe(TV_VSOCK_RECEIVE, number, gpa, cut, 3, (uint16_t)(SIZE / 2 + number));
        describe(TV_VSOCK_RECEIVE, SIZE / 2 + number, gpa + cut, size - cut, 2, 0);
    } else {
        describe(TV_VSOCK_RECEIVE, number, gpa, size, 2, 0);
    }
    offer(TV_VSOCK_RECEIVE, (uint16_t)number);
}

static void take_given(struct fuzz *fuzz)
{
    uint16_t index;
    memcpy(&index, at(ring(TV_VSOCK_RECEIVE, 2) + 2), 2);
    for (; used[TV_VSOCK_RECEIVE] != index; used[TV_VSOCK_RECEIVE]++) {
        uint32_t element[2];
        struct tv_vsock_header header;
        memcpy(element, at(ring(TV_VSOCK_RECEIVE, 2) + 4 + 8 * (used[TV_VSOCK_RECEIVE] % SIZE)), sizeof element);
        FUZZ_CHECK(element[0] < SIZE / 2);
        uint32_t size = buffer_size[element[0]];
        FUZZ_CHECK(element[1] <= size);
        const uint8_t *room = at(buffer_of(element[0])), *bytes = room + ROOM / 2 - size / 2;
        for (const uint8_t *each = room; each < room + ROOM; each++)
            if (each < bytes || each >= bytes + element[1])
                FUZZ_CHECK(*each == CANARY);
        if (!element[1])
            continue; /* a buffer without room broke the queue */
        FUZZ_CHECK(element[1] >= sizeof header);
        memcpy(&header, bytes, sizeof header);
        FUZZ_CHECK(header.src_cid == TV_VSOCK_HOST_CID && header.dst_cid == CID);
        FUZZ_CHECK(header.len == element[1] - sizeof header);
        FUZZ_CHECK(header.op >= TV_VSOCK_REQUEST && header.op <= TV_VSOCK_CREDIT_REQUEST);
        FUZZ_CHECK(!header.len || header.op == TV_VSOCK_RW);
        known[fuzz_below(fuzz, KNOWN)] = (struct known){header.dst_port, header.src_port};
        given++;
        if (!fuzz_one_in(fuzz, 50)) /* else it is lost to the guest for good */
            listen_with(fuzz, element[0]);
    }
}

/* --- what the guest sends ---------------------------------------------------------------------------------------- */

static void send_packet(struct fuzz *fuzz)
{
    static const uint16_t likely[] = {TV_VSOCK_REQUEST,  TV_VSOCK_REQUEST,       TV_VSOCK_RESPONSE, TV_VSOCK_RESPONSE,
                                      TV_VSOCK_RST,      TV_VSOCK_SHUTDOWN,      TV_VSOCK_RW,       TV_VSOCK_RW,
                                      TV_VSOCK_RW,       TV_VSOCK_RW,            TV_VSOCK_RW,       TV_VSOCK_RW,
                                      TV_VSOCK_CREDIT_UPDATE, TV_VSOCK_CREDIT_UPDATE, TV_VSOCK_CREDIT_REQUEST};
    static const uint32_t lengths[] = {0, 1, 7, 100, 4096, 65536, 131072, 131073};
    struct known *one = &known[fuzz_below(fuzz, KNOWN)];
    struct tv_vsock_header header = {CID, TV_VSOCK_HOST_CID, one->guest, one->host, 0, TV_VSOCK_STREAM, 0, 0, 0, 0};
    struct tv_vsock_conn *conn = tv_vsock_find(vsock, one->guest, one->host);
    header.op = fuzz_one_in(fuzz, 50) ? (uint16_t)fuzz_next(fuzz) : likely[fuzz_below(fuzz, 15)];
    if (conn && conn->stage == TV_VSOCK_ASKED && !fuzz_one_in(fuzz, 3))
        header.op = TV_VSOCK_RESPONSE;
    if (header.op == TV_VSOCK_REQUEST && !fuzz_one_in(fuzz, 4)) {
        header.src_port = (uint32_t)fuzz_below(fuzz, 6);
        header.dst_port = fuzz_one_in(fuzz, 4) ? (uint32_t)fuzz_next(fuzz) : 7;
    }
    if (header.op == TV_VSOCK_RW)
        header.len = fuzz_one_in(fuzz, 3) ? lengths[fuzz_below(fuzz, 8)] : (uint32_t)fuzz_below(fuzz, 2000);
    header.flags = header.op == TV_VSOCK_SHUTDOWN ? (uint32_t)fuzz_below(fuzz, 5) : 0;
    header.buf_alloc = fuzz_one_in(fuzz, 4) ? (uint32_t)fuzz_below(fuzz, 3000) : 1 << 18;
    header.fwd_cnt = conn && !fuzz_one_in(fuzz, 16) ? conn->sent : 0;
    uint32_t length = header.len + (uint32_t)sizeof header;
    switch (fuzz_below(fuzz, 80)) {
    case 0:
        header.src_cid = fuzz_next(fuzz);
        break;
    case 1:
        header.dst_cid = fuzz_below(fuzz, 5);
        break;
    case 2:
        header.type = (uint16_t)fuzz_below(fuzz, 4);
        break;
    case 3:
        header.len = (uint32_t)fuzz_next(fuzz);
        break;
    case 4:
        header.len += 1;
        break;
    case 5:
        length = (uint32_t)fuzz_below(fuzz, 45);
        break;
    case 6:
        header.buf_alloc = (uint32_t)fuzz_next(fuzz);
        header.fwd_cnt = (uint32_t)fuzz_next(fuzz);
        break;
    case 7:
        header.src_port = (uint32_t)fuzz_next(fuzz);
        header.dst_port = (uint32_t)fuzz_next(fuzz);
        break;
    case 8:
        fuzz_fill(fuzz, &header, sizeof header);
    }
    memcpy(at(SENDING), &header, sizeof header);
    uint32_t cut = fuzz_one_in(fuzz, 2) ? 44 : (uint32_t)fuzz_below(fuzz, length);
    if (cut && cut < length) {
        describe(TV_VSOCK_TRANSMIT, 0, SENDING, cut, 1, 1);
        describe(TV_VSOCK_TRANSMIT, 1, SENDING + cut, length - cut, 0, 0);
    } else {
        describe(TV_VSOCK_TRANSMIT, 0, SENDING, length, 0, 0);
    }
    packets++;
    offered += length > sizeof header ? length - sizeof header : 0;
    offer(TV_VSOCK_TRANSMIT, 0);
}

/* Whether the device has taken the last one: it may hold it back while its answers find no buffer. */
static int taken(void)
{
    memcpy(&used[TV_VSOCK_TRANSMIT], at(ring(TV_VSOCK_TRANSMIT, 2) + 2), 2);
    return used[TV_VSOCK_TRANSMIT] == avail[TV_VSOCK_TRANSMIT];
}

/* --- what the host's peers do ------------------------------------------------------------------------------------ */

static void greet(struct fuzz *fuzz, int fd)
{
    static const char *const bad[] = {"", "\n", "CONNECT", "CONNECT x\n", "CONNECT 4294967295\n", "CONNECT 1 1\n",
                                      "CONNECT 1", "GET / HTTP/1.1\r\nHost: a\r\nAccept: everything\r\n\r\n"};
    char line[64];
    int length = snprintf(line, sizeof line, "CONNECT %u\n", (unsigned)fuzz_below(fuzz, 6));
    if (fuzz_one_in(fuzz, 8))
        length = snprintf(line, sizeof line, "%s", bad[fuzz_below(fuzz, 8)]);
    ssize_t sent = send(fd, line, (size_t)length, MSG_DONTWAIT | MSG_NOSIGNAL);
    (void)sent;
}

static void peer_acts(struct fuzz *fuzz)
{
    static uint8_t bytes[65536];
    int *fd = &peers[fuzz_below(fuzz, PEERS)];
    ssize_t done = 0;
    if (*fd < 0) {
        if (service >= 0 && fuzz_one_in(fuzz, 2)) {
            *fd = accept4(service, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
            return;
        }
        *fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (*fd < 0)
            return;
        if (connect(*fd, (struct sockaddr *)&address, sizeof address)) {
            close(*fd);
            *fd = -1;
            return;
        }
        if (!fuzz_one_in(fuzz, 8))
            greet(fuzz, *fd);
        return;
    }
    switch (fuzz_below(fuzz, 12)) {
    case 0:
        close(*fd);
        *fd = -1;
        return;
    case 1:
        shutdown(*fd, (int)fuzz_below(fuzz, 3));
        return;
    case 2:
        greet(fuzz, *fd);
        return;
    case 3:
    case 4:
    case 5:
    case 6:
        done = send(*fd, bytes, fuzz_below(fuzz, fuzz_one_in(fuzz, 4) ? sizeof bytes : 300), MSG_DONTWAIT | MSG_NOSIGNAL);
        return;
    default:
        done = recv(*fd, bytes, 1 + fuzz_below(fuzz, sizeof bytes), MSG_DONTWAIT);
    }
    (void)done;
}

static int listen_at(const struct sockaddr_un *where)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    unlink(where->sun_path);
    if (fd >= 0 && (bind(fd, (const struct sockaddr *)where, sizeof *where) || listen(fd, 8))) {
        close(fd);
        fd = -1;
    }
    return fd;
}

static void close_if(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* The server at port 7 comes or goes. */
static void toggle_service(void)
{
    struct sockaddr_un where = address;
    strcat(where.sun_path, "_7");
    if (service < 0)
        service = listen_at(&where);
    else
        close_if(&service);
}

#endif
