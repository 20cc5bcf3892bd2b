/* The host's side of virtio-vsock: unix sockets that never block, in one epoll set. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "vsock_table.h"

#define TICK_NS 100000000 /* limits are kept to this */
#define EVENTS 64         /* in one look */
#define LOOKS 4           /* in one turn */
#define ACCEPTS 32        /* in one turn */
#define GREETING_MAX 32   /* "CONNECT 4294967294\n" and some spaces */

/* --- time ------------------------------------------------------------------------------------------------------ */

static void set_timer(struct tv_vsock *vsock, long every_ns)
{
    struct itimerspec when = {{0, every_ns}, {0, every_ns}};
    timerfd_settime(vsock->timer_fd, 0, &when, NULL);
    vsock->ticking = every_ns != 0;
}

/* There is something that has a limit in time. */
void tv_vsock_tick_soon(struct tv_vsock *vsock)
{
    if (!vsock->ticking)
        set_timer(vsock, TICK_NS);
}

static void expire(struct tv_vsock *vsock, struct tv_vsock_conn *conn)
{
    tv_vsock_add(&vsock->counts.timed_out, 1);
    switch (conn->stage) {
    case TV_VSOCK_GREETING:
    case TV_VSOCK_LINGER:
        tv_vsock_release(vsock, conn);
        return;
    case TV_VSOCK_ASKED:
    case TV_VSOCK_ENDING: /* in reset already where its guest takes nothing: then it stays, one slot of its own */
        tv_vsock_abort(vsock, conn);
    }
}

static void tick(struct tv_vsock *vsock)
{
    uint64_t count, now = tv_now_ns();
    int limited = 0;
    ssize_t got = read(vsock->timer_fd, &count, sizeof count);
    (void)got;
    for (uint32_t i = 0; i < TV_VSOCK_CONNECTIONS; i++) {
        struct tv_vsock_conn *conn = &vsock->conns[i];
        if (conn->stage == TV_VSOCK_FREE || conn->stage == TV_VSOCK_OPEN || conn->owed & 1u << TV_VSOCK_RST)
            continue;
        limited = 1;
        if (now > conn->expires_ns)
            expire(vsock, conn);
    }
    if (vsock->pausing) {
        vsock->pausing = 0;
        tv_vsock_watch_listener(vsock);
    }
    if (!limited)
        set_timer(vsock, 0);
}

/* --- clients of the host ---------------------------------------------------------------------------------------- */

static void watch_listener(struct tv_vsock *vsock, int on)
{
    struct epoll_event event = {.events = on ? EPOLLIN : 0, .data.ptr = &vsock->listener};
    epoll_ctl(vsock->epoll_fd, EPOLL_CTL_MOD, vsock->listener, &event);
    vsock->listening = (uint8_t)on;
}

/* Take clients, unless there are too many half made connections, or it was found lately that there are no descriptors:
 * until then they wait in the listener's queue. */
void tv_vsock_watch_listener(struct tv_vsock *vsock)
{
    if (vsock->listener >= 0 && !vsock->pausing && vsock->counts.half_open < TV_VSOCK_HALF_OPEN)
        watch_listener(vsock, 1);
}

/* From now on its socket's events are told, as edges. 0, or -1. */
int tv_vsock_watch(struct tv_vsock *vsock, struct tv_vsock_conn *conn)
{
    uint64_t slot = (uint64_t)(conn - vsock->conns);
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
                                .data.u64 = (uint64_t)conn->generation << 32 | slot << 1 | 1}; /* odd: no pointer */
    return epoll_ctl(vsock->epoll_fd, EPOLL_CTL_ADD, conn->fd, &event);
}

static void accept_clients(struct tv_vsock *vsock)
{
    for (int left = ACCEPTS; left; left--) {
        if (vsock->counts.half_open >= TV_VSOCK_HALF_OPEN) {
            watch_listener(vsock, 0);
            return;
        }
        int fd = accept4(vsock->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0) {
            if (errno != EMFILE && errno != ENFILE && errno != ENOBUFS && errno != ENOMEM)
                return; /* nobody there any more */
            tv_vsock_add(&vsock->counts.no_descriptors, 1);
            vsock->pausing = 1;
            watch_listener(vsock, 0);
            tv_vsock_tick_soon(vsock);
            return;
        }
        struct tv_vsock_conn *conn = tv_vsock_take(vsock, fd);
        if (!conn) {
            tv_vsock_add(&vsock->counts.refused, 1);
            close(fd);
            continue;
        }
        tv_vsock_add(&vsock->counts.accepted, 1);
        tv_vsock_enter(vsock, conn, TV_VSOCK_GREETING);
        if (tv_vsock_watch(vsock, conn))
            tv_vsock_release(vsock, conn);
    }
}

