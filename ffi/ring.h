/* Split virtqueues, device side (virtio 1.2 section 2.7).
 *
 * Everything in the rings is written by a hostile guest while we read it. Invariants
 *  - Each descriptor, ring entry and header is read once, into private memory; what is checked is what is used.
 *  - A walk is bounded by the queue size, an indirect table too; indirect tables don't nest.
 *  - Every address is checked against one RAM region, with its whole length, before it becomes a pointer.
 *  - Pages are marked dirty after they are written and before the guest is told: that is tv_queue_publish.
 *  - A struct tv_queue belongs to one worker thread while it runs, to Python otherwise.
 *  - A guest's mistake makes the queue `broken`: nothing more is taken from it until the device is reset.
 *
 * Chains are taken one by one (pop), perhaps several for one packet (virtio 1.2 section 5.1.6.4, mergeable buffers),
 * and either pushed or given back (rewind). Pushed ones are the driver's when they are published, all at once: it sees
 * several chains of one packet together, and one index and one interrupt do for many requests.
 */
#ifndef TV_RING_H
#define TV_RING_H
#include <stdint.h>
#include <sys/uio.h>

#include "irq.h"
#include "memory.h"

#define TV_QUEUE_MAX 1024        /* largest queue size that any device offers: bounds a chain */
#define TV_CHAIN_BYTES (1u << 30) /* more in one request is a mistake, and would overflow `used.len` sums */

enum tv_broken {
    TV_QUEUE_FINE = 0,
    TV_BROKEN_AVAIL_JUMP = 1,   /* avail.idx runs further ahead than the queue is long */
    TV_BROKEN_HEAD = 2,         /* a head index outside the table */
    TV_BROKEN_NEXT = 3,         /* a next index outside the table */
    TV_BROKEN_LOOP = 4,         /* a chain longer than the queue */
    TV_BROKEN_ADDRESS = 5,      /* a buffer outside RAM */
    TV_BROKEN_INDIRECT = 6,     /* an indirect table that is nested, empty, oversized, or was not negotiated */
    TV_BROKEN_ORDER = 7,        /* a readable buffer after a writable one */
    TV_BROKEN_TOO_LONG = 8,     /* more than TV_CHAIN_BYTES in one chain */
    TV_BROKEN_REQUEST = 9,      /* the device type's own rules: no room for an answer */
};

enum tv_armed { TV_PERHAPS_ARMED, TV_ARMED, TV_DISARMED }; /* what the driver was told of notifications */

struct tv_queue {
    struct tv_memory *memory;
    struct tv_irq *irq;
    uint64_t desc_gpa, avail_gpa, used_gpa;
    uint8_t *desc, *avail, *used;
    struct tv_region *near; /* where the last buffer was that was looked for in all of RAM */
    uint16_t index; /* the device's number of this queue */
    uint16_t size;
    uint16_t next_avail, next_used; /* next_used is the used index that the driver sees */
    uint16_t taken;     /* chains popped and not published yet, nor given back; at most `size` */
    uint16_t pushed;    /* of these: in the used ring already */
    uint16_t signalled; /* used index at the last interrupt decision */
    uint8_t signalled_valid;
    uint8_t event_idx, indirect;
    uint8_t armed;    /* enum tv_armed, without EVENT_IDX */
    uint8_t wrote;    /* more than a status byte since the last publication */
    int broken;
    uint64_t chains, interrupts;
};

struct tv_chain {
    uint16_t head;
    uint32_t readable, writable; /* segments: readable first */
    uint64_t readable_bytes, writable_bytes;
    struct iovec iov[TV_QUEUE_MAX];
    uint64_t gpa[TV_QUEUE_MAX];
};

int tv_queue_open(struct tv_queue *queue);
int tv_queue_pop(struct tv_queue *queue, struct tv_chain *chain);
void tv_queue_rewind(struct tv_queue *queue, uint16_t chains);
void tv_queue_push(struct tv_queue *queue, uint16_t head, uint32_t length);
int tv_queue_publish(struct tv_queue *queue);
void tv_queue_disarm(struct tv_queue *queue);
int tv_queue_rearm(struct tv_queue *queue);
uint64_t tv_chain_read(const struct tv_chain *chain, uint64_t offset, void *to, uint64_t length);
uint64_t tv_chain_write(struct tv_memory *memory, const struct tv_chain *chain, uint64_t offset, const void *from,
                        uint64_t length);
uint32_t tv_chain_slice(const struct tv_chain *chain, int writable, uint64_t offset, uint64_t length,
                        struct iovec *out);
void tv_chain_mark_written(struct tv_memory *memory, const struct tv_chain *chain, uint64_t length);

#endif
