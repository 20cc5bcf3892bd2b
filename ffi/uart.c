#include "uart.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bytes.h"

/* Registers by offset; DLAB turns the first two into the divisor latch. Names and bits: PC16550D data sheet. */
enum { RBR_THR_DLL, IER_DLM, IIR_FCR, LCR, MCR, LSR, MSR, SCR, REGISTERS };

#define IER_RX 0x01
#define IER_THRE 0x02
#define IER_LINE 0x04
#define IER_MODEM 0x08
#define IIR_NONE 0x01
#define IIR_MODEM 0x00
#define IIR_THRE 0x02
#define IIR_RX 0x04
#define IIR_LINE 0x06
#define IIR_FIFO 0xc0
#define FCR_ENABLE 0x01
#define FCR_CLEAR_RX 0x02
#define LCR_DLAB 0x80
#define MCR_LOOP 0x10
#define LSR_DR 0x01
#define LSR_OE 0x02
#define LSR_THRE 0x20
#define LSR_TEMT 0x40
#define MSR_WIRED 0xb0 /* DCD, DSR and CTS: somebody is always at the other end */

#define WAKE_IRQ 1u
#define WAKE_READY 2u

struct tv_uart {
    pthread_mutex_t lock;
    int irq_fd;
    int ready_fd;
    uint8_t ier, fcr, lcr, mcr, msr, scr, dll, dlm;
    uint8_t thre_pending, overrun;
    uint8_t rx_was_full; /* somebody may wait for room */
    uint8_t frozen;      /* saved: the consumer gets nothing until the VM runs again */
    uint64_t tx_dropped;
    struct tv_bytes tx, rx;
    uint8_t tx_bytes[TV_UART_TX_SIZE];
    uint8_t rx_bytes[TV_UART_RX_SIZE];
};

/* Signal what a step asked for. Called without the lock; a full eventfd counter is as good as a signal. */
static void wake(struct tv_uart *uart, unsigned what)
{
    const uint64_t one = 1;
    int fds[2] = {what & WAKE_IRQ ? uart->irq_fd : -1, what & WAKE_READY ? uart->ready_fd : -1};
    for (int i = 0; i < 2; i++) {
        while (fds[i] >= 0 && write(fds[i], &one, sizeof(one)) < 0 && errno == EINTR)
            ;
    }
}

static int thre(const struct tv_uart *uart)
{
    return uart->tx.used <= TV_UART_TX_SIZE - TV_UART_TX_RESERVE;
}

static uint8_t line_status(const struct tv_uart *uart)
{
    return (uart->rx.used ? LSR_DR : 0) | (uart->overrun ? LSR_OE : 0) | (thre(uart) ? LSR_THRE | LSR_TEMT : 0);
}

/* The pending cause of highest priority that IER lets through, as IIR spells it. */
static uint8_t cause(const struct tv_uart *uart)
{
    if (uart->ier & IER_LINE && uart->overrun)
        return IIR_LINE;
    if (uart->ier & IER_RX && uart->rx.used)
        return IIR_RX;
    if (uart->ier & IER_THRE && uart->thre_pending)
        return IIR_THRE;
    if (uart->ier & IER_MODEM && uart->msr & 0x0f)
        return IIR_MODEM;
    return IIR_NONE;
}

/* The transmitter became empty: on an edge-triggered line every such event is a new pulse. */
static unsigned raise_thre(struct tv_uart *uart)
{
    uart->thre_pending = 1;
    return uart->ier & IER_THRE ? WAKE_IRQ : 0;
}

/* Modem inputs after MCR changed: wired high, or MCR's outputs in loopback. Low nibble: changes since last read. */
static unsigned set_modem_lines(struct tv_uart *uart)
{
    uint8_t lines = MSR_WIRED;
    if (uart->mcr & MCR_LOOP)
        lines = (uart->mcr & 0x02) << 3 | (uart->mcr & 0x01) << 5 | (uart->mcr & 0x0c) << 4;
    uint8_t changed = (lines ^ uart->msr) >> 4;
    changed &= ~(lines >> 4 & 0x04); /* TERI tells the trailing edge only */
    uart->msr = lines | (uart->msr & 0x0f) | changed;
    return changed && uart->ier & IER_MODEM ? WAKE_IRQ : 0;
}

