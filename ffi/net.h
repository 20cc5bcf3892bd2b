/* virtio-net (virtio 1.2 section 5.1): a worker a pair of queues, which receives and transmits over one link, and serves
 * the control queue if it is the first one.
 *
 * Invariants
 *  - struct tv_net is what the workers of a device share, and outlives them. `mac`, `pairs`, `offloads` and `status` are
 *    atomic words: the control queue changes them, any thread reads them. `changed` is set with them.
 *  - Sending never waits for a peer: a frame that finds no room stays on the queue for TV_NET_STALL_NS at the most, and
 *    from then on each is dropped until one has found room again. So no peer holds a guest's queue.
 *  - Received frames without a buffer stay where they are, and their sender has to wait: it is read from again when the
 *    driver has offered one.
 *  - Everything that is dropped is counted, by its reason.
 */
#ifndef TV_NET_H
#define TV_NET_H
#include "net_link.h"
#include "worker.h"

#define TV_NET_STALL_NS 200000000ull
#define TV_NET_PAIRS 16u /* most queue pairs of a device: a worker thread each */
#define TV_NET_NONE UINT32_MAX /* no such queue here */
#define TV_NET_S_LINK_UP 1u
#define TV_NET_S_ANNOUNCE 2u

struct tv_net {
    uint64_t features; /* as negotiated; while no worker runs */
    uint64_t mac;      /* the first byte is the lowest */
    uint64_t offloads; /* TV_NET_GUEST_OFFLOADS that are on */
    uint32_t pairs;    /* queue pairs in use */
    uint32_t max_pairs;
    uint32_t status;
    uint32_t changed; /* the tap is to be told of offloads and pairs */
    struct tv_net_link *links[TV_NET_PAIRS];
};

/* Written by the worker alone, each read whole by others. Frames and their bytes without headers; `malformed`: no frame
 * at all, or with a header that lies; `lost`: nobody was there, or took it in time; `long`: beyond the driver's buffers. */
struct tv_net_counts {
    uint64_t rx_frames, rx_bytes, rx_malformed, rx_long;
    uint64_t tx_frames, tx_bytes, tx_malformed, tx_lost;
    uint64_t announced, commands, refused;
};

struct tv_net_worker {
    struct tv_worker worker;
    struct tv_net *net;
    struct tv_net_link *link;
    int timer_fd;
    uint32_t pair;
    uint32_t receive, transmit; /* its numbers of these queues, or TV_NET_NONE */
    uint32_t announce;          /* announcements that are to be sent yet */
    uint8_t begun;
    uint64_t timer_at, dial_at, dial_wait, announce_at; /* tv_now_ns; 0: not armed, not wanted */
    uint64_t stalled_at;                                /* since when no frame has found room */
    struct tv_vnet_allowed from_driver;
    struct tv_chain first; /* of a received frame that takes several */
    struct tv_net_counts counts;
};

/* What became of a frame: it is done with, or dropped for its length; it waits for a buffer that the driver rings for,
 * or for none, since that has come; or its driver is at fault. */
enum tv_net_delivered { TV_NET_DELIVERED, TV_NET_TOO_LONG, TV_NET_NO_BUFFER, TV_NET_AGAIN, TV_NET_BROKEN };

static inline void tv_net_add(uint64_t *count, uint64_t more)
{
    __atomic_store_n(count, *count + more, __ATOMIC_RELAXED);
}

void tv_net_init(struct tv_net *net, const uint8_t mac[6], uint32_t max_pairs);
void tv_net_begin(struct tv_net *net, uint64_t features, int goes_on);
void tv_net_reset(struct tv_net *net, const uint8_t mac[6]);
int tv_net_worker_init(struct tv_net_worker *self, struct tv_net *net, uint32_t pair);
void tv_net_worker_free(struct tv_net_worker *self);
void tv_net_apply(struct tv_net *net);
enum tv_net_delivered tv_net_deliver(struct tv_net_worker *self, struct tv_queue *queue, struct tv_vnet_header *header,
                                     const uint8_t *data, uint32_t length);
int64_t tv_net_control(struct tv_net_worker *self, struct tv_queue *queue, const struct tv_chain *chain);
uint64_t tv_net_mac(const uint8_t mac[6]);

#endif
