/* The thread that serves virtqueues: some queues of one device, and the descriptors that say when there is work.
 *
 * It sleeps until descriptors are ready and gives each of these one *turn* in every round: on_ready(worker, at). The
 * first TV_WORKER_QUEUES descriptors are the doorbells of the queues, the rest the device's own (a tap, a socket, a
 * source of entropy). The default turn, tv_worker_serve, takes chains from the doorbell's queue and hands them to
 * `serve`.
 *
 * Invariants
 *  - A turn is bounded, in chains and, between two chains, in time (TV_TURN_*): no queue starves another, nor the stop
 *    word. What a turn leaves over gets the next one, in the next round.
 *  - What is served is published in batches (TV_BATCH_NS), and at the latest when the turn ends; a handler that is
 *    about to do something slow publishes first (tv_worker_publish). While it works, the driver is asked not to notify.
 *  - A handler that may take long looks at the stop word between pieces of bounded size, and gives its chain back.
 *  - All fields belong to the worker's thread while it runs, to Python otherwise; but `stop`, which any thread sets,
 *    and counters, which any may read.
 *  - A broken queue is left alone, and the others go on.
 */
#ifndef TV_WORKER_H
#define TV_WORKER_H
#include <poll.h>
#include <stdint.h>
#include <time.h>

#include "ring.h"

#define TV_WORKER_QUEUES 8 /* more than any device here wants in one thread: vsock has three */
#define TV_WORKER_OWN 8    /* descriptors besides doorbells */
#define TV_WORKER_WATCHES (TV_WORKER_QUEUES + TV_WORKER_OWN)

#define TV_STOPPED (-1) /* a handler's answer: asked to stop, the chain goes back */
#define TV_NOT_NOW (-2) /* the chain goes back and stays available; whoever ends the reason makes a descriptor ready */
#define TV_AGAIN (-3)   /* the chain goes back, and its queue has another turn: so much of it is enough for one */
#define TV_TAKEN (-4)   /* the chain is the handler's own until it pushes it, in any order with others */

struct tv_worker;
/* Serve one chain; gives the used length, or why it goes back. May set queue->broken. */
typedef int64_t (*tv_serve_fn)(struct tv_worker *worker, struct tv_queue *queue, struct tv_chain *chain);
/* Give descriptor `at` its turn. A doorbell has been emptied; the device's own is as poll found it. */
typedef void (*tv_ready_fn)(struct tv_worker *worker, uint32_t at);
/* The thread leaves the worker, perhaps for a moment and to come back as another one: push what was taken. */
typedef void (*tv_leave_fn)(struct tv_worker *worker);

struct tv_watch {
    int fd;
    short events; /* of poll; 0: not watched */
};

struct tv_worker {
    struct tv_queue queues[TV_WORKER_QUEUES];
    uint32_t queue_count;
    struct tv_watch watches[TV_WORKER_WATCHES];
    tv_serve_fn serve;
    tv_ready_fn on_ready; /* NULL: the default turn */
    tv_leave_fn on_leave; /* NULL: nothing to do */
    int kick_fd;
    uint32_t stop; /* atomic: set, then kick_fd is written */
    uint32_t due;  /* bits: descriptors that get a turn without being ready */
    uint32_t told; /* bits: queues whose end was reported */
    uint32_t news; /* a handler has something to tell to Python */
    uint32_t later;   /* bits: descriptors that get a turn at `later_ns` */
    uint64_t later_ns;
    uint64_t wakeups;
    struct tv_chain chain; /* of the turn that is under way */
    uint64_t taken_ns;     /* for a device that measures its requests: when it began with the last one */
};

static inline uint64_t tv_now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int tv_worker_add(struct tv_worker *worker, const struct tv_queue *queue, int doorbell_fd);
void tv_worker_watch(struct tv_worker *worker, uint32_t own, int fd, short events);
int tv_worker_run(struct tv_worker *worker);
void tv_worker_serve(struct tv_worker *worker, uint32_t at);
void tv_worker_later(struct tv_worker *worker, uint32_t at, uint64_t after_ns);
void tv_worker_publish(struct tv_worker *worker);
void tv_worker_stop(struct tv_worker *worker);
int tv_worker_stopping(const struct tv_worker *worker);

#endif
