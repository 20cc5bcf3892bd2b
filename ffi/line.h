/* A console line: the two byte rings between a device and the one task that ties it to a sink. The serial port
 * (uart.c) and the virtio console (console.c) each have one as their first member.
 *
 * Invariants
 *  - All fields, and those of the device around it, are read and written under `lock`, which nobody holds across
 *    anything that blocks or touches guest memory: a few register steps and byte copies.
 *  - Event descriptors are nonblocking and are signalled after the unlock; -1 is none. They are the caller's, and open
 *    until tv_line_close.
 *  - What the guest transmitted stays in `tx` until the one consumer says that its sink has it (tv_line_consume_tx).
 *    What was typed stays in `rx` until the guest takes it; a full `rx` is back-pressure on whoever types.
 *  - `frozen`: what is in `tx` belongs to a saved state, and the consumer gets nothing.
 *  - The object outlives every thread that may call anything here: vCPUs, queue workers, the consumer.
 */
#ifndef TV_LINE_H
#define TV_LINE_H
#include <pthread.h>
#include <stdint.h>

#include "bytes.h"

#define TV_LINE_TX_SIZE 65536u
#define TV_LINE_RX_SIZE 4096u

/* Whom a step wakes: the consumer (there is output, or room for input that found none), or the guest's side (there is
 * input, or room for output). */
#define TV_LINE_READY 1u
#define TV_LINE_INPUT 2u
#define TV_LINE_ROOM 4u

struct tv_line;
/* The device's part in a step of the consumer, under the lock; gives whom to wake. */
typedef unsigned (*tv_line_fn)(struct tv_line *line);

struct tv_line {
    pthread_mutex_t lock;
    int ready_fd, input_fd, room_fd;
    uint32_t tx_low; /* a `tx` that was full tells of its room when no more than this is left in it */
    tv_line_fn on_input, on_room;
    uint8_t tx_was_full, rx_was_full; /* somebody may wait for room */
    uint8_t frozen;
    struct tv_bytes tx, rx;
    uint8_t tx_bytes[TV_LINE_TX_SIZE];
    uint8_t rx_bytes[TV_LINE_RX_SIZE];
};

/* The rings, as a saved state has them: oldest byte first. */
struct tv_line_state {
    uint32_t tx_len;
    uint32_t rx_len;
    uint8_t tx[TV_LINE_TX_SIZE];
    uint8_t rx[TV_LINE_RX_SIZE];
};

/* The device's calls. */
void tv_line_init(struct tv_line *line, uint32_t tx_low, tv_line_fn on_input, tv_line_fn on_room);
void tv_line_destroy(struct tv_line *line);
void tv_line_lock(struct tv_line *line);
void tv_line_unlock(struct tv_line *line, unsigned wake);
unsigned tv_line_drop_rx(struct tv_line *line, uint32_t len);
void tv_line_save(struct tv_line *line, struct tv_line_state *state, uint32_t in_flight);
int tv_line_fits(const struct tv_line_state *state);
void tv_line_load(struct tv_line *line, const struct tv_line_state *state);

/* The consumer's. */
void tv_line_close(struct tv_line *line);
uint32_t tv_line_peek_tx(struct tv_line *line, uint8_t *into, uint32_t max);
void tv_line_consume_tx(struct tv_line *line, uint32_t len);
uint32_t tv_line_push_rx(struct tv_line *line, const uint8_t *from, uint32_t len);
uint32_t tv_line_tx_used(struct tv_line *line);
uint32_t tv_line_rx_room(struct tv_line *line);
void tv_line_thaw(struct tv_line *line);

#endif
