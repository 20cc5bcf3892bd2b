/* Opening what an image names, and nothing outside a folder: openat2, which the C library may not know. */
#define _GNU_SOURCE
#include "qcow2.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define NR_OPENAT2 437 /* the same on every architecture; linux/openat2.h may be older than the kernel */
#define BENEATH 0x08u
#define NO_MAGIC_LINKS 0x02u
#define TRIES 16 /* EAGAIN: a rename raced with a path that goes up */

int tv_open_beneath(int folder_fd, const char *path)
{
    struct {
        uint64_t flags, mode, resolve;
    } how = {O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, 0, BENEATH | NO_MAGIC_LINKS};
    long fd = -1;
    for (int tries = 0; tries < TRIES; tries++) {
        fd = syscall(NR_OPENAT2, folder_fd, path, &how, sizeof how);
        if (fd >= 0 || (errno != EAGAIN && errno != EINTR))
            break;
    }
    return (int)fd;
}
