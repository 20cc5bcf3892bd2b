#include "uart.h"

#include <stdlib.h>

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

#define WAKE_IRQ TV_LINE_INPUT /* the line's `input_fd`; a UART has one interrupt for everything */
#define WAKE_READY TV_LINE_READY

struct tv_uart {
    struct tv_line line;
    uint8_t ier, fcr, lcr, mcr, msr, scr, dll, dlm;
    uint8_t thre_pending, overrun;
    uint64_t tx_dropped;
};

static int thre(const struct tv_uart *uart)
{
    return uart->line.tx.used <= uart->line.tx_low;
}

static uint8_t line_status(const struct tv_uart *uart)
{
    return (uart->line.rx.used ? LSR_DR : 0) | (uart->overrun ? LSR_OE : 0) | (thre(uart) ? LSR_THRE | LSR_TEMT : 0);
}

/* The pending cause of highest priority that IER lets through, as IIR spells it. */
static uint8_t cause(const struct tv_uart *uart)
{
    if (uart->ier & IER_LINE && uart->overrun)
        return IIR_LINE;
    if (uart->ier & IER_RX && uart->line.rx.used)
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

/* The sink has made room in a ring that had been full. */
static unsigned on_room(struct tv_line *line)
{
    return raise_thre((struct tv_uart *)line);
}

static unsigned on_input(struct tv_line *line)
{
    return ((struct tv_uart *)line)->ier & IER_RX ? WAKE_IRQ : 0;
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
    if (!tv_bytes_fill(&uart->line.rx, &byte, 1)) {
        uart->overrun = 1;
        return uart->ier & IER_LINE ? WAKE_IRQ : 0;
    }
    return on_input(&uart->line);
}

static unsigned transmit(struct tv_uart *uart, uint8_t byte)
{
    unsigned what = uart->line.frozen ? WAKE_READY : 0;
    uart->line.frozen = 0;
    uart->thre_pending = 0;
    if (uart->mcr & MCR_LOOP) {
        what |= receive(uart, byte);
    } else if (!tv_bytes_fill(&uart->line.tx, &byte, 1)) {
        uart->tx_dropped++;
    } else if (uart->line.tx.used == 1) {
        what |= WAKE_READY;
    }
    uart->line.tx_was_full = !thre(uart);
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
            tv_bytes_drop(&uart->line.rx, uart->line.rx.used);
        uart->fcr = value & (FCR_ENABLE | 0xc0);
        return tv_line_drop_rx(&uart->line, 0);
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
        tv_bytes_peek(&uart->line.rx, value, 1);
        what = tv_line_drop_rx(&uart->line, 1);
        if (uart->line.rx.used)
            what |= on_input(&uart->line); /* the next byte arrives */
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

/* A UART as after power-on; descriptors may be -1. NULL without memory. */
struct tv_uart *tv_uart_new(int irq_fd, int ready_fd)
{
    struct tv_uart *uart = calloc(1, sizeof(*uart));
    if (!uart)
        return NULL;
    tv_line_init(&uart->line, TV_LINE_TX_SIZE - TV_UART_TX_RESERVE, on_input, on_room);
    uart->line.input_fd = irq_fd;
    uart->line.ready_fd = ready_fd;
    uart->lcr = 0x03; /* 8n1 */
    uart->dll = 12;   /* 9600 baud */
    uart->msr = MSR_WIRED;
    return uart;
}

/* After the last thread that may call anything here. */
void tv_uart_free(struct tv_uart *uart)
{
    if (!uart)
        return;
    tv_line_destroy(&uart->line);
    free(uart);
}

struct tv_line *tv_uart_line(struct tv_uart *uart)
{
    return &uart->line;
}

/* A port access of `count` elements of `size` bytes each at register `offset`; an element wider than a byte reaches
 * the registers after it, as the ISA bus splits it. `data` holds count * size bytes. Returns 0: always handled. Any
 * thread. */
int tv_uart_pio(void *opaque, uint16_t offset, uint8_t size, int is_out, uint8_t *data, uint32_t count)
{
    struct tv_uart *uart = opaque;
    unsigned what = 0;
    tv_line_lock(&uart->line);
    for (uint32_t element = 0; element < count; element++) {
        for (uint32_t byte = 0; byte < size; byte++, data++) {
            uint32_t place = (uint32_t)offset + byte;
            what |= is_out ? write_register(uart, place, *data) : read_register(uart, place, data);
        }
    }
    tv_line_unlock(&uart->line, what);
    return 0;
}

/* Bytes lost because the guest wrote past a full ring without looking at LSR.THRE. */
uint64_t tv_uart_tx_dropped(struct tv_uart *uart)
{
    tv_line_lock(&uart->line);
    uint64_t dropped = uart->tx_dropped;
    tv_line_unlock(&uart->line, 0);
    return dropped;
}

/* See tv_line_save; with the vCPUs stopped. A guest that transmits again runs after all, which is a tv_line_thaw. */
void tv_uart_save(struct tv_uart *uart, struct tv_uart_state *state, uint32_t in_flight)
{
    tv_line_lock(&uart->line);
    state->ier = uart->ier;
    state->fcr = uart->fcr;
    state->lcr = uart->lcr;
    state->mcr = uart->mcr;
    state->msr = uart->msr;
    state->scr = uart->scr;
    state->dll = uart->dll;
    state->dlm = uart->dlm;
    state->thre_pending = uart->thre_pending;
    state->overrun = uart->overrun;
    tv_line_save(&uart->line, &state->line, in_flight);
    tv_line_unlock(&uart->line, 0);
}

/* 0, or -1 and no change when the lengths make no sense. Reserved bits are dropped. Pulses the line where an
 * interrupt is pending: a spurious edge does no harm, a lost one does. */
int tv_uart_load(struct tv_uart *uart, const struct tv_uart_state *state)
{
    if (!tv_line_fits(&state->line))
        return -1;
    tv_line_lock(&uart->line);
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
    tv_line_load(&uart->line, &state->line);
    tv_line_unlock(&uart->line, WAKE_READY | (cause(uart) != IIR_NONE ? WAKE_IRQ : 0));
    return 0;
}
