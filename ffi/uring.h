/* io_uring by its system calls, as much of it as a thread needs that moves data with one ring of its own. Everything is
 * called in the thread that made the ring. The ring's descriptor is readable while tv_uring_next has something. */
#ifndef TV_URING_H
#define TV_URING_H
#include <stdint.h>
#include <sys/uio.h>

struct io_uring_sqe;
struct io_uring_cqe;

struct tv_uring {
    int fd; /* -1: none */
    uint32_t entries, queued; /* queued: not given to the kernel yet */
    uint32_t *sq_tail, *sq_array, sq_mask;
    uint32_t *cq_head, *cq_tail, cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    void *rings;
    uint64_t rings_bytes;
};

int tv_uring_open(struct tv_uring *ring, uint32_t entries);
void tv_uring_close(struct tv_uring *ring);
void tv_uring_move(struct tv_uring *ring, int write, int fd, const struct iovec *iov, uint32_t count, uint64_t at,
                   uint64_t tag);
int tv_uring_enter(struct tv_uring *ring, uint32_t wait_for);
int tv_uring_next(struct tv_uring *ring, uint64_t *tag, int32_t *result);

#endif
