#define _GNU_SOURCE
#include "pages_io.h"

#include <errno.h>
#include <poll.h>

#define POLL_SLICE_MS 1000

/* Wait until `fd` is ready for `events`. Gives a reason: DONE (ready), KICKED (also by `other_fd`), STALLED or ERRNO
 * (*error). `kick_fd`, `other_fd` < 0: that one is not looked at. */
int tv_wait_ready(int fd, short events, int kick_fd, int other_fd, uint64_t until_ms, int *error)
{
    for (;;) {
        uint64_t now = tv_now_ms();
        if (now >= until_ms)
            return TV_PAGES_STALLED;
        uint64_t left = until_ms - now;
        struct pollfd polled[3] = {
            {.fd = fd, .events = events}, {.fd = kick_fd, .events = POLLIN}, {.fd = other_fd, .events = POLLIN}};
        int ready = poll(polled, 3, left < POLL_SLICE_MS ? (int)left : POLL_SLICE_MS);
        if (ready < 0) {
            if (errno == EINTR)
                continue;
            *error = errno;
            return TV_PAGES_ERRNO;
        }
        if (polled[1].revents || polled[2].revents)
            return TV_PAGES_KICKED;
        if (polled[0].revents)
            return TV_PAGES_DONE;
    }
}

/* Whether a kick stands. */
int tv_kicked(int kick_fd)
{
    struct pollfd polled = {.fd = kick_fd, .events = POLLIN};
    return poll(&polled, 1, 0) > 0;
}