/* The port in "CONNECT <port>\n", or -1. `length` bytes, the newline among them. */
static int64_t parse_greeting(const char *line, size_t length)
{
    static const char word[] = "connect";
    size_t at = 0;
    uint64_t port = 0;
    for (; at < sizeof word - 1; at++)
        if (at >= length || (line[at] | 0x20) != word[at])
            return -1;
    size_t blanks = at;
    while (at < length && line[at] == ' ')
        at++;
    if (at == blanks)
        return -1;
    size_t digits = at;
    for (; at < length && line[at] >= '0' && line[at] <= '9'; at++) {
        port = port * 10 + (uint64_t)(line[at] - '0');
        if (port >= UINT32_MAX) /* the last one means any port, section 5.10.4 and vsock(7) */
            return -1;
    }
    if (at == digits)
        return -1;
    while (at < length && (line[at] == ' ' || line[at] == '\r'))
        at++;
    return at + 1 == length && line[at] == '\n' ? (int64_t)port : -1;
}

/* What a client says first. Only its line is taken: what follows is the guest's. */
static void greet(struct tv_vsock *vsock, struct tv_vsock_conn *conn)
{
    char line[GREETING_MAX];
    ssize_t got = recv(conn->fd, line, sizeof line, MSG_PEEK | MSG_DONTWAIT);
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (got <= 0) {
        tv_vsock_release(vsock, conn);
        return;
    }
    char *end = memchr(line, '\n', (size_t)got);
    if (!end && got < GREETING_MAX)
        return; /* the rest is another edge */
    int64_t port = end ? parse_greeting(line, (size_t)(end + 1 - line)) : -1;
    if (port < 0) {
        tv_vsock_add(&vsock->counts.bad_greeting, 1);
        tv_vsock_release(vsock, conn);
        return;
    }
    got = recv(conn->fd, line, (size_t)(end + 1 - line), MSG_DONTWAIT); /* it is there */
    tv_vsock_set_ports(vsock, conn, (uint32_t)port, tv_vsock_pick_port(vsock, (uint32_t)port));
    conn->readable = 1; /* perhaps: what came with the line had its edge */
    tv_vsock_enter(vsock, conn, TV_VSOCK_ASKED);
    tv_vsock_owe(vsock, conn, TV_VSOCK_REQUEST);
}

/* --- the guest's connections ------------------------------------------------------------------------------------ */

/* To "<path>_<port>". Gives the socket, connected; -1 when nobody serves it, or its queue is full. */
int tv_vsock_connect_host(struct tv_vsock *vsock, uint32_t port)
{
    struct sockaddr_un to = vsock->address;
    size_t room = sizeof to.sun_path - vsock->path_length;
    if (snprintf(to.sun_path + vsock->path_length, room, "_%u", port) >= (int)room)
        return -1;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -1;
    if (!connect(fd, (struct sockaddr *)&to, sizeof to)) /* unix: at once or not at all */
        return fd;
    close(fd);
    return -1;
}

/* --- what is written to a peer ---------------------------------------------------------------------------------- */

/* It has taken so many bytes of the guest's; the guest is told when it is worth a packet. */
void tv_vsock_host_sent(struct tv_vsock *vsock, struct tv_vsock_conn *conn, uint32_t bytes)
{
    conn->forwarded += bytes;
    tv_vsock_add(&vsock->counts.to_host, bytes);
    if (conn->stage == TV_VSOCK_OPEN && conn->forwarded - conn->forwarded_told >= TV_VSOCK_BUFFER / 4)
        tv_vsock_owe(vsock, conn, TV_VSOCK_CREDIT_UPDATE);
}

