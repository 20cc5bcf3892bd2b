/* virtio-vsock: a guest that serves three ports and connects to one of the host, and checks every byte of a pattern.
 *
 *   port 1   what comes goes back
 *   port 2   what comes is the pattern, from its start: a byte that is another is an error
 *   port 3   sends the pattern without end
 *   vsock_out=N   connects to the host's port N, sends the pattern there and expects it back; and again when it is reset
 *
 * It keeps to the credit that it was given and says what it gives. A transport reset ends all connections, as it does
 * for Linux. Starts once, never resets, never blocks its caller; an answer counts only when its interrupt came. */
#include "vsock.h"

#define GUEST_PORTS 50000
#define CONNS 1024 /* a power of two */
#define ECHO COPIED  /* bytes that one echo has not sent back yet; a power of two */
#define ROOM 262144u /* what the others are promised: they keep nothing */
#define PERIOD 65521 /* of the pattern: a prime, so that no packet's length divides it */
#define A_STEP 16    /* packets each way */
#define RETRY_MS 20

enum kind { FREE, ECHOES, CHECKS, SENDS, OUT_ASKED, OUT };

struct conn {
    uint32_t kind, guest_port, host_port;
    uint32_t queued, owed, ending; /* owed: bits 1 << op */
    uint32_t peer_alloc, peer_forwarded, sent;
    uint32_t forwarded, told;
    uint32_t in_at, out_at; /* in the pattern's period */
    uint32_t head, used;    /* of the echo */
    uint8_t echo[ECHO];
};

static struct conn conns[CONNS];
static uint16_t todo[CONNS]; /* those with something to send, in turn */
static uint32_t todo_head, todo_used;
static uint8_t pattern[PERIOD + LARGEST];
static uint64_t retry_at;
static uint32_t next_port;
static int started;

static uint32_t wanted_port;
static uint64_t open_now, accepted, connected, checked, patterned, echoed, transport_resets;

extern struct driver vsock_driver;

static void find(void)
{
    for (uint32_t i = 0; i < sizeof pattern; i++) {
        uint32_t x = i % PERIOD * 2654435761u;
        pattern[i] = (uint8_t)(x >> 24 ^ x >> 13);
    }
    if (link_find())
        return;
    vsock_driver.wanted = 0;
    put_absent("vsock");
}

/* --- connections ------------------------------------------------------------------------------------------------- */

static uint32_t place_of(uint32_t guest_port, uint32_t host_port)
{
    return (guest_port * 31 + host_port) % CONNS;
}

/* The connection, or a free place for it; NULL when all are taken. */
static struct conn *look_up(uint32_t guest_port, uint32_t host_port, int make)
{
    struct conn *place = NULL;
    for (uint32_t i = 0, at = place_of(guest_port, host_port); i < CONNS; i++, at = (at + 1) % CONNS) {
        struct conn *conn = &conns[at];
        if (conn->kind && conn->guest_port == guest_port && conn->host_port == host_port)
            return conn;
        if (!conn->kind && !conn->queued) {
            place = place ? place : conn;
            if (!conn->guest_port)
                break; /* never used: it is nowhere behind */
        }
    }
    return make ? place : NULL;
}

static void queue(struct conn *conn)
{
    if (conn->queued)
        return;
    conn->queued = 1;
    todo[(todo_head + todo_used++) % CONNS] = (uint16_t)(conn - conns);
}

static void owe(struct conn *conn, enum op op)
{
    conn->owed |= 1u << op;
    queue(conn);
}

static struct conn *make(enum kind kind, uint32_t guest_port, uint32_t host_port)
{
    struct conn *conn = look_up(guest_port, host_port, 1);
    if (!conn || conn->kind)
        return NULL;
    uint8_t *bytes = (uint8_t *)conn;
    for (uint32_t i = 0; i < offsetof(struct conn, echo); i++)
        bytes[i] = 0;
    conn->kind = kind;
    conn->guest_port = guest_port;
    conn->host_port = host_port;
    open_now++;
    return conn;
}

static void drop(struct conn *conn)
{
    if (conn->kind == OUT || conn->kind == OUT_ASKED)
        retry_at = rdtsc() + milliseconds(RETRY_MS);
    conn->kind = FREE;
    conn->owed = 0;
    open_now--;
}

static uint32_t credit(const struct conn *conn)
{
    return conn->peer_alloc - (conn->sent - conn->peer_forwarded);
}

