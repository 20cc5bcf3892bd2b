/* The init of a Linux guest that uses its vsock: one process echoes what clients of the host say on port 1024, the other
 * sends a pattern to the host's port 7 and expects it back, on a new connection where the last one was reset. */
#include "guest.h"

#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>

#include <linux/vm_sockets.h>

#define ECHO_PORT 1024
#define SERVER_PORT 7
#define ROUNDS 60
#define BYTES 20000 /* a round: more than a receive buffer, so many packets */

static const char *const MODULES[] = {"virtio_ring",
                                      "virtio",
                                      "virtio_pci_legacy_dev",
                                      "virtio_pci_modern_dev",
                                      "virtio_pci",
                                      "vsock",
                                      "vmw_vsock_virtio_transport_common",
                                      "vmw_vsock_virtio_transport"};

static struct sockaddr_vm at(unsigned cid, unsigned port)
{
    return (struct sockaddr_vm){.svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port};
}

static int send_all(int fd, const char *from, size_t length)
{
    while (length) {
        ssize_t sent = send(fd, from, length, MSG_NOSIGNAL);
        if (sent < 0)
            return -1;
        from += sent;
        length -= (size_t)sent;
    }
    return 0;
}

static void echo(void)
{
    static char bytes[65536];
    struct sockaddr_vm here = at(VMADDR_CID_ANY, ECHO_PORT);
    int listener = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&here, sizeof here) || listen(listener, 8))
        printf("GUEST problem: cannot listen: %s\n", strerror(errno));
    for (;;) {
        unsigned long total = 0;
        int fd = accept(listener, NULL, NULL);
        ssize_t got;
        if (fd < 0)
            continue;
        while ((got = recv(fd, bytes, sizeof bytes, 0)) > 0 && !send_all(fd, bytes, (size_t)got))
            total += (unsigned long)got;
        printf("GUEST echoed %lu\n", total);
        close(fd);
    }
}

static int connect_out(void)
{
    struct sockaddr_vm there = at(VMADDR_CID_HOST, SERVER_PORT);
    for (int tries = 0; tries < 600; tries++) {
        int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
        if (!connect(fd, (struct sockaddr *)&there, sizeof there))
            return fd;
        close(fd);
        tenth();
    }
    printf("GUEST problem: cannot connect: %s\n", strerror(errno));
    return -1;
}

int main(void)
{
    static char out[BYTES], in[BYTES];
    setvbuf(stdout, NULL, _IOLBF, 0);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    LOAD_ALL(MODULES);
    if (!fork())
        echo();
    int fd = connect_out();
    unsigned cid = 0;
    int device = open("/dev/vsock", O_RDONLY);
    if (ioctl(device, IOCTL_VM_SOCKETS_GET_LOCAL_CID, &cid) < 0)
        printf("GUEST problem: no address: %s\n", strerror(errno));
    printf("GUEST address %u\n", cid);
    for (unsigned long round = 0; round < ROUNDS && fd >= 0; round++) {
        for (size_t i = 0; i < sizeof out; i++)
            out[i] = (char)(i * 31 + round * 7 + i / 251);
        memset(in, 0, sizeof in);
        if (send_all(fd, out, sizeof out) || recv(fd, in, sizeof in, MSG_WAITALL) != (ssize_t)sizeof in) {
            printf("GUEST round %lu ended: %s\n", round, strerror(errno));
            close(fd);
            fd = connect_out();
            continue;
        }
        printf("GUEST round %lu %s\n", round, memcmp(in, out, sizeof in) ? "bad" : "good");
        tenth();
    }
    printf("GUEST done\n");
    reboot(RB_POWER_OFF);
    return 1;
}
