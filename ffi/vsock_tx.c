/* What a guest sends by virtio-vsock. Every header is copied once, and nothing in it is believed. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

#include "vsock_table.h"

#define PAYLOAD (sizeof(struct tv_vsock_header))

/* The guest asks the host's port. One that is refused hears so. */
static void connect_out(struct tv_vsock *vsock, const struct tv_vsock_header *header)
{
    uint16_t type = header->type;
    if (vsock->free == TV_VSOCK_NOBODY) {
        tv_vsock_add(&vsock->counts.refused, 1);
        tv_vsock_reply(vsock, header->src_port, header->dst_port, type);
        return;
    }
    int fd = tv_vsock_connect_host(vsock, header->dst_port);
    if (fd < 0) {
        tv_vsock_add(&vsock->counts.no_listener, 1);
        tv_vsock_reply(vsock, header->src_port, header->dst_port, type);
        return;
    }
    struct tv_vsock_conn *conn = tv_vsock_take(vsock, fd); /* there is one */
    tv_vsock_set_ports(vsock, conn, header->src_port, header->dst_port);
    conn->guest_alloc = header->buf_alloc;
    conn->guest_forwarded = header->fwd_cnt;
    conn->readable = 1;
    tv_vsock_enter(vsock, conn, TV_VSOCK_OPEN);
    if (tv_vsock_watch(vsock, conn)) {
        tv_vsock_abort(vsock, conn);
        return;
    }
    tv_vsock_add(&vsock->counts.connected, 1);
    tv_vsock_add(&vsock->counts.established, 1);
    tv_vsock_owe(vsock, conn, TV_VSOCK_RESPONSE);
}

/* The guest takes the client, who is told: its socket is new and has room for a line. */
static void established(struct tv_vsock *vsock, struct tv_vsock_conn *conn)
{
    char line[16];
    int length = snprintf(line, sizeof line, "OK %u\n", conn->host_port);
    if (send(conn->fd, line, (size_t)length, MSG_DONTWAIT | MSG_NOSIGNAL) != length) {
        tv_vsock_abort(vsock, conn);
        return;
    }
    tv_vsock_add(&vsock->counts.established, 1);
    tv_vsock_enter(vsock, conn, TV_VSOCK_OPEN);
    tv_vsock_queue(vsock, conn);
}

/* A packet that makes no sense now, from a guest that knows better, or a forged one: it costs the connection. */
static void out_of_order(struct tv_vsock *vsock, struct tv_vsock_conn *conn)
{
    tv_vsock_add(&vsock->counts.out_of_order, 1);
    tv_vsock_abort(vsock, conn);
}

/* Straight from guest memory into the socket. Gives how much it took; 0 too when it is deaf now. */
static uint32_t write_through(struct tv_vsock *vsock, struct tv_vsock_conn *conn, const struct tv_chain *chain,
                              uint32_t length)
{
    struct msghdr message = {.msg_iov = vsock->iov};
    message.msg_iovlen = tv_chain_slice(chain, 0, PAYLOAD, length, vsock->iov);
    ssize_t sent;
    do
        sent = sendmsg(conn->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent >= 0)
        return (uint32_t)sent;
    if (errno != EAGAIN && errno != ENOBUFS && errno != ENOMEM)
        tv_vsock_host_deaf(vsock, conn);
    return 0;
}

/* The rest waits here. 0, or -1 without memory. */
static int keep(struct tv_vsock_conn *conn, const struct tv_chain *chain, uint64_t from, uint32_t length)
{
    struct tv_bytes *backlog = &conn->backlog;
    if (!backlog->bytes) {
        backlog->bytes = malloc(TV_VSOCK_BUFFER);
        backlog->size = TV_VSOCK_BUFFER;
        if (!backlog->bytes)
            return -1;
    }
    uint32_t end = (backlog->head + backlog->used) & (backlog->size - 1);
    uint32_t first = backlog->size - end < length ? backlog->size - end : length;
    tv_chain_read(chain, from, backlog->bytes + end, first);
    tv_chain_read(chain, from + first, backlog->bytes, length - first);
    backlog->used += length; /* the caller has seen that there is room: it is the credit */
    return 0;
}

static void data(struct tv_vsock *vsock, struct tv_vsock_conn *conn, const struct tv_chain *chain, uint32_t length)
{
    if (conn->guest_shut & TV_VSOCK_SHUT_SEND) {
        out_of_order(vsock, conn);
        return;
    }
    if (length > TV_VSOCK_BUFFER - (conn->received - conn->forwarded)) {
        tv_vsock_add(&vsock->counts.over_credit, 1);
        tv_vsock_abort(vsock, conn);
        return;
    }
    if (!length)
        return;
    conn->received += length;
    if (conn->host_shut & TV_VSOCK_SHUT_RCV) { /* sent before the guest heard of it */
        conn->forwarded = conn->received;
        return;
    }
    uint32_t sent = conn->backlog.used ? 0 : write_through(vsock, conn, chain, length);
    if (conn->stage != TV_VSOCK_OPEN || conn->host_shut & TV_VSOCK_SHUT_RCV)
        return; /* deaf */
    if (sent < length && keep(conn, chain, PAYLOAD + sent, length - sent)) {
        tv_vsock_abort(vsock, conn);
        return;
    }
    tv_vsock_host_sent(vsock, conn, sent);
}

