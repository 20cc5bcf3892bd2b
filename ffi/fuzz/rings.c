/* Hostile rings through the walker and the worker's turns (ffi/ring.c, ffi/worker.c).
 *
 * A case is a small RAM of regions, some with a neighbour and some with a hole behind, one to three queues in it whose
 * rings and descriptors are wrong in every way that a driver can think of, and a guest that goes on writing between
 * turns and in the middle of a request. A device reads and writes the chains that it is given. Then:
 *  - every segment lies, whole, in one region, and is where its address says;
 *  - nothing changed but the used rings and the writable segments of chains that were taken;
 *  - whatever changed is marked dirty;
 *  - every turn ends, and a broken queue gives nothing any more.
 *
 * links: ring.c worker.c park.c
 * short: 20000
 * full: 1000000
 */
#define _GNU_SOURCE
#include "fuzz.h"

#include <sys/eventfd.h>

#include "ram.h"
#include "worker.h"

#define TURNS 12
#define DEVICE_BYTES 4096 /* a device reads and writes of one chain, mostly */

enum { NEXT = 1, WRITE = 2, INDIRECT = 4 };

static struct tv_worker *worker;
static struct tv_chain *other;
static struct fuzz *random_of; /* of the case under way */
static uint32_t isr;
static struct tv_irq irq = {.fd = -1, .isr = &isr};
static uint64_t now_ns;
static unsigned turns;
static struct {
    uint64_t refused, chains, broken[10], rewound, told;
} met;

/* Also the worker's clock: a case depends on nothing but its number. */
int clock_gettime(clockid_t clock, struct timespec *now)
{
    (void)clock;
    now_ns += random_of && fuzz_one_in(random_of, 16) ? fuzz_below(random_of, 2000000) : 300;
    *now = (struct timespec){(time_t)(now_ns / 1000000000u), (long)(now_ns % 1000000000u)};
    return 0;
}

/* --- what a hostile guest writes --------------------------------------------------------------------------------- */

static uint32_t some_length(struct fuzz *fuzz)
{
    static const uint32_t lengths[] = {0, 1, 2, 15, 16, 17, 32, 512, 4095, 4096, 4097, 0x2000, 0x8000, 0x8001,
                                       1u << 29, 1u << 30, 0x7fffffff, 0x80000000, 0xfffffff0, 0xffffffff};
    if (!fuzz_one_in(fuzz, 64))
        return (uint32_t)fuzz_below(fuzz, 64);
    return lengths[fuzz_below(fuzz, sizeof lengths / sizeof *lengths)];
}

/* Mostly inside; at the edges of regions, over them, in holes, where additions wrap. */
static uint64_t some_gpa(struct fuzz *fuzz, uint64_t length)
{
    uint64_t region = fuzz_below(fuzz, fuzz_one_in(fuzz, 4) ? memory.count : 2);
    uint64_t gpa = LAYOUT[region].gpa, size = LAYOUT[region].size;
    switch (fuzz_below(fuzz, 200)) {
    case 0:
    case 1:
        return gpa + size - length + fuzz_below(fuzz, 4); /* ends with the region, or a little after it */
    case 2:
        return gpa + size - fuzz_below(fuzz, length + 2); /* straddles */
    case 3:
        return gpa - fuzz_below(fuzz, length + 2);
    case 4:
        return 0 - fuzz_below(fuzz, length + 2); /* wraps */
    case 5:
        return fuzz_next(fuzz);
    case 6:
        return 1ull << fuzz_below(fuzz, 64);
    default:
        return gpa + fuzz_below(fuzz, size > length ? size - length + 1 : size);
    }
}

/* An index into a table of so many: mostly `good`, or just behind its end, or anywhere. */
static uint16_t some_index(struct fuzz *fuzz, uint64_t good, uint64_t entries)
{
    if (!fuzz_one_in(fuzz, 64))
        return (uint16_t)good;
    return (uint16_t)(fuzz_one_in(fuzz, 2) ? entries : fuzz_next(fuzz));
}

