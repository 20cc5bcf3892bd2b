/* A 16550A UART, shared by vCPU threads; its wires are a tv_line.
 *
 * Invariants, beside the line's
 *  - LSR.THRE goes away TV_UART_TX_RESERVE bytes before the ring is full, so a driver that looks at it never loses a
 *    byte. One that doesn't look has the reserve; what it writes past that is dropped and counted.
 *  - The line's `tx_was_full` says that LSR.THRE is away.
 */
#ifndef TV_UART_H
#define TV_UART_H
#include <stdint.h>

#include "line.h"

#define TV_UART_TX_RESERVE 4096u

struct tv_uart_state {
    uint8_t ier, fcr, lcr, mcr, msr, scr, dll, dlm;
    uint8_t thre_pending; /* the THRE interrupt is pending */
    uint8_t overrun;      /* LSR.OE */
    struct tv_line_state line;
};

struct tv_uart;

struct tv_uart *tv_uart_new(int irq_fd, int ready_fd);
void tv_uart_free(struct tv_uart *uart);
struct tv_line *tv_uart_line(struct tv_uart *uart);
int tv_uart_pio(void *uart, uint16_t offset, uint8_t size, int is_out, uint8_t *data, uint32_t count);
uint64_t tv_uart_tx_dropped(struct tv_uart *uart);
void tv_uart_save(struct tv_uart *uart, struct tv_uart_state *state, uint32_t in_flight);
int tv_uart_load(struct tv_uart *uart, const struct tv_uart_state *state);

#endif
