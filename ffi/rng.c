#include "rng.h"

#include <errno.h>
#include <poll.h>
#include <unistd.h>

#define CHUNK 4096            /* one read: so that a stop is seen between them */
#define REQUEST_MAX (1u << 16) /* of one buffer: a driver asks again, and no request holds the queue for long */
#define POLL_SLICE_MS 1000

/* Wait for entropy or a kick. 0 go on, TV_STOPPED. */
static int wait_source(struct tv_rng *rng)
{
    struct pollfd wait[2] = {{.fd = rng->source_fd, .events = POLLIN},
                             {.fd = rng->worker.kick_fd, .events = POLLIN}};
    if (tv_worker_stopping(&rng->worker))
        return TV_STOPPED;
    poll(wait, 2, POLL_SLICE_MS);
    return tv_worker_stopping(&rng->worker) ? TV_STOPPED : 0;
}

static int64_t serve(struct tv_worker *worker, struct tv_chain *chain)
{
    struct tv_rng *rng = (struct tv_rng *)worker;
    uint8_t buffer[CHUNK];
    uint64_t wanted = chain->writable_bytes < REQUEST_MAX ? chain->writable_bytes : REQUEST_MAX;
    uint64_t done = 0;
    while (done < wanted) {
        uint64_t part = wanted - done < CHUNK ? wanted - done : CHUNK;
        ssize_t got = read(rng->source_fd, buffer, part);
        if (got > 0) {
            tv_chain_write(worker->queue.memory, chain, done, buffer, (uint64_t)got);
            done += (uint64_t)got;
            continue;
        }
        if (done)
            break; /* section 5.4.6: less than asked for is an answer, nothing is not */
        if (got < 0 && errno == EINTR)
            continue;
        if (got == 0 || (errno != EAGAIN && errno != EWOULDBLOCK)) {
            rng->errors++; /* a source at its end: the driver gets an empty answer, the VM goes on */
            break;
        }
        if (wait_source(rng) == TV_STOPPED)
            return TV_STOPPED;
    }
    rng->bytes += done;
    return (int64_t)done;
}

void tv_rng_init(struct tv_rng *rng)
{
    rng->worker.serve = serve;
}
