#define _GNU_SOURCE
#include "pages_inbox.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define ENTRIES 4u /* 2 MiB: two frames of leeway for each thread; more, and they leave the caches */
#define FRAME_BYTES (TV_FRAME_PAGES * TV_PAGE_SIZE)

struct tv_inbox {
    pthread_mutex_t lock; /* of all that follows, short: never held over work */
    pthread_cond_t more, room;
    pthread_t thread;
    struct tv_landing *landing;
    uint32_t pushed, done; /* free running: entries [done, pushed) wait or are at hand; the next one is the receiver's */
    uint32_t room_wanted;  /* entries that the receiver waits for; 0: it does not wait */
    int running, ending;
    int alarm;  /* an eventfd, readable when a frame could not land */
    int reason; /* of the first one that could not: nothing lands after it */
    struct tv_fault fault;
    struct tv_entry entries[ENTRIES];
};

/* NULL and errno where there is no memory, or no descriptor. Its bytes are a mapping of their own: the host has them back with it. */
struct tv_inbox *tv_inbox_new(void)
{
    struct tv_inbox *inbox = calloc(1, sizeof *inbox);
    if (!inbox)
        return NULL;
    uint8_t *bytes = mmap(NULL, ENTRIES * FRAME_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    inbox->alarm = bytes == MAP_FAILED ? -1 : eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (inbox->alarm < 0) {
        int error = errno;
        if (bytes != MAP_FAILED)
            munmap(bytes, ENTRIES * FRAME_BYTES);
        free(inbox);
        errno = error;
        return NULL;
    }
    pthread_mutex_init(&inbox->lock, NULL);
    pthread_cond_init(&inbox->more, NULL);
    pthread_cond_init(&inbox->room, NULL);
    for (uint32_t i = 0; i < ENTRIES; i++)
        inbox->entries[i].bytes = bytes + i * FRAME_BYTES;
    return inbox;
}

/* No call uses it any more. */
void tv_inbox_free(struct tv_inbox *inbox)
{
    if (!inbox)
        return;
    munmap(inbox->entries[0].bytes, ENTRIES * FRAME_BYTES);
    close(inbox->alarm);
    pthread_cond_destroy(&inbox->room);
    pthread_cond_destroy(&inbox->more);
    pthread_mutex_destroy(&inbox->lock);
    free(inbox);
}

static void *land_all(void *argument)
{
    struct tv_inbox *inbox = argument;
    pthread_mutex_lock(&inbox->lock);
    for (;;) {
        while (inbox->done == inbox->pushed && !inbox->ending)
            pthread_cond_wait(&inbox->more, &inbox->lock);
        if (inbox->done == inbox->pushed)
            break;
        struct tv_entry *entry = &inbox->entries[inbox->done % ENTRIES];
        int reason = inbox->reason;
        struct tv_fault fault = {0};
        pthread_mutex_unlock(&inbox->lock);
        if (reason == TV_PAGES_DONE)
            reason = tv_land(inbox->landing, entry, &fault);
        pthread_mutex_lock(&inbox->lock);
        if (reason != TV_PAGES_DONE && inbox->reason == TV_PAGES_DONE) {
            inbox->reason = reason;
            inbox->fault = fault;
            inbox->fault.sequence = entry->sequence;
            eventfd_write(inbox->alarm, 1);
        }
        inbox->done++;
        if (inbox->room_wanted && ENTRIES - (inbox->pushed - inbox->done) >= inbox->room_wanted)
            pthread_cond_signal(&inbox->room);
    }
    pthread_mutex_unlock(&inbox->lock);
    return NULL;
}

/* By the receiver, under the lock. */
static void wait_for_room(struct tv_inbox *inbox, uint32_t wanted)
{
    inbox->room_wanted = wanted;
    while (ENTRIES - (inbox->pushed - inbox->done) < wanted)
        pthread_cond_wait(&inbox->room, &inbox->lock);
    inbox->room_wanted = 0;
}

/* The entry that the next frame is received into: waits where all are taken, until half of them are free, to be woken
 * once for several frames. A reason other than DONE: an earlier frame could not land. */
int tv_inbox_room(struct tv_inbox *inbox, struct tv_entry **entry)
{
    pthread_mutex_lock(&inbox->lock);
    if (inbox->pushed - inbox->done == ENTRIES)
        wait_for_room(inbox, ENTRIES / 2);
    *entry = &inbox->entries[inbox->pushed % ENTRIES];
    int reason = inbox->reason;
    pthread_mutex_unlock(&inbox->lock);
    return reason;
}

/* Wait until all that was pushed has landed. A reason other than DONE: some of it could not. */
int tv_inbox_drain(struct tv_inbox *inbox)
{
    pthread_mutex_lock(&inbox->lock);
    wait_for_room(inbox, ENTRIES);
    int reason = inbox->reason;
    pthread_mutex_unlock(&inbox->lock);
    return reason;
}

/* No signal of the process is served in the landing thread. */
static int start(struct tv_inbox *inbox, struct tv_landing *landing)
{
    sigset_t all, before;
    inbox->landing = landing;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    int error = pthread_create(&inbox->thread, NULL, land_all, inbox);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    inbox->running = !error;
    return error;
}

/* Hand the entry that tv_inbox_room() gave to the landing thread. Gives DONE or ERRNO. */
int tv_inbox_push(struct tv_inbox *inbox, struct tv_landing *landing, struct tv_fault *fault)
{
    if (!inbox->running && (fault->error = start(inbox, landing)))
        return TV_PAGES_ERRNO;
    pthread_mutex_lock(&inbox->lock);
    if (inbox->pushed++ == inbox->done)
        pthread_cond_signal(&inbox->more);
    pthread_mutex_unlock(&inbox->lock);
    return TV_PAGES_DONE;
}

/* Whether frames wait to land. */
int tv_inbox_waits(struct tv_inbox *inbox)
{
    pthread_mutex_lock(&inbox->lock);
    int waits = inbox->pushed != inbox->done;
    pthread_mutex_unlock(&inbox->lock);
    return waits;
}

/* An eventfd that is readable when a frame could not land, until the end. */
int tv_inbox_alarm(const struct tv_inbox *inbox)
{
    return inbox->alarm;
}

/* End the landing thread, after what waits has landed, or without it (`drop`). Gives the reason of the first frame that
 * could not land, or DONE; the inbox is as new. */
int tv_inbox_end(struct tv_inbox *inbox, int drop, struct tv_fault *fault)
{
    if (inbox->running) {
        pthread_mutex_lock(&inbox->lock);
        inbox->ending = 1;
        if (drop && inbox->reason == TV_PAGES_DONE)
            inbox->reason = TV_PAGES_KICKED;
        pthread_cond_signal(&inbox->more);
        pthread_mutex_unlock(&inbox->lock);
        pthread_join(inbox->thread, NULL);
    }
    int reason = inbox->reason;
    eventfd_t none;
    eventfd_read(inbox->alarm, &none);
    if (reason != TV_PAGES_DONE && reason != TV_PAGES_KICKED)
        *fault = inbox->fault;
    else
        reason = TV_PAGES_DONE;
    inbox->running = inbox->ending = inbox->reason = 0;
    inbox->pushed = inbox->done = 0;
    inbox->fault = (struct tv_fault){0};
    return reason;
}
