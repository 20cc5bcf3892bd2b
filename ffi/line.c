#include "line.h"

#include <errno.h>
#include <unistd.h>

/* --- for the device -------------------------------------------------------------------------------------------- */

/* Empty rings in zeroed memory; the device sets its descriptors. */
void tv_line_init(struct tv_line *line, uint32_t tx_low, tv_line_fn on_input, tv_line_fn on_room)
{
    pthread_mutex_init(&line->lock, NULL);
    line->ready_fd = line->input_fd = line->room_fd = -1;
    line->tx_low = tx_low;
    line->on_input = on_input;
    line->on_room = on_room;
    line->tx = (struct tv_bytes){line->tx_bytes, TV_LINE_TX_SIZE, 0, 0};
    line->rx = (struct tv_bytes){line->rx_bytes, TV_LINE_RX_SIZE, 0, 0};
}

/* After the last thread that may call anything here. */
void tv_line_destroy(struct tv_line *line)
{
    pthread_mutex_destroy(&line->lock);
}

void tv_line_lock(struct tv_line *line)
{
    pthread_mutex_lock(&line->lock);
}

/* Unlock, then signal what the step asked for. A full eventfd counter is as good as a signal. */
void tv_line_unlock(struct tv_line *line, unsigned wake)
{
    const uint64_t one = 1;
    int fds[3] = {wake & TV_LINE_READY ? line->ready_fd : -1, wake & TV_LINE_INPUT ? line->input_fd : -1,
                  wake & TV_LINE_ROOM ? line->room_fd : -1};
    pthread_mutex_unlock(&line->lock);
    for (int i = 0; i < 3; i++) {
        while (fds[i] >= 0 && write(fds[i], &one, sizeof(one)) < 0 && errno == EINTR)
            ;
    }
}

/* Under the lock: the guest has the oldest `len` bytes of input. Gives whom to wake. */
unsigned tv_line_drop_rx(struct tv_line *line, uint32_t len)
{
    tv_bytes_drop(&line->rx, len);
    if (!line->rx_was_full || line->rx.used > TV_LINE_RX_SIZE / 2)
        return 0;
    line->rx_was_full = 0;
    return TV_LINE_READY;
}

/* Under the lock: copy the rings, less the first `in_flight` transmitted bytes: those that a thread is giving to the
 * sink right now. What is left belongs to the saved state from here on, so the consumer gets no more of it. */
void tv_line_save(struct tv_line *line, struct tv_line_state *state, uint32_t in_flight)
{
    line->frozen = 1;
    struct tv_bytes left = line->tx;
    tv_bytes_drop(&left, in_flight);
    state->tx_len = tv_bytes_peek(&left, state->tx, TV_LINE_TX_SIZE);
    state->rx_len = tv_bytes_peek(&line->rx, state->rx, TV_LINE_RX_SIZE);
}

/* Whether tv_line_load can take it. */
int tv_line_fits(const struct tv_line_state *state)
{
    return state->tx_len <= TV_LINE_TX_SIZE && state->rx_len <= TV_LINE_RX_SIZE;
}

/* Under the lock, what fits: these are the rings' bytes now. */
void tv_line_load(struct tv_line *line, const struct tv_line_state *state)
{
    line->frozen = line->rx_was_full = 0;
    tv_bytes_drop(&line->tx, line->tx.used);
    tv_bytes_drop(&line->rx, line->rx.used);
    tv_bytes_fill(&line->tx, state->tx, state->tx_len);
    tv_bytes_fill(&line->rx, state->rx, state->rx_len);
    line->tx_was_full = line->tx.used > line->tx_low;
}

/* --- for the consumer ------------------------------------------------------------------------------------------ */

/* The descriptors are about to be closed: none is signalled any more. */
void tv_line_close(struct tv_line *line)
{
    tv_line_lock(line);
    line->ready_fd = line->input_fd = line->room_fd = -1;
    tv_line_unlock(line, 0);
}

/* Copy up to `max` transmitted bytes without taking them; none while frozen. */
uint32_t tv_line_peek_tx(struct tv_line *line, uint8_t *into, uint32_t max)
{
    tv_line_lock(line);
    uint32_t len = line->frozen ? 0 : tv_bytes_peek(&line->tx, into, max);
    tv_line_unlock(line, 0);
    return len;
}

/* The sink has the first `len` of them. */
void tv_line_consume_tx(struct tv_line *line, uint32_t len)
{
    unsigned wake = 0;
    tv_line_lock(line);
    tv_bytes_drop(&line->tx, len);
    if (line->tx_was_full && line->tx.used <= line->tx_low) {
        line->tx_was_full = 0;
        wake = line->on_room(line);
    }
    tv_line_unlock(line, wake);
}

/* Bytes for the guest; gives how many found room. With less than all, `ready_fd` tells of new room later. */
uint32_t tv_line_push_rx(struct tv_line *line, const uint8_t *from, uint32_t len)
{
    tv_line_lock(line);
    uint32_t taken = tv_bytes_fill(&line->rx, from, len);
    if (taken < len)
        line->rx_was_full = 1;
    tv_line_unlock(line, taken ? line->on_input(line) : 0);
    return taken;
}

/* Bytes that the sink has not taken yet. */
uint32_t tv_line_tx_used(struct tv_line *line)
{
    tv_line_lock(line);
    uint32_t used = line->tx.used;
    tv_line_unlock(line, 0);
    return used;
}

/* How many bytes tv_line_push_rx would take now. When that is none, `ready_fd` tells of new room later. */
uint32_t tv_line_rx_room(struct tv_line *line)
{
    tv_line_lock(line);
    uint32_t room = tv_bytes_room(&line->rx);
    if (!room)
        line->rx_was_full = 1;
    tv_line_unlock(line, 0);
    return room;
}

/* A saved state was not used, or one was loaded: the VM runs here, and what is in the rings is its again. */
void tv_line_thaw(struct tv_line *line)
{
    tv_line_lock(line);
    line->frozen = 0;
    tv_line_unlock(line, TV_LINE_READY);
}
