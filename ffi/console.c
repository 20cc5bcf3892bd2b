#include "console.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bytes.h"

#define CHUNK 4096 /* copied between two looks at the stop flag */

#define RECEIVE 0 /* queue numbers, virtio 1.2 section 5.3.2 */

#define WAKE_READY 1u
#define WAKE_RECEIVE 2u
#define WAKE_TRANSMIT 4u

struct tv_console {
    pthread_mutex_t lock;
    int ready_fd;               /* the task: there is output, or room for input */
    int receive_fd, transmit_fd; /* the queues' doorbells while their worker runs: there is input, or room for output */
    uint8_t tx_was_full, rx_was_full; /* somebody may wait for room */
    uint8_t frozen;             /* saved: the consumer gets nothing until the VM runs again */
    uint32_t tx_taken;          /* bytes of the chain that is next on the transmit queue */
    struct tv_bytes tx, rx;
    uint8_t tx_bytes[TV_CONSOLE_TX_SIZE];
    uint8_t rx_bytes[TV_CONSOLE_RX_SIZE];
};

/* Unlock, then signal what the step asked for. A full eventfd counter is as good as a signal. */
static void unlock_and_wake(struct tv_console *console, unsigned what)
{
    const uint64_t one = 1;
    int fds[3] = {what & WAKE_READY ? console->ready_fd : -1, what & WAKE_RECEIVE ? console->receive_fd : -1,
                  what & WAKE_TRANSMIT ? console->transmit_fd : -1};
    pthread_mutex_unlock(&console->lock);
    for (int i = 0; i < 3; i++) {
        while (fds[i] >= 0 && write(fds[i], &one, sizeof(one)) < 0 && errno == EINTR)
            ;
    }
}

/* NULL without memory. */
struct tv_console *tv_console_new(int ready_fd)
{
    struct tv_console *console = calloc(1, sizeof(*console));
    if (!console)
        return NULL;
    pthread_mutex_init(&console->lock, NULL);
    console->ready_fd = ready_fd;
    console->receive_fd = console->transmit_fd = -1;
    console->tx = (struct tv_bytes){console->tx_bytes, TV_CONSOLE_TX_SIZE, 0, 0};
    console->rx = (struct tv_bytes){console->rx_bytes, TV_CONSOLE_RX_SIZE, 0, 0};
    return console;
}

/* After the last thread that may call anything here. */
void tv_console_free(struct tv_console *console)
{
    if (!console)
        return;
    pthread_mutex_destroy(&console->lock);
    free(console);
}

/* The descriptors are about to be closed: none is signalled any more. */
void tv_console_close(struct tv_console *console)
{
    pthread_mutex_lock(&console->lock);
    console->ready_fd = console->receive_fd = console->transmit_fd = -1;
    pthread_mutex_unlock(&console->lock);
}

/* The doorbells of the queues whose worker is about to run, or -1 when it has ended. */
void tv_console_set_bells(struct tv_console *console, int receive_fd, int transmit_fd)
{
    pthread_mutex_lock(&console->lock);
    console->receive_fd = receive_fd;
    console->transmit_fd = transmit_fd;
    pthread_mutex_unlock(&console->lock);
}

/* --- the worker ------------------------------------------------------------------------------------------------ */

/* A buffer of the receive queue takes what input there is. Without any it stays available. */
static int64_t receive(struct tv_console_worker *self, struct tv_queue *queue, struct tv_chain *chain)
{
    struct tv_console *console = self->console;
    uint8_t buffer[CHUNK];
    uint64_t done = 0;
    while (done < chain->writable_bytes && done < TV_CONSOLE_RX_SIZE) { /* a ring's worth: then the other queue */
        uint64_t room = chain->writable_bytes - done;
        pthread_mutex_lock(&console->lock);
        uint32_t len = tv_bytes_peek(&console->rx, buffer, room < CHUNK ? (uint32_t)room : CHUNK);
        pthread_mutex_unlock(&console->lock);
        if (!len)
            break;
        done += tv_chain_write(queue->memory, chain, done, buffer, len);
        pthread_mutex_lock(&console->lock);
        tv_bytes_drop(&console->rx, len);
        unsigned what = 0;
        if (console->rx_was_full && console->rx.used <= TV_CONSOLE_RX_SIZE / 2) {
            console->rx_was_full = 0;
            what = WAKE_READY;
        }
        unlock_and_wake(console, what);
    }
    self->received += done;
    return !done && chain->writable_bytes ? TV_NOT_NOW : (int64_t)done;
}

