/* The two halves of the vsock driver: vsock_link.c has its rings and what is in them, vsock.c what it means. */
#ifndef VSOCK_H
#define VSOCK_H
#include "driver.h"

#define DEVICE_ID 0x1053
#define HOST 2
#define HEADER 44
#define LARGEST 16384 /* data of one packet */
#define COPIED 1024   /* bytes of a packet whose data the caller changes meanwhile */

enum op { REQUEST = 1, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST };

/* Virtio 1.2 section 5.10.6. */
struct header {
    uint64_t src_cid, dst_cid;
    uint32_t src_port, dst_port, len;
    uint16_t type, op;
    uint32_t flags, buf_alloc, fwd_cnt;
} __attribute__((packed));

extern uint64_t link_cid;

int link_find(void);
int link_start(void);
void link_step(void);
int link_has_room(void);
int link_send(const struct header *header, const uint8_t *data, uint32_t head, uint32_t size);
const struct header *link_next(uint32_t *length);
void link_done(void);
int link_event(uint32_t *id, uint32_t *length);
uint32_t link_slot(void);
uint32_t link_status(void);

#endif
