/* Waiting that a kick always ends, and kicking that never hits the wrong thread.
 *
 * tv_park_wait is the one parked wait of vCPU threads and queue workers: a poll on a kick eventfd, perhaps on a
 * second descriptor, with a limit. A worker needs no more than that and tv_eventfd_drain.
 *
 * A struct tv_kicker belongs to one vCPU (or worker). Invariants
 *  - `event_fd` is a non-blocking eventfd, open from init to close, and -1 after. A kick writes it, a park empties
 *    it: a kick that came before the park makes it return at once.
 *  - Everything below `lock` is read and written under it, except `kicked`. So a signal never goes to a thread that
 *    has moved on to other work (trio reuses threads), kvm_run is never touched after it was withdrawn, and a kick
 *    after the close writes to no reused descriptor.
 *  - Only the owning thread clears *immediate_exit, before its caller reads the request word.
 *  - The memory of the struct outlives every caller of tv_kick; closing leaves the mutex usable.
 */
#ifndef TV_PARK_H
#define TV_PARK_H
#include <pthread.h>
#include <stdint.h>
#include <sys/types.h>

struct tv_kicker {
    uint32_t kicked; /* atomic: a kick since the owner last looked */
    pthread_mutex_t lock;
    pid_t tid;               /* 0: no thread */
    uint8_t *immediate_exit; /* NULL: nothing to make exit */
    int event_fd;
};

int tv_kick_signal_install(void);
int tv_park_wait(int kick_fd, int other_fd, int timeout_ms);
int tv_eventfd_drain(int fd);

int tv_kicker_init(struct tv_kicker *kicker);
void tv_kicker_close(struct tv_kicker *kicker);
void tv_kicker_publish(struct tv_kicker *kicker, uint8_t *immediate_exit);
void tv_kicker_withdraw(struct tv_kicker *kicker);
void tv_kick(struct tv_kicker *kicker);
int tv_kicker_park(struct tv_kicker *kicker, int timeout_ms);

#endif
