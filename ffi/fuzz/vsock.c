/* A hostile guest and hostile peers of the host at one vsock device, through its real hooks, rings and sockets.
 *
 * A case is a device, some hundred steps long: packets that may be anything but mostly are what could come next, receive
 * buffers of every size, clients that greet badly, send, read, stop, half close and die, servers that come and go,
 * descriptors that run out, limits in time that pass, workers that are stopped and started in the middle, resets. After
 * every step
 *  - nobody has anything to do any more: a turn that always wants another one is found;
 *  - the table is whole: every slot is free or at a stage, counted, listed and found as that stage says;
 *  - a backlog is what was received and not forwarded, and no longer than what the guest was promised;
 *  - what the guest got are packets, no more data than it has room for, and nothing beside its buffers.
 * At its end nothing is left open. The clock and the timer are ours, so a case depends on nothing but its number.
 *
 * links: vsock.c vsock_table.c vsock_host.c vsock_tx.c vsock_rx.c ring.c worker.c park.c
 * short: 250
 * full: 20000
 */
#define _GNU_SOURCE
#include "fuzz.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>

#include "vsock_sides.h"

#define STEPS 120
#define ROUNDS 20000 /* until nothing is due: a thousand times what it takes */

static uint64_t now_ns = 1;
static struct tv_vsock_counts met;
static uint64_t broken, restarts;

/* --- the clock and the timer are the case's ---------------------------------------------------------------------- */

int clock_gettime(clockid_t clock, struct timespec *now)
{
    (void)clock;
    now_ns += 100;
    *now = (struct timespec){(time_t)(now_ns / 1000000000u), (long)(now_ns % 1000000000u)};
    return 0;
}

int timerfd_create(int clock, int flags)
{
    (void)clock;
    (void)flags;
    return eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
}

int timerfd_settime(int fd, int flags, const struct itimerspec *when, struct itimerspec *before)
{
    (void)fd, (void)flags, (void)when, (void)before;
    return 0;
}

/* --- the worker -------------------------------------------------------------------------------------------------- */

static void start_worker(void)
{
    memset(worker, 0, sizeof *worker);
    worker->worker.kick_fd = -1;
    tv_vsock_worker_init(worker, vsock);
    for (int queue = 0; queue < TV_VSOCK_QUEUES; queue++)
        FUZZ_CHECK(tv_worker_add(&worker->worker, &state[queue], -1) == queue);
    worker->worker.due = 7; /* as tv_worker_run has it */
}

/* Where the queues stand goes from one worker to the next. */
static void restart_worker(void)
{
    for (int queue = 0; queue < TV_VSOCK_QUEUES; queue++)
        state[queue] = worker->worker.queues[queue];
    start_worker();
}

/* As tv_worker_run does it, until there is nothing to do. */
static void run(void)
{
    struct pollfd wait = {vsock->epoll_fd, POLLIN, 0};
    for (int round = 0;; round++) {
        FUZZ_CHECK(round < ROUNDS);
        if (poll(&wait, 1, 0) > 0)
            worker->worker.due |= 1u << TV_WORKER_QUEUES;
        uint32_t due = worker->worker.due;
        worker->worker.due = 0;
        if (!due)
            return;
        for (uint32_t bit = 0; bit <= TV_WORKER_QUEUES; bit++)
            if (due >> bit & 1)
                worker->worker.on_ready(&worker->worker, bit);
    }
}

/* --- a case ------------------------------------------------------------------------------------------------------ */

