#define _GNU_SOURCE
#include "net_link.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define IOV_MOST 64u    /* segments that go to the kernel as they are; more are gathered first */
#define FLUSH_AT (64u << 10) /* so much is worth a system call before the turn ends */

/* NULL without memory. Descriptors that it has are its own from here, and nonblocking. */
struct tv_net_link *tv_net_link_new(int kind, int fd, int listen_fd)
{
    struct tv_net_link *link = calloc(1, sizeof *link);
    if (!link)
        return NULL;
    link->kind = kind;
    link->fd = fd;
    link->listen_fd = listen_fd;
    return link;
}

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* Let go of the outside: no descriptor is open after this, nothing waits. Idempotent; with no worker. */
void tv_net_link_drop(struct tv_net_link *link)
{
    close_fd(&link->fd);
    close_fd(&link->listen_fd);
    link->in_at = link->in_end = link->out_at = link->out_end = link->frame = 0;
}

void tv_net_link_free(struct tv_net_link *link)
{
    if (!link)
        return;
    tv_net_link_drop(link);
    free(link);
}

/* Whom to dial, or to send datagrams to. -1: no socket can have that path. */
int tv_net_link_to(struct tv_net_link *link, const char *path, uint32_t length)
{
    if (!length || length >= sizeof link->peer.sun_path)
        return -1;
    memset(&link->peer, 0, sizeof link->peer);
    link->peer.sun_family = AF_UNIX;
    memcpy(link->peer.sun_path, path, length);
    link->peer_len = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length + 1);
    return 0;
}

/* --- peers of a stream ----------------------------------------------------------------------------------------- */

/* The peer is given up; what was on the way with it is lost, as it is on a cable. */
void tv_net_hang_up(struct tv_net_link *link)
{
    if (link->fd < 0)
        return;
    close_fd(&link->fd);
    link->hung_up = 1;
    link->in_at = link->in_end = link->out_at = link->out_end = link->frame = 0;
}

static void adopt(struct tv_net_link *link, int fd)
{
    tv_net_hang_up(link);
    link->fd = fd;
    link->connections++;
}

/* Try once to reach the one whom this link dials. 1: there is a peer now, 0: nobody answers. */
int tv_net_dial(struct tv_net_link *link)
{
    if (link->kind != TV_NET_STREAM || !link->peer_len || link->fd >= 0)
        return link->fd >= 0;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return 0;
    if (connect(fd, (struct sockaddr *)&link->peer, link->peer_len)) {
        close(fd);
        return 0;
    }
    adopt(link, fd);
    return 1;
}

/* Whoever came last is the peer. 1: there is a new one. */
int tv_net_accept(struct tv_net_link *link)
{
    int fd = accept4(link->listen_fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0)
        return 0;
    adopt(link, fd);
    return 1;
}

/* --- receiving ------------------------------------------------------------------------------------------------- */

static int again(void)
{
    return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
}

static int violated(struct tv_net_link *link)
{
    link->violations++;
    tv_net_hang_up(link);
    return -1;
}

/* More of a stream. 1 something came, 0 nothing now, -1 the peer has gone. */
static int read_stream(struct tv_net_link *link)
{
    if (link->in_at) {
        memmove(link->in, link->in + link->in_at, link->in_end - link->in_at);
        link->in_end -= link->in_at;
        link->in_at = 0;
    }
    ssize_t got = recv(link->fd, link->in + link->in_end, sizeof link->in - link->in_end, 0);
    if (got > 0) {
        link->in_end += (uint32_t)got;
        return 1;
    }
    if (got < 0 && again())
        return 0;
    tv_net_hang_up(link);
    return -1;
}

static int next_of_stream(struct tv_net_link *link, const uint8_t **data, uint32_t *length)
{
    for (;;) {
        uint32_t have = link->in_end - link->in_at, big, len = 0;
        if (have >= TV_NET_LENGTH) {
            memcpy(&big, link->in + link->in_at, sizeof big);
            len = ntohl(big);
            if (len > TV_NET_FRAME_MAX)
                return violated(link);
            if (have - TV_NET_LENGTH >= len) {
                *data = link->in + link->in_at + TV_NET_LENGTH;
                *length = len;
                link->frame = TV_NET_LENGTH + len;
                return 1;
            }
        }
        int got = read_stream(link);
        if (got <= 0)
            return got;
    }
}

