#include "ring.h"

#include <string.h>

#define DESC_NEXT 1u
#define DESC_WRITE 2u
#define DESC_INDIRECT 4u
#define AVAIL_NO_INTERRUPT 1u
#define USED_NO_NOTIFY 1u

void tv_irq_signal(struct tv_irq *irq, uint32_t bit)
{
    tv_irq_raise(irq, bit);
}

/* Any thread. The old eventfd stays open: a worker may be about to write to it. */
void tv_irq_set_fd(struct tv_irq *irq, int fd)
{
    __atomic_store_n(&irq->fd, fd, __ATOMIC_SEQ_CST);
}

/* Read-to-clear, as the guest reads the ISR register. */
uint32_t tv_isr_take(uint32_t *isr)
{
    return __atomic_exchange_n(isr, 0, __ATOMIC_SEQ_CST);
}

static inline uint16_t load16(const uint8_t *at)
{
    return __atomic_load_n((const uint16_t *)at, __ATOMIC_ACQUIRE);
}

static inline void store16(uint8_t *at, uint16_t value)
{
    __atomic_store_n((uint16_t *)at, value, __ATOMIC_RELEASE);
}

/* Where a free-running index is in a ring: tv_queue_open has seen to it that the size is a power of two. */
static inline uint32_t slot(const struct tv_queue *queue, uint16_t index)
{
    return index & (queue->size - 1u);
}

static __attribute__((cold, noinline)) int broken(struct tv_queue *queue, int why)
{
    queue->broken = why;
    return -1;
}

/* Turn the ring addresses into pointers. 0, or -1 when a ring is not wholly in one region or misaligned. */
int tv_queue_open(struct tv_queue *queue)
{
    uint64_t size = queue->size;
    if (!size || size > TV_QUEUE_MAX || size & (size - 1))
        return -1;
    if (queue->desc_gpa % 16 || queue->avail_gpa % 2 || queue->used_gpa % 4)
        return -1;
    queue->desc = tv_ptr(queue->memory, queue->desc_gpa, 16 * size);
    queue->avail = tv_ptr(queue->memory, queue->avail_gpa, 6 + 2 * size);
    queue->used = tv_ptr(queue->memory, queue->used_gpa, 6 + 8 * size);
    queue->near = tv_region_of(queue->memory, queue->desc_gpa, 16 * size);
    queue->signalled_valid = queue->wrote = 0;
    queue->armed = TV_PERHAPS_ARMED; /* a worker before this one may have ended in the middle of its work */
    queue->taken = queue->pushed = 0;
    queue->broken = 0;
    return queue->desc && queue->avail && queue->used ? 0 : -1;
}

/* Eight bytes of guest memory, read once: what is in a register the compiler can't fetch again. */
static inline uint64_t read_once(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof value);
    __asm__ volatile("" : "+r"(value));
    return value;
}

/* The region that holds a buffer. One is mostly in the same as the one before it, which is tried first; `near` is a
 * region that devices may use, since tv_region_of gave it. */
static __attribute__((noinline)) struct tv_region *look_up(struct tv_queue *queue, uint64_t gpa, uint32_t len)
{
    struct tv_region *region = tv_region_of(queue->memory, gpa, len);
    if (region)
        queue->near = region;
    return region;
}

static inline struct tv_region *region_near(struct tv_queue *queue, struct tv_region *near, uint64_t gpa, uint32_t len)
{
    uint64_t offset = gpa - near->gpa; /* wraps to more than any size where gpa is less */
    if (__builtin_expect(offset <= near->size && len <= near->size - offset, 1))
        return near;
    return look_up(queue, gpa, len);
}

/* The table that an indirect descriptor names, or NULL and the queue broken. */
static __attribute__((noinline)) const uint8_t *indirect_table(struct tv_queue *queue, uint64_t gpa, uint64_t rest,
                                                                int nested)
{
    uint32_t len = (uint32_t)rest;
    const uint8_t *table = NULL;
    if (!nested && queue->indirect && !(rest >> 32 & DESC_NEXT) && len && len % 16 == 0 && len / 16 <= queue->size)
        table = tv_ptr(queue->memory, gpa, len);
    if (!table)
        broken(queue, TV_BROKEN_INDIRECT);
    return table;
}

/* Walk the chain from `index` of the queue's own table, and on in an indirect one: of either at most as many
 * descriptors as it has. Readable segments come before writable ones, so counting both is enough to see the order. */
