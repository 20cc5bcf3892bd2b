/* The packets of virtio-vsock (virtio 1.2 section 5.10.6), as they lie in the buffers of both queues. */
#ifndef TV_VSOCK_WIRE_H
#define TV_VSOCK_WIRE_H
#include <stdint.h>

#define TV_VSOCK_HOST_CID 2
#define TV_VSOCK_STREAM 1 /* the type */

enum tv_vsock_op {
    TV_VSOCK_REQUEST = 1,
    TV_VSOCK_RESPONSE = 2,
    TV_VSOCK_RST = 3,
    TV_VSOCK_SHUTDOWN = 4,
    TV_VSOCK_RW = 5,
    TV_VSOCK_CREDIT_UPDATE = 6,
    TV_VSOCK_CREDIT_REQUEST = 7,
};

#define TV_VSOCK_SHUT_RCV 1u  /* the sender receives no more data */
#define TV_VSOCK_SHUT_SEND 2u /* the sender sends no more data */
#define TV_VSOCK_SHUT_BOTH (TV_VSOCK_SHUT_RCV | TV_VSOCK_SHUT_SEND)

/* Little-endian, as every host of ours. */
struct tv_vsock_header {
    uint64_t src_cid, dst_cid;
    uint32_t src_port, dst_port;
    uint32_t len; /* of what follows */
    uint16_t type, op;
    uint32_t flags;
    uint32_t buf_alloc; /* the sender's room for one stream */
    uint32_t fwd_cnt;   /* bytes that the sender's user has taken from it, free running */
} __attribute__((packed));

_Static_assert(sizeof(struct tv_vsock_header) == 44, "virtio 1.2 section 5.10.6");

#endif