/* Into the ring, as far as it has room; the rest of the chain waits there for more. */
static int64_t transmit(struct tv_console_worker *self, struct tv_chain *chain)
{
    struct tv_console *console = self->console;
    uint8_t buffer[CHUNK];
    for (uint32_t moved = 0;;) {
        if (tv_worker_stopping(&self->worker))
            return TV_STOPPED;
        if (moved >= TV_CONSOLE_TX_SIZE)
            return TV_AGAIN; /* a ring's worth, taken as fast as it came: now the other queue */
        pthread_mutex_lock(&console->lock);
        uint64_t taken = console->tx_taken;
        uint32_t room = console->tx.size - console->tx.used;
        int done = taken >= chain->readable_bytes;
        if (done)
            console->tx_taken = 0;
        else if (!room)
            console->tx_was_full = 1;
        pthread_mutex_unlock(&console->lock);
        if (done)
            return 0;
        if (!room)
            return TV_NOT_NOW;
        uint64_t got = tv_chain_read(chain, taken, buffer, room < CHUNK ? room : CHUNK);
        pthread_mutex_lock(&console->lock);
        unsigned what = console->tx.used ? 0 : WAKE_READY;
        tv_bytes_fill(&console->tx, buffer, (uint32_t)got);
        console->tx_taken += (uint32_t)got;
        moved += (uint32_t)got;
        self->transmitted += got; /* before anybody can have seen them */
        unlock_and_wake(console, what);
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

/* --- the task -------------------------------------------------------------------------------------------------- */

/* Copy up to `max` transmitted bytes without taking them; none while frozen. One consumer only. */
uint32_t tv_console_peek_tx(struct tv_console *console, uint8_t *into, uint32_t max)
{
    pthread_mutex_lock(&console->lock);
    uint32_t len = console->frozen ? 0 : tv_bytes_peek(&console->tx, into, max);
    pthread_mutex_unlock(&console->lock);
    return len;
}

/* The sink has the first `len` of them. */
void tv_console_consume_tx(struct tv_console *console, uint32_t len)
{
    unsigned what = 0;
    pthread_mutex_lock(&console->lock);
    tv_bytes_drop(&console->tx, len);
    if (console->tx_was_full && console->tx.used <= TV_CONSOLE_TX_SIZE / 2) {
        console->tx_was_full = 0;
        what = WAKE_TRANSMIT;
    }
    unlock_and_wake(console, what);
}

/* Bytes for the guest; gives how many found room. With less than all, `ready_fd` tells of new room later. */
uint32_t tv_console_push_rx(struct tv_console *console, const uint8_t *from, uint32_t len)
{
    pthread_mutex_lock(&console->lock);
    uint32_t taken = tv_bytes_fill(&console->rx, from, len);
    if (taken < len)
        console->rx_was_full = 1;
    unlock_and_wake(console, taken ? WAKE_RECEIVE : 0);
    return taken;
}

/* Bytes that the sink has not taken yet. */
uint32_t tv_console_tx_used(struct tv_console *console)
{
    pthread_mutex_lock(&console->lock);
    uint32_t used = console->tx.used;
    pthread_mutex_unlock(&console->lock);
    return used;
}

/* How many bytes tv_console_push_rx would take now. When that is none, `ready_fd` tells of new room later. */
uint32_t tv_console_rx_room(struct tv_console *console)
{
    pthread_mutex_lock(&console->lock);
    uint32_t room = console->rx.size - console->rx.used;
    if (!room)
        console->rx_was_full = 1;
    pthread_mutex_unlock(&console->lock);
    return room;
}

/* The driver is gone, its half-taken chain with it. What it had transmitted is on its way to the sink, and what was
 * typed is the next driver's. */
void tv_console_reset(struct tv_console *console)
{
    pthread_mutex_lock(&console->lock);
    console->tx_taken = 0;
    console->tx_was_full = 0;
    pthread_mutex_unlock(&console->lock);
}

/* --- state ----------------------------------------------------------------------------------------------------- */

/* With the worker ended. Copy the state, less the first `in_flight` transmitted bytes: those the sink is being given
 * right now. The consumer gets no more until tv_console_thaw. */
void tv_console_save(struct tv_console *console, struct tv_console_state *state, uint32_t in_flight)
{
    pthread_mutex_lock(&console->lock);
    console->frozen = 1;
    *state = (struct tv_console_state){.tx_taken = console->tx_taken};
    struct tv_bytes left = console->tx;
    tv_bytes_drop(&left, in_flight);
    state->tx_len = tv_bytes_peek(&left, state->tx, TV_CONSOLE_TX_SIZE);
    state->rx_len = tv_bytes_peek(&console->rx, state->rx, TV_CONSOLE_RX_SIZE);
    pthread_mutex_unlock(&console->lock);
}

/* The VM runs here, with the state that was saved or loaded. */
void tv_console_thaw(struct tv_console *console)
{
    pthread_mutex_lock(&console->lock);
    console->frozen = 0;
    unlock_and_wake(console, WAKE_READY);
}

/* 0, or -1 and no change when the lengths make no sense. */
int tv_console_load(struct tv_console *console, const struct tv_console_state *state)
{
    if (state->tx_len > TV_CONSOLE_TX_SIZE || state->rx_len > TV_CONSOLE_RX_SIZE || state->tx_taken > TV_CHAIN_BYTES)
        return -1;
    pthread_mutex_lock(&console->lock);
    console->tx_taken = state->tx_taken;
    console->tx_was_full = console->rx_was_full = console->frozen = 0;
    console->tx.head = console->rx.head = 0;
    console->tx.used = state->tx_len;
    console->rx.used = state->rx_len;
    memcpy(console->tx_bytes, state->tx, state->tx_len);
    memcpy(console->rx_bytes, state->rx, state->rx_len);
    unlock_and_wake(console, WAKE_READY);
    return 0;
}