static unsigned receive(struct tv_uart *uart, uint8_t byte)
{
    if (tv_bytes_put(&uart->rx, byte)) {
        uart->overrun = 1;
        return uart->ier & IER_LINE ? WAKE_IRQ : 0;
    }
    return uart->ier & IER_RX ? WAKE_IRQ : 0;
}

static unsigned transmit(struct tv_uart *uart, uint8_t byte)
{
    unsigned what = uart->frozen ? WAKE_READY : 0;
    uart->frozen = 0;
    uart->thre_pending = 0;
    if (uart->mcr & MCR_LOOP) {
        what |= receive(uart, byte);
    } else if (tv_bytes_put(&uart->tx, byte)) {
        uart->tx_dropped++;
    } else if (uart->tx.used == 1) {
        what |= WAKE_READY;
    }
    return thre(uart) ? what | raise_thre(uart) : what;
}

static unsigned write_register(struct tv_uart *uart, uint32_t offset, uint8_t value)
{
    int dlab = uart->lcr & LCR_DLAB;
    uint8_t enabled;
    switch (offset) {
    case RBR_THR_DLL:
        if (!dlab)
            return transmit(uart, value);
        uart->dll = value;
        return 0;
    case IER_DLM:
        if (dlab) {
            uart->dlm = value;
            return 0;
        }
        enabled = value & ~uart->ier & 0x0f;
        uart->ier = value & 0x0f;
        if (enabled & IER_THRE && thre(uart))
            uart->thre_pending = 1;
        return enabled && cause(uart) != IIR_NONE ? WAKE_IRQ : 0;
    case IIR_FCR:
        if (value & FCR_CLEAR_RX || (value ^ uart->fcr) & FCR_ENABLE)
            tv_bytes_drop(&uart->rx, uart->rx.used);
        uart->fcr = value & (FCR_ENABLE | 0xc0);
        return uart->rx_was_full ? (uart->rx_was_full = 0, WAKE_READY) : 0;
    case LCR:
        uart->lcr = value;
        return 0;
    case MCR:
        uart->mcr = value & 0x1f;
        return set_modem_lines(uart);
    case SCR:
        uart->scr = value;
        return 0;
    default: /* LSR and MSR are read-only here */
        return 0;
    }
}

static unsigned read_register(struct tv_uart *uart, uint32_t offset, uint8_t *value)
{
    int dlab = uart->lcr & LCR_DLAB;
    unsigned what = 0;
    switch (offset) {
    case RBR_THR_DLL:
        if (dlab) {
            *value = uart->dll;
            return 0;
        }
        *value = 0;
        tv_bytes_peek(&uart->rx, value, 1);
        tv_bytes_drop(&uart->rx, 1);
        if (uart->rx.used && uart->ier & IER_RX)
            what = WAKE_IRQ; /* the next byte arrives */
        if (uart->rx_was_full && uart->rx.used <= TV_UART_RX_SIZE / 2) {
            uart->rx_was_full = 0;
            what |= WAKE_READY;
        }
        return what;
    case IER_DLM:
        *value = dlab ? uart->dlm : uart->ier;
        return 0;
    case IIR_FCR:
        *value = cause(uart);
        if (*value == IIR_THRE)
            uart->thre_pending = 0;
        if (uart->fcr & FCR_ENABLE)
            *value |= IIR_FIFO;
        return 0;
    case LCR:
        *value = uart->lcr;
        return 0;
    case MCR:
        *value = uart->mcr;
        return 0;
    case LSR:
        *value = line_status(uart);
        uart->overrun = 0;
        return 0;
    case MSR:
        *value = uart->msr;
        uart->msr &= 0xf0;
        return 0;
    case SCR:
        *value = uart->scr;
        return 0;
    default:
        *value = 0xff;
        return 0;
    }
}

