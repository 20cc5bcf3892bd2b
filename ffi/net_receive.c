/* A received frame and the driver's buffers. */
#include "net.h"

/* At the end of those that there are, before they are given back: the driver is to ring for the next one, since fewer
 * than these were not enough. 1: it has come meanwhile. */
static int ask_for_buffers(struct tv_queue *queue)
{
    tv_queue_publish(queue); /* first: the driver may have nothing more before it hears of these */
    return tv_queue_rearm(queue);
}

/* Into one buffer, or with MRG_RXBUF into as many as it takes (section 5.1.6.4). Nothing of it is the driver's before
 * all of it is there. */
static enum tv_net_delivered put(struct tv_net_worker *self, struct tv_queue *queue, struct tv_vnet_header *header,
                                 const uint8_t *data, uint32_t length)
{
    int mergeable = !!(self->net->features & TV_NET_F_MRG_RXBUF);
    uint16_t heads[TV_QUEUE_MAX];
    uint32_t lengths[TV_QUEUE_MAX], done = 0, used = 0;
    header->num_buffers = 1;
    while (!used || done < length) {
        struct tv_chain *chain = used ? &self->worker.chain : &self->first;
        uint32_t before = used ? 0 : TV_NET_HEADER, left = length - done;
        int got = used && !mergeable ? 0 : tv_queue_pop(queue, chain);
        if (got <= 0) {
            int never = used && (!mergeable || used == queue->size);
            int more = got == 0 && !never && ask_for_buffers(queue);
            tv_queue_rewind(queue, (uint16_t)used);
            return got < 0 ? TV_NET_BROKEN : never ? TV_NET_TOO_LONG : more ? TV_NET_AGAIN : TV_NET_NO_BUFFER;
        }
        if (chain->writable_bytes <= before) {
            tv_queue_rewind(queue, (uint16_t)(used + 1));
            queue->broken = TV_BROKEN_REQUEST; /* no room for a header, or for anything */
            return TV_NET_BROKEN;
        }
        uint64_t room = chain->writable_bytes - before;
        uint32_t part = room < left ? (uint32_t)room : left;
        if (before)
            tv_chain_write(queue->memory, chain, 0, header, TV_NET_HEADER);
        tv_chain_write(queue->memory, chain, before, data + done, part);
        heads[used] = chain->head;
        lengths[used++] = before + part;
        done += part;
    }
    if (used > 1) {
        header->num_buffers = (uint16_t)used;
        tv_chain_write(queue->memory, &self->first, 0, header, TV_NET_HEADER);
    }
    for (uint32_t i = 0; i < used; i++)
        tv_queue_push(queue, heads[i], lengths[i]);
    return TV_NET_DELIVERED;
}

/* One frame that is there. */
enum tv_net_delivered tv_net_deliver(struct tv_net_worker *self, struct tv_queue *queue, struct tv_vnet_header *header,
                                     const uint8_t *data, uint32_t length)
{
    struct tv_vnet_allowed allowed =
        tv_vnet_to_driver(__atomic_load_n(&self->net->offloads, __ATOMIC_RELAXED));
    if (length < TV_NET_FRAME_MIN || length > TV_NET_FRAME_MAX || tv_vnet_check(header, length, &allowed)) {
        tv_net_add(&self->counts.rx_malformed, 1);
        return TV_NET_DELIVERED;
    }
    enum tv_net_delivered how = put(self, queue, header, data, length);
    if (how == TV_NET_DELIVERED) {
        tv_net_add(&self->counts.rx_frames, 1);
        tv_net_add(&self->counts.rx_bytes, length);
    } else if (how == TV_NET_TOO_LONG) {
        tv_net_add(&self->counts.rx_long, 1);
    }
    return how;
}
