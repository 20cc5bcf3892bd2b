/* A minimal device side of a split virtqueue, and beside it the walker and the worker's turn of ffi/, on the same rings.
 *
 * gcc -O2 -I../ffi -o bare_ring bare_ring.c ../ffi/ring.c ../ffi/worker.c ../ffi/park.c && ./bare_ring BURSTS
 *
 * The minimal loop does what no device can do without: it reads the available index once a burst, each head and each
 * descriptor, looks its address up in the table of RAM's regions, notes the segments and how many may be read, writes a
 * used element a chain and the used index once a burst, and looks whether an interrupt is wanted. It trusts the driver
 * otherwise: no loop, order, length or jump is looked for, nothing is copied first, no page is marked dirty. A burst is
 * a queue full of chains. Prints, for each kind of chain, the chains a second of each loop; they take turns. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

#include "worker.h"

#define RAM (4u << 20)
#define SIZE 256
#define DESC 0x10000u
#define AVAIL 0x14000u
#define USED 0x18000u
#define TABLES 0x20000u
#define DATA 0x100000u
#define PARTS 3
#define SLICES 90

enum { NEXT = 1, WRITE = 2, INDIRECT = 4 };

struct descriptor {
    uint64_t addr;
    uint32_t len;
    uint16_t flags, next;
};

static uint8_t *ram;
static uint32_t isr;
static struct tv_irq irq = {.fd = -1, .isr = &isr};
static struct tv_memory memory;
static uint16_t offered;
static volatile uint64_t sink; /* what a device would do with the segments */

static uint16_t *half(uint32_t gpa)
{
    return (uint16_t *)(ram + gpa);
}

/* --- the minimal loop -------------------------------------------------------------------------------------------- */

struct bare {
    uint16_t next_avail, next_used;
    uint32_t readable, segments;
    struct iovec iov[TV_QUEUE_MAX];
};

static int bare_walk(struct bare *bare, const struct descriptor *table, uint16_t index)
{
    for (;;) {
        const struct descriptor *desc = &table[index];
        void *at = tv_ptr(&memory, desc->addr, desc->len);
        if (!at)
            return -1;
        if (desc->flags & INDIRECT)
            return bare_walk(bare, at, 0);
        bare->iov[bare->segments++] = (struct iovec){at, desc->len};
        bare->readable += !(desc->flags & WRITE);
        if (!(desc->flags & NEXT))
            return 0;
        index = desc->next;
    }
}

static __attribute__((noinline)) void run_bare(struct bare *bare)
{
    uint16_t end = __atomic_load_n(half(AVAIL + 2), __ATOMIC_ACQUIRE);
    while (bare->next_avail != end) {
        uint16_t head = half(AVAIL + 4)[bare->next_avail++ % SIZE];
        bare->segments = bare->readable = 0;
        if (bare_walk(bare, (struct descriptor *)(ram + DESC), head))
            exit(1);
        sink += bare->segments;
        ((uint64_t *)(ram + USED + 4))[bare->next_used++ % SIZE] = head;
    }
    __atomic_store_n(half(USED + 2), bare->next_used, __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    if (!(*half(AVAIL) & 1))
        tv_irq_raise(&irq, TV_ISR_QUEUE);
}

/* --- ours -------------------------------------------------------------------------------------------------------- */

static __attribute__((noinline)) void run_walker(struct tv_queue *queue, struct tv_chain *chain)
{
    int got;
    while ((got = tv_queue_pop(queue, chain)) == 1) {
        sink += chain->readable + chain->writable;
        tv_queue_push(queue, chain->head, 0);
    }
    if (got < 0)
        exit(1);
    tv_queue_publish(queue);
}

static int64_t serve(struct tv_worker *worker, struct tv_queue *queue, struct tv_chain *chain)
{
    sink += chain->readable + chain->writable;
    return 0;
}

/* --- the driver -------------------------------------------------------------------------------------------------- */

static uint16_t lay_out(uint32_t parts, int indirect)
{
    uint16_t chains = indirect ? SIZE : SIZE / parts;
    for (uint16_t chain = 0; chain < chains; chain++) {
        uint16_t first = indirect ? 0 : (uint16_t)(chain * parts);
        struct descriptor *table = (struct descriptor *)(ram + (indirect ? TABLES + 64u * chain : DESC));
        for (uint16_t part = 0; part < parts; part++)
            table[first + part] = (struct descriptor){DATA + 64u * chain + 16u * part, 16,
                                                      (uint16_t)((part + 1u < parts ? NEXT : 0) | (part ? WRITE : 0)),
                                                      (uint16_t)(first + part + 1)};
        if (indirect)
            ((struct descriptor *)(ram + DESC))[chain] =
                (struct descriptor){TABLES + 64u * chain, 16 * parts, INDIRECT, 0};
        for (uint16_t slot = chain; slot < SIZE; slot = (uint16_t)(slot + chains))
            half(AVAIL + 4)[slot] = (uint16_t)(indirect ? chain : chain * parts);
    }
    return chains;
}

static void reset(void)
{
    offered = 0;
    *half(AVAIL + 2) = *half(USED + 2) = 0;
}

/* Chains a second of one loop, of so many bursts. */
static double measure(int which, int bursts, uint16_t chains)
{
    static struct bare bare;
    static struct tv_chain chain;
    static struct tv_worker worker;
    struct tv_queue queue = {.memory = &memory, .irq = &irq, .desc_gpa = DESC, .avail_gpa = AVAIL, .used_gpa = USED,
                             .size = SIZE, .indirect = 1};
    reset();
    memset(&bare, 0, sizeof bare);
    memset(&worker, 0, sizeof worker);
    worker.serve = serve;
    if (tv_queue_open(&queue) || tv_worker_add(&worker, &queue, -1) < 0)
        exit(1);
    uint64_t began = tv_now_ns();
    for (int burst = 0; burst < bursts; burst++) {
        offered = (uint16_t)(offered + chains);
        __atomic_store_n(half(AVAIL + 2), offered, __ATOMIC_RELEASE);
        if (which == 0)
            run_bare(&bare);
        else if (which == 1)
            run_walker(&queue, &chain);
        else
            do {
                worker.due = 0;
                tv_worker_serve(&worker, 0);
            } while (worker.due);
        if (*half(USED + 2) != offered)
            exit(1);
    }
    return (double)bursts * chains / ((double)(tv_now_ns() - began) / 1e9);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        uint32_t parts;
        int indirect;
    } kinds[] = {{"one descriptor", 1, 0}, {"three descriptors", PARTS, 0}, {"three, indirect", PARTS, 1}};
    if (argc != 2)
        return 2;
    int bursts = atoi(argv[1]);
    ram = aligned_alloc(4096, RAM);
    memset(ram, 0, RAM);
    memory.count = 1;
    memory.regions[0] = (struct tv_region){.size = RAM, .hva = ram, .dirty = calloc(RAM / 4096 / 64, 8)};
    for (unsigned i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        memset(ram, 0, TABLES + 0x10000);
        uint16_t chains = lay_out(kinds[i].parts, kinds[i].indirect);
        double best[3] = {0};
        for (int slice = 0; slice < SLICES; slice++) { /* the best of many short ones: the host has other things to do */
            double rate = measure(slice % 3, bursts / SLICES + 1, chains);
            best[slice % 3] = rate > best[slice % 3] ? rate : best[slice % 3];
        }
        printf("%s\t%.0f\t%.0f\t%.0f\n", kinds[i].name, best[0], best[1], best[2]);
    }
    return 0;
}