static void reset_locked(struct tv_uart *uart)
{
    uart->ier = uart->fcr = uart->mcr = uart->scr = uart->dlm = 0;
    uart->lcr = 0x03; /* 8n1 */
    uart->dll = 12;   /* 9600 baud */
    uart->msr = MSR_WIRED;
    uart->thre_pending = uart->overrun = 0;
    tv_bytes_drop(&uart->rx, uart->rx.used);
}

/* A UART as after power-on; descriptors may be -1. NULL without memory. */
struct tv_uart *tv_uart_new(int irq_fd, int ready_fd)
{
    struct tv_uart *uart = calloc(1, sizeof(*uart));
    if (!uart)
        return NULL;
    pthread_mutex_init(&uart->lock, NULL);
    uart->irq_fd = irq_fd;
    uart->ready_fd = ready_fd;
    uart->tx = (struct tv_bytes){uart->tx_bytes, TV_UART_TX_SIZE, 0, 0};
    uart->rx = (struct tv_bytes){uart->rx_bytes, TV_UART_RX_SIZE, 0, 0};
    reset_locked(uart);
    return uart;
}

/* After the last thread that may call anything here. */
void tv_uart_free(struct tv_uart *uart)
{
    if (!uart)
        return;
    pthread_mutex_destroy(&uart->lock);
    free(uart);
}

/* A port access of `count` elements of `size` bytes each at register `offset`; an element wider than a byte reaches
 * the registers after it, as the ISA bus splits it. `data` holds count * size bytes. Returns 0: always handled. Any
 * thread. */
int tv_uart_pio(void *opaque, uint16_t offset, uint8_t size, int is_out, uint8_t *data, uint32_t count)
{
    struct tv_uart *uart = opaque;
    unsigned what = 0;
    pthread_mutex_lock(&uart->lock);
    for (uint32_t element = 0; element < count; element++) {
        for (uint32_t byte = 0; byte < size; byte++, data++) {
            uint32_t place = (uint32_t)offset + byte;
            what |= is_out ? write_register(uart, place, *data) : read_register(uart, place, data);
        }
    }
    pthread_mutex_unlock(&uart->lock);
    wake(uart, what);
    return 0;
}

/* Copy up to `max` transmitted bytes without taking them; none while frozen. One consumer only. */
uint32_t tv_uart_peek_tx(struct tv_uart *uart, uint8_t *into, uint32_t max)
{
    pthread_mutex_lock(&uart->lock);
    uint32_t len = uart->frozen ? 0 : tv_bytes_peek(&uart->tx, into, max);
    pthread_mutex_unlock(&uart->lock);
    return len;
}

/* The sink has the first `len` of them. Gives the THRE interrupt back where the ring had been full. */
void tv_uart_consume_tx(struct tv_uart *uart, uint32_t len)
{
    unsigned what = 0;
    pthread_mutex_lock(&uart->lock);
    int was = thre(uart);
    tv_bytes_drop(&uart->tx, len);
    if (!was && thre(uart))
        what = raise_thre(uart);
    pthread_mutex_unlock(&uart->lock);
    wake(uart, what);
}

/* Peek and consume in one. */
uint32_t tv_uart_take_tx(struct tv_uart *uart, uint8_t *into, uint32_t max)
{
    uint32_t len = tv_uart_peek_tx(uart, into, max);
    tv_uart_consume_tx(uart, len);
    return len;
}

/* Bytes for the guest; gives how many found room. With less than all, `ready_fd` tells of new room later. */
uint32_t tv_uart_push_rx(struct tv_uart *uart, const uint8_t *from, uint32_t len)
{
    pthread_mutex_lock(&uart->lock);
    uint32_t taken = tv_bytes_fill(&uart->rx, from, len);
    if (taken < len)
        uart->rx_was_full = 1;
    unsigned what = taken && uart->ier & IER_RX ? WAKE_IRQ : 0;
    pthread_mutex_unlock(&uart->lock);
    wake(uart, what);
    return taken;
}

/* Bytes that the sink has not taken yet. */
uint32_t tv_uart_tx_used(struct tv_uart *uart)
{
    pthread_mutex_lock(&uart->lock);
    uint32_t used = uart->tx.used;
    pthread_mutex_unlock(&uart->lock);
    return used;
}

