#include "console.h"

#include <stdlib.h>

#define CHUNK 4096 /* copied between two looks at the stop flag */
#define RECEIVE 0  /* queue number, virtio 1.2 section 5.3.2; the other one transmits */

struct tv_console {
    struct tv_line line;
    uint32_t tx_taken; /* bytes of the chain that is next on the transmit queue */
};

static unsigned on_input(struct tv_line *line)
{
    return TV_LINE_INPUT;
}

static unsigned on_room(struct tv_line *line)
{
    return TV_LINE_ROOM;
}

/* NULL without memory. */
struct tv_console *tv_console_new(int ready_fd)
{
    struct tv_console *console = calloc(1, sizeof(*console));
    if (!console)
        return NULL;
    tv_line_init(&console->line, TV_LINE_TX_SIZE / 2, on_input, on_room);
    console->line.ready_fd = ready_fd;
    return console;
}

/* After the last thread that may call anything here. */
void tv_console_free(struct tv_console *console)
{
    if (!console)
        return;
    tv_line_destroy(&console->line);
    free(console);
}

struct tv_line *tv_console_line(struct tv_console *console)
{
    return &console->line;
}

/* The doorbells of the queues whose worker is about to run, or -1 when it has ended. */
void tv_console_set_bells(struct tv_console *console, int receive_fd, int transmit_fd)
{
    tv_line_lock(&console->line);
    console->line.input_fd = receive_fd;
    console->line.room_fd = transmit_fd;
    tv_line_unlock(&console->line, 0);
}

/* --- the worker ------------------------------------------------------------------------------------------------ */

/* A buffer of the receive queue takes what input there is. Without any it stays available. */
static int64_t receive(struct tv_console_worker *self, struct tv_queue *queue, struct tv_chain *chain)
{
    struct tv_line *line = &self->console->line;
    uint8_t buffer[CHUNK];
    uint64_t done = 0;
    while (done < chain->writable_bytes && done < TV_LINE_RX_SIZE) { /* a ring's worth: then the other queue */
        uint64_t room = chain->writable_bytes - done;
        tv_line_lock(line);
        uint32_t len = tv_bytes_peek(&line->rx, buffer, room < CHUNK ? (uint32_t)room : CHUNK);
        tv_line_unlock(line, 0);
        if (!len)
            break;
        done += tv_chain_write(queue->memory, chain, done, buffer, len);
        tv_line_lock(line);
        tv_line_unlock(line, tv_line_drop_rx(line, len));
    }
    self->received += done;
    return !done && chain->writable_bytes ? TV_NOT_NOW : (int64_t)done;
}

/* Into the ring, as far as it has room; the rest of the chain waits there for more. */
static int64_t transmit(struct tv_console_worker *self, struct tv_chain *chain)
{
    struct tv_console *console = self->console;
    struct tv_line *line = &console->line;
    uint8_t buffer[CHUNK];
    for (uint32_t moved = 0;;) {
        if (tv_worker_stopping(&self->worker))
            return TV_STOPPED;
        if (moved >= TV_LINE_TX_SIZE)
            return TV_AGAIN; /* a ring's worth, taken as fast as it came: now the other queue */
        tv_line_lock(line);
        uint64_t taken = console->tx_taken;
        uint32_t room = tv_bytes_room(&line->tx);
        int done = taken >= chain->readable_bytes;
        if (done)
            console->tx_taken = 0;
        else if (!room)
            line->tx_was_full = 1;
        tv_line_unlock(line, 0);
        if (done)
            return 0;
        if (!room)
            return TV_NOT_NOW;
        uint64_t got = tv_chain_read(chain, taken, buffer, room < CHUNK ? room : CHUNK);
        tv_line_lock(line);
        unsigned wake = line->tx.used ? 0 : TV_LINE_READY;
        tv_bytes_fill(&line->tx, buffer, (uint32_t)got);
        console->tx_taken += (uint32_t)got;
        moved += (uint32_t)got;
        self->transmitted += got; /* before anybody can have seen them */
        tv_line_unlock(line, wake);
    }
}

static int64_t serve(struct tv_worker *worker, struct tv_queue *queue, struct tv_chain *chain)
{
    struct tv_console_worker *self = (struct tv_console_worker *)worker;
    return queue->index == RECEIVE ? receive(self, queue, chain) : transmit(self, chain);
}

void tv_console_worker_init(struct tv_console_worker *worker, struct tv_console *console)
{
    worker->console = console;
    worker->worker.serve = serve;
}

/* --- state ----------------------------------------------------------------------------------------------------- */

/* The driver is gone, its half-taken chain with it. What it had transmitted is on its way to the sink, and what was
 * typed is the next driver's. */
void tv_console_reset(struct tv_console *console)
{
    tv_line_lock(&console->line);
    console->tx_taken = 0;
    console->line.tx_was_full = 0;
    tv_line_unlock(&console->line, 0);
}

/* See tv_line_save; with the worker ended. */
void tv_console_save(struct tv_console *console, struct tv_console_state *state, uint32_t in_flight)
{
    tv_line_lock(&console->line);
    state->tx_taken = console->tx_taken;
    tv_line_save(&console->line, &state->line, in_flight);
    tv_line_unlock(&console->line, 0);
}

/* 0, or -1 and no change when the lengths make no sense. */
int tv_console_load(struct tv_console *console, const struct tv_console_state *state)
{
    if (!tv_line_fits(&state->line) || state->tx_taken > TV_CHAIN_BYTES)
        return -1;
    tv_line_lock(&console->line);
    console->tx_taken = state->tx_taken;
    tv_line_load(&console->line, &state->line);
    tv_line_unlock(&console->line, TV_LINE_READY);
    return 0;
}