static void write_descriptor(struct fuzz *fuzz, uint64_t table, uint64_t at, uint64_t entries)
{
    struct {
        uint64_t addr;
        uint32_t len;
        uint16_t flags, next;
    } desc;
    desc.len = some_length(fuzz);
    desc.addr = some_gpa(fuzz, desc.len);
    if (memory.count == REGIONS && fuzz_one_in(fuzz, 3)) {
        desc.len = 1u << 29;
        desc.addr = LAYOUT[LARGE].gpa + fuzz_below(fuzz, desc.len);
    }
    desc.flags = (uint16_t)((fuzz_below(fuzz, 3) ? NEXT : 0) | (at > entries / 2 || fuzz_one_in(fuzz, 16) ? WRITE : 0));
    desc.next = some_index(fuzz, at + 1 < entries ? at + 1 : 0, entries);
    if (fuzz_one_in(fuzz, 12)) {
        desc.flags |= INDIRECT;
        if (!fuzz_one_in(fuzz, 8))
            desc.flags &= (uint16_t)~NEXT;
        desc.len = 16 * (uint32_t)fuzz_below(fuzz, entries + (fuzz_one_in(fuzz, 16) ? 3 : 1)) + (fuzz_one_in(fuzz, 64) ? 7 : 0);
        desc.addr = fuzz_one_in(fuzz, 32) ? table : some_gpa(fuzz, desc.len);
        for (uint32_t i = 0; i < desc.len / 16 && i < 32; i++) /* mostly no deeper */
            if (desc.addr != table) {
                struct fuzz inner = *fuzz;
                uint8_t bytes[16];
                uint64_t inside = some_gpa(&inner, 64);
                uint32_t length = (uint32_t)fuzz_below(&inner, 64);
                uint16_t flags = (uint16_t)(NEXT | (i > 2 ? WRITE : 0) | (fuzz_one_in(&inner, 64) ? INDIRECT : 0));
                uint16_t next = (uint16_t)(i + 1);
                if (i + 1 == desc.len / 16 || fuzz_one_in(&inner, 16))
                    flags &= (uint16_t)~NEXT;
                memcpy(bytes, &inside, 8);
                memcpy(bytes + 8, &length, 4);
                memcpy(bytes + 12, &flags, 2);
                memcpy(bytes + 14, &next, 2);
                guest_writes(desc.addr + 16ull * i, bytes, sizeof bytes);
                *fuzz = inner;
            }
    }
    guest_writes(table + 16 * at, &desc, sizeof desc);
}

/* Offer a few heads, now and then far too many, the same twice, or none that exists. */
static void offer(struct fuzz *fuzz, const struct tv_queue *queue)
{
    uint16_t index = 0, count = (uint16_t)fuzz_below(fuzz, queue->size + 1u);
    uint8_t *at = tv_ptr(&memory, queue->avail_gpa + 2, 2);
    if (at)
        memcpy(&index, at, 2);
    for (uint16_t i = 0; i < count; i++) {
        uint16_t head = some_index(fuzz, fuzz_below(fuzz, queue->size), queue->size);
        guest_writes(queue->avail_gpa + 4 + 2 * ((uint16_t)(index + i) % queue->size), &head, 2);
    }
    index = (uint16_t)(fuzz_one_in(fuzz, 32) ? fuzz_next(fuzz) : index + count);
    guest_writes(queue->avail_gpa + 2, &index, 2);
}

static void scribble(struct fuzz *fuzz, const struct tv_queue *queue)
{
    uint16_t word = (uint16_t)fuzz_next(fuzz);
    uint8_t bytes[24];
    switch (fuzz_below(fuzz, 6)) {
    case 0:
        guest_writes(queue->avail_gpa, &word, 2); /* flags */
        break;
    case 1:
        guest_writes(queue->avail_gpa + 4 + 2 * queue->size, &word, 2); /* used_event */
        break;
    case 2:
        guest_writes(queue->used_gpa + 2, &word, 2); /* the device's own index: it must not read it back */
        break;
    case 3:
        fuzz_fill(fuzz, bytes, sizeof bytes);
        guest_writes(some_gpa(fuzz, sizeof bytes), bytes, sizeof bytes);
        break;
    case 4:
        offer(fuzz, queue);
        break;
    default:
        write_descriptor(fuzz, queue->desc_gpa, fuzz_below(fuzz, queue->size), queue->size);
    }
}

