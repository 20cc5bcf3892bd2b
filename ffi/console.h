/* virtio-console (virtio 1.2 section 5.3), one port: two byte rings between its queue worker and one task.
 *
 * Invariants of struct tv_console
 *  - All fields are read and written under `lock`, which nobody holds across anything that blocks or touches guest
 *    memory. Event descriptors are nonblocking and signalled after the unlock; -1 is none.
 *  - Transmitted bytes stay in the ring until the one consumer says that its sink has them. A full ring leaves the
 *    chain available: the driver waits, nothing is dropped. `tx_taken` counts what the ring has of that chain.
 *  - Input stays in its ring until the driver offers a buffer; the ring's end is back-pressure on whoever types.
 *  - The object outlives its worker: it is Python's, which keeps it as long as a worker's task lives.
 */
#ifndef TV_CONSOLE_H
#define TV_CONSOLE_H
#include <stdint.h>

#include "worker.h"

#define TV_CONSOLE_TX_SIZE 65536u
#define TV_CONSOLE_RX_SIZE 4096u

struct tv_console_state {
    uint32_t tx_taken;
    uint32_t tx_len;
    uint32_t rx_len;
    uint8_t tx[65536];
    uint8_t rx[4096];
};

struct tv_console;

/* One thread serves both queues. */
struct tv_console_worker {
    struct tv_worker worker;
    struct tv_console *console;
    uint64_t received, transmitted; /* bytes */
};

struct tv_console *tv_console_new(int ready_fd);
void tv_console_free(struct tv_console *console);
void tv_console_close(struct tv_console *console);
void tv_console_set_bells(struct tv_console *console, int receive_fd, int transmit_fd);
void tv_console_worker_init(struct tv_console_worker *worker, struct tv_console *console);
uint32_t tv_console_peek_tx(struct tv_console *console, uint8_t *into, uint32_t max);
void tv_console_consume_tx(struct tv_console *console, uint32_t len);
uint32_t tv_console_push_rx(struct tv_console *console, const uint8_t *from, uint32_t len);
uint32_t tv_console_tx_used(struct tv_console *console);
uint32_t tv_console_rx_room(struct tv_console *console);
void tv_console_reset(struct tv_console *console);
void tv_console_save(struct tv_console *console, struct tv_console_state *state, uint32_t in_flight);
void tv_console_thaw(struct tv_console *console);
int tv_console_load(struct tv_console *console, const struct tv_console_state *state);

#endif
