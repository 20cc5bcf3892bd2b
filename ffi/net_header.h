/* The virtio-net header (virtio 1.2 section 5.1.6), and what of it may be believed.
 *
 * A guest writes one before each frame that it sends, a tap (or a peer) one before each that it gives. It names offsets
 * into the frame and work that somebody shall do there, so it goes on only after tv_vnet_check: what passes points into
 * its frame, and asks for what was negotiated and nothing else.
 */
#ifndef TV_NET_HEADER_H
#define TV_NET_HEADER_H
#include <stdint.h>

#define TV_NET_HEADER 12u      /* with VERSION_1 it always has num_buffers */
#define TV_NET_FRAME_MIN 14u   /* an Ethernet header */
#define TV_NET_FRAME_MAX 65550u /* section 5.1.6.3.1: the longest TCP or UDP packet and its Ethernet header */

#define TV_NET_F_CSUM (1ull << 0)
#define TV_NET_F_GUEST_CSUM (1ull << 1)
#define TV_NET_F_CTRL_GUEST_OFFLOADS (1ull << 2)
#define TV_NET_F_MTU (1ull << 3)
#define TV_NET_F_MAC (1ull << 5)
#define TV_NET_F_GUEST_TSO4 (1ull << 7)
#define TV_NET_F_GUEST_TSO6 (1ull << 8)
#define TV_NET_F_GUEST_ECN (1ull << 9)
#define TV_NET_F_GUEST_UFO (1ull << 10)
#define TV_NET_F_HOST_TSO4 (1ull << 11)
#define TV_NET_F_HOST_TSO6 (1ull << 12)
#define TV_NET_F_HOST_ECN (1ull << 13)
#define TV_NET_F_HOST_UFO (1ull << 14)
#define TV_NET_F_MRG_RXBUF (1ull << 15)
#define TV_NET_F_STATUS (1ull << 16)
#define TV_NET_F_CTRL_VQ (1ull << 17)
#define TV_NET_F_GUEST_ANNOUNCE (1ull << 21)
#define TV_NET_F_MQ (1ull << 22)
#define TV_NET_F_CTRL_MAC_ADDR (1ull << 23)

#define TV_NET_GUEST_OFFLOADS                                                                                          \
    (TV_NET_F_GUEST_CSUM | TV_NET_F_GUEST_TSO4 | TV_NET_F_GUEST_TSO6 | TV_NET_F_GUEST_ECN | TV_NET_F_GUEST_UFO)
#define TV_NET_HOST_OFFLOADS                                                                                           \
    (TV_NET_F_CSUM | TV_NET_F_HOST_TSO4 | TV_NET_F_HOST_TSO6 | TV_NET_F_HOST_ECN | TV_NET_F_HOST_UFO)

struct tv_vnet_header {
    uint8_t flags, gso_type;
    uint16_t hdr_len, gso_size, csum_start, csum_offset, num_buffers;
};

/* What one direction may ask for. */
struct tv_vnet_allowed {
    uint8_t checksum, tso4, tso6, ecn, ufo, valid; /* `valid`: the flag that says a checksum was looked at */
};

struct tv_vnet_allowed tv_vnet_from_driver(uint64_t features);
struct tv_vnet_allowed tv_vnet_to_driver(uint64_t offloads);
int tv_vnet_check(struct tv_vnet_header *header, uint64_t length, const struct tv_vnet_allowed *allowed);

#endif