/* --- the device -------------------------------------------------------------------------------------------------- */

static void check_chain(const struct tv_queue *queue, const struct tv_chain *chain)
{
    uint64_t readable = 0, writable = 0;
    FUZZ_CHECK(chain->head < queue->size);
    FUZZ_CHECK(queue->taken <= queue->size && queue->pushed <= queue->taken);
    FUZZ_CHECK((uint64_t)chain->readable + chain->writable <= TV_QUEUE_MAX);
    FUZZ_CHECK((uint64_t)chain->readable + chain->writable <= 2ull * queue->size);
    for (uint32_t i = 0; i < chain->readable + chain->writable; i++) {
        uint64_t length = chain->iov[i].iov_len, gpa = chain->gpa[i];
        int at = region_of(gpa, length);
        FUZZ_CHECK(length && at >= 0);
        FUZZ_CHECK(chain->iov[i].iov_base == memory.regions[at].hva + (gpa - LAYOUT[at].gpa));
        *(i < chain->readable ? &readable : &writable) += length;
        if (i >= chain->readable)
            allow(gpa, length);
    }
    FUZZ_CHECK(readable == chain->readable_bytes && writable == chain->writable_bytes);
    FUZZ_CHECK(readable + writable <= TV_CHAIN_BYTES);
}

/* Read, write and slice at offsets that may lie anywhere. Buffers are as long as they are said to be. */
static uint64_t use_chain(struct fuzz *fuzz, const struct tv_chain *chain)
{
    uint64_t length = fuzz_below(fuzz, fuzz_one_in(fuzz, 8) ? DEVICE_BYTES : 64);
    uint64_t from = fuzz_below(fuzz, chain->readable_bytes + 2), to = fuzz_below(fuzz, chain->writable_bytes + 2);
    uint8_t *buffer = malloc(length + 1);
    struct iovec *slice = malloc(TV_QUEUE_MAX * sizeof *slice);
    uint64_t sum = 0, room = from < chain->readable_bytes ? chain->readable_bytes - from : 0;
    memset(buffer, 0x5a, length + 1);
    FUZZ_CHECK(tv_chain_read(chain, from, buffer, length) == (room < length ? room : length));
    FUZZ_CHECK(buffer[length] == 0x5a);
    room = to < chain->writable_bytes ? chain->writable_bytes - to : 0;
    uint64_t wrote = tv_chain_write(&memory, chain, to, buffer, length);
    FUZZ_CHECK(wrote == (room < length ? room : length));
    uint32_t pieces = tv_chain_slice(chain, 1, to, length, slice);
    FUZZ_CHECK(pieces <= chain->writable);
    for (uint32_t i = 0; i < pieces; i++)
        sum += slice[i].iov_len;
    FUZZ_CHECK(sum == wrote);
    tv_chain_mark_written(&memory, chain, length);
    free(buffer);
    free(slice);
    return wrote;
}

static int64_t serve(struct tv_worker *at, struct tv_queue *queue, struct tv_chain *chain)
{
    struct fuzz *fuzz = random_of;
    check_chain(queue, chain);
    met.chains++;
    if (fuzz_one_in(fuzz, 8))
        scribble(fuzz, queue);
    uint64_t used = use_chain(fuzz, chain);
    if (fuzz_one_in(fuzz, 16)) { /* several chains for one packet: all of them are pushed, or those after it go back */
        uint16_t more = 0, keep = fuzz_one_in(fuzz, 2);
        for (; more < 3 && tv_queue_pop(queue, other) == 1; more++) {
            check_chain(queue, other);
            if (keep)
                tv_queue_push(queue, other->head, (uint32_t)fuzz_next(fuzz));
        }
        if (keep && more)
            return (int64_t)used;
        tv_queue_rewind(queue, more);
        met.rewound += more;
    }
    if (fuzz_one_in(fuzz, 32))
        tv_worker_publish(at);
    switch (fuzz_below(fuzz, 48)) {
    case 0:
        return TV_NOT_NOW;
    case 1:
        return TV_AGAIN;
    case 2:
        return TV_STOPPED;
    case 3:
        queue->broken = queue->broken ? queue->broken : TV_BROKEN_REQUEST;
        return 0;
    default:
        return (int64_t)used;
    }
}

