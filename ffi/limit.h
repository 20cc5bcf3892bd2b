/* A rate limiter: two token buckets, of bytes and of operations, as Cloud Hypervisor's and Firecracker's. A bucket holds
 * `size` tokens at most and is refilled evenly, as many in `refill_ns`; `burst` more can be spent once, before the others.
 * One that asks for more than `size` waits for a full bucket and leaves a debt: the rate holds over time, and nothing is
 * too large for ever. Shared by threads, under a lock that is held for a few sums. */
#ifndef TV_LIMIT_H
#define TV_LIMIT_H
#include <pthread.h>
#include <stdint.h>

struct tv_bucket {
    uint64_t size; /* 0: no limit */
    uint64_t refill_ns;
    uint64_t burst;
    int64_t tokens; /* less than 0: a debt */
    uint64_t at_ns; /* when `tokens` was right; nothing that was earned is lost by rounding */
};

struct tv_limiter {
    pthread_mutex_t lock;
    struct tv_bucket bytes, ops;
    uint64_t refused;
};

void tv_bucket_init(struct tv_bucket *bucket, uint64_t size, uint64_t burst, uint64_t refill_ms, uint64_t now_ns);
uint64_t tv_bucket_take(struct tv_bucket *bucket, uint64_t tokens, uint64_t now_ns);
void tv_limiter_init(struct tv_limiter *limiter);
uint64_t tv_limiter_take(struct tv_limiter *limiter, uint64_t bytes, uint64_t ops, uint64_t now_ns);
uint64_t tv_limiter_refused(struct tv_limiter *limiter);

#endif