/* How many bytes tv_uart_push_rx would take now. When that is none, `ready_fd` tells of new room later. */
uint32_t tv_uart_rx_room(struct tv_uart *uart)
{
    pthread_mutex_lock(&uart->lock);
    uint32_t room = uart->rx.size - uart->rx.used;
    if (!room)
        uart->rx_was_full = 1;
    pthread_mutex_unlock(&uart->lock);
    return room;
}

/* Bytes lost because the guest wrote past a full ring without looking at LSR.THRE. */
uint64_t tv_uart_tx_dropped(struct tv_uart *uart)
{
    pthread_mutex_lock(&uart->lock);
    uint64_t dropped = uart->tx_dropped;
    pthread_mutex_unlock(&uart->lock);
    return dropped;
}

/* The machine was reset: registers as after power-on; what was transmitted stays on its way to the sink. */
void tv_uart_reset(struct tv_uart *uart)
{
    pthread_mutex_lock(&uart->lock);
    reset_locked(uart);
    uart->rx_was_full = 0;
    pthread_mutex_unlock(&uart->lock);
    wake(uart, WAKE_READY);
}

/* Copy the state, less the first `in_flight` transmitted bytes: those the sink is being given right now. What is
 * left in the ring belongs to the saved state from here on, so the consumer gets no more of it until the guest
 * transmits again (it runs after all) or tv_uart_thaw. */
void tv_uart_save(struct tv_uart *uart, struct tv_uart_state *state, uint32_t in_flight)
{
    pthread_mutex_lock(&uart->lock);
    uart->frozen = 1;
    *state = (struct tv_uart_state){
        .ier = uart->ier, .fcr = uart->fcr, .lcr = uart->lcr, .mcr = uart->mcr,
        .msr = uart->msr, .scr = uart->scr, .dll = uart->dll, .dlm = uart->dlm,
        .thre_pending = uart->thre_pending, .overrun = uart->overrun,
    };
    struct tv_bytes left = uart->tx;
    tv_bytes_drop(&left, in_flight);
    state->tx_len = tv_bytes_peek(&left, state->tx, TV_UART_TX_SIZE);
    state->rx_len = tv_bytes_peek(&uart->rx, state->rx, TV_UART_RX_SIZE);
    pthread_mutex_unlock(&uart->lock);
}

/* The saved state was not used: the VM runs on here. */
void tv_uart_thaw(struct tv_uart *uart)
{
    pthread_mutex_lock(&uart->lock);
    uart->frozen = 0;
    pthread_mutex_unlock(&uart->lock);
    wake(uart, WAKE_READY);
}

/* 0, or -1 and no change when the lengths make no sense. Reserved bits are dropped. Pulses the line where an
 * interrupt is pending: a spurious edge does no harm, a lost one does. */
int tv_uart_load(struct tv_uart *uart, const struct tv_uart_state *state)
{
    unsigned what = 0;
    if (state->tx_len > TV_UART_TX_SIZE || state->rx_len > TV_UART_RX_SIZE)
        return -1;
    pthread_mutex_lock(&uart->lock);
    uart->ier = state->ier & 0x0f;
    uart->fcr = state->fcr & (FCR_ENABLE | 0xc0);
    uart->lcr = state->lcr;
    uart->mcr = state->mcr & 0x1f;
    uart->msr = state->msr;
    uart->scr = state->scr;
    uart->dll = state->dll;
    uart->dlm = state->dlm;
    uart->thre_pending = !!state->thre_pending;
    uart->overrun = !!state->overrun;
    uart->rx_was_full = uart->frozen = 0;
    uart->tx.head = uart->rx.head = 0;
    uart->tx.used = state->tx_len;
    uart->rx.used = state->rx_len;
    memcpy(uart->tx_bytes, state->tx, state->tx_len);
    memcpy(uart->rx_bytes, state->rx, state->rx_len);
    if (cause(uart) != IIR_NONE)
        what |= WAKE_IRQ;
    if (uart->tx.used)
        what |= WAKE_READY;
    pthread_mutex_unlock(&uart->lock);
    wake(uart, what);
    return 0;
}