static void check_table(void)
{
    uint64_t stages[TV_VSOCK_LINGER + 1] = {0}, listed = 0, queued = 0, free_slots = 0;
    for (uint32_t i = 0; i < TV_VSOCK_CONNECTIONS; i++) {
        struct tv_vsock_conn *conn = &vsock->conns[i];
        stages[conn->stage]++;
        if (conn->stage == TV_VSOCK_FREE) {
            FUZZ_CHECK(conn->fd < 0 && !conn->backlog.bytes && !conn->queued);
            continue;
        }
        queued += conn->queued;
        FUZZ_CHECK((conn->fd >= 0) == (conn->stage != TV_VSOCK_ENDING));
        int found = conn->stage != TV_VSOCK_GREETING && conn->stage != TV_VSOCK_LINGER;
        FUZZ_CHECK((tv_vsock_find(vsock, conn->guest_port, conn->host_port) == conn) == found);
        FUZZ_CHECK(conn->backlog.used <= TV_VSOCK_BUFFER);
        if (conn->stage == TV_VSOCK_OPEN || conn->stage == TV_VSOCK_LINGER)
            FUZZ_CHECK(conn->backlog.used == conn->received - conn->forwarded);
    }
    for (uint16_t slot = vsock->first; slot != TV_VSOCK_NOBODY; slot = vsock->conns[slot].next, listed++)
        FUZZ_CHECK(vsock->conns[slot].queued && listed <= queued);
    for (uint16_t slot = vsock->free; slot != TV_VSOCK_NOBODY; slot = vsock->conns[slot].next, free_slots++)
        FUZZ_CHECK(vsock->conns[slot].stage == TV_VSOCK_FREE && free_slots < TV_VSOCK_CONNECTIONS);
    FUZZ_CHECK(listed == queued && free_slots + TV_VSOCK_CONNECTIONS - vsock->slots == stages[TV_VSOCK_FREE]);
    FUZZ_CHECK(stages[TV_VSOCK_GREETING] + stages[TV_VSOCK_ASKED] == vsock->counts.half_open);
    FUZZ_CHECK(stages[TV_VSOCK_OPEN] == vsock->counts.open && stages[TV_VSOCK_ENDING] == vsock->counts.ending);
    FUZZ_CHECK(stages[TV_VSOCK_LINGER] == vsock->counts.lingering);
    FUZZ_CHECK(vsock->replies_used <= TV_VSOCK_REPLIES);
}

/* Of what the guest sent: with the peers, or kept for them. */
static uint64_t carried(void)
{
    uint64_t sum = vsock->counts.to_host;
    for (uint32_t i = 0; i < TV_VSOCK_CONNECTIONS; i++)
        sum += vsock->conns[i].backlog.used;
    return sum;
}

static int lowest_descriptor(void)
{
    int fd = dup(STDIN_FILENO);
    close_if(&(int){fd});
    return fd;
}

static void start_device(void)
{
    memset(at(RINGS), 0, BUFFERS - RINGS);
    memset(avail, 0, sizeof avail);
    memset(used, 0, sizeof used);
    for (int queue = 0; queue < TV_VSOCK_QUEUES; queue++) {
        state[queue] = (struct tv_queue){.memory = &memory, .irq = &irq, .index = (uint16_t)queue, .size = SIZE};
        state[queue].desc_gpa = ring(queue, 0);
        state[queue].avail_gpa = ring(queue, 1);
        state[queue].used_gpa = ring(queue, 2);
    }
    start_worker();
}

/* The driver begins anew, as after a reset, or on another host. */
static void reset(struct fuzz *fuzz)
{
    fuzz_one_in(fuzz, 2) ? tv_vsock_reset(vsock) : tv_vsock_moved(vsock);
    FUZZ_CHECK(!vsock->counts.open && !vsock->counts.half_open && !vsock->counts.ending && !vsock->counts.lingering);
    start_device();
    for (uint32_t i = 0; i < SIZE / 2; i++)
        listen_with(fuzz, i);
    describe(TV_VSOCK_EVENT, 0, SENDING, 4, 2, 0);
    offer(TV_VSOCK_EVENT, 0);
}

/* Sockets that hold little: what they don't take is kept. */
static void shrink_sockets(void)
{
    int least = 1;
    for (uint32_t i = 0; i < TV_VSOCK_CONNECTIONS; i++)
        if (vsock->conns[i].fd >= 0)
            setsockopt(vsock->conns[i].fd, SOL_SOCKET, SO_SNDBUF, &least, sizeof least);
}

static void one_step(struct fuzz *fuzz)
{
    uint64_t ticks = 1;
    ssize_t done = 0;
    switch (fuzz_below(fuzz, 200)) {
    case 0:
        reset(fuzz);
        return;
    case 1:
    case 2:
        restart_worker();
        restarts++;
        return;
    case 3:
    case 4:
        toggle_service();
        return;
    case 5: /* handed over, and back */
        tv_vsock_listen(vsock, -1);
        FUZZ_CHECK(!tv_vsock_listen(vsock, listener));
        return;
    case 6:
    case 7:
        now_ns += fuzz_below(fuzz, 3000000000u);
        done = write(vsock->timer_fd, &ticks, sizeof ticks);
        (void)done;
        return;
    default:
        if (taken() && fuzz_one_in(fuzz, 2))
            send_packet(fuzz);
        else
            peer_acts(fuzz);
    }
}

