#include "vsock.h"

#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "vsock_table.h"

#define HOST 0 /* which of the worker's own descriptors: the epoll set */
#define TRANSPORT_RESET 0 /* section 5.10.6.7: the id of an event */

static uint32_t bit_of(const struct tv_worker *worker, uint16_t index)
{
    for (uint32_t at = 0; at < worker->queue_count; at++)
        if (worker->queues[at].index == index)
            return 1u << at;
    return 0; /* the driver doesn't use it */
}

static int64_t give_event(struct tv_vsock *vsock, struct tv_queue *queue, struct tv_chain *chain)
{
    uint32_t id = TRANSPORT_RESET;
    if (!vsock->reset_owed)
        return TV_NOT_NOW;
    if (chain->writable_bytes < sizeof id) {
        queue->broken = TV_BROKEN_REQUEST;
        return 0;
    }
    vsock->reset_owed = 0;
    return (int64_t)tv_chain_write(queue->memory, chain, 0, &id, sizeof id);
}

static int64_t serve(struct tv_worker *worker, struct tv_queue *queue, struct tv_chain *chain)
{
    struct tv_vsock *vsock = ((struct tv_vsock_worker *)worker)->vsock;
    switch (queue->index) {
    case TV_VSOCK_RECEIVE:
        return tv_vsock_give_packet(vsock, queue, chain);
    case TV_VSOCK_TRANSMIT:
        return tv_vsock_take_packet(vsock, queue, chain);
    default:
        return give_event(vsock, queue, chain);
    }
}

/* Whoever made something for the guest gives the receive queue a turn; that one, having made room among the replies,
 * gives the transmit queue one. */
static void on_ready(struct tv_worker *worker, uint32_t at)
{
    struct tv_vsock *vsock = ((struct tv_vsock_worker *)worker)->vsock;
    uint32_t receive = bit_of(worker, TV_VSOCK_RECEIVE);
    if (at >= TV_WORKER_QUEUES)
        tv_vsock_host_turn(vsock, worker, at);
    else
        tv_worker_serve(worker, at);
    if (1u << at == receive) {
        vsock->news = 0; /* what is left waits for a buffer, or has its next turn already */
        if (vsock->tx_waits && vsock->replies_used < TV_VSOCK_REPLIES) {
            vsock->tx_waits = 0;
            worker->due |= bit_of(worker, TV_VSOCK_TRANSMIT);
        }
    } else if (vsock->news) {
        vsock->news = 0;
        worker->due |= receive;
    }
}

/* Connections at once: a descriptor each, of which the guest has half at the most, so that the VM has the rest. */
static uint32_t how_many(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) || limit.rlim_cur / 2 > TV_VSOCK_CONNECTIONS)
        return TV_VSOCK_CONNECTIONS;
    return (uint32_t)(limit.rlim_cur / 2);
}

/* A device without connections whose listener is none yet; `path` is that of its socket, for the guest's connections.
 * NULL without memory or descriptors, or when the path is too long. Its patience is set next. */
struct tv_vsock *tv_vsock_new(uint64_t cid, const char *path)
{
    struct tv_vsock *vsock = calloc(1, sizeof *vsock);
    if (!vsock)
        return NULL;
    vsock->cid = cid;
    vsock->listener = -1;
    vsock->address.sun_family = AF_UNIX;
    vsock->path_length = (uint32_t)strlen(path);
    vsock->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    vsock->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    tv_vsock_table_init(vsock, how_many());
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = &vsock->timer_fd};
    if (vsock->path_length + TV_VSOCK_SUFFIX >= sizeof vsock->address.sun_path || vsock->epoll_fd < 0 ||
        vsock->timer_fd < 0 || epoll_ctl(vsock->epoll_fd, EPOLL_CTL_ADD, vsock->timer_fd, &event)) {
        tv_vsock_free(vsock);
        return NULL;
    }
    memcpy(vsock->address.sun_path, path, vsock->path_length);
    return vsock;
}

/* After the last worker. */
void tv_vsock_free(struct tv_vsock *vsock)
{
    if (!vsock)
        return;
    tv_vsock_reset(vsock);
    if (vsock->epoll_fd >= 0)
        close(vsock->epoll_fd);
    if (vsock->timer_fd >= 0)
        close(vsock->timer_fd);
    free(vsock);
}

void tv_vsock_worker_init(struct tv_vsock_worker *worker, struct tv_vsock *vsock)
{
    worker->vsock = vsock;
    worker->worker.serve = serve;
    worker->worker.on_ready = on_ready;
    tv_worker_watch(&worker->worker, HOST, vsock->epoll_fd, POLLIN);
}

/* How long a connection may be half made (a client's line, the guest's answer), and half closed. */
void tv_vsock_set_patience(struct tv_vsock *vsock, uint64_t greeting_ns, uint64_t linger_ns)
{
    vsock->greeting_ns = greeting_ns;
    vsock->linger_ns = linger_ns;
}

/* Take clients from this listening, nonblocking socket, which stays the caller's; -1: from none any more, which is said
 * before it is closed. 0, or -1 when it can't be watched. No worker runs. */
int tv_vsock_listen(struct tv_vsock *vsock, int fd)
{
    if (vsock->listener >= 0)
        epoll_ctl(vsock->epoll_fd, EPOLL_CTL_DEL, vsock->listener, NULL);
    vsock->listener = fd;
    vsock->listening = vsock->pausing = 0;
    if (fd < 0)
        return 0;
    struct epoll_event event = {.events = 0, .data.ptr = &vsock->listener};
    if (epoll_ctl(vsock->epoll_fd, EPOLL_CTL_ADD, fd, &event)) {
        vsock->listener = -1;
        return -1;
    }
    tv_vsock_watch_listener(vsock);
    return 0;
}

/* The driver is gone, and every connection with it: the host's peers see their end. No worker runs. */
void tv_vsock_reset(struct tv_vsock *vsock)
{
    for (uint32_t i = 0; i < TV_VSOCK_CONNECTIONS; i++)
        if (vsock->conns[i].stage != TV_VSOCK_FREE)
            tv_vsock_release(vsock, &vsock->conns[i]);
    vsock->replies_first = vsock->replies_used = 0;
    vsock->news = vsock->tx_waits = vsock->reset_owed = 0;
}

/* The driver was another device's until now, with connections that do not exist here: it is told when it next has a
 * buffer for that. No worker runs. */
void tv_vsock_moved(struct tv_vsock *vsock)
{
    tv_vsock_reset(vsock);
    vsock->reset_owed = 1;
}

const struct tv_vsock_counts *tv_vsock_counts(const struct tv_vsock *vsock)
{
    return &vsock->counts;
}
