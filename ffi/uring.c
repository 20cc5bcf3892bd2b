#define _GNU_SOURCE
#include "uring.h"

#include <errno.h>
#include <linux/io_uring.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* No interrupt for a completion: this thread enters the kernel soon, or sleeps there. Linux 6.0. */
#ifdef IORING_SETUP_SINGLE_ISSUER
#define FLAGS (IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_COOP_TASKRUN)
#else
#define FLAGS 0u
#endif

/* Room for `entries`, a power of two, that nobody has taken back. 0, or -1 with errno where there is no io_uring: an old
 * kernel, or one that was told to offer none. */
int tv_uring_open(struct tv_uring *ring, uint32_t entries)
{
    struct io_uring_params params = {.flags = FLAGS};
    ring->fd = (int)syscall(__NR_io_uring_setup, entries, &params);
    if (ring->fd < 0 && errno == EINVAL && FLAGS) {
        params = (struct io_uring_params){0};
        ring->fd = (int)syscall(__NR_io_uring_setup, entries, &params);
    }
    if (ring->fd < 0)
        return -1;
    ring->entries = entries;
    ring->queued = 0;
    uint64_t sq = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
    uint64_t cq = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    ring->rings_bytes = sq > cq ? sq : cq;
    ring->rings = MAP_FAILED;
    if (params.features & IORING_FEAT_SINGLE_MMAP)
        ring->rings = mmap(NULL, ring->rings_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring->fd,
                           IORING_OFF_SQ_RING);
    ring->sqes = mmap(NULL, entries * sizeof(struct io_uring_sqe), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                      ring->fd, IORING_OFF_SQES);
    if (ring->rings == MAP_FAILED || ring->sqes == MAP_FAILED) {
        tv_uring_close(ring);
        errno = ENOSYS;
        return -1;
    }
    uint8_t *base = ring->rings;
    ring->sq_tail = (uint32_t *)(base + params.sq_off.tail);
    ring->sq_mask = *(uint32_t *)(base + params.sq_off.ring_mask);
    ring->sq_array = (uint32_t *)(base + params.sq_off.array);
    ring->cq_head = (uint32_t *)(base + params.cq_off.head);
    ring->cq_tail = (uint32_t *)(base + params.cq_off.tail);
    ring->cq_mask = *(uint32_t *)(base + params.cq_off.ring_mask);
    ring->cqes = (struct io_uring_cqe *)(base + params.cq_off.cqes);
    return 0;
}

/* Nothing is under way. Idempotent. */
void tv_uring_close(struct tv_uring *ring)
{
    if (ring->fd < 0)
        return;
    if (ring->sqes != MAP_FAILED)
        munmap(ring->sqes, ring->entries * sizeof(struct io_uring_sqe));
    if (ring->rings != MAP_FAILED)
        munmap(ring->rings, ring->rings_bytes);
    close(ring->fd);
    ring->fd = -1;
}

/* Queue one move; `iov` stays until it is done. There is room: at most `entries` are under way. */
void tv_uring_move(struct tv_uring *ring, int write, int fd, const struct iovec *iov, uint32_t count, uint64_t at,
                   uint64_t tag)
{
    uint32_t tail = *ring->sq_tail, slot = tail & ring->sq_mask;
    struct io_uring_sqe *sqe = &ring->sqes[slot];
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = write ? IORING_OP_WRITEV : IORING_OP_READV;
    sqe->fd = fd;
    sqe->addr = (uint64_t)(uintptr_t)iov;
    sqe->len = count;
    sqe->off = at;
    sqe->user_data = tag;
    ring->sq_array[slot] = slot;
    __atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
    ring->queued++;
}

/* Give the kernel what is queued, and wait until so many are done. 0, or -1 with errno; what it did not take stays
 * queued. */
int tv_uring_enter(struct tv_uring *ring, uint32_t wait_for)
{
    for (;;) {
        long taken = syscall(__NR_io_uring_enter, ring->fd, ring->queued, wait_for, IORING_ENTER_GETEVENTS, NULL, 0);
        if (taken < 0 && errno == EINTR)
            continue;
        if (taken < 0)
            return -1;
        ring->queued -= (uint32_t)taken;
        return 0;
    }
}

/* Take one that is done: 1, with its tag and result (bytes, or -errno); 0 when there is none. */
int tv_uring_next(struct tv_uring *ring, uint64_t *tag, int32_t *result)
{
    uint32_t head = *ring->cq_head;
    if (head == __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE))
        return 0;
    const struct io_uring_cqe *cqe = &ring->cqes[head & ring->cq_mask];
    *tag = cqe->user_data;
    *result = cqe->res;
    __atomic_store_n(ring->cq_head, head + 1, __ATOMIC_RELEASE);
    return 1;
}
