#include "net_header.h"

#include <string.h>

#define NEEDS_CSUM 1u
#define DATA_VALID 2u
#define GSO_NONE 0u
#define GSO_TCPV4 1u
#define GSO_UDP 3u
#define GSO_TCPV6 4u
#define GSO_ECN 0x80u

_Static_assert(sizeof(struct tv_vnet_header) == TV_NET_HEADER, "as on the wire");

/* Of frames that the driver sends: of features that need others it may have taken one alone. */
struct tv_vnet_allowed tv_vnet_from_driver(uint64_t features)
{
    uint8_t checksum = !!(features & TV_NET_F_CSUM);
    uint8_t tso4 = checksum && features & TV_NET_F_HOST_TSO4, tso6 = checksum && features & TV_NET_F_HOST_TSO6;
    return (struct tv_vnet_allowed){
        .checksum = checksum,
        .tso4 = tso4,
        .tso6 = tso6,
        .ecn = (tso4 || tso6) && features & TV_NET_F_HOST_ECN,
        .ufo = checksum && features & TV_NET_F_HOST_UFO,
    };
}

/* Of frames that go to it, with the offloads that it has switched on. */
struct tv_vnet_allowed tv_vnet_to_driver(uint64_t offloads)
{
    uint8_t checksum = !!(offloads & TV_NET_F_GUEST_CSUM);
    uint8_t tso4 = checksum && offloads & TV_NET_F_GUEST_TSO4, tso6 = checksum && offloads & TV_NET_F_GUEST_TSO6;
    return (struct tv_vnet_allowed){
        .checksum = checksum,
        .tso4 = tso4,
        .tso6 = tso6,
        .ecn = (tso4 || tso6) && offloads & TV_NET_F_GUEST_ECN,
        .ufo = checksum && offloads & TV_NET_F_GUEST_UFO,
        .valid = checksum,
    };
}

/* Makes of a header in private memory one that may go on with its frame of `length` bytes: 0, or -1 where it asks for
 * what can't be. Fields that mean nothing become 0. */
int tv_vnet_check(struct tv_vnet_header *header, uint64_t length, const struct tv_vnet_allowed *allowed)
{
    struct tv_vnet_header made = {.num_buffers = 0};
    if (header->flags & NEEDS_CSUM) {
        uint32_t start = header->csum_start, end = start + header->csum_offset + 2u;
        if (!allowed->checksum || start < TV_NET_FRAME_MIN || end > length)
            return -1;
        made.flags = NEEDS_CSUM;
        made.csum_start = header->csum_start;
        made.csum_offset = header->csum_offset;
    } else if (header->flags & DATA_VALID && allowed->valid) {
        made.flags = DATA_VALID;
    }
    if (header->gso_type != GSO_NONE) {
        uint8_t type = header->gso_type & (uint8_t)~GSO_ECN;
        int may = type == GSO_TCPV4 ? allowed->tso4 : type == GSO_TCPV6 ? allowed->tso6
                  : type == GSO_UDP ? allowed->ufo : 0;
        if (!may || (header->gso_type & GSO_ECN && (!allowed->ecn || type == GSO_UDP)))
            return -1;
        if (made.flags != NEEDS_CSUM || !header->gso_size || header->hdr_len > length)
            return -1;
        made.gso_type = header->gso_type;
        made.gso_size = header->gso_size;
        made.hdr_len = header->hdr_len;
    }
    *header = made;
    return 0;
}
