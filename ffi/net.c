#include "net.h"

#include <poll.h>
#include <string.h>
#include <sys/timerfd.h>
#include <unistd.h>

#define TURN_FRAMES 256    /* received in one turn; see worker.c */
#define TURN_NS 1000000u
#define BATCH_NS 50000u
#define RETRY_NS 200000u   /* nothing tells when a datagram's receiver has room again */
#define DIAL_NS 50000000ull /* between two tries to reach a peer, at first; and at the most: */
#define DIAL_MOST_NS 1000000000ull
#define BROKEN_NS 1000000000ull /* until a tap that failed is read again */
#define ANNOUNCE_NS 50000000ull /* between announcements, each a little later, as QEMU spaces them */
#define ANNOUNCE_STEP_NS 100000000ull
#define ANNOUNCEMENTS 5
#define RARP_BYTES 60 /* the shortest frame on a cable */

enum own { READ, ROOM, LISTEN, TIMER }; /* the worker's own descriptors */

static int64_t serve(struct tv_worker *worker, struct tv_queue *queue, struct tv_chain *chain);
static void on_ready(struct tv_worker *worker, uint32_t at);

/* --- the device ---------------------------------------------------------------------------------------------------- */

void tv_net_init(struct tv_net *net, const uint8_t mac[6], uint32_t max_pairs)
{
    net->max_pairs = max_pairs;
    tv_net_reset(net, mac);
}

/* With no worker: as it is before any driver. */
void tv_net_reset(struct tv_net *net, const uint8_t mac[6])
{
    net->features = net->offloads = 0;
    net->mac = tv_net_mac(mac);
    net->pairs = 1;
    net->status = TV_NET_S_LINK_UP;
    net->changed = 1;
}

/* With no worker: `features` are negotiated. All offloads among them are on (section 5.1.6.5.6.1), unless the driver
 * `goes_on`: then it has chosen. */
void tv_net_begin(struct tv_net *net, uint64_t features, int goes_on)
{
    net->features = features;
    net->offloads = (goes_on ? net->offloads : UINT64_MAX) & features & TV_NET_GUEST_OFFLOADS;
    if (!(features & TV_NET_F_MQ) || !net->pairs || net->pairs > net->max_pairs)
        net->pairs = 1;
    if (!(features & TV_NET_F_GUEST_ANNOUNCE))
        net->status &= ~TV_NET_S_ANNOUNCE;
    net->changed = 1;
}

/* 0, or -1 with errno: no descriptor for its timer. */
int tv_net_worker_init(struct tv_net_worker *self, struct tv_net *net, uint32_t pair)
{
    self->worker.serve = serve;
    self->worker.on_ready = on_ready;
    self->net = net;
    self->link = net->links[pair];
    self->pair = pair;
    self->receive = self->transmit = TV_NET_NONE;
    self->from_driver = tv_vnet_from_driver(net->features);
    self->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    return self->timer_fd < 0 ? -1 : 0;
}

/* What tv_net_worker_init made, or did not. After the run; the struct stays its owner's. */
void tv_net_worker_free(struct tv_net_worker *self)
{
    if (self->worker.serve && self->timer_fd >= 0)
        close(self->timer_fd);
    self->timer_fd = -1;
}

/* Which of its queues is which: they are added by now. */
static void know_queues(struct tv_net_worker *self)
{
    for (uint32_t at = 0; at < self->worker.queue_count; at++) {
        uint16_t index = self->worker.queues[at].index;
        if (index == 2 * self->pair)
            self->receive = at;
        else if (index == 2 * self->pair + 1)
            self->transmit = at;
    }
}

/* --- time ---------------------------------------------------------------------------------------------------------- */

/* A turn at `at_ns`, or earlier. */
static void wake_at(struct tv_net_worker *self, uint64_t at_ns)
{
    if (self->timer_at && self->timer_at <= at_ns)
        return;
    self->timer_at = at_ns;
    struct itimerspec when = {.it_value = {(time_t)(at_ns / 1000000000u), (long)(at_ns % 1000000000u)}};
    timerfd_settime(self->timer_fd, TFD_TIMER_ABSTIME, &when, NULL);
}

/* --- the peer ------------------------------------------------------------------------------------------------------ */

static void watch(struct tv_net_worker *self, enum own own, short events)
{
    int fd = own == LISTEN ? self->link->listen_fd : own == TIMER ? self->timer_fd : self->link->fd;
    tv_worker_watch(&self->worker, own, fd, fd < 0 ? 0 : events);
}

static int receives(const struct tv_net_worker *self)
{
    return self->receive != TV_NET_NONE;
}

/* There is a peer, or another one. */
static void met(struct tv_net_worker *self)
{
    if (self->stalled_at)
        self->worker.due |= 1u << self->transmit; /* what waited for the one before goes to this one */
    self->dial_at = self->dial_wait = self->stalled_at = 0;
    self->link->hung_up = 0; /* that was the one before */
    watch(self, READ, receives(self) ? POLLIN : 0);
    watch(self, ROOM, 0);
}

