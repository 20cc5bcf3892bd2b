#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "vsock_table.h"

#define FIRST_PORT (1u << 30) /* of the host's clients: above what anybody listens on, as Cloud Hypervisor has it */
#define PORTS (1u << 30)

static uint16_t slot_of(const struct tv_vsock *vsock, const struct tv_vsock_conn *conn)
{
    return (uint16_t)(conn - vsock->conns);
}

/* The first `slots` free, the others never used; nobody in a list. What connections hold is let go of before. */
void tv_vsock_table_init(struct tv_vsock *vsock, uint32_t slots)
{
    for (uint32_t i = 0; i < TV_VSOCK_CONNECTIONS; i++) {
        vsock->conns[i].fd = -1;
        vsock->conns[i].next = i + 1 < slots ? (uint16_t)(i + 1) : TV_VSOCK_NOBODY;
    }
    for (uint32_t i = 0; i < TV_VSOCK_BUCKETS; i++)
        vsock->buckets[i] = TV_VSOCK_NOBODY;
    vsock->free = slots ? 0 : TV_VSOCK_NOBODY;
    vsock->first = vsock->last = TV_VSOCK_NOBODY;
    vsock->next_port = 0;
}

/* How many are at `stage` is one of the counts; OPEN is what has been neither free nor half made. */
static uint64_t *count_of(struct tv_vsock *vsock, uint8_t stage)
{
    switch (stage) {
    case TV_VSOCK_GREETING:
    case TV_VSOCK_ASKED:
        return &vsock->counts.half_open;
    case TV_VSOCK_OPEN:
        return &vsock->counts.open;
    case TV_VSOCK_ENDING:
        return &vsock->counts.ending;
    case TV_VSOCK_LINGER:
        return &vsock->counts.lingering;
    default:
        return NULL;
    }
}

/* The one place where a stage is assigned; what has a limit in time gets it. */
void tv_vsock_enter(struct tv_vsock *vsock, struct tv_vsock_conn *conn, enum tv_vsock_stage stage)
{
    uint64_t *before = count_of(vsock, conn->stage), *now = count_of(vsock, stage);
    if (before)
        tv_vsock_add(before, (uint64_t)-1);
    if (now)
        tv_vsock_add(now, 1);
    conn->stage = stage;
    if (!vsock->listening)
        tv_vsock_watch_listener(vsock);
    if (stage == TV_VSOCK_FREE || stage == TV_VSOCK_OPEN)
        return;
    conn->expires_ns = tv_now_ns() + (stage <= TV_VSOCK_ASKED ? vsock->greeting_ns : vsock->linger_ns);
    tv_vsock_tick_soon(vsock);
}

/* A free slot for a socket, at no stage yet; NULL, and the socket stays the caller's, when there is none. */
struct tv_vsock_conn *tv_vsock_take(struct tv_vsock *vsock, int fd)
{
    if (vsock->free == TV_VSOCK_NOBODY)
        return NULL;
    struct tv_vsock_conn *conn = &vsock->conns[vsock->free];
    uint32_t generation = conn->generation + 1;
    vsock->free = conn->next;
    memset(conn, 0, sizeof *conn);
    conn->generation = generation;
    conn->next = conn->previous = conn->next_in_bucket = TV_VSOCK_NOBODY;
    conn->fd = fd;
    return conn;
}

/* --- by ports -------------------------------------------------------------------------------------------------- */

/* Multiplied, so that neither a guest's run of ports nor ours fills one bucket; the guest hurts only itself. */
static uint16_t *bucket_of(struct tv_vsock *vsock, uint32_t guest_port, uint32_t host_port)
{
    uint64_t mixed = ((uint64_t)guest_port << 32 | host_port) * 0x9e3779b97f4a7c15ull;
    return &vsock->buckets[mixed >> 32 & (TV_VSOCK_BUCKETS - 1)];
}

void tv_vsock_set_ports(struct tv_vsock *vsock, struct tv_vsock_conn *conn, uint32_t guest_port, uint32_t host_port)
{
    uint16_t *bucket = bucket_of(vsock, guest_port, host_port);
    conn->guest_port = guest_port;
    conn->host_port = host_port;
    conn->next_in_bucket = *bucket;
    *bucket = slot_of(vsock, conn);
}

/* Idempotent. */
void tv_vsock_unset_ports(struct tv_vsock *vsock, struct tv_vsock_conn *conn)
{
    uint16_t slot = slot_of(vsock, conn);
    for (uint16_t *at = bucket_of(vsock, conn->guest_port, conn->host_port); *at != TV_VSOCK_NOBODY;
         at = &vsock->conns[*at].next_in_bucket) {
        if (*at != slot)
            continue;
        *at = conn->next_in_bucket;
        conn->next_in_bucket = TV_VSOCK_NOBODY;
        return;
    }
}

