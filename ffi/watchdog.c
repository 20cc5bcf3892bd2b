#include "watchdog.h"

static void store(uint64_t *at, uint64_t value)
{
    __atomic_store_n(at, value, __ATOMIC_RELEASE); /* the worker is the only writer */
}

static int64_t serve(struct tv_worker *worker, struct tv_queue *queue, struct tv_chain *chain)
{
    struct tv_watchdog *watchdog = (struct tv_watchdog *)worker;
    static const uint8_t alive = 1;
    if (chain->readable || !chain->writable_bytes) {
        store(&watchdog->errors, watchdog->errors + 1);
        return 0;
    }
    tv_chain_write(queue->memory, chain, 0, &alive, 1);
    store(&watchdog->last_ns, worker->taken_ns);
    store(&watchdog->pings, watchdog->pings + 1);
    return 1;
}

void tv_watchdog_init(struct tv_watchdog *watchdog)
{
    watchdog->worker.serve = serve;
}
