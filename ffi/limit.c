#include "limit.h"

#define NS_IN_MS 1000000ull

/* `size` or `refill_ms` 0: no limit. Starts full. */
void tv_bucket_init(struct tv_bucket *bucket, uint64_t size, uint64_t burst, uint64_t refill_ms, uint64_t now_ns)
{
    if (size > INT64_MAX)
        size = INT64_MAX;
    *bucket = (struct tv_bucket){refill_ms ? size : 0, 0, burst, (int64_t)size, now_ns};
    if (__builtin_mul_overflow(refill_ms, NS_IN_MS, &bucket->refill_ns))
        bucket->refill_ns = UINT64_MAX;
}

/* What was earned since; the time of a token that is not whole yet stays to be earned with. */
static void refill(struct tv_bucket *bucket, uint64_t now_ns)
{
    if (now_ns <= bucket->at_ns)
        return;
    unsigned __int128 passed = now_ns - bucket->at_ns;
    unsigned __int128 earned = passed * bucket->size / bucket->refill_ns;
    __int128 room = (__int128)bucket->size - bucket->tokens;
    if ((__int128)earned >= room) {
        bucket->tokens = (int64_t)bucket->size;
        bucket->at_ns = now_ns;
        return;
    }
    bucket->tokens += (int64_t)earned;
    bucket->at_ns += (uint64_t)(earned * bucket->refill_ns / bucket->size);
}

/* How long until `tokens` can be taken; 0: now. */
static uint64_t wait_ns(struct tv_bucket *bucket, uint64_t tokens, uint64_t now_ns)
{
    if (!bucket->size)
        return 0;
    refill(bucket, now_ns);
    if (tokens <= bucket->burst)
        return 0;
    tokens -= bucket->burst;
    uint64_t needed = tokens < bucket->size ? tokens : bucket->size;
    if (bucket->tokens >= 0 && (uint64_t)bucket->tokens >= needed)
        return 0;
    unsigned __int128 missing = (unsigned __int128)((__int128)needed - bucket->tokens);
    unsigned __int128 wait = (missing * bucket->refill_ns + bucket->size - 1) / bucket->size;
    return wait > INT64_MAX ? INT64_MAX : (uint64_t)wait;
}

static void spend(struct tv_bucket *bucket, uint64_t tokens)
{
    if (!bucket->size)
        return;
    uint64_t burst = tokens < bucket->burst ? tokens : bucket->burst;
    bucket->burst -= burst;
    tokens -= burst;
    if (__builtin_sub_overflow(bucket->tokens, (int64_t)(tokens > INT64_MAX ? INT64_MAX : tokens), &bucket->tokens))
        bucket->tokens = INT64_MIN;
}

/* 0: they were taken. Otherwise none was, and they can be after so many nanoseconds. */
uint64_t tv_bucket_take(struct tv_bucket *bucket, uint64_t tokens, uint64_t now_ns)
{
    uint64_t wait = wait_ns(bucket, tokens, now_ns);
    if (!wait)
        spend(bucket, tokens);
    return wait;
}

/* Of buckets that are set. */
void tv_limiter_init(struct tv_limiter *limiter)
{
    pthread_mutex_init(&limiter->lock, NULL);
    limiter->refused = 0;
}

/* Both or none; as tv_bucket_take. */
uint64_t tv_limiter_take(struct tv_limiter *limiter, uint64_t bytes, uint64_t ops, uint64_t now_ns)
{
    pthread_mutex_lock(&limiter->lock);
    uint64_t wait = wait_ns(&limiter->bytes, bytes, now_ns), other = wait_ns(&limiter->ops, ops, now_ns);
    if (other > wait)
        wait = other;
    if (wait) {
        limiter->refused++;
    } else {
        spend(&limiter->bytes, bytes);
        spend(&limiter->ops, ops);
    }
    pthread_mutex_unlock(&limiter->lock);
    return wait;
}

uint64_t tv_limiter_refused(struct tv_limiter *limiter)
{
    pthread_mutex_lock(&limiter->lock);
    uint64_t refused = limiter->refused;
    pthread_mutex_unlock(&limiter->lock);
    return refused;
}