static void one(struct fuzz *fuzz)
{
    int lowest = lowest_descriptor();
    struct rlimit limit = {(rlim_t)lowest + 8, 4096}; /* sometimes there are a few only */
    for (int i = 0; i < PEERS; i++)
        peers[i] = -1;
    for (int i = 0; i < KNOWN; i++)
        known[i] = (struct known){(uint32_t)i, 7};
    listener = listen_at(&address);
    vsock = tv_vsock_new(CID, address.sun_path);
    if (vsock)
        tv_vsock_set_patience(vsock, 2000000000ull, 30000000000ull);
    FUZZ_CHECK(vsock && listener >= 0 && !tv_vsock_listen(vsock, listener));
    if (fuzz_one_in(fuzz, 2))
        toggle_service();
    start_device();
    reset(fuzz);
    int small = fuzz_one_in(fuzz, 2);
    offered = 0;
    if (fuzz_one_in(fuzz, 8))
        setrlimit(RLIMIT_NOFILE, &limit);
    for (int step = 0; step < STEPS; step++) {
        uint64_t before = carried() - offered;
        one_step(fuzz);
        before += offered; /* no byte that was not sent */
        run();
        take_given(fuzz);
        check_table();
        FUZZ_CHECK(carried() <= before);
        if (small)
            shrink_sockets();
        if (worker->worker.queues[TV_VSOCK_RECEIVE].broken || worker->worker.queues[TV_VSOCK_TRANSMIT].broken) {
            broken++;
            reset(fuzz);
        }
    }
    uint64_t *sum = (uint64_t *)&met;
    for (size_t i = 0; i < sizeof met / sizeof *sum; i++)
        sum[i] += ((const uint64_t *)&vsock->counts)[i];
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    tv_vsock_listen(vsock, -1);
    tv_vsock_free(vsock);
    for (int i = 0; i < PEERS; i++)
        close_if(&peers[i]);
    close_if(&service);
    close_if(&listener);
    FUZZ_CHECK(lowest_descriptor() == lowest); /* nothing is left open */
}

static void summarize(char *into, size_t size)
{
    snprintf(into, size,
             "%llu packets sent, %llu given, %llu established, %llu and %llu bytes, %llu resets, %llu malformed, "
             "%llu misaddressed, %llu over credit, %llu out of order, %llu unknown, %llu bad greetings, %llu timed out, "
             "%llu without descriptors, %llu workers, %llu queues broken",
             (unsigned long long)packets, (unsigned long long)given, (unsigned long long)met.established,
             (unsigned long long)met.to_guest, (unsigned long long)met.to_host, (unsigned long long)met.resets,
             (unsigned long long)met.malformed, (unsigned long long)met.misaddressed,
             (unsigned long long)met.over_credit, (unsigned long long)met.out_of_order, (unsigned long long)met.unknown,
             (unsigned long long)met.bad_greeting, (unsigned long long)met.timed_out,
             (unsigned long long)met.no_descriptors, (unsigned long long)restarts, (unsigned long long)broken);
}

int main(int argc, char **argv)
{
    char folder[] = "/tmp/fuzz-vsock-XXXXXX";
    struct tv_region *region = &memory.regions[0];
    *region = (struct tv_region){.size = RAM, .hva = aligned_alloc(TV_PAGE_SIZE, RAM)};
    region->dirty = calloc(RAM / TV_PAGE_SIZE / 64, 8);
    memset(region->hva, 0, RAM);
    memory.count = 1;
    worker = calloc(1, sizeof *worker);
    if (!mkdtemp(folder))
        return 2;
    address.sun_family = AF_UNIX;
    snprintf(address.sun_path, sizeof address.sun_path, "%s/v", folder);
    int code = fuzz_main(argc, argv, one, summarize);
    unlink(address.sun_path);
    strcat(address.sun_path, "_7");
    unlink(address.sun_path);
    rmdir(folder);
    return code;
}
