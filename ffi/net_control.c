/* virtio-net's control queue (virtio 1.2 section 5.1.6.5), and what a tap is told of it. */
#include <linux/if.h>
#include <linux/if_tun.h>
#include <string.h>
#include <sys/ioctl.h>

#include "net.h"

#define CLASS_MAC 1
#define CLASS_ANNOUNCE 3
#define CLASS_MQ 4
#define CLASS_OFFLOADS 5
#define MAC_ADDR_SET 1
#define ANNOUNCE_ACK 0
#define MQ_PAIRS_SET 0
#define OFFLOADS_SET 0
#define OK 0
#define ERR 1

uint64_t tv_net_mac(const uint8_t mac[6])
{
    uint64_t packed = 0;
    for (int i = 5; i >= 0; i--)
        packed = packed << 8 | mac[i];
    return packed;
}

/* A command's data, if it is all there. */
static int read_data(const struct tv_chain *chain, void *into, uint64_t length)
{
    return tv_chain_read(chain, 2, into, length) == length;
}

static int set_mac(struct tv_net *net, const struct tv_chain *chain)
{
    uint8_t mac[6];
    if (!(net->features & TV_NET_F_CTRL_MAC_ADDR) || !read_data(chain, mac, sizeof mac))
        return ERR;
    __atomic_store_n(&net->mac, tv_net_mac(mac), __ATOMIC_SEQ_CST);
    return OK;
}

static int set_pairs(struct tv_net *net, const struct tv_chain *chain)
{
    uint16_t pairs;
    if (!(net->features & TV_NET_F_MQ) || !read_data(chain, &pairs, sizeof pairs))
        return ERR;
    if (!pairs || pairs > net->max_pairs)
        return ERR;
    __atomic_store_n(&net->pairs, pairs, __ATOMIC_SEQ_CST);
    tv_net_apply(net);
    return OK;
}

static int set_offloads(struct tv_net *net, const struct tv_chain *chain)
{
    uint64_t offloads;
    if (!(net->features & TV_NET_F_CTRL_GUEST_OFFLOADS) || !read_data(chain, &offloads, sizeof offloads))
        return ERR;
    if (offloads & ~(net->features & TV_NET_GUEST_OFFLOADS))
        return ERR;
    __atomic_store_n(&net->offloads, offloads, __ATOMIC_SEQ_CST);
    tv_net_apply(net);
    return OK;
}

static int acknowledge(struct tv_net *net)
{
    if (!(net->features & TV_NET_F_GUEST_ANNOUNCE))
        return ERR;
    __atomic_and_fetch(&net->status, ~TV_NET_S_ANNOUNCE, __ATOMIC_SEQ_CST);
    return OK;
}

/* One command: class, command, data; the answer is the first writable byte. */
int64_t tv_net_control(struct tv_net_worker *self, struct tv_queue *queue, const struct tv_chain *chain)
{
    uint8_t header[2], answer = ERR;
    if (!chain->writable_bytes) {
        queue->broken = TV_BROKEN_REQUEST;
        return 0;
    }
    if (tv_chain_read(chain, 0, header, sizeof header) == sizeof header) {
        switch (header[0] << 8 | header[1]) {
        case CLASS_MAC << 8 | MAC_ADDR_SET:
            answer = (uint8_t)set_mac(self->net, chain);
            break;
        case CLASS_ANNOUNCE << 8 | ANNOUNCE_ACK:
            answer = (uint8_t)acknowledge(self->net);
            break;
        case CLASS_MQ << 8 | MQ_PAIRS_SET:
            answer = (uint8_t)set_pairs(self->net, chain);
            break;
        case CLASS_OFFLOADS << 8 | OFFLOADS_SET:
            answer = (uint8_t)set_offloads(self->net, chain);
            break;
        }
    }
    tv_net_add(&self->counts.commands, 1);
    tv_net_add(&self->counts.refused, answer);
    tv_chain_write(queue->memory, chain, 0, &answer, 1);
    return 1;
}

/* --- the tap ----------------------------------------------------------------------------------------------------- */

static void tell_offloads(int fd, uint64_t offloads)
{
    struct tv_vnet_allowed wanted = tv_vnet_to_driver(offloads);
    unsigned long flags = 0;
    if (wanted.checksum)
        flags |= TUN_F_CSUM;
    if (wanted.tso4)
        flags |= TUN_F_TSO4;
    if (wanted.tso6)
        flags |= TUN_F_TSO6;
    if (wanted.ecn)
        flags |= TUN_F_TSO_ECN;
    if (ioctl(fd, TUNSETOFFLOAD, wanted.ufo ? flags | TUN_F_UFO : flags) && wanted.ufo)
        ioctl(fd, TUNSETOFFLOAD, flags); /* a kernel without UFO gives less, which nobody misses */
}

/* In a worker, which may wait for the kernel's network lock: a tap gives what the driver can take, on the queues that
 * it serves. Harmless on links that are none. */
void tv_net_apply(struct tv_net *net)
{
    uint32_t pairs = __atomic_load_n(&net->pairs, __ATOMIC_SEQ_CST);
    uint64_t offloads = __atomic_load_n(&net->offloads, __ATOMIC_SEQ_CST);
    for (uint32_t at = 0; at < net->max_pairs; at++) {
        struct tv_net_link *link = net->links[at];
        if (!link || link->kind != TV_NET_TAP || link->fd < 0)
            continue;
        if (at == 0)
            tell_offloads(link->fd, offloads);
        if (net->max_pairs > 1) { /* fails where it is so already */
            struct ifreq request = {.ifr_flags = at < pairs ? IFF_ATTACH_QUEUE : IFF_DETACH_QUEUE};
            ioctl(link->fd, TUNSETQUEUE, &request);
        }
    }
}
