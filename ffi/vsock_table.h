/* Inside virtio-vsock: its connections and what its parts do for each other. See vsock.h.
 *
 * Invariants of a connection
 *  - `stage` is assigned in vsock_table.c only (tv_vsock_enter), which counts; a FREE slot is in no list.
 *  - It is found by its ports from ASKED on and until the guest is done with it: not while GREETING or LINGERing.
 *  - `readable` says that its socket may hold something: its events are edges (EPOLLET), and a read that gets less than
 *    it has room for has emptied it, but for an end that was seen already, or descriptors that were sent along.
 *  - `backlog` holds `received - forwarded` bytes, at most TV_VSOCK_BUFFER.
 */
#ifndef TV_VSOCK_TABLE_H
#define TV_VSOCK_TABLE_H
#include <stdint.h>
#include <sys/un.h>

#include "bytes.h"
#include "vsock.h"
#include "vsock_wire.h"

#define TV_VSOCK_NOBODY UINT16_MAX
#define TV_VSOCK_BUCKETS 2048 /* a power of two */
#define TV_VSOCK_BATCH 16     /* chains that one read fills: drivers' buffers are of 4 KiB, a system call costs as much */

enum tv_vsock_stage {
    TV_VSOCK_FREE,
    TV_VSOCK_GREETING, /* a client of the host is there, its line isn't */
    TV_VSOCK_ASKED,    /* the guest is asked whether it takes it, or is owed the question */
    TV_VSOCK_OPEN,
    TV_VSOCK_ENDING, /* the host's socket is closed: the guest is owed a reset, or owes its own after a shutdown */
    TV_VSOCK_LINGER, /* the guest is done with it; what it sent is still on its way into the host's socket */
};

enum { TV_VSOCK_RECEIVE, TV_VSOCK_TRANSMIT, TV_VSOCK_EVENT, TV_VSOCK_QUEUES }; /* section 5.10.2 */

struct tv_vsock_conn {
    uint8_t stage;
    uint8_t owed; /* bits 1 << enum tv_vsock_op: packets that the guest is to get */
    uint8_t queued; /* in the list of those with something for the guest */
    uint8_t readable, eof, hung_up;
    uint8_t last;  /* its peer was seen to send no more: no edge comes after what is there */
    uint8_t batch; /* chains that a read of it gets: see next_batch; 0: the first one */
    uint8_t guest_shut, host_shut; /* TV_VSOCK_SHUT_*, as the guest said, and as it is told */
    uint8_t starved; /* a CREDIT_REQUEST was sent, and no credit came since */
    uint16_t next_in_bucket, next, previous; /* slots; `next` is of the free list too */
    int fd;
    uint32_t generation; /* of the slot: an event of the one before it is not this one's */
    uint32_t guest_port, host_port;
    uint32_t guest_alloc, guest_forwarded, sent;           /* to the guest */
    uint32_t received, forwarded, forwarded_told;          /* from the guest */
    uint64_t expires_ns; /* of every stage but OPEN */
    struct tv_bytes backlog; /* of the guest, for the host's peer; its memory is kept as long as the slot is used */
};

struct tv_vsock_reply {
    uint32_t guest_port, host_port;
    uint16_t type;
};

struct tv_vsock {
    uint64_t cid;
    struct sockaddr_un address; /* of the listener; a port is appended for the guest's connections */
    uint32_t path_length;
    int epoll_fd, timer_fd, listener;
    uint8_t listening; /* the listener is watched */
    uint8_t pausing;   /* there were no descriptors: it is watched again at the next tick */
    uint8_t ticking;
    uint8_t reset_owed; /* the transport reset event */
    uint8_t news;       /* somebody has something for the guest since the last turn of its queue */
    uint8_t tx_waits;   /* the guest's packets wait for room among the replies */
    uint64_t greeting_ns, linger_ns;
    uint32_t next_port;
    uint16_t free, first, last; /* slots: the free list; who has something for the guest, next one first */
    uint16_t buckets[TV_VSOCK_BUCKETS];
    uint32_t replies_first, replies_used;
    struct tv_vsock_reply replies[TV_VSOCK_REPLIES];
    struct tv_vsock_conn conns[TV_VSOCK_CONNECTIONS];
    struct iovec iov[TV_QUEUE_MAX]; /* of the call that is under way */
    struct tv_chain more[TV_VSOCK_BATCH - 1]; /* of the read that is under way, behind the worker's own */
    struct tv_vsock_counts counts;
};

