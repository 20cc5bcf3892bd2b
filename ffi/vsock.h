/* virtio-vsock (virtio 1.2 section 5.10): streams between a guest's vsock sockets and unix sockets of the host.
 *
 * The hybrid that Firecracker made and Cloud Hypervisor has: a client of the host connects to the device's socket and
 * says "CONNECT <port>\n"; once the guest has accepted it hears "OK <port>\n", and then it is a stream. A guest's
 * connection to port N of the host goes to the unix socket "<path>_N".
 *
 *   vsock_wire.h   what a packet looks like
 *   vsock_table.c  connections: one slot each, by ports; who has something to tell the guest, in turn
 *   vsock_host.c   the sockets: accepting, greeting, connecting, what is written to them, time
 *   vsock_tx.c     what the guest sends
 *   vsock_rx.c     what it gets
 *   vsock.c        the device: one worker for its three queues and an epoll descriptor for everything else
 *
 * Invariants of struct tv_vsock
 *  - It belongs to its worker's thread while one runs, to Python otherwise: but the counts, which any may read.
 *  - Connections outlive a worker: a device gate that closes and opens again loses nothing. They end with the driver
 *    (tv_vsock_reset), and do not travel: a destination owes its driver a transport reset (tv_vsock_moved).
 *  - What a guest and a peer can make it hold is bounded: TV_VSOCK_CONNECTIONS slots with TV_VSOCK_BUFFER bytes each
 *    (fewer where the process may have few descriptors: the others' are not this guest's to use up),
 *    TV_VSOCK_HALF_OPEN of them not established, TV_VSOCK_REPLIES resets to nobody.
 *  - Credit (section 5.10.6.3): no byte is read from a host's socket that the guest has not promised room for, and a
 *    guest that sends more than it was promised room for loses the connection. So a peer that doesn't read, on either
 *    side, holds up its own stream and nobody else's.
 */
#ifndef TV_VSOCK_H
#define TV_VSOCK_H
#include <stdint.h>

#include "worker.h"

#define TV_VSOCK_CONNECTIONS 1024
#define TV_VSOCK_BUFFER (128u << 10) /* of each: what the guest may send before the host's peer has read. A power of 2 */
#define TV_VSOCK_HALF_OPEN 256       /* clients that have not said their line, or whom the guest has not answered */
#define TV_VSOCK_REPLIES 256         /* resets that wait for a buffer; then the guest's next packets wait */
#define TV_VSOCK_SUFFIX 11           /* bytes: "_4294967295" */

/* Since the device was made; the first four tell what is, not what was. */
struct tv_vsock_counts {
    uint64_t open, half_open, ending, lingering;
    uint64_t accepted;      /* clients of the host */
    uint64_t connected;     /* the guest's connections to a host's socket */
    uint64_t established;   /* of both kinds */
    uint64_t to_guest, to_host; /* bytes of streams */
    uint64_t resets;        /* sent to the guest */
    uint64_t refused;       /* no slot was free */
    uint64_t no_listener;   /* the guest's connections to a socket that nobody serves */
    uint64_t bad_greeting;  /* clients that said something else than CONNECT <port> */
    uint64_t timed_out;     /* half made, or half closed, for too long */
    uint64_t malformed;     /* packets too short for their header or their length, or of no operation */
    uint64_t misaddressed;  /* with another CID than its own, or to another than the host's */
    uint64_t over_credit;   /* connections lost because the guest sent more than there was room for */
    uint64_t out_of_order;  /* packets that make no sense in the state of their connection */
    uint64_t unknown;       /* packets of a connection that isn't there */
    uint64_t no_descriptors; /* times that nobody could be accepted for want of descriptors */
};

struct tv_vsock;

struct tv_vsock_worker {
    struct tv_worker worker;
    struct tv_vsock *vsock;
};

struct tv_vsock *tv_vsock_new(uint64_t cid, const char *path);
void tv_vsock_free(struct tv_vsock *vsock);
void tv_vsock_worker_init(struct tv_vsock_worker *worker, struct tv_vsock *vsock);
void tv_vsock_set_patience(struct tv_vsock *vsock, uint64_t greeting_ns, uint64_t linger_ns);
int tv_vsock_listen(struct tv_vsock *vsock, int fd);
void tv_vsock_reset(struct tv_vsock *vsock);
void tv_vsock_moved(struct tv_vsock *vsock);
const struct tv_vsock_counts *tv_vsock_counts(const struct tv_vsock *vsock);

#endif