/* The peer has gone, or there was none: look for it again, in a while. */
static void alone(struct tv_net_worker *self)
{
    watch(self, READ, 0);
    watch(self, ROOM, 0);
    self->link->hung_up = 0;
    if (!self->link->peer_len || self->link->kind != TV_NET_STREAM || self->dial_at)
        return;
    self->dial_wait = self->dial_wait ? self->dial_wait * 2 : DIAL_NS;
    if (self->dial_wait > DIAL_MOST_NS)
        self->dial_wait = DIAL_MOST_NS;
    self->dial_at = tv_now_ns() + self->dial_wait;
    wake_at(self, self->dial_at);
}

static void look_for_peer(struct tv_net_worker *self)
{
    self->dial_at = 0;
    if (tv_net_dial(self->link))
        met(self);
    else
        alone(self);
}

/* --- transmit ------------------------------------------------------------------------------------------------------ */

/* What waits in the link goes on as soon as there is room for it. Gives whether something waits. */
static int flush(struct tv_net_worker *self)
{
    if (self->link->kind != TV_NET_STREAM)
        return self->stalled_at != 0;
    int busy = tv_net_flush(self->link) == TV_NET_BUSY;
    if (self->link->hung_up)
        alone(self);
    else if (self->link->fd >= 0)
        watch(self, ROOM, busy ? POLLOUT : 0);
    return busy;
}

/* No room for a frame: wait for some, or no longer. Gives whether to wait. */
static int wait_for_room(struct tv_net_worker *self)
{
    uint64_t now = tv_now_ns();
    if (!self->stalled_at)
        self->stalled_at = now;
    if (now - self->stalled_at >= TV_NET_STALL_NS)
        return 0;
    if (self->link->kind == TV_NET_DGRAM) {
        wake_at(self, now + RETRY_NS);
    } else {
        watch(self, ROOM, POLLOUT);
        wake_at(self, self->stalled_at + TV_NET_STALL_NS);
    }
    return 1;
}

static int64_t transmit(struct tv_net_worker *self, struct tv_chain *chain)
{
    struct tv_vnet_header header;
    struct iovec iov[TV_QUEUE_MAX + 1];
    uint64_t length = chain->readable_bytes - TV_NET_HEADER; /* wraps where there is not even a header */
    if (length < TV_NET_FRAME_MIN || length > TV_NET_FRAME_MAX) {
        tv_net_add(&self->counts.tx_malformed, 1);
        return 0;
    }
    tv_chain_read(chain, 0, &header, sizeof header);
    if (tv_vnet_check(&header, length, &self->from_driver)) {
        tv_net_add(&self->counts.tx_malformed, 1);
        return 0;
    }
    uint32_t count = tv_chain_slice(chain, 0, TV_NET_HEADER, length, iov + 1);
    int sent = tv_net_send(self->link, &header, iov, count, (uint32_t)length);
    if (sent == TV_NET_BUSY && wait_for_room(self))
        return TV_NOT_NOW;
    if (sent == TV_NET_SENT) {
        self->stalled_at = 0;
        tv_net_add(&self->counts.tx_frames, 1);
        tv_net_add(&self->counts.tx_bytes, length);
    } else {
        tv_net_add(&self->counts.tx_lost, 1);
    }
    return 0;
}

static int64_t serve(struct tv_worker *worker, struct tv_queue *queue, struct tv_chain *chain)
{
    struct tv_net_worker *self = (struct tv_net_worker *)worker;
    if (self->transmit != TV_NET_NONE && queue == &worker->queues[self->transmit])
        return transmit(self, chain);
    return tv_net_control(self, queue, chain);
}

static void transmit_turn(struct tv_net_worker *self)
{
    if (self->transmit == TV_NET_NONE)
        return;
    tv_worker_serve(&self->worker, self->transmit);
    if (!flush(self) && self->stalled_at) {
        self->stalled_at = 0;
        self->worker.due |= 1u << self->transmit; /* what waited for room has it now */
    }
}

/* --- receive ------------------------------------------------------------------------------------------------------- */

