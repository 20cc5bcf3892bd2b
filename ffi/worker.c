#define _GNU_SOURCE
#include "worker.h"

#include <errno.h>
#include <unistd.h>

#include "park.h"

#define POLL_SLICE_MS 1000     /* a lost kick costs at most this */
#define TV_TURN_CHAINS 256     /* of one descriptor, before the next one's turn */
#define TV_TURN_NS 1000000u    /* the same in time, looked at between two chains */
#define TV_BATCH_NS 50000u     /* so long a served chain waits for others, and for as long as the last ones take */
#define TV_STRIDE 16           /* quick chains between two looks at the clock, which costs more than some of them */
#define TV_QUICK_NS 10000u     /* they are, when so many took no longer */

/* Before the run: a queue, of which this takes a copy, and its doorbell. Gives its number here, which is its
 * doorbell's; -1 when its rings make no sense (tv_queue_open) or there are too many. */
int tv_worker_add(struct tv_worker *worker, const struct tv_queue *queue, int doorbell_fd)
{
    uint32_t at = worker->queue_count;
    if (at == TV_WORKER_QUEUES)
        return -1;
    worker->queues[at] = *queue;
    if (tv_queue_open(&worker->queues[at]))
        return -1;
    worker->watches[at] = (struct tv_watch){doorbell_fd, POLLIN};
    worker->queue_count++;
    return (int)at;
}

/* From now on, wait for `events` (0: none) of the device's descriptor number `own`. Before the run, or in a turn. */
void tv_worker_watch(struct tv_worker *worker, uint32_t own, int fd, short events)
{
    worker->watches[TV_WORKER_QUEUES + own] = (struct tv_watch){fd, events};
}

/* In a turn: give descriptor `at` another one after so long, whatever happens meanwhile. The earliest counts. */
void tv_worker_later(struct tv_worker *worker, uint32_t at, uint64_t after_ns)
{
    uint64_t now = tv_now_ns(), when = after_ns > UINT64_MAX - now ? UINT64_MAX : now + after_ns;
    if (!worker->later || when < worker->later_ns)
        worker->later_ns = when;
    worker->later |= 1u << at;
}

int tv_worker_stopping(const struct tv_worker *worker)
{
    return __atomic_load_n(&worker->stop, __ATOMIC_SEQ_CST);
}

/* Any thread, any time, before the run and after it too. Idempotent. */
void tv_worker_stop(struct tv_worker *worker)
{
    uint64_t one = 1;
    __atomic_store_n(&worker->stop, 1, __ATOMIC_SEQ_CST);
    ssize_t written = write(worker->kick_fd, &one, sizeof one);
    (void)written;
}

/* In a handler, before it does something slow: no driver waits for it that has been served already. */
void tv_worker_publish(struct tv_worker *worker)
{
    for (uint32_t at = 0; at < worker->queue_count; at++)
        tv_queue_publish(&worker->queues[at]);
}

/* The default turn of a doorbell: serve what its queue holds, as long as a turn may be. Leaves the queue armed and
 * empty, or due, or with a chain that nothing can be done with now, or broken. What was served is published. */
void tv_worker_serve(struct tv_worker *worker, uint32_t at)
{
    struct tv_queue *queue = &worker->queues[at];
    struct tv_chain *chain = &worker->chain;
    uint64_t began = tv_now_ns(), batch = began, looked = began;
    uint32_t stride = 1, unseen = 0; /* chains from one look at the clock to the next, and since the last one */
    for (uint32_t left = TV_TURN_CHAINS; !tv_worker_stopping(worker); left--) {
        if (!left || looked - began > TV_TURN_NS) {
            worker->due |= 1u << at;
            break;
        }
        int got = tv_queue_pop(queue, chain);
        if (got < 0)
            break;
        if (!got) {
            tv_queue_publish(queue); /* first: the driver may have nothing more before it hears of these */
            if (!tv_queue_rearm(queue))
                return;
            stride = 1;
            continue;
        }
        tv_queue_disarm(queue);
        int64_t length = worker->serve(worker, queue, chain);
        if (length < 0 && length != TV_TAKEN) {
            tv_queue_rewind(queue, 1); /* not armed: the driver has nothing to tell that others won't */
            if (length == TV_AGAIN)
                worker->due |= 1u << at;
            break;
        }
        if (length != TV_TAKEN)
            tv_queue_push(queue, chain->head, (uint32_t)length);
        if (queue->broken)
            break;
        if (++unseen < stride)
            continue;
        uint64_t now = tv_now_ns();
        stride = now - looked > TV_QUICK_NS ? 1 : stride < TV_STRIDE ? 2 * stride : TV_STRIDE;
        unseen = 0;
        looked = now;
        if (now - batch > TV_BATCH_NS) {
            tv_queue_publish(queue);
            batch = now;
        }
    }
    tv_queue_publish(queue);
}