/* It takes no more. What the guest sent in good faith is dropped, and the guest told. */
void tv_vsock_host_deaf(struct tv_vsock *vsock, struct tv_vsock_conn *conn)
{
    conn->forwarded = conn->received;
    conn->backlog.used = 0;
    if (conn->stage == TV_VSOCK_LINGER) {
        tv_vsock_release(vsock, conn);
        return;
    }
    if (conn->host_shut & TV_VSOCK_SHUT_RCV)
        return;
    if (conn->eof) {
        tv_vsock_host_ended(vsock, conn);
        return;
    }
    conn->host_shut |= TV_VSOCK_SHUT_RCV;
    conn->readable = 1; /* perhaps it is gone altogether: that is seen by reading */
    tv_vsock_owe(vsock, conn, TV_VSOCK_SHUTDOWN);
}

/* What the backlog holds, as far as the socket takes it; and then the guest's own end of it, if it came meanwhile. */
void tv_vsock_flush(struct tv_vsock *vsock, struct tv_vsock_conn *conn)
{
    struct tv_bytes *backlog = &conn->backlog;
    while (backlog->used) {
        uint32_t at = backlog->head & (backlog->size - 1);
        uint32_t part = backlog->size - at < backlog->used ? backlog->size - at : backlog->used;
        ssize_t sent = send(conn->fd, backlog->bytes + at, part, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0 && errno == EAGAIN)
            return;
        if (sent < 0) {
            tv_vsock_host_deaf(vsock, conn);
            return;
        }
        tv_bytes_drop(backlog, (uint32_t)sent);
        if (conn->stage == TV_VSOCK_LINGER)
            conn->expires_ns = tv_now_ns() + vsock->linger_ns; /* it moves */
        tv_vsock_host_sent(vsock, conn, (uint32_t)sent);
    }
    if (conn->stage == TV_VSOCK_LINGER)
        tv_vsock_release(vsock, conn);
    else if (conn->guest_shut & TV_VSOCK_SHUT_SEND)
        shutdown(conn->fd, SHUT_WR);
}

/* --- its events ------------------------------------------------------------------------------------------------- */

/* Nothing more comes from the peer and nothing more can go there: the guest is told, and its answer waited for. */
void tv_vsock_host_ended(struct tv_vsock *vsock, struct tv_vsock_conn *conn)
{
    tv_vsock_close(conn);
    conn->host_shut = TV_VSOCK_SHUT_BOTH;
    tv_vsock_enter(vsock, conn, TV_VSOCK_ENDING);
    tv_vsock_owe(vsock, conn, TV_VSOCK_SHUTDOWN);
}

static void conn_event(struct tv_vsock *vsock, struct tv_vsock_conn *conn, uint32_t events)
{
    int ended = (events & (EPOLLHUP | EPOLLERR)) != 0;
    conn->last |= (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
    switch (conn->stage) {
    case TV_VSOCK_GREETING:
        greet(vsock, conn);
        return;
    case TV_VSOCK_ASKED:
        conn->readable = 1;
        conn->hung_up |= ended;
        if (ended)
            tv_vsock_abort(vsock, conn);
        return;
    case TV_VSOCK_OPEN:
        conn->hung_up |= ended;
        if (ended && (conn->eof || conn->guest_shut & TV_VSOCK_SHUT_RCV)) { /* nothing of it is to be read */
            tv_vsock_host_ended(vsock, conn);
            return;
        }
        if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) {
            conn->readable = !conn->eof;
            tv_vsock_queue(vsock, conn);
        }
        if (events & EPOLLOUT && conn->backlog.used)
            tv_vsock_flush(vsock, conn);
        return;
    case TV_VSOCK_LINGER:
        if (ended)
            tv_vsock_release(vsock, conn);
        else
            tv_vsock_flush(vsock, conn);
    }
}

/* The turn of the epoll descriptor, `at` of the worker's: bounded, what is left over gets the next one. */
void tv_vsock_host_turn(struct tv_vsock *vsock, struct tv_worker *worker, uint32_t at)
{
    struct epoll_event events[EVENTS];
    for (int look = 0; look < LOOKS; look++) {
        int count = epoll_wait(vsock->epoll_fd, events, EVENTS, 0);
        for (int i = 0; i < count; i++) {
            uint64_t which = events[i].data.u64;
            if (!(which & 1)) {
                events[i].data.ptr == &vsock->listener ? accept_clients(vsock) : tick(vsock);
                continue;
            }
            struct tv_vsock_conn *conn = &vsock->conns[(uint32_t)which >> 1];
            if (conn->generation == (uint32_t)(which >> 32) && conn->fd >= 0)
                conn_event(vsock, conn, events[i].events);
        }
        if (count < EVENTS)
            return;
    }
    worker->due |= 1u << at;
}