/* The guest has ended it: what it sent before still goes to the peer. Nobody finds the connection any more, so that
 * its ports are the guest's again. */
static void guest_ended(struct tv_vsock *vsock, struct tv_vsock_conn *conn)
{
    if (conn->fd < 0 || !conn->backlog.used) {
        tv_vsock_release(vsock, conn);
        return;
    }
    tv_vsock_unset_ports(vsock, conn);
    conn->owed = 0;
    conn->readable = 0;
    tv_vsock_enter(vsock, conn, TV_VSOCK_LINGER);
}

static void shut(struct tv_vsock *vsock, struct tv_vsock_conn *conn, const struct tv_vsock_header *header)
{
    conn->guest_shut |= header->flags & TV_VSOCK_SHUT_BOTH;
    if (conn->guest_shut == TV_VSOCK_SHUT_BOTH) {
        tv_vsock_reply(vsock, conn->guest_port, conn->host_port, TV_VSOCK_STREAM); /* section 5.10.6.5 */
        guest_ended(vsock, conn);
        return;
    }
    if (conn->stage != TV_VSOCK_OPEN)
        return;
    if (conn->guest_shut & TV_VSOCK_SHUT_RCV)
        shutdown(conn->fd, SHUT_RD);
    if (conn->guest_shut & TV_VSOCK_SHUT_SEND && !conn->backlog.used)
        shutdown(conn->fd, SHUT_WR);
}

static void known(struct tv_vsock *vsock, struct tv_vsock_conn *conn, const struct tv_vsock_header *header,
                  const struct tv_chain *chain)
{
    if (conn->guest_alloc != header->buf_alloc || conn->guest_forwarded != header->fwd_cnt) {
        conn->guest_alloc = header->buf_alloc;
        conn->guest_forwarded = header->fwd_cnt;
        conn->starved = 0;
        if (conn->readable)
            tv_vsock_queue(vsock, conn);
    }
    int open = conn->stage == TV_VSOCK_OPEN;
    switch (header->op) {
    case TV_VSOCK_RST:
        guest_ended(vsock, conn);
        return;
    case TV_VSOCK_SHUTDOWN:
        if (conn->stage == TV_VSOCK_ASKED)
            out_of_order(vsock, conn);
        else
            shut(vsock, conn, header);
        return;
    case TV_VSOCK_RESPONSE:
        if (conn->stage == TV_VSOCK_ASKED && !(conn->owed & 1u << TV_VSOCK_REQUEST))
            established(vsock, conn);
        else
            out_of_order(vsock, conn);
        return;
    case TV_VSOCK_RW:
        if (open)
            data(vsock, conn, chain, header->len);
        else if (conn->stage != TV_VSOCK_ENDING) /* where it was sent before the guest heard of the end */
            out_of_order(vsock, conn);
        return;
    case TV_VSOCK_CREDIT_UPDATE:
        return;
    case TV_VSOCK_CREDIT_REQUEST:
        if (open)
            tv_vsock_owe(vsock, conn, TV_VSOCK_CREDIT_UPDATE);
        return;
    default: /* TV_VSOCK_REQUEST */
        out_of_order(vsock, conn);
    }
}

/* One chain of the transmit queue: gives 0, its used length, or that it is to wait. */
int64_t tv_vsock_take_packet(struct tv_vsock *vsock, struct tv_queue *queue, struct tv_chain *chain)
{
    struct tv_vsock_header header;
    if (vsock->replies_used == TV_VSOCK_REPLIES) { /* section 5.10.6.1.2: it may wait for room among our replies */
        vsock->tx_waits = 1;
        return TV_NOT_NOW;
    }
    if (tv_chain_read(chain, 0, &header, sizeof header) != sizeof header) {
        tv_vsock_add(&vsock->counts.malformed, 1);
        return 0;
    }
    if (header.src_cid != vsock->cid || header.dst_cid != TV_VSOCK_HOST_CID) {
        tv_vsock_add(&vsock->counts.misaddressed, 1);
        return 0;
    }
    struct tv_vsock_conn *conn = NULL;
    if (header.type == TV_VSOCK_STREAM)
        conn = tv_vsock_find(vsock, header.src_port, header.dst_port);
    if (header.op < TV_VSOCK_REQUEST || header.op > TV_VSOCK_CREDIT_REQUEST ||
        header.len > chain->readable_bytes - PAYLOAD) {
        tv_vsock_add(&vsock->counts.malformed, 1);
        if (conn)
            tv_vsock_abort(vsock, conn);
        return 0;
    }
    if (conn)
        known(vsock, conn, &header, chain);
    else if (header.op == TV_VSOCK_REQUEST && header.type == TV_VSOCK_STREAM)
        connect_out(vsock, &header);
    else if (header.op != TV_VSOCK_RST) {
        tv_vsock_add(&vsock->counts.unknown, 1);
        tv_vsock_reply(vsock, header.src_port, header.dst_port, header.type);
    }
    return 0;
}
