/* virtio-console (virtio 1.2 section 5.3), one port: a tv_line whose guest side is a worker of two queues.
 *
 * Invariants of struct tv_console, beside the line's
 *  - A full ring leaves the chain available: the driver waits, nothing is dropped. `tx_taken` counts what the ring has
 *    of that chain.
 *  - Input stays in its ring until the driver offers a buffer.
 *  - `input_fd` and `room_fd` are the queues' doorbells while their worker runs.
 *  - The object is Python's, which keeps it as long as a worker's task lives.
 */
#ifndef TV_CONSOLE_H
#define TV_CONSOLE_H
#include <stdint.h>

#include "line.h"
#include "worker.h"

struct tv_console_state {
    uint32_t tx_taken;
    struct tv_line_state line;
};

struct tv_console;

struct tv_console_worker {
    struct tv_worker worker;
    struct tv_console *console;
    uint64_t received, transmitted; /* bytes */
};

struct tv_console *tv_console_new(int ready_fd);
void tv_console_free(struct tv_console *console);
struct tv_line *tv_console_line(struct tv_console *console);
void tv_console_set_bells(struct tv_console *console, int receive_fd, int transmit_fd);
void tv_console_worker_init(struct tv_console_worker *worker, struct tv_console *console);
void tv_console_reset(struct tv_console *console);
void tv_console_save(struct tv_console *console, struct tv_console_state *state, uint32_t in_flight);
int tv_console_load(struct tv_console *console, const struct tv_console_state *state);

#endif