static void on_ready(struct tv_worker *at, uint32_t which)
{
    struct tv_queue *queue = &at->queues[which];
    if (!fuzz_one_in(random_of, 4))
        scribble(random_of, queue);
    int was = queue->broken;
    uint64_t chains = queue->chains;
    tv_worker_serve(at, which);
    FUZZ_CHECK(!was || (queue->broken == was && queue->chains == chains));
    FUZZ_CHECK(queue->taken == 0 && queue->pushed == 0); /* a turn that ends owes nothing */
    at->due |= 1u << which; /* never asleep: here nobody rings */
    if (++turns >= TURNS)
        tv_worker_stop(at);
}

/* --- a case ------------------------------------------------------------------------------------------------------ */

/* A ring's address: mostly where it fits, often at the end of a region. */
static uint64_t some_ring(struct fuzz *fuzz, uint64_t length, uint64_t align)
{
    uint64_t region = fuzz_below(fuzz, 4) ? 0 : 1, gpa = LAYOUT[region].gpa, size = LAYOUT[region].size;
    if (fuzz_one_in(fuzz, 32) || length > size)
        return some_gpa(fuzz, length);
    if (fuzz_one_in(fuzz, 4))
        return (gpa + size - length) & ~(align - 1);
    return (gpa + fuzz_below(fuzz, size - length + 1)) & ~(align - 1);
}

/* A chain as long as its queue that goes on in an indirect table as long again. */
static void write_longest(struct fuzz *fuzz, const struct tv_queue *queue)
{
    struct {
        uint64_t addr;
        uint32_t len;
        uint16_t flags, next;
    } desc = {.addr = 0, .len = 1 + (uint32_t)fuzz_below(fuzz, 2)};
    for (uint32_t i = 0; i < queue->size; i++) {
        desc.flags = NEXT;
        desc.next = (uint16_t)(i + 1);
        if (i + 1 == queue->size) {
            desc.flags = INDIRECT;
            desc.addr = LAYOUT[0].gpa + LAYOUT[0].size - 16ull * queue->size;
            desc.len = 16u * queue->size;
        }
        guest_writes(queue->desc_gpa + 16 * i, &desc, sizeof desc);
    }
    desc.addr = LAYOUT[1].gpa;
    desc.len = 1;
    for (uint32_t i = 0; i < queue->size; i++) {
        desc.flags = i + 1 < queue->size ? NEXT : 0;
        desc.next = (uint16_t)(i + 1);
        guest_writes(LAYOUT[0].gpa + LAYOUT[0].size - 16ull * (queue->size - i), &desc, sizeof desc);
    }
    uint16_t head = (uint16_t)fuzz_below(fuzz, 3);
    guest_writes(queue->avail_gpa + 4 + 2 * (queue->next_avail % queue->size), &head, 2);
}

