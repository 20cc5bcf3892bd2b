/* What a guest gets by virtio-vsock: resets for nobody's connections, then everybody's packets in turn, one each. */
#include <errno.h>
#include <sys/socket.h>

#include "vsock_table.h"

#define DATA_MAX (64u << 10) /* of one read, before another connection's turn */
#define HEADER sizeof(struct tv_vsock_header)

static int64_t give(struct tv_vsock *vsock, struct tv_queue *queue, struct tv_chain *chain,
                    struct tv_vsock_header *header, uint32_t guest_port, uint32_t host_port, uint16_t op)
{
    header->src_cid = TV_VSOCK_HOST_CID;
    header->dst_cid = vsock->cid;
    header->src_port = host_port;
    header->dst_port = guest_port;
    header->op = op;
    if (op == TV_VSOCK_RST)
        tv_vsock_add(&vsock->counts.resets, 1);
    return (int64_t)tv_chain_write(queue->memory, chain, 0, header, sizeof *header);
}

/* Every packet of a connection says what room there is. */
static int64_t give_of(struct tv_vsock *vsock, struct tv_queue *queue, struct tv_chain *chain,
                       struct tv_vsock_conn *conn, enum tv_vsock_op op, uint32_t length)
{
    struct tv_vsock_header header = {.type = TV_VSOCK_STREAM, .len = length, .buf_alloc = TV_VSOCK_BUFFER};
    header.fwd_cnt = conn->forwarded_told = conn->forwarded;
    header.flags = op == TV_VSOCK_SHUTDOWN ? conn->host_shut : 0;
    conn->owed &= (uint8_t) ~(1u << op | 1u << TV_VSOCK_CREDIT_UPDATE);
    return give(vsock, queue, chain, &header, conn->guest_port, conn->host_port, (uint16_t)op) + length;
}

/* The peer's socket has come to its end, everything from it is with the guest. */
static void at_end(struct tv_vsock *vsock, struct tv_vsock_conn *conn)
{
    conn->readable = 0;
    conn->eof = 1;
    if (conn->hung_up || conn->host_shut & TV_VSOCK_SHUT_RCV) {
        tv_vsock_host_ended(vsock, conn);
        return;
    }
    conn->host_shut |= TV_VSOCK_SHUT_SEND;
    conn->owed |= 1u << TV_VSOCK_SHUTDOWN;
}

/* Room for a read: the worker's chain, and more of the queue's where this connection lately filled as many. Gives how
 * many; `rooms` says what each gets of at most `most` bytes. */
static uint32_t gather(struct tv_vsock *vsock, struct tv_queue *queue, struct tv_chain *chain, uint32_t batch,
                       uint64_t most, struct tv_chain **chains, uint64_t *rooms, struct msghdr *message)
{
    uint32_t count = 0;
    message->msg_iov = vsock->iov;
    for (struct tv_chain *next = chain; most; next = &vsock->more[count - 1]) {
        if (count && tv_queue_pop(queue, next) != 1)
            break;
        if (count && (next->writable_bytes <= HEADER || message->msg_iovlen + next->writable > TV_QUEUE_MAX)) {
            tv_queue_rewind(queue, 1);
            break;
        }
        uint64_t room = next->writable_bytes - HEADER;
        chains[count] = next;
        rooms[count] = room < most ? room : most;
        message->msg_iovlen += tv_chain_slice(next, 1, HEADER, rooms[count], vsock->iov + message->msg_iovlen);
        most -= rooms[count];
        if (++count == batch)
            break;
    }
    return count;
}

/* Twice as many where all were filled, and as few as were, but no less than half as many, where there was less. */
static uint8_t next_batch(uint32_t had, uint32_t wanted)
{
    uint32_t next = wanted > had / 2 ? wanted : had / 2;
    return (uint8_t)(next < TV_VSOCK_BATCH ? next : TV_VSOCK_BATCH);
}

/* As much from the socket as the guest has room for, a packet a chain. All but the last one are pushed here; that is left
 * to the worker, in `chain`. Gives its used length; 0 when there is nothing now. */
