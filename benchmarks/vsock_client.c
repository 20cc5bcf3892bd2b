/* Streams and connections a second, over a plain socket pair and over a VM's vsock, by the same loops.
 *
 *   vsock_client copy MIB            through a socket pair, from one thread to another: MiB/s
 *   vsock_client dial N              connections a second to a unix socket of its own, with a line each way
 *   vsock_client read PATH MIB       from port 3 of the probe guest behind PATH: MiB/s
 *   vsock_client write PATH MIB      to its port 2, which checks the pattern
 *   vsock_client connect PATH N      connections a second to its port 1 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define CHUNK 65536
#define PERIOD 65521 /* of the pattern, see the probe guest's vsock.c */

static uint8_t pattern[PERIOD + CHUNK];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static int dial(const char *path)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    snprintf(to.sun_path, sizeof to.sun_path, "%s", path);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to))
        fail(path);
    return fd;
}

static void hear_line(int fd)
{
    char line[64];
    if (recv(fd, line, sizeof line, MSG_PEEK) <= 0) /* it comes in one piece */
        fail("no answer");
    char *end = memchr(line, '\n', sizeof line);
    if (recv(fd, line, end ? (size_t)(end + 1 - line) : sizeof line, 0) <= 0)
        fail("no answer");
}

static int vsock(const char *path, int port)
{
    char line[32];
    int fd = dial(path), length = snprintf(line, sizeof line, "CONNECT %d\n", port);
    if (send(fd, line, (size_t)length, 0) != length)
        fail("send");
    hear_line(fd);
    return fd;
}

static void send_bytes(int fd, uint64_t bytes)
{
    for (uint64_t at = 0; at < bytes;) {
        ssize_t sent = send(fd, pattern + at % PERIOD, bytes - at < CHUNK ? bytes - at : CHUNK, 0);
        if (sent <= 0)
            fail("send");
        at += (uint64_t)sent;
    }
}

static void receive_bytes(int fd, uint64_t bytes)
{
    static uint8_t into[CHUNK];
    while (bytes) {
        ssize_t got = recv(fd, into, bytes < CHUNK ? bytes : CHUNK, 0);
        if (got <= 0)
            fail("recv");
        bytes -= (uint64_t)got;
    }
}

struct job {
    int fd;
    uint64_t many;
};

static void *receiver(void *argument)
{
    struct job *job = argument;
    receive_bytes(job->fd, job->many);
    return NULL;
}

static void *answerer(void *argument)
{
    struct job *job = argument;
    for (uint64_t left = job->many; left; left--) {
        int fd = accept(job->fd, NULL, NULL);
        hear_line(fd);
        if (send(fd, "OK 1\n", 5, 0) != 5)
            fail("send");
        close(fd);
    }
    return NULL;
}

static void copy(uint64_t bytes)
{
    int pair[2];
    pthread_t thread;
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
        fail("socketpair");
    struct job job = {pair[1], bytes};
    pthread_create(&thread, NULL, receiver, &job);
    send_bytes(pair[0], bytes);
    pthread_join(thread, NULL);
}

static void dial_own(uint64_t many)
{
    struct sockaddr_un here = {.sun_family = AF_UNIX};
    pthread_t thread;
    snprintf(here.sun_path, sizeof here.sun_path, "/tmp/vsock-dial-%d", (int)getpid());
    struct job job = {socket(AF_UNIX, SOCK_STREAM, 0), many};
    if (bind(job.fd, (struct sockaddr *)&here, sizeof here) || listen(job.fd, 64))
        fail(here.sun_path);
    pthread_create(&thread, NULL, answerer, &job);
    for (uint64_t left = many; left; left--)
        close(vsock(here.sun_path, 1));
    pthread_join(thread, NULL);
    unlink(here.sun_path);
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "", *path = argc > 3 ? argv[2] : "";
    uint64_t many = argc > 2 ? strtoull(argv[argc - 1], NULL, 0) : 0;
    for (uint32_t i = 0; i < sizeof pattern; i++) {
        uint32_t x = i % PERIOD * 2654435761u;
        pattern[i] = (uint8_t)(x >> 24 ^ x >> 13);
    }
    double began = now();
    if (!strcmp(what, "copy"))
        copy(many << 20);
    else if (!strcmp(what, "dial"))
        dial_own(many);
    else if (!strcmp(what, "read"))
        receive_bytes(vsock(path, 3), many << 20);
    else if (!strcmp(what, "write"))
        send_bytes(vsock(path, 2), many << 20);
    else if (!strcmp(what, "connect"))
        for (uint64_t left = many; left; left--)
            close(vsock(path, 1));
    else
        return 2;
    printf("%.3f\n", (double)many / (now() - began));
    return 0;
}