static uint32_t room_of(const struct conn *conn)
{
    return conn->kind == ECHOES ? ECHO : ROOM;
}

/* --- what goes --------------------------------------------------------------------------------------------------- */

/* 1; 0 when every slot is on its way. */
static int send(uint32_t guest_port, uint32_t host_port, enum op op, uint32_t flags, struct conn *conn,
                const uint8_t *data, uint32_t length)
{
    struct header header = {.src_port = guest_port, .dst_port = host_port, .len = length, .op = (uint16_t)op};
    header.flags = flags;
    int echoes = conn && conn->kind == ECHOES;
    if (conn) {
        header.buf_alloc = room_of(conn);
        header.fwd_cnt = conn->forwarded;
    }
    if (!link_send(&header, echoes ? conn->echo : data, echoes ? conn->head : 0, echoes ? ECHO : 0))
        return 0;
    if (conn)
        conn->told = conn->forwarded;
    return 1;
}

static int send_data(struct conn *conn)
{
    uint32_t most = credit(conn);
    if (conn->kind == ECHOES) {
        most = most < conn->used ? most : conn->used;
        if (!most)
            return 0;
        if (!send(conn->guest_port, conn->host_port, RW, 0, conn, NULL, most))
            return 0;
        conn->head += most;
        conn->used -= most;
        conn->forwarded += most;
        echoed += most;
    } else if (conn->kind == SENDS || conn->kind == OUT) {
        most = most < LARGEST ? most : LARGEST;
        if (!most || !send(conn->guest_port, conn->host_port, RW, 0, conn, pattern + conn->out_at, most))
            return 0;
        conn->out_at = (conn->out_at + most) % PERIOD;
        patterned += most;
    } else {
        return 0;
    }
    conn->sent += most;
    return 1;
}

/* The next packet of a connection; 0: it has none, or no slot is free. */
static int send_one(struct conn *conn)
{
    static const enum op first[] = {RST, REQUEST, RESPONSE};
    for (uint32_t i = 0; i < 3; i++) {
        if (!(conn->owed & 1u << first[i]))
            continue;
        if (!send(conn->guest_port, conn->host_port, first[i], 0, conn, NULL, 0))
            return 0;
        conn->owed &= ~(1u << first[i]);
        if (first[i] == RST)
            drop(conn);
        return 1;
    }
    if (!conn->ending || conn->kind == ECHOES)
        if (send_data(conn))
            return 1;
    if (conn->ending == 1 && !conn->used) {
        if (!send(conn->guest_port, conn->host_port, SHUTDOWN, 3, conn, NULL, 0))
            return 0;
        conn->ending = 2;
        return 1;
    }
    if (conn->owed & 1u << CREDIT_UPDATE) {
        if (!send(conn->guest_port, conn->host_port, CREDIT_UPDATE, 0, conn, NULL, 0))
            return 0;
        conn->owed &= ~(1u << CREDIT_UPDATE);
        return 1;
    }
    return 0;
}

static int has_more(const struct conn *conn)
{
    if (!conn->kind)
        return 0;
    if (conn->owed || (conn->ending == 1 && !conn->used))
        return 1;
    if (conn->kind == ECHOES)
        return conn->used && credit(conn);
    return (conn->kind == SENDS || conn->kind == OUT) && !conn->ending && credit(conn);
}

static void send_some(void)
{
    for (uint32_t left = A_STEP; left && todo_used; left--) {
        struct conn *conn = &conns[todo[todo_head % CONNS]];
        int sent = conn->kind ? send_one(conn) : 0;
        if (!sent && has_more(conn))
            return; /* no slot: it stays the first */
        todo_head++;
        todo_used--;
        conn->queued = 0;
        if (has_more(conn))
            queue(conn);
    }
}

/* --- what comes -------------------------------------------------------------------------------------------------- */

