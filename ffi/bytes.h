/* A ring of bytes, for those that keep one under a lock of their own: `used` never exceeds `size`, and bytes leave in
 * the order in which they came. */
#ifndef TV_BYTES_H
#define TV_BYTES_H
#include <stdint.h>

struct tv_bytes {
    uint8_t *bytes;
    uint32_t size; /* a power of two */
    uint32_t head; /* free running; the next byte to leave is bytes[head & (size - 1)] */
    uint32_t used;
};

/* -1: no room. */
static inline int tv_bytes_put(struct tv_bytes *ring, uint8_t byte)
{
    if (ring->used == ring->size)
        return -1;
    ring->bytes[(ring->head + ring->used++) & (ring->size - 1)] = byte;
    return 0;
}

/* Put what finds room; gives how many bytes did. */
static inline uint32_t tv_bytes_fill(struct tv_bytes *ring, const uint8_t *from, uint32_t len)
{
    uint32_t taken = 0;
    while (taken < len && !tv_bytes_put(ring, from[taken]))
        taken++;
    return taken;
}

/* Copy the oldest bytes without taking them; gives how many. */
static inline uint32_t tv_bytes_peek(const struct tv_bytes *ring, uint8_t *into, uint32_t max)
{
    uint32_t len = ring->used < max ? ring->used : max;
    for (uint32_t i = 0; i < len; i++)
        into[i] = ring->bytes[(ring->head + i) & (ring->size - 1)];
    return len;
}

static inline void tv_bytes_drop(struct tv_bytes *ring, uint32_t len)
{
    if (len > ring->used)
        len = ring->used;
    ring->head += len;
    ring->used -= len;
}

#endif
