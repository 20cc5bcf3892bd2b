/* A ring of bytes, for those that keep one under a lock of their own: `used` never exceeds `size`, and bytes leave in
 * the order in which they came. */
#ifndef TV_BYTES_H
#define TV_BYTES_H
#include <stdint.h>
#include <string.h>

struct tv_bytes {
    uint8_t *bytes;
    uint32_t size; /* a power of two */
    uint32_t head; /* free running; the next byte to leave is bytes[head & (size - 1)] */
    uint32_t used;
};

static inline uint32_t tv_bytes_room(const struct tv_bytes *ring)
{
    return ring->size - ring->used;
}

/* Put what finds room; gives how many bytes did. */
static inline uint32_t tv_bytes_fill(struct tv_bytes *ring, const uint8_t *from, uint32_t len)
{
    if (len > tv_bytes_room(ring))
        len = tv_bytes_room(ring);
    uint32_t at = (ring->head + ring->used) & (ring->size - 1);
    uint32_t first = ring->size - at < len ? ring->size - at : len;
    memcpy(ring->bytes + at, from, first);
    memcpy(ring->bytes, from + first, len - first);
    ring->used += len;
    return len;
}

/* Copy the oldest bytes without taking them; gives how many. */
static inline uint32_t tv_bytes_peek(const struct tv_bytes *ring, uint8_t *into, uint32_t max)
{
    uint32_t len = ring->used < max ? ring->used : max;
    uint32_t at = ring->head & (ring->size - 1);
    uint32_t first = ring->size - at < len ? ring->size - at : len;
    memcpy(into, ring->bytes + at, first);
    memcpy(into + first, ring->bytes, len - first);
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