static inline void tv_vsock_add(uint64_t *count, uint64_t more)
{
    __atomic_store_n(count, *count + more, __ATOMIC_RELAXED); /* one writer, any reader */
}

/* Bytes that may be sent to the guest: nothing where it contradicts itself. */
static inline uint32_t tv_vsock_credit(const struct tv_vsock_conn *conn)
{
    uint32_t under_way = conn->sent - conn->guest_forwarded;
    return under_way < conn->guest_alloc ? conn->guest_alloc - under_way : 0;
}

/* vsock_table.c */
void tv_vsock_table_init(struct tv_vsock *vsock, uint32_t slots);
struct tv_vsock_conn *tv_vsock_take(struct tv_vsock *vsock, int fd);
void tv_vsock_enter(struct tv_vsock *vsock, struct tv_vsock_conn *conn, enum tv_vsock_stage stage);
void tv_vsock_set_ports(struct tv_vsock *vsock, struct tv_vsock_conn *conn, uint32_t guest_port, uint32_t host_port);
void tv_vsock_unset_ports(struct tv_vsock *vsock, struct tv_vsock_conn *conn);
struct tv_vsock_conn *tv_vsock_find(struct tv_vsock *vsock, uint32_t guest_port, uint32_t host_port);
uint32_t tv_vsock_pick_port(struct tv_vsock *vsock, uint32_t guest_port);
void tv_vsock_queue(struct tv_vsock *vsock, struct tv_vsock_conn *conn);
struct tv_vsock_conn *tv_vsock_next(struct tv_vsock *vsock);
void tv_vsock_owe(struct tv_vsock *vsock, struct tv_vsock_conn *conn, enum tv_vsock_op op);
void tv_vsock_close(struct tv_vsock_conn *conn);
void tv_vsock_release(struct tv_vsock *vsock, struct tv_vsock_conn *conn);
void tv_vsock_abort(struct tv_vsock *vsock, struct tv_vsock_conn *conn);
int tv_vsock_reply(struct tv_vsock *vsock, uint32_t guest_port, uint32_t host_port, uint16_t type);

/* vsock_host.c */
void tv_vsock_host_turn(struct tv_vsock *vsock, struct tv_worker *worker, uint32_t at);
void tv_vsock_watch_listener(struct tv_vsock *vsock);
void tv_vsock_tick_soon(struct tv_vsock *vsock);
int tv_vsock_connect_host(struct tv_vsock *vsock, uint32_t port);
int tv_vsock_watch(struct tv_vsock *vsock, struct tv_vsock_conn *conn);
void tv_vsock_flush(struct tv_vsock *vsock, struct tv_vsock_conn *conn);
void tv_vsock_host_sent(struct tv_vsock *vsock, struct tv_vsock_conn *conn, uint32_t bytes);
void tv_vsock_host_deaf(struct tv_vsock *vsock, struct tv_vsock_conn *conn);
void tv_vsock_host_ended(struct tv_vsock *vsock, struct tv_vsock_conn *conn);

/* vsock_tx.c, vsock_rx.c: the hooks of two of the queues */
int64_t tv_vsock_take_packet(struct tv_vsock *vsock, struct tv_queue *queue, struct tv_chain *chain);
int64_t tv_vsock_give_packet(struct tv_vsock *vsock, struct tv_queue *queue, struct tv_chain *chain);

#endif