static inline int walk(struct tv_queue *queue, struct tv_chain *chain, uint32_t index)
{
    const uint8_t *table = queue->desc;
    struct tv_region *region = queue->near;
    uint32_t entries = queue->size, budget = entries, segments = 0, readable = 0;
    uint64_t bytes = 0, readable_bytes = 0;
    int nested = 0;
    for (;;) {
        if (!budget--)
            return broken(queue, TV_BROKEN_LOOP);
        uint64_t addr = read_once(table + 16ull * index), rest = read_once(table + 16ull * index + 8);
        uint32_t len = (uint32_t)rest;
        if (__builtin_expect(rest >> 32 & DESC_INDIRECT, 0)) {
            table = indirect_table(queue, addr, rest, nested);
            if (!table)
                return -1;
            entries = budget = len / 16;
            index = 0;
            nested = 1;
            continue;
        }
        uint32_t reads = !(rest >> 32 & DESC_WRITE);
        if (reads && segments != readable)
            return broken(queue, TV_BROKEN_ORDER);
        if (__builtin_expect(len, 1)) {
            region = region_near(queue, region, addr, len);
            if (!region)
                return broken(queue, TV_BROKEN_ADDRESS);
            if (segments == TV_QUEUE_MAX)
                return broken(queue, TV_BROKEN_LOOP);
            chain->iov[segments] = (struct iovec){region->hva + (addr - region->gpa), len};
            chain->gpa[segments] = addr;
            segments++;
            readable += reads;
            bytes += len;
            readable_bytes += reads ? len : 0;
            if (bytes > TV_CHAIN_BYTES)
                return broken(queue, TV_BROKEN_TOO_LONG);
        }
        if (!(rest >> 32 & DESC_NEXT))
            break;
        index = (uint32_t)(rest >> 48);
        if (index >= entries)
            return broken(queue, TV_BROKEN_NEXT);
    }
    chain->readable = readable;
    chain->writable = segments - readable;
    chain->readable_bytes = readable_bytes;
    chain->writable_bytes = bytes - readable_bytes;
    return 0;
}

/* Take the next chain. 1 taken, 0 none there, -1 the queue is broken (see queue->broken). */
int tv_queue_pop(struct tv_queue *queue, struct tv_chain *chain)
{
    if (queue->broken)
        return -1;
    uint16_t waiting = (uint16_t)(load16(queue->avail + 2) - queue->next_avail);
    if (!waiting)
        return 0;
    if (waiting > queue->size - queue->taken)
        return broken(queue, TV_BROKEN_AVAIL_JUMP);
    uint16_t head = load16(queue->avail + 4 + 2 * slot(queue, queue->next_avail));
    if (head >= queue->size)
        return broken(queue, TV_BROKEN_HEAD);
    chain->head = head;
    if (walk(queue, chain, head))
        return -1;
    queue->next_avail++;
    queue->taken++;
    queue->chains++;
    return 1;
}

/* Give back the last `chains` that were popped, none of which was pushed: they are the next to be popped again. */
void tv_queue_rewind(struct tv_queue *queue, uint16_t chains)
{
    if (chains > queue->taken - queue->pushed)
        chains = queue->taken - queue->pushed;
    queue->next_avail -= chains;
    queue->taken -= chains;
    queue->chains -= chains;
}

/* Put a popped chain into the used ring, where the driver does not look before tv_queue_publish. Its data pages are
 * marked already. `length`: bytes written from the first writable one on. */
void tv_queue_push(struct tv_queue *queue, uint16_t head, uint32_t length)
{
    uint16_t at = (uint16_t)(queue->next_used + queue->pushed);
    uint64_t element = head | (uint64_t)length << 32; /* id and len, little-endian */
    memcpy(queue->used + 4 + 8 * slot(queue, at), &element, sizeof element);
    queue->pushed++;
    queue->wrote |= length > 1;
}

/* The used elements that were pushed, and the index after them: one atomic step a page, and not one an element. */
static void mark_pushed(struct tv_queue *queue)
{
    uint32_t first = slot(queue, queue->next_used), count = queue->pushed;
    uint32_t before_wrap = queue->size - first < count ? queue->size - first : count;
    tv_mark_dirty(queue->memory, queue->used_gpa + 4 + 8ull * first, 8ull * before_wrap);
    tv_mark_dirty(queue->memory, queue->used_gpa + 4, 8ull * (count - before_wrap));
}

/* Whether the driver wants to hear of the step from `before` to the used index (sections 2.7.7 and 2.7.10). */
static int wants_interrupt(struct tv_queue *queue, uint16_t before)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* our used index before the driver's wish */
    if (!queue->event_idx)
        return !(load16(queue->avail) & AVAIL_NO_INTERRUPT);
    uint16_t now = queue->next_used, event = load16(queue->avail + 4 + 2 * queue->size);
    return !queue->signalled_valid || (uint16_t)(now - event - 1) < (uint16_t)(now - before);
}

/* Everything that was pushed is the driver's, with one step of the used index, and one interrupt if it wants one. This
 * is the moment in which a guest can learn of what was written for it: whoever must know earlier is told here. A lone
 * status byte is not worth that. Gives whether there was an interrupt. */
