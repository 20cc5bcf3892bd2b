/* A 16550A UART whose wires are two byte rings, shared by vCPU threads and one drain task.
 *
 * Invariants
 *  - All fields are read and written under `lock`, which nobody holds across anything that blocks: a few register
 *    steps and byte copies. Event descriptors are nonblocking and are signalled after the unlock.
 *  - `used` of a ring never exceeds its size; bytes leave in the order in which they came.
 *  - Transmitted bytes stay in the ring until the one consumer says that its sink has them (tv_uart_consume_tx):
 *    LSR.THRE goes away TV_UART_TX_RESERVE bytes before the ring is full, so a driver that looks at it never loses
 *    a byte. One that doesn't look has the reserve; what it writes past that is dropped and counted.
 *  - The object outlives every vCPU thread; the descriptors are the caller's and outlive the object.
 */
#ifndef TV_UART_H
#define TV_UART_H
#include <stdint.h>

#define TV_UART_TX_SIZE 65536u
#define TV_UART_TX_RESERVE 4096u
#define TV_UART_RX_SIZE 4096u

struct tv_uart_state {
    uint8_t ier, fcr, lcr, mcr, msr, scr, dll, dlm;
    uint8_t thre_pending; /* the THRE interrupt is pending */
    uint8_t overrun;      /* LSR.OE */
    uint32_t tx_len;
    uint32_t rx_len;
    uint8_t tx[65536];
    uint8_t rx[4096];
};

struct tv_uart;

struct tv_uart *tv_uart_new(int irq_fd, int ready_fd);
void tv_uart_free(struct tv_uart *uart);
int tv_uart_pio(void *uart, uint16_t offset, uint8_t size, int is_out, uint8_t *data, uint32_t count);
uint32_t tv_uart_peek_tx(struct tv_uart *uart, uint8_t *into, uint32_t max);
void tv_uart_consume_tx(struct tv_uart *uart, uint32_t len);
uint32_t tv_uart_take_tx(struct tv_uart *uart, uint8_t *into, uint32_t max);
uint32_t tv_uart_push_rx(struct tv_uart *uart, const uint8_t *from, uint32_t len);
uint32_t tv_uart_tx_used(struct tv_uart *uart);
uint32_t tv_uart_rx_room(struct tv_uart *uart);
uint64_t tv_uart_tx_dropped(struct tv_uart *uart);
void tv_uart_reset(struct tv_uart *uart);
void tv_uart_save(struct tv_uart *uart, struct tv_uart_state *state, uint32_t in_flight);
void tv_uart_thaw(struct tv_uart *uart);
int tv_uart_load(struct tv_uart *uart, const struct tv_uart_state *state);

#endif
