#include "rng.h"

#include <errno.h>
#include <poll.h>
#include <unistd.h>

#define CHUNK 4096             /* one read */
#define REQUEST_MAX (1u << 16) /* of one buffer: a driver asks again, and no request holds the queue for long */
#define SOURCE 0               /* which of the worker's own descriptors: watched while a chain waits for entropy */

static int64_t serve(struct tv_worker *worker, struct tv_queue *queue, struct tv_chain *chain)
{
    struct tv_rng *rng = (struct tv_rng *)worker;
    uint8_t buffer[CHUNK];
    uint64_t wanted = chain->writable_bytes < REQUEST_MAX ? chain->writable_bytes : REQUEST_MAX;
    uint64_t done = 0;
    while (done < wanted) {
        uint64_t part = wanted - done < CHUNK ? wanted - done : CHUNK;
        ssize_t got = read(rng->source_fd, buffer, part);
        if (got > 0) {
            tv_chain_write(queue->memory, chain, done, buffer, (uint64_t)got);
            done += (uint64_t)got;
            continue;
        }
        if (done)
            break; /* section 5.4.6: less than asked for is an answer, nothing is not */
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            tv_worker_watch(worker, SOURCE, rng->source_fd, POLLIN);
            return TV_NOT_NOW;
        }
        rng->errors++; /* a source at its end: the driver gets an empty answer, the VM goes on */
        break;
    }
    rng->bytes += done;
    return (int64_t)done;
}

/* A notification, or there is entropy for the chain that waits. */
static void on_ready(struct tv_worker *worker, uint32_t at)
{
    struct tv_rng *rng = (struct tv_rng *)worker;
    tv_worker_watch(worker, SOURCE, rng->source_fd, 0);
    tv_worker_serve(worker, at < TV_WORKER_QUEUES ? at : 0);
}

void tv_rng_init(struct tv_rng *rng)
{
    rng->worker.serve = serve;
    rng->worker.on_ready = on_ready;
}