/* Frames to the driver, as long as a turn may be, as there are frames, as there are buffers. */
static void receive_turn(struct tv_net_worker *self)
{
    struct tv_queue *queue = &self->worker.queues[self->receive];
    uint64_t began = tv_now_ns(), batch = began;
    for (uint32_t left = TURN_FRAMES; !queue->broken && !tv_worker_stopping(&self->worker);) {
        struct tv_vnet_header header;
        const uint8_t *data;
        uint32_t length;
        uint64_t now = tv_now_ns();
        if (!left-- || now - began > TURN_NS) {
            self->worker.due |= 1u << self->receive;
            break;
        }
        if (now - batch > BATCH_NS) {
            tv_queue_publish(queue);
            batch = now;
        }
        int got = tv_net_next(self->link, &header, &data, &length);
        if (got <= 0) {
            tv_queue_publish(queue);
            if (got < 0 && self->link->kind == TV_NET_TAP) {
                watch(self, READ, 0);
                wake_at(self, now + BROKEN_NS);
            } else if (got < 0) {
                alone(self);
            } else {
                watch(self, READ, POLLIN);
            }
            return;
        }
        tv_queue_disarm(queue);
        enum tv_net_delivered how = tv_net_deliver(self, queue, &header, data, length);
        if (how == TV_NET_AGAIN)
            continue;
        if (how == TV_NET_NO_BUFFER) {
            watch(self, READ, 0); /* the next buffer rings the doorbell */
            return;
        }
        if (how == TV_NET_BROKEN)
            break;
        tv_net_taken(self->link);
    }
    tv_queue_publish(queue);
    if (queue->broken)
        watch(self, READ, 0); /* nobody takes anything from there until the device is reset */
}

/* --- announcements ------------------------------------------------------------------------------------------------- */

/* "This address is here now", to the switches on the way: a reverse ARP request that nobody answers. */
static void announce(struct tv_net_worker *self)
{
    static const uint8_t request[] = {0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3}; /* type, Ethernet, IPv4, lengths, reverse */
    uint8_t frame[RARP_BYTES] = {0};
    uint64_t mac = __atomic_load_n(&self->net->mac, __ATOMIC_SEQ_CST);
    struct tv_vnet_header header = {0};
    struct iovec iov[2] = {{0}, {frame, sizeof frame}};
    memset(frame, 0xff, 6);
    memcpy(frame + 6, &mac, 6);
    memcpy(frame + 12, request, sizeof request);
    memcpy(frame + 22, &mac, 6);
    memcpy(frame + 32, &mac, 6);
    if (tv_net_send(self->link, &header, iov, 1, sizeof frame) == TV_NET_SENT)
        tv_net_add(&self->counts.announced, 1);
    flush(self);
}

static void announce_if_due(struct tv_net_worker *self, uint64_t now)
{
    if (!self->announce)
        return;
    if (now >= self->announce_at) {
        announce(self);
        uint32_t sent = ANNOUNCEMENTS - --self->announce;
        self->announce_at = now + ANNOUNCE_NS + (uint64_t)(sent > 1 ? sent - 1 : 0) * ANNOUNCE_STEP_NS;
    }
    if (self->announce)
        wake_at(self, self->announce_at);
}

/* --- turns --------------------------------------------------------------------------------------------------------- */

/* Once, in the worker's thread: what may wait for the kernel is done here. */
static void begin(struct tv_net_worker *self)
{
    self->begun = 1;
    know_queues(self);
    if (self->pair == 0 && __atomic_exchange_n(&self->net->changed, 0, __ATOMIC_SEQ_CST))
        tv_net_apply(self->net);
    watch(self, TIMER, POLLIN);
    watch(self, LISTEN, POLLIN);
    if (self->link->fd >= 0)
        met(self);
    else
        look_for_peer(self);
    flush(self);
    if (self->announce > ANNOUNCEMENTS)
        self->announce = ANNOUNCEMENTS;
    self->announce_at = tv_now_ns();
    announce_if_due(self, self->announce_at);
}

static void on_timer(struct tv_net_worker *self)
{
    uint64_t expired, now = tv_now_ns();
    ssize_t got = read(self->timer_fd, &expired, sizeof expired);
    (void)got;
    self->timer_at = 0;
    if (self->dial_at && now >= self->dial_at)
        look_for_peer(self);
    else if (self->dial_at)
        wake_at(self, self->dial_at);
    announce_if_due(self, now);
    if (self->stalled_at)
        transmit_turn(self);
    if (receives(self))
        receive_turn(self);
}

static void on_ready(struct tv_worker *worker, uint32_t at)
{
    struct tv_net_worker *self = (struct tv_net_worker *)worker;
    if (!self->begun)
        begin(self);
    if (at == self->receive) {
        receive_turn(self);
    } else if (at == self->transmit) {
        transmit_turn(self);
    } else if (at < worker->queue_count) {
        tv_worker_serve(worker, at);
    } else if (at == TV_WORKER_QUEUES + READ && receives(self)) {
        receive_turn(self);
    } else if (at == TV_WORKER_QUEUES + ROOM) {
        watch(self, ROOM, 0);
        flush(self);
        transmit_turn(self);
    } else if (at == TV_WORKER_QUEUES + LISTEN) {
        if (tv_net_accept(self->link))
            met(self);
    } else if (at == TV_WORKER_QUEUES + TIMER) {
        on_timer(self);
    }
    if (self->link->hung_up)
        alone(self);
}
