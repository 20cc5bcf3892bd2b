#define _GNU_SOURCE
#include "pmem.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <unistd.h>

#define T_FLUSH 0u
#define R_OK 0u
#define R_EIO 1u

/* --- requests ---------------------------------------------------------------------------------------------------- */

static void add(uint64_t *counter)
{
    __atomic_store_n(counter, *counter + 1, __ATOMIC_RELAXED); /* the worker is the only writer */
}

static int flush(const struct tv_pmem *pmem)
{
    int result;
    if (pmem->fd < 0)
        return 0;
    do
        result = fdatasync(pmem->fd); /* what was stored through a mapping is part of it */
    while (result && errno == EINTR);
    return result;
}

static int64_t serve(struct tv_worker *worker, struct tv_queue *queue, struct tv_chain *chain)
{
    struct tv_pmem *pmem = (struct tv_pmem *)worker;
    uint32_t type, answer = R_EIO;
    if (chain->writable_bytes < sizeof answer) {
        queue->broken = TV_BROKEN_REQUEST;
        return 0;
    }
    if (tv_chain_read(chain, 0, &type, sizeof type) == sizeof type && type == T_FLUSH) {
        tv_worker_publish(worker);
        if (!flush(pmem))
            answer = R_OK;
        add(&pmem->flushes);
    }
    if (answer != R_OK)
        add(&pmem->errors);
    tv_chain_write(queue->memory, chain, 0, &answer, sizeof answer);
    return sizeof answer;
}

void tv_pmem_init(struct tv_pmem *pmem)
{
    pmem->worker.serve = serve;
}

/* A descriptor that is readable after somebody cut the file, or wrote to it (stores through a mapping do not count), or
 * -errno: there may be too many. What is read from it says nothing more. */
int tv_watch_file(int fd)
{
    char path[32];
    int watch = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    if (watch < 0)
        return -errno;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (inotify_add_watch(watch, path, IN_MODIFY) < 0) {
        int error = errno;
        close(watch);
        return -error;
    }
    return watch;
}

/* --- pages that are gone ----------------------------------------------------------------------------------------- */

static struct {
    uintptr_t start, end; /* end 0: free; written last, read first */
    int lost;
} guards[TV_GUARDS];

static pthread_once_t installed = PTHREAD_ONCE_INIT;
static pthread_mutex_t table = PTHREAD_MUTEX_INITIALIZER;
static struct sigaction before;

/* To whom it went before: for good, where that was nobody, since the instruction is tried again. */
static void pass_on(int number, siginfo_t *info, void *context)
{
    if (before.sa_flags & SA_SIGINFO)
        before.sa_sigaction(number, info, context);
    else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN)
        before.sa_handler(number);
    else
        signal(number, SIG_DFL);
}

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    int saved = errno;
    uintptr_t at = (uintptr_t)info->si_addr;
    for (int i = 0; i < TV_GUARDS; i++) {
        uintptr_t end = __atomic_load_n(&guards[i].end, __ATOMIC_ACQUIRE);
        if (!end || at >= end || at < guards[i].start)
            continue;
        void *page = (void *)(at & ~(uintptr_t)(TV_PAGE_SIZE - 1));
        void *zeros = mmap(page, TV_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        __atomic_store_n(&guards[i].lost, 1, __ATOMIC_RELEASE);
        if (zeros == page) {
            errno = saved;
            return;
        }
    }
    pass_on(number, info, context);
    errno = saved;
}

static void install(void)
{
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    sigemptyset(&action.sa_mask);
    sigaction(SIGBUS, &action, &before);
}

/* Guard whole pages. Gives a number, or -1 when there are too many. Any thread. */
int tv_guard(void *start, uint64_t size)
{
    int found = -1;
    pthread_once(&installed, install);
    pthread_mutex_lock(&table);
    for (int i = 0; i < TV_GUARDS && found < 0; i++) {
        if (guards[i].end)
            continue;
        guards[i].start = (uintptr_t)start;
        guards[i].lost = 0;
        __atomic_store_n(&guards[i].end, (uintptr_t)start + size, __ATOMIC_RELEASE);
        found = i;
    }
    pthread_mutex_unlock(&table);
    return found;
}

/* Whether a page of the range is gone. Any thread. */
int tv_guard_lost(int guard)
{
    return __atomic_load_n(&guards[guard].lost, __ATOMIC_ACQUIRE);
}

/* Once; nobody touches the range any more. Any thread. */
void tv_unguard(int guard)
{
    __atomic_store_n(&guards[guard].end, 0, __ATOMIC_RELEASE);
}