/* NULL: there is none. */
struct tv_vsock_conn *tv_vsock_find(struct tv_vsock *vsock, uint32_t guest_port, uint32_t host_port)
{
    for (uint16_t at = *bucket_of(vsock, guest_port, host_port); at != TV_VSOCK_NOBODY;
         at = vsock->conns[at].next_in_bucket) {
        struct tv_vsock_conn *conn = &vsock->conns[at];
        if (conn->guest_port == guest_port && conn->host_port == host_port)
            return conn;
    }
    return NULL;
}

/* A port of the host that no connection to this one of the guest's has: there are more ports than slots. */
uint32_t tv_vsock_pick_port(struct tv_vsock *vsock, uint32_t guest_port)
{
    for (;;) {
        uint32_t port = FIRST_PORT + vsock->next_port++ % PORTS;
        if (!tv_vsock_find(vsock, guest_port, port))
            return port;
    }
}

/* --- who has something for the guest --------------------------------------------------------------------------- */

/* At the end, so that everybody has its turn. Idempotent. */
void tv_vsock_queue(struct tv_vsock *vsock, struct tv_vsock_conn *conn)
{
    vsock->news = 1;
    if (conn->queued)
        return;
    conn->queued = 1;
    conn->next = TV_VSOCK_NOBODY;
    conn->previous = vsock->last;
    if (vsock->last == TV_VSOCK_NOBODY)
        vsock->first = slot_of(vsock, conn);
    else
        vsock->conns[vsock->last].next = slot_of(vsock, conn);
    vsock->last = slot_of(vsock, conn);
}

static void unqueue(struct tv_vsock *vsock, struct tv_vsock_conn *conn)
{
    if (!conn->queued)
        return;
    *(conn->previous == TV_VSOCK_NOBODY ? &vsock->first : &vsock->conns[conn->previous].next) = conn->next;
    *(conn->next == TV_VSOCK_NOBODY ? &vsock->last : &vsock->conns[conn->next].previous) = conn->previous;
    conn->queued = 0;
    conn->next = conn->previous = TV_VSOCK_NOBODY;
}

/* Takes the first one out; NULL: there is none. */
struct tv_vsock_conn *tv_vsock_next(struct tv_vsock *vsock)
{
    if (vsock->first == TV_VSOCK_NOBODY)
        return NULL;
    struct tv_vsock_conn *conn = &vsock->conns[vsock->first];
    unqueue(vsock, conn);
    return conn;
}

void tv_vsock_owe(struct tv_vsock *vsock, struct tv_vsock_conn *conn, enum tv_vsock_op op)
{
    conn->owed |= (uint8_t)(1u << op);
    tv_vsock_queue(vsock, conn);
}

/* --- ends ------------------------------------------------------------------------------------------------------ */

/* The host's socket, which epoll forgets by itself. Idempotent. */
void tv_vsock_close(struct tv_vsock_conn *conn)
{
    int fd = conn->fd;
    conn->fd = -1;
    if (fd >= 0)
        close(fd);
}

/* Everything of it is gone, the slot is free. */
void tv_vsock_release(struct tv_vsock *vsock, struct tv_vsock_conn *conn)
{
    tv_vsock_close(conn);
    unqueue(vsock, conn);
    if (conn->stage != TV_VSOCK_GREETING && conn->stage != TV_VSOCK_LINGER)
        tv_vsock_unset_ports(vsock, conn);
    free(conn->backlog.bytes);
    conn->backlog = (struct tv_bytes){0};
    tv_vsock_enter(vsock, conn, TV_VSOCK_FREE);
    conn->next = vsock->free;
    vsock->free = slot_of(vsock, conn);
}

/* Of one that the guest knows, or is owed the question about: its peer hears no more, the guest of a reset. The slot
 * is free once it was told. */
void tv_vsock_abort(struct tv_vsock *vsock, struct tv_vsock_conn *conn)
{
    if (conn->owed & 1u << TV_VSOCK_REQUEST) { /* it never heard of it */
        tv_vsock_release(vsock, conn);
        return;
    }
    tv_vsock_close(conn);
    conn->owed = 0;
    tv_vsock_enter(vsock, conn, TV_VSOCK_ENDING);
    tv_vsock_owe(vsock, conn, TV_VSOCK_RST);
}

/* A reset for a connection that isn't there. The caller has seen that there is room. */
int tv_vsock_reply(struct tv_vsock *vsock, uint32_t guest_port, uint32_t host_port, uint16_t type)
{
    if (vsock->replies_used == TV_VSOCK_REPLIES)
        return -1;
    uint32_t at = (vsock->replies_first + vsock->replies_used++) % TV_VSOCK_REPLIES;
    vsock->replies[at] = (struct tv_vsock_reply){guest_port, host_port, type};
    vsock->news = 1;
    return 0;
}
