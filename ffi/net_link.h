/* What a virtio-net device is tied to: one queue of a tap, a unix stream or a pair of unix datagram sockets.
 *
 * On a stream each frame has its length before it, 4 bytes, big endian (as QEMU's `-netdev stream` and passt speak it);
 * a datagram is a frame. Only a tap has virtio-net headers, of 12 bytes.
 *
 * Invariants
 *  - All fields are the worker's while one runs, Python's otherwise; the object is Python's and outlives both.
 *  - Nothing here blocks: descriptors are nonblocking, and what can't be done now says so.
 *  - What a peer may have waiting here is bounded: one buffer of bytes each way. A peer that has said something that
 *    can't be a frame is hung up on, since nobody knows where its next frame begins.
 *  - The newest connection is the one that counts: a peer that has moved comes again from somewhere else.
 */
#ifndef TV_NET_LINK_H
#define TV_NET_LINK_H
#include <stdint.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>

#include "net_header.h"
#include "ring.h"

#define TV_NET_LENGTH 4u                                    /* bytes of a stream's frame before its data */
#define TV_NET_ROOM (4u * (TV_NET_FRAME_MAX + TV_NET_HEADER)) /* of each buffer: some of the longest frames */

enum tv_net_kind { TV_NET_TAP = 1, TV_NET_STREAM = 2, TV_NET_DGRAM = 3 };
enum tv_net_sent { TV_NET_SENT, TV_NET_BUSY, TV_NET_LOST }; /* lost: there is nobody, or it can't be carried */

struct tv_net_link {
    int kind;
    int fd;        /* the tap, the datagram socket, or the peer; -1: nobody */
    int listen_fd; /* where peers come; -1: none do */
    uint8_t hung_up; /* a peer that had been there has gone since this was last cleared */
    struct sockaddr_un peer; /* whom to dial, or where datagrams go */
    socklen_t peer_len;      /* 0: nobody is dialled */
    uint32_t in_at, in_end;  /* what has been received and not taken yet */
    uint32_t out_at, out_end; /* a stream's bytes that are to be sent */
    uint32_t frame;           /* bytes of the frame that tv_net_next has found, with what stands before it */
    uint64_t connections, violations;
    uint8_t in[TV_NET_ROOM], out[TV_NET_ROOM];
};

struct tv_net_link *tv_net_link_new(int kind, int fd, int listen_fd);
void tv_net_link_free(struct tv_net_link *link);
int tv_net_link_to(struct tv_net_link *link, const char *path, uint32_t length);
void tv_net_link_drop(struct tv_net_link *link);

int tv_net_dial(struct tv_net_link *link);
int tv_net_accept(struct tv_net_link *link);
void tv_net_hang_up(struct tv_net_link *link);
int tv_net_next(struct tv_net_link *link, struct tv_vnet_header *header, const uint8_t **data, uint32_t *length);
void tv_net_taken(struct tv_net_link *link);
int tv_net_send(struct tv_net_link *link, const struct tv_vnet_header *header, struct iovec *iov, uint32_t count,
                uint32_t length);
int tv_net_flush(struct tv_net_link *link);

#endif