/* A tap's frame with its header, or a datagram. One that is too long comes cut, by a byte more than may be. */
static int next_of_packets(struct tv_net_link *link, struct tv_vnet_header *header, const uint8_t **data,
                           uint32_t *length)
{
    if (!link->frame) {
        uint32_t most = TV_NET_HEADER + TV_NET_FRAME_MAX + 1;
        ssize_t got = link->kind == TV_NET_TAP ? read(link->fd, link->in, most) : recv(link->fd, link->in, most, 0);
        if (got < 0)
            return again() || link->kind == TV_NET_DGRAM ? 0 : -1;
        link->in_end = (uint32_t)got;
        link->frame = 1; /* an empty datagram is one too */
    }
    uint32_t before = link->kind == TV_NET_TAP ? TV_NET_HEADER : 0;
    uint32_t have = link->in_end < before ? before : link->in_end;
    if (before)
        memcpy(header, link->in, sizeof *header);
    *data = link->in + before;
    *length = have - before;
    return 1;
}

/* The next frame, which stays until tv_net_taken. 1 there is one, 0 none now, -1 nor will there be: the peer has gone,
 * the tap fails. `header` is as it came, or all zero. */
int tv_net_next(struct tv_net_link *link, struct tv_vnet_header *header, const uint8_t **data, uint32_t *length)
{
    memset(header, 0, sizeof *header);
    if (link->fd < 0)
        return -1;
    if (link->kind == TV_NET_STREAM)
        return next_of_stream(link, data, length);
    return next_of_packets(link, header, data, length);
}

void tv_net_taken(struct tv_net_link *link)
{
    if (link->kind == TV_NET_STREAM) {
        link->in_at += link->frame;
        if (link->in_at == link->in_end)
            link->in_at = link->in_end = 0;
    } else {
        link->in_end = 0;
    }
    link->frame = 0;
}

/* --- sending --------------------------------------------------------------------------------------------------- */

/* Send what waits in `out`. TV_NET_SENT: nothing is left, or nobody is there for it. */
int tv_net_flush(struct tv_net_link *link)
{
    while (link->out_at < link->out_end && link->fd >= 0) {
        ssize_t sent = send(link->fd, link->out + link->out_at, link->out_end - link->out_at, MSG_NOSIGNAL);
        if (sent > 0) {
            link->out_at += (uint32_t)sent;
            continue;
        }
        if (sent < 0 && errno == EINTR)
            continue;
        if (sent < 0 && again())
            return TV_NET_BUSY;
        tv_net_hang_up(link);
    }
    link->out_at = link->out_end = 0;
    return TV_NET_SENT;
}

static void gather(uint8_t *to, const struct iovec *iov, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        memcpy(to, iov[i].iov_base, iov[i].iov_len);
        to += iov[i].iov_len;
    }
}

/* Behind the others, to go with them in one call: see tv_net_flush. */
static int send_to_stream(struct tv_net_link *link, const struct iovec *iov, uint32_t count, uint32_t length)
{
    uint32_t whole = TV_NET_LENGTH + length, big = htonl(length);
    if (link->out_end - link->out_at >= FLUSH_AT || sizeof link->out - link->out_end < whole)
        tv_net_flush(link);
    if (link->fd < 0)
        return TV_NET_LOST;
    if (sizeof link->out - link->out_end < whole && link->out_at) {
        memmove(link->out, link->out + link->out_at, link->out_end - link->out_at);
        link->out_end -= link->out_at;
        link->out_at = 0;
    }
    if (sizeof link->out - link->out_end < whole)
        return TV_NET_BUSY;
    memcpy(link->out + link->out_end, &big, sizeof big);
    gather(link->out + link->out_end + TV_NET_LENGTH, iov, count);
    link->out_end += whole;
    return TV_NET_SENT;
}

/* Send one frame of `length` bytes, TV_NET_FRAME_MAX at the most: iov[1 ... count], iov[0] is for the header. Nothing
 * of it is kept here, but for a stream's copy. */
int tv_net_send(struct tv_net_link *link, const struct tv_vnet_header *header, struct iovec *iov, uint32_t count,
                uint32_t length)
{
    if (link->fd < 0)
        return TV_NET_LOST;
    if (link->kind == TV_NET_STREAM)
        return send_to_stream(link, iov + 1, count, length);
    if (count > IOV_MOST) {
        gather(link->out, iov + 1, count);
        iov[1] = (struct iovec){link->out, length};
        count = 1;
    }
    ssize_t sent;
    if (link->kind == TV_NET_TAP) {
        iov[0] = (struct iovec){(void *)header, TV_NET_HEADER};
        sent = writev(link->fd, iov, (int)count + 1);
    } else {
        struct msghdr message = {
            .msg_name = &link->peer, .msg_namelen = link->peer_len, .msg_iov = iov + 1, .msg_iovlen = count};
        sent = sendmsg(link->fd, &message, MSG_NOSIGNAL);
    }
    if (sent >= 0)
        return TV_NET_SENT;
    return again() ? TV_NET_BUSY : TV_NET_LOST;
}