static void turn(struct tv_worker *worker, uint32_t at)
{
    if (worker->on_ready)
        worker->on_ready(worker, at);
    else if (at < worker->queue_count)
        tv_worker_serve(worker, at);
}

static int wait_slice(const struct tv_worker *worker, struct pollfd *wait, nfds_t count)
{
    uint64_t limit = worker->due ? 0 : POLL_SLICE_MS * 1000000ull;
    if (worker->later && limit) {
        uint64_t now = tv_now_ns(), left = worker->later_ns > now ? worker->later_ns - now : 0;
        limit = left < limit ? left : limit;
    }
    struct timespec timeout = {(time_t)(limit / 1000000000u), (long)(limit % 1000000000u)};
    return ppoll(wait, count, &timeout, NULL);
}

/* Sleep until a descriptor is ready, or its time has come, or not at all while one is due; ready ones become due. */
static void wait_ready(struct tv_worker *worker)
{
    struct pollfd wait[TV_WORKER_WATCHES + 1] = {{.fd = worker->kick_fd, .events = POLLIN}};
    uint32_t which[TV_WORKER_WATCHES + 1];
    nfds_t count = 1;
    for (uint32_t at = 0; at < TV_WORKER_WATCHES; at++) {
        struct tv_watch *watch = &worker->watches[at];
        if (!watch->events)
            continue;
        which[count] = at;
        wait[count++] = (struct pollfd){.fd = watch->fd, .events = watch->events};
    }
    int ready = wait_slice(worker, wait, count);
    if (worker->later && tv_now_ns() >= worker->later_ns) {
        worker->due |= worker->later;
        worker->later = 0;
    }
    if (ready <= 0)
        return;
    for (nfds_t i = 1; i < count; i++) {
        if (!wait[i].revents)
            continue;
        worker->due |= 1u << which[i];
        worker->wakeups++;
        if (which[i] < TV_WORKER_QUEUES)
            tv_eventfd_drain(wait[i].fd);
    }
}

/* Queues that broke since the last call: their doorbells count no more. */
static int newly_broken(struct tv_worker *worker)
{
    uint32_t told = worker->told;
    for (uint32_t at = 0; at < worker->queue_count; at++) {
        if (!worker->queues[at].broken)
            continue;
        worker->told |= 1u << at;
        worker->watches[at].events = 0;
    }
    return worker->told != told;
}

static int run(struct tv_worker *worker)
{
    for (uint32_t at = 0; at < worker->queue_count; at++)
        worker->due |= 1u << at;
    for (;;) {
        uint32_t due = worker->due;
        worker->due = 0; /* a turn that left something over says so again */
        for (uint32_t at = 0; at < TV_WORKER_WATCHES; at++) {
            if (tv_worker_stopping(worker))
                return 0;
            if (due & 1u << at)
                turn(worker, at);
        }
        if (newly_broken(worker) || worker->news)
            return 1;
        wait_ready(worker);
    }
}

/* The life of a worker thread. Every queue is looked at once, notified or not; then it is as the head of worker.h
 * says. Returns 0 when asked to stop, 1 when queues broke (each is told once) or a handler has news: call again, the
 * others go on. Called without the GIL; every sleep ends by a kick or in POLL_SLICE_MS. A request that was taken is
 * finished and published, or given back, before this returns. */
int tv_worker_run(struct tv_worker *worker)
{
    int more = run(worker);
    if (worker->on_leave)
        worker->on_leave(worker);
    worker->news = 0;
    return more;
}