int tv_queue_publish(struct tv_queue *queue)
{
    if (!queue->pushed)
        return 0;
    if (queue->wrote)
        tv_memory_before_told(queue->memory);
    mark_pushed(queue);
    queue->next_used += queue->pushed;
    queue->taken -= queue->pushed;
    queue->pushed = queue->wrote = 0;
    store16(queue->used + 2, queue->next_used);
    tv_mark_dirty(queue->memory, queue->used_gpa + 2, 2);
    int wanted = wants_interrupt(queue, queue->signalled);
    queue->signalled = queue->next_used;
    queue->signalled_valid = 1;
    if (wanted) {
        queue->interrupts++;
        tv_irq_raise(queue->irq, TV_ISR_QUEUE);
    }
    return wanted;
}

static void set_used_flags(struct tv_queue *queue, uint16_t flags)
{
    store16(queue->used, flags);
    tv_mark_dirty(queue->memory, queue->used_gpa, 2);
}

/* No notifications, please: somebody looks at the queue anyway. With EVENT_IDX that is so until tv_queue_rearm, since
 * the driver has passed the index that it was asked for. */
void tv_queue_disarm(struct tv_queue *queue)
{
    if (queue->event_idx || queue->armed == TV_DISARMED)
        return;
    queue->armed = TV_DISARMED;
    set_used_flags(queue, USED_NO_NOTIFY);
}

/* Ask for a notification of the next chain. 1 when one came in meanwhile, so that nobody will notify us of it. */
int tv_queue_rearm(struct tv_queue *queue)
{
    if (queue->event_idx) {
        uint64_t offset = 4 + 8ull * queue->size;
        store16(queue->used + offset, queue->next_avail);
        tv_mark_dirty(queue->memory, queue->used_gpa + offset, 2);
    } else if (queue->armed != TV_ARMED) {
        queue->armed = TV_ARMED;
        set_used_flags(queue, 0);
    }
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* our wish before the driver's avail index */
    return load16(queue->avail + 2) != queue->next_avail;
}

/* The part [offset, offset + length) of the readable (or writable) bytes as an iovec; gives the segments. `out` has
 * room for TV_QUEUE_MAX. */
uint32_t tv_chain_slice(const struct tv_chain *chain, int writable, uint64_t offset, uint64_t length,
                        struct iovec *out)
{
    uint32_t first = writable ? chain->readable : 0;
    uint32_t count = writable ? chain->writable : chain->readable;
    uint32_t used = 0;
    for (uint32_t i = first; i < first + count && length; i++) {
        uint64_t size = chain->iov[i].iov_len;
        if (offset >= size) {
            offset -= size;
            continue;
        }
        uint64_t part = size - offset < length ? size - offset : length;
        out[used++] = (struct iovec){(uint8_t *)chain->iov[i].iov_base + offset, part};
        length -= part;
        offset = 0;
    }
    return used;
}

/* Copy readable bytes from `offset`; gives how many there were. */
uint64_t tv_chain_read(const struct tv_chain *chain, uint64_t offset, void *to, uint64_t length)
{
    uint64_t copied = 0;
    for (uint32_t i = 0; i < chain->readable && copied < length; i++) {
        uint64_t size = chain->iov[i].iov_len;
        if (offset >= size) {
            offset -= size;
            continue;
        }
        uint64_t part = size - offset < length - copied ? size - offset : length - copied;
        memcpy((uint8_t *)to + copied, (uint8_t *)chain->iov[i].iov_base + offset, part);
        copied += part;
        offset = 0;
    }
    return copied;
}

/* Copy into the writable bytes from `offset` and mark them dirty; gives how many fitted. */
uint64_t tv_chain_write(struct tv_memory *memory, const struct tv_chain *chain, uint64_t offset, const void *from,
                        uint64_t length)
{
    uint64_t copied = 0;
    for (uint32_t i = chain->readable; i < chain->readable + chain->writable && copied < length; i++) {
        uint64_t size = chain->iov[i].iov_len;
        if (offset >= size) {
            offset -= size;
            continue;
        }
        uint64_t part = size - offset < length - copied ? size - offset : length - copied;
        memcpy((uint8_t *)chain->iov[i].iov_base + offset, (const uint8_t *)from + copied, part);
        tv_mark_dirty(memory, chain->gpa[i] + offset, part);
        copied += part;
        offset = 0;
    }
    return copied;
}

/* Mark the first `length` writable bytes dirty, after somebody (preadv) wrote them. */
void tv_chain_mark_written(struct tv_memory *memory, const struct tv_chain *chain, uint64_t length)
{
    for (uint32_t i = chain->readable; i < chain->readable + chain->writable && length; i++) {
        uint64_t part = chain->iov[i].iov_len < length ? chain->iov[i].iov_len : length;
        tv_mark_dirty(memory, chain->gpa[i], part);
        length -= part;
    }
}