static int add_queue(struct fuzz *fuzz)
{
    struct tv_queue queue = {.memory = &memory, .irq = &irq};
    queue.size = (uint16_t)(1u << fuzz_below(fuzz, fuzz_one_in(fuzz, 16) ? 11 : 5));
    if (fuzz_one_in(fuzz, 32))
        queue.size = (uint16_t)fuzz_next(fuzz);
    queue.desc_gpa = some_ring(fuzz, 16 * queue.size, fuzz_one_in(fuzz, 32) ? 1 : 16);
    queue.avail_gpa = some_ring(fuzz, 6 + 2 * queue.size, fuzz_one_in(fuzz, 32) ? 1 : 2);
    queue.used_gpa = some_ring(fuzz, 6 + 8 * queue.size, fuzz_one_in(fuzz, 32) ? 1 : 4);
    queue.indirect = !fuzz_one_in(fuzz, 8);
    int longest = fuzz_one_in(fuzz, 64);
    if (longest) { /* the used ring over the descriptors, for there is no more room */
        queue.size = TV_QUEUE_MAX;
        queue.desc_gpa = queue.used_gpa = LAYOUT[0].gpa;
        queue.avail_gpa = LAYOUT[1].gpa;
        queue.indirect = 1;
    }
    queue.event_idx = (uint8_t)fuzz_below(fuzz, 2);
    queue.next_avail = (uint16_t)(fuzz_one_in(fuzz, 2) ? 0 : fuzz_next(fuzz));
    queue.next_used = (uint16_t)(fuzz_one_in(fuzz, 2) ? queue.next_avail : fuzz_next(fuzz));
    int fits = queue.size && queue.size <= TV_QUEUE_MAX && !(queue.size & (queue.size - 1)) &&
               queue.desc_gpa % 16 == 0 && queue.avail_gpa % 2 == 0 && queue.used_gpa % 4 == 0 &&
               region_of(queue.desc_gpa, 16 * queue.size) >= 0 && region_of(queue.avail_gpa, 6 + 2 * queue.size) >= 0 &&
               region_of(queue.used_gpa, 6 + 8 * queue.size) >= 0;
    int number = tv_worker_add(worker, &queue, -1);
    FUZZ_CHECK(fits == (number >= 0));
    if (!fits) {
        met.refused++;
        return 0;
    }
    for (uint16_t i = 0; i < queue.size && i < 256; i++)
        write_descriptor(fuzz, queue.desc_gpa, i, queue.size);
    guest_writes(queue.avail_gpa + 2, &queue.next_avail, 2);
    offer(fuzz, &queue);
    if (longest)
        write_longest(fuzz, &queue);
    allow(queue.used_gpa, 6 + 8 * queue.size);
    return 1;
}

static void one(struct fuzz *fuzz)
{
    random_of = fuzz;
    now_ns = 1;
    memory.count = fuzz_one_in(fuzz, 16) ? REGIONS : LARGE;
    reset_ram();
    int kick = worker->kick_fd;
    memset(worker, 0, offsetof(struct tv_worker, chain));
    worker->kick_fd = kick;
    worker->serve = serve;
    worker->on_ready = on_ready;
    turns = 0;
    int queues = 0, told = 0;
    for (uint64_t wanted = 1 + fuzz_below(fuzz, 3); wanted; wanted--)
        queues += add_queue(fuzz);
    if (queues) {
        while (tv_worker_run(worker) == 1)
            FUZZ_CHECK(++told <= queues);
        met.told += (uint64_t)told;
        for (uint32_t i = 0; i < worker->queue_count; i++)
            met.broken[worker->queues[i].broken]++;
        check_memory();
    }
    if (fuzz_one_in(fuzz, 1024))
        forget_large();
    random_of = NULL;
}

static void summarize(char *into, size_t size)
{
    static const char *const why[] = {"whole", "jump",  "head",  "next",     "loop",
                                      "address", "indirect", "order", "too long", "request"};
    int used = snprintf(into, size, "%llu chains, %llu queues refused, ended", (unsigned long long)met.chains,
                        (unsigned long long)met.refused);
    for (int i = 0; i < 10; i++)
        used += snprintf(into + used, size - (size_t)used, " %s %llu", why[i], (unsigned long long)met.broken[i]);
}

int main(int argc, char **argv)
{
    make_ram();
    worker = calloc(1, sizeof *worker);
    other = malloc(sizeof *other);
    worker->kick_fd = eventfd(0, EFD_NONBLOCK);
    return fuzz_main(argc, argv, one, summarize);
}
