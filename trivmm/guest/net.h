/* The probe guest's network: frames between net.c, which has the device, and net_ip.c, which speaks ARP, IP and UDP. */
#ifndef NET_H
#define NET_H
#include "driver.h"

#define FRAME_ROOM 65536

extern uint8_t net_mac[6];
extern uint32_t net_ip, net_gateway, net_port; /* host byte order; 0: none of it */
extern uint64_t net_echoed, net_pinged;

/* A buffer for one frame to be sent, or NULL: none is free. */
uint8_t *net_frame(void);
/* Send what is in the buffer that net_frame gave last. */
void net_send(uint32_t length);

void ip_received(const uint8_t *frame, uint32_t length);
void ip_step(uint64_t now);

static inline void copy_bytes(volatile uint8_t *to, const volatile uint8_t *from, uint32_t length)
{
    for (uint32_t i = 0; i < length; i++)
        to[i] = from[i];
}
static inline uint32_t get16(const uint8_t *at)
{
    return (uint32_t)at[0] << 8 | at[1];
}
static inline uint32_t get32(const uint8_t *at)
{
    return get16(at) << 16 | get16(at + 2);
}
static inline void put16(uint8_t *at, uint32_t value)
{
    at[0] = (uint8_t)(value >> 8);
    at[1] = (uint8_t)value;
}
static inline void put32(uint8_t *at, uint32_t value)
{
    put16(at, value >> 16);
    put16(at + 2, value);
}

#endif
