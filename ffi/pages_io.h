/* What the files of pages.h share: bytes of a frame, the clock, and waits for a socket that a kick ends.
 *
 * Every wait is one poll() of at most POLL_SLICE_MS over the socket and the eventfds that end it, repeated until a
 * deadline: no wait rests on one wake-up alone. A kick is level-triggered and never read here, so it is never lost.
 */
#ifndef TV_PAGES_IO_H
#define TV_PAGES_IO_H
#include <stdint.h>
#include <string.h>
#include <time.h>

#include "pages.h"

static inline void tv_put32(uint8_t *at, uint32_t value)
{
    memcpy(at, &value, 4); /* x86: little-endian */
}

static inline uint32_t tv_get32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, 4);
    return value;
}

static inline uint64_t tv_now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

int tv_wait_ready(int fd, short events, int kick_fd, int other_fd, uint64_t until_ms, int *error);
int tv_kicked(int kick_fd);

#endif
