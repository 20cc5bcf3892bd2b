#include "block.h"

#include <errno.h>

/* The worker is the only writer, so a plain sum is right and only the store must be whole. */

static uint64_t load(const uint64_t *at)
{
    return __atomic_load_n(at, __ATOMIC_RELAXED);
}

static void store(uint64_t *at, uint64_t value)
{
    __atomic_store_n(at, value, __ATOMIC_RELAXED);
}

void tv_block_add(uint64_t *count, uint64_t more)
{
    store(count, *count + more);
}

void tv_block_count_flow(struct tv_flow *flow, uint64_t bytes, uint64_t since_ns)
{
    uint64_t took = tv_now_ns() - since_ns;
    if (took < flow->least_ns)
        store(&flow->least_ns, took);
    if (took > flow->most_ns)
        store(&flow->most_ns, took);
    tv_block_add(&flow->total_ns, took);
    tv_block_add(&flow->bytes, bytes);
    tv_block_add(&flow->ops, 1);
}

static void read_flow(const struct tv_flow *flow, struct tv_flow *into)
{
    into->ops = load(&flow->ops);
    into->bytes = load(&flow->bytes);
    into->total_ns = load(&flow->total_ns);
    into->least_ns = load(&flow->least_ns);
    into->most_ns = load(&flow->most_ns);
}

/* From any thread, while the worker runs or after it. A request that ends meanwhile may be in some fields only. */
void tv_block_count(const struct tv_block *block, struct tv_block_counts *into)
{
    const struct tv_block_counts *counts = &block->counts;
    read_flow(&counts->read, &into->read);
    read_flow(&counts->write, &into->write);
    into->flush_ops = load(&counts->flush_ops);
    into->discard_ops = load(&counts->discard_ops);
    into->write_zeroes_ops = load(&counts->write_zeroes_ops);
    into->errors = load(&counts->errors);
    into->io_errors = load(&counts->io_errors);
    into->limited = load(&counts->limited);
}

/* The image said errno: an I/O error to the driver, and news for Python unless it had this kind of it a moment ago.
 * Gives the status. */
int tv_block_fail(struct tv_block *block, enum tv_block_op op)
{
    int error = errno;
    uint64_t now = tv_now_ns();
    tv_block_add(&block->counts.io_errors, 1);
    struct tv_block_fault *fault = block->faults, *end = block->faults + block->fault_count;
    while (fault < end && (fault->op != op || fault->error != error))
        fault++;
    if (fault == end && block->fault_count == TV_BLOCK_FAULTS)
        return TV_BLOCK_IOERR;
    if (fault == end || now - fault->at_ns > TV_BLOCK_FAULT_NS) {
        block->fault_count += fault == end;
        *fault = (struct tv_block_fault){op, error, now, 1};
        block->worker.news = 1;
    }
    return TV_BLOCK_IOERR;
}

/* While the worker does not run: 1 with a fault that was not fetched yet, or 0. */
int tv_block_next_fault(struct tv_block *block, struct tv_block_fault *into)
{
    for (uint32_t i = 0; i < block->fault_count; i++) {
        if (!block->faults[i].fresh)
            continue;
        *into = block->faults[i];
        block->faults[i].fresh = 0;
        return 1;
    }
    return 0;
}