static int64_t give_data(struct tv_vsock *vsock, struct tv_queue *queue, struct tv_chain *chain,
                         struct tv_vsock_conn *conn)
{
    struct tv_chain *chains[TV_VSOCK_BATCH];
    uint64_t rooms[TV_VSOCK_BATCH], total = 0;
    struct msghdr message = {0};
    uint32_t credit = tv_vsock_credit(conn), count, filled = 0;
    count = gather(vsock, queue, chain, conn->batch ? conn->batch : 1, credit < DATA_MAX ? credit : DATA_MAX, chains,
                   rooms, &message);
    if (!count)
        return 0;
    ssize_t got;
    do
        got = recvmsg(conn->fd, &message, MSG_DONTWAIT);
    while (got < 0 && errno == EINTR);
    for (uint32_t i = 0; i < count; total += rooms[i++])
        filled += got > 0 && total < (uint64_t)got;
    tv_queue_rewind(queue, (uint16_t)(count - (filled ? filled : 1)));
    if (got <= 0) {
        if (got < 0 && errno == EAGAIN) {
            conn->readable = 0;
        } else {
            conn->hung_up |= got < 0; /* it went away with something unread */
            at_end(vsock, conn);
        }
        return 0;
    }
    if ((uint64_t)got < total)
        conn->readable = conn->last || message.msg_flags & MSG_CTRUNC;
    conn->batch = next_batch(count, (uint64_t)got < total ? filled : count * 2);
    tv_vsock_add(&vsock->counts.to_guest, (uint64_t)got);
    for (uint32_t i = 0;; i++) {
        uint32_t part = (uint32_t)((uint64_t)got < rooms[i] ? (uint64_t)got : rooms[i]);
        got -= part;
        conn->sent += part;
        tv_chain_mark_written(queue->memory, chains[i], HEADER + part);
        int64_t length = give_of(vsock, queue, chains[i], conn, TV_VSOCK_RW, part);
        if (i + 1 == filled) {
            chain->head = chains[i]->head;
            return length;
        }
        tv_queue_push(queue, chains[i]->head, (uint32_t)length);
    }
}

/* One packet of a connection, the most urgent one; 0: it has none now. */
static int64_t give_one(struct tv_vsock *vsock, struct tv_queue *queue, struct tv_chain *chain,
                        struct tv_vsock_conn *conn)
{
    static const enum tv_vsock_op first[] = {TV_VSOCK_RST, TV_VSOCK_REQUEST, TV_VSOCK_RESPONSE};
    for (uint32_t i = 0; i < sizeof first / sizeof *first; i++)
        if (conn->owed & 1u << first[i])
            return give_of(vsock, queue, chain, conn, first[i], 0);
    if (conn->stage == TV_VSOCK_OPEN && conn->readable && !(conn->guest_shut & TV_VSOCK_SHUT_RCV)) {
        int64_t given = give_data(vsock, queue, chain, conn);
        if (given)
            return given;
        if (conn->readable && !conn->starved && !tv_vsock_credit(conn)) {
            conn->starved = 1; /* asked once: the guest tells when it has room */
            return give_of(vsock, queue, chain, conn, TV_VSOCK_CREDIT_REQUEST, 0);
        }
    }
    if (conn->owed & 1u << TV_VSOCK_SHUTDOWN)
        return give_of(vsock, queue, chain, conn, TV_VSOCK_SHUTDOWN, 0);
    if (conn->owed & 1u << TV_VSOCK_CREDIT_UPDATE)
        return give_of(vsock, queue, chain, conn, TV_VSOCK_CREDIT_UPDATE, 0);
    return 0;
}

static int has_more(const struct tv_vsock_conn *conn)
{
    if (conn->owed)
        return 1;
    return conn->stage == TV_VSOCK_OPEN && conn->readable && !(conn->guest_shut & TV_VSOCK_SHUT_RCV) &&
           (tv_vsock_credit(conn) || !conn->starved);
}

/* One chain of the receive queue: gives its used length, or that there is nothing for it. */
int64_t tv_vsock_give_packet(struct tv_vsock *vsock, struct tv_queue *queue, struct tv_chain *chain)
{
    if (chain->writable_bytes <= HEADER) { /* no byte of a stream would ever fit */
        queue->broken = TV_BROKEN_REQUEST;
        return 0;
    }
    if (vsock->replies_used) {
        struct tv_vsock_reply *reply = &vsock->replies[vsock->replies_first];
        struct tv_vsock_header header = {.type = reply->type};
        vsock->replies_first = (vsock->replies_first + 1) % TV_VSOCK_REPLIES;
        vsock->replies_used--;
        return give(vsock, queue, chain, &header, reply->guest_port, reply->host_port, TV_VSOCK_RST);
    }
    for (struct tv_vsock_conn *conn; (conn = tv_vsock_next(vsock));) {
        int reset = conn->owed & 1u << TV_VSOCK_RST;
        int64_t given = give_one(vsock, queue, chain, conn);
        if (reset)
            tv_vsock_release(vsock, conn);
        else if (has_more(conn))
            tv_vsock_queue(vsock, conn);
        if (given)
            return given;
    }
    return TV_NOT_NOW;
}
