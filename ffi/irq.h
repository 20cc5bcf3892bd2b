/* An interrupt as a queue worker sees it: the ISR bit and, where the queue has an MSI-X vector, its eventfd.
 *
 * Invariants: `fd` and `isr` are read and written atomically, since the guest may rewrite a queue's vector while its
 * worker runs. An eventfd stays open as long as its transport, so a worker never writes to a reused descriptor. */
#ifndef TV_IRQ_H
#define TV_IRQ_H
#include <stdint.h>
#include <unistd.h>

struct tv_irq {
    int fd; /* -1: no vector */
    uint32_t *isr;
    uint64_t raised;
};

#define TV_ISR_QUEUE 1u
#define TV_ISR_CONFIG 2u

static inline void tv_irq_raise(struct tv_irq *irq, uint32_t bit)
{
    uint64_t one = 1;
    __atomic_fetch_or(irq->isr, bit, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&irq->raised, 1, __ATOMIC_RELAXED);
    int fd = __atomic_load_n(&irq->fd, __ATOMIC_SEQ_CST);
    if (fd >= 0) {
        ssize_t written = write(fd, &one, sizeof one);
        (void)written; /* EAGAIN: already as pending as can be */
    }
}

void tv_irq_signal(struct tv_irq *irq, uint32_t bit);
void tv_irq_set_fd(struct tv_irq *irq, int fd);
uint32_t tv_isr_take(uint32_t *isr);

#endif
