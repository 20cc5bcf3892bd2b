#include "park.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The first real-time signals belong to the C library; the next ones are popular with debuggers. */
static int kick_signal(void)
{
    return SIGRTMIN + 4;
}

static void on_kick(int number)
{
    (void)number; /* its arrival is the message: KVM_RUN and poll give EINTR */
}

/* Install the no-op handler, without SA_RESTART so that system calls return. Process-wide, idempotent. 0 or -errno. */
int tv_kick_signal_install(void)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_kick;
    sigemptyset(&action.sa_mask);
    return sigaction(kick_signal(), &action, NULL) ? -errno : 0;
}

/* Wait until kick_fd or other_fd (-1: none) is readable, at most timeout_ms. Bits: 1 kicked, 2 other_fd readable or
 * broken; 0 at the end of the time; -errno. Reads nothing. A signal counts as a kick: the caller looks at what is
 * asked of it either way. Takes no lock; any thread. */
int tv_park_wait(int kick_fd, int other_fd, int timeout_ms)
{
    struct pollfd wait[2] = {{.fd = kick_fd, .events = POLLIN}, {.fd = other_fd, .events = POLLIN}};
    int ready = poll(wait, 2, timeout_ms < 0 ? 0 : timeout_ms);
    if (ready < 0)
        return errno == EINTR ? 1 : -errno;
    return (wait[0].revents ? 1 : 0) | (wait[1].revents ? 2 : 0);
}

/* Take what a non-blocking eventfd holds, so that it is not readable until the next write. 1 when it held something,
 * 0 when not. Any thread. */
int tv_eventfd_drain(int fd)
{
    uint64_t value;
    ssize_t got;
    do
        got = read(fd, &value, sizeof value);
    while (got < 0 && errno == EINTR);
    return got == (ssize_t)sizeof value;
}

/* 0, or -errno with nothing to close. Before any other thread knows the kicker. */
int tv_kicker_init(struct tv_kicker *kicker)
{
    memset(kicker, 0, sizeof *kicker);
    pthread_mutex_init(&kicker->lock, NULL);
    kicker->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    return kicker->event_fd < 0 ? -errno : 0;
}

/* After the owner has withdrawn. Idempotent. Kicks may still come: they do nothing. */
void tv_kicker_close(struct tv_kicker *kicker)
{
    pthread_mutex_lock(&kicker->lock);
    int fd = kicker->event_fd;
    kicker->event_fd = -1;
    kicker->tid = 0;
    kicker->immediate_exit = NULL;
    pthread_mutex_unlock(&kicker->lock);
    if (fd >= 0)
        close(fd);
}

/* The owning thread, first: from now on kicks signal it. Makes sure that it does not block the signal. */
void tv_kicker_publish(struct tv_kicker *kicker, uint8_t *immediate_exit)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, kick_signal());
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    pthread_mutex_lock(&kicker->lock);
    kicker->tid = (pid_t)syscall(SYS_gettid);
    kicker->immediate_exit = immediate_exit;
    pthread_mutex_unlock(&kicker->lock);
}

/* The owning thread, last: after this no signal is sent to it. */
void tv_kicker_withdraw(struct tv_kicker *kicker)
{
    pthread_mutex_lock(&kicker->lock);
    kicker->tid = 0;
    kicker->immediate_exit = NULL;
    pthread_mutex_unlock(&kicker->lock);
}

/* Any thread, any time after init: before the owner starts and after the close too. Idempotent. Waits only for
 * another kick, a publish or a withdraw, each a few instructions and one system call that doesn't block. */
void tv_kick(struct tv_kicker *kicker)
{
    uint64_t one = 1;
    pthread_mutex_lock(&kicker->lock);
    __atomic_store_n(&kicker->kicked, 1, __ATOMIC_SEQ_CST);
    if (kicker->immediate_exit)
        __atomic_store_n(kicker->immediate_exit, 1, __ATOMIC_SEQ_CST);
    if (kicker->tid)
        syscall(SYS_tgkill, getpid(), kicker->tid, kick_signal());
    if (kicker->event_fd >= 0) {
        ssize_t written = write(kicker->event_fd, &one, sizeof one);
        (void)written; /* EAGAIN: the counter is full, so it is readable, which is all we want */
    }
    pthread_mutex_unlock(&kicker->lock);
}

/* The owning thread waits for a kick, at most timeout_ms. 1 kicked, 0 not, -errno. Empties the eventfd; `kicked`
 * stays, so the next run tells the caller once more, which is harmless. */
int tv_kicker_park(struct tv_kicker *kicker, int timeout_ms)
{
    int ready = tv_park_wait(kicker->event_fd, -1, timeout_ms);
    if (ready > 0)
        tv_eventfd_drain(kicker->event_fd);
    return ready;
}