static void take_data(struct conn *conn, const uint8_t *data, uint32_t length)
{
    if (conn->kind == ECHOES) {
        if (length > ECHO - conn->used) {
            device_error("VSOCK more than there was room for", conn->guest_port, ECHO - conn->used, length);
            return;
        }
        for (uint32_t i = 0; i < length; i++)
            conn->echo[(conn->head + conn->used + i) % ECHO] = data[i];
        conn->used += length;
        queue(conn);
        return;
    }
    const uint8_t *want = pattern + conn->in_at;
    uint32_t i = 0;
    for (; i + 8 <= length && *(const uint64_t *)(data + i) == *(const uint64_t *)(want + i); i += 8)
        ;
    for (; i < length; i++) {
        if (data[i] == want[i])
            continue;
        device_error("LOST vsock byte, port", conn->host_port, want[i], data[i]);
        break;
    }
    conn->in_at = (conn->in_at + length) % PERIOD;
    conn->forwarded += length;
    checked += length;
    if (conn->forwarded - conn->told > ROOM / 4)
        owe(conn, CREDIT_UPDATE);
}

static void request(const struct header *header)
{
    static const enum kind kinds[] = {FREE, ECHOES, CHECKS, SENDS};
    struct conn *conn = NULL;
    if (header->dst_port >= 1 && header->dst_port <= 3)
        conn = make(kinds[header->dst_port], header->dst_port, header->src_port);
    if (!conn) {
        send(header->dst_port, header->src_port, RST, 0, NULL, NULL, 0);
        return;
    }
    conn->peer_alloc = header->buf_alloc;
    conn->peer_forwarded = header->fwd_cnt;
    accepted++;
    owe(conn, RESPONSE);
}

static void take_packet(const struct header *header, const uint8_t *data, uint32_t length)
{
    if (length < HEADER || header->len != length - HEADER || header->src_cid != HOST || header->dst_cid != link_cid ||
        header->len > LARGEST) {
        device_error("VSOCK packet, op", header->op, header->len, length);
        return;
    }
    if (header->op == REQUEST) {
        request(header);
        return;
    }
    struct conn *conn = look_up(header->dst_port, header->src_port, 0);
    if (!conn) {
        if (header->op != RST)
            send(header->dst_port, header->src_port, RST, 0, NULL, NULL, 0);
        return;
    }
    conn->peer_alloc = header->buf_alloc;
    conn->peer_forwarded = header->fwd_cnt;
    queue(conn);
    switch (header->op) {
    case RST:
        drop(conn);
        return;
    case RESPONSE:
        if (conn->kind == OUT_ASKED) {
            conn->kind = OUT;
            connected++;
        }
        return;
    case SHUTDOWN:
        if ((header->flags & 3) == 3)
            owe(conn, RST);
        else if (!conn->ending)
            conn->ending = 1;
        return;
    case RW:
        take_data(conn, data, header->len);
        return;
    case CREDIT_REQUEST:
        owe(conn, CREDIT_UPDATE);
    }
}

static void transport_reset(void)
{
    transport_resets++;
    for (uint32_t i = 0; i < CONNS; i++)
        if (conns[i].kind)
            drop(&conns[i]);
}

static void take_events(void)
{
    uint32_t id, length;
    if (!link_event(&id, &length))
        return;
    if (length != sizeof id || id)
        device_error("VSOCK event, id", id, 0, length);
    else
        transport_reset();
}

static void connect_out(void)
{
    if (!wanted_port || rdtsc() < retry_at)
        return;
    struct conn *conn = make(OUT_ASKED, GUEST_PORTS + next_port++ % 10000, wanted_port);
    retry_at = ~0ull; /* until it is dropped */
    if (conn)
        owe(conn, REQUEST);
}

static void step(void)
{
    const struct header *header;
    uint32_t length;
    if (!started && !link_start()) {
        note_problem("vsock does not start, slot", link_slot(), 0, link_status());
        vsock_driver.wanted = 0;
        return;
    }
    started = 1;
    link_step();
    take_events();
    for (uint32_t left = A_STEP; left && link_has_room() && (header = link_next(&length)); left--) {
        take_packet(header, (const uint8_t *)header + HEADER, length);
        link_done();
    }
    connect_out();
    send_some();
}

static void report(void)
{
    put_number(" vsock_open=", open_now);
    put_number(" vsock_accepted=", accepted);
    put_number(" vsock_connected=", connected);
    put_number(" vsock_checked=", checked);
    put_number(" vsock_sent=", patterned);
    put_number(" vsock_echoed=", echoed);
    put_number(" vsock_resets=", transport_resets);
}

static const struct word words[] = {{"vsock=", &vsock_driver.wanted}, {"vsock_out=", &wanted_port}, {NULL, NULL}};

struct driver vsock_driver = {.name = "vsock", .words = words, .find = find, .step = step, .report = report};
