/* From a doorbell to whoever serves it: a worker of ffi/ with a queue, and a bare epoll loop, each in a thread of its own.
 *
 * gcc -O2 -pthread -I../ffi -o bare_doorbell bare_doorbell.c ../ffi/ring.c ../ffi/worker.c ../ffi/park.c
 * ./bare_doorbell ROUNDS
 *
 * A round: wait until the thread must be asleep, write its eventfd, and see when it has got so far: the bare loop has
 * read the eventfd, the worker has taken the chain. They take turns. Prints p50 and p99 in nanoseconds, bare then ours. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "worker.h"

#define RAM (1u << 20)
#define SIZE 256
#define DESC 0x10000u
#define AVAIL 0x14000u
#define USED 0x18000u
#define SLEEP_NS 60000u /* long enough for a thread that has nothing to do to be asleep */

static uint8_t *ram;
static uint64_t reached; /* when the one that was rung got so far; 0: not yet */
static int bare_bell, bare_stop;

static void *bare_loop(void *argument)
{
    struct epoll_event event = {.events = EPOLLIN};
    int epoll = epoll_create1(0);
    (void)argument;
    epoll_ctl(epoll, EPOLL_CTL_ADD, bare_bell, &event);
    while (!__atomic_load_n(&bare_stop, __ATOMIC_SEQ_CST)) {
        uint64_t count;
        if (epoll_wait(epoll, &event, 1, 1000) == 1 && read(bare_bell, &count, sizeof count) == sizeof count)
            __atomic_store_n(&reached, tv_now_ns(), __ATOMIC_SEQ_CST);
    }
    close(epoll);
    return NULL;
}

static int64_t serve(struct tv_worker *worker, struct tv_queue *queue, struct tv_chain *chain)
{
    (void)worker, (void)queue, (void)chain;
    __atomic_store_n(&reached, tv_now_ns(), __ATOMIC_SEQ_CST);
    return 0;
}

static void *worker_loop(void *worker)
{
    tv_worker_run(worker);
    return NULL;
}

static void ring(int fd)
{
    uint64_t one = 1;
    if (write(fd, &one, sizeof one) != sizeof one)
        exit(1);
}

static void spin(uint64_t ns)
{
    for (uint64_t until = tv_now_ns() + ns; tv_now_ns() < until;)
        __builtin_ia32_pause();
}

static uint64_t time_one(int bell)
{
    spin(SLEEP_NS);
    __atomic_store_n(&reached, 0, __ATOMIC_SEQ_CST);
    uint64_t began = tv_now_ns(), at;
    ring(bell);
    while (!(at = __atomic_load_n(&reached, __ATOMIC_SEQ_CST)))
        __builtin_ia32_pause();
    return at - began;
}

static int by_size(const void *a, const void *b)
{
    uint64_t one = *(const uint64_t *)a, other = *(const uint64_t *)b;
    return (one > other) - (one < other);
}

static void tell(uint64_t *took, int rounds)
{
    qsort(took, (size_t)rounds, sizeof *took, by_size);
    printf("%llu\t%llu\n", (unsigned long long)took[rounds / 2], (unsigned long long)took[rounds * 99 / 100]);
}

int main(int argc, char **argv)
{
    static struct tv_memory memory;
    static struct tv_worker worker;
    static uint32_t isr;
    static struct tv_irq irq = {.fd = -1, .isr = &isr};
    int rounds = argc == 2 ? atoi(argv[1]) : 0, bell = eventfd(0, EFD_NONBLOCK);
    if (rounds < 1)
        return 2;
    ram = aligned_alloc(4096, RAM);
    memset(ram, 0, RAM);
    memory.count = 1;
    memory.regions[0] = (struct tv_region){.size = RAM, .hva = ram, .dirty = calloc(RAM / 4096 / 64, 8)};
    struct tv_queue queue = {.memory = &memory, .irq = &irq, .desc_gpa = DESC, .avail_gpa = AVAIL, .used_gpa = USED,
                             .size = SIZE};
    uint64_t desc[2] = {0x80000, 16 | 2ull << 32};
    memcpy(ram + DESC, desc, sizeof desc);
    worker.kick_fd = eventfd(0, EFD_NONBLOCK);
    worker.serve = serve;
    bare_bell = eventfd(0, EFD_NONBLOCK);
    if (tv_worker_add(&worker, &queue, bell) < 0)
        return 1;
    pthread_t ours, bare;
    pthread_create(&ours, NULL, worker_loop, &worker);
    pthread_create(&bare, NULL, bare_loop, NULL);
    uint64_t *bare_took = calloc((size_t)rounds, 8), *our_took = calloc((size_t)rounds, 8);
    for (int round = 0; round < rounds; round++) {
        bare_took[round] = time_one(bare_bell);
        uint16_t index = (uint16_t)(round + 1);
        __atomic_store_n((uint16_t *)(ram + AVAIL + 2), index, __ATOMIC_RELEASE);
        our_took[round] = time_one(bell);
    }
    tell(bare_took, rounds);
    tell(our_took, rounds);
    __atomic_store_n(&bare_stop, 1, __ATOMIC_SEQ_CST);
    ring(bare_bell);
    tv_worker_stop(&worker);
    pthread_join(ours, NULL);
    pthread_join(bare, NULL);
    return 0;
}
