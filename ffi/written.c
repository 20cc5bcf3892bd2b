#define _GNU_SOURCE
#include "written.h"
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The kernel's interface as of Linux 6.7 (linux/userfaultfd.h, linux/fs.h; Documentation/admin-guide/mm/pagemap.rst),
 * written out here: a distribution's headers are often older than the kernel that runs. */
#define USER_MODE_ONLY 1 /* needs no privilege; faults in the kernel are none of ours: asynchronous ones end inside it */
#define API_VERSION 0xaaull
#define WP_HUGETLBFS_SHMEM (1ull << 12)
#define WP_UNPOPULATED (1ull << 13)
#define WP_ASYNC (1ull << 15)
#define REGISTER_MODE_WP (1ull << 1)
#define WRITEPROTECT_MODE_WP (1ull << 0)

struct api {
    uint64_t api, features, ioctls;
};

struct registration {
    uint64_t start, len, mode, ioctls;
};

struct protection {
    uint64_t start, len, mode;
};

#define IOCTL_API _IOWR(0xaa, 0x3f, struct api)
#define IOCTL_REGISTER _IOWR(0xaa, 0x00, struct registration)
#define IOCTL_WRITEPROTECT _IOWR(0xaa, 0x06, struct protection)

#define IS_WRITTEN (1ull << 1)
#define WP_MATCHING (1ull << 0)
#define CHECK_WPASYNC (1ull << 1)
#define FOUND_AT_ONCE 512

struct found {
    uint64_t start, end, categories;
};

struct scan {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

#define IOCTL_SCAN _IOWR('f', 16, struct scan)

/* A descriptor that mappings are watched with, or -errno: EINVAL from a kernel without the asynchronous mode. */
int tv_written_open(void)
{
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | USER_MODE_ONLY);
    if (uffd < 0)
        return -errno;
    struct api api = {.api = API_VERSION, .features = WP_HUGETLBFS_SHMEM | WP_UNPOPULATED | WP_ASYNC};
    if (ioctl(uffd, IOCTL_API, &api)) {
        int error = errno;
        close(uffd);
        return -error;
    }
    return uffd;
}

/* From now on writes to the mapping are seen; nothing is written yet. Pages that have no memory are watched as well.
 * 0 or an errno, after which part of it may be protected: the descriptor is closed next. Waits for the kernel, some
 * milliseconds a GiB. */
int tv_written_watch(int uffd, uintptr_t start, uint64_t size)
{
    struct registration registration = {.start = start, .len = size, .mode = REGISTER_MODE_WP};
    if (ioctl(uffd, IOCTL_REGISTER, &registration))
        return errno;
    int result;
    do {
        struct protection protection = {.start = start, .len = size, .mode = WRITEPROTECT_MODE_WP};
        result = ioctl(uffd, IOCTL_WRITEPROTECT, &protection);
    } while (result && (errno == EINTR || errno == EAGAIN));
    return result ? errno : 0;
}

static void set_bits(uint64_t *into, uint64_t first, uint64_t end)
{
    while (first < end) {
        uint64_t shift = first % 64, count = 64 - shift;
        if (count > end - first)
            count = end - first;
        into[first / 64] |= (count == 64 ? ~0ull : (1ull << count) - 1) << shift;
        first += count;
    }
}

/* OR the pages that were written since the last time into `into` (a bit a page) and watch them again. 0 or an errno
 * (EPERM: the mapping is not watched, or not all of it), after which the log is not whole any more. `pagemap` is
 * /proc/self/pagemap. One thread at a time.
 *
 * Asking for this one category alone is what makes the kernel count an entry that is gone as written. */
int tv_written_take(int pagemap, uintptr_t start, uint64_t size, uint64_t *into)
{
    struct found found[FOUND_AT_ONCE];
    uint64_t at = start, end = start + size;
    while (at < end) {
        struct scan scan = {
            .size = sizeof scan,
            .flags = WP_MATCHING | CHECK_WPASYNC,
            .start = at,
            .end = end,
            .vec = (uintptr_t)found,
            .vec_len = FOUND_AT_ONCE,
            .category_mask = IS_WRITTEN,
            .return_mask = IS_WRITTEN,
        };
        int count = ioctl(pagemap, IOCTL_SCAN, &scan);
        if (count < 0)
            return errno;
        for (int i = 0; i < count; i++)
            set_bits(into, (found[i].start - start) >> TV_PAGE_SHIFT, (found[i].end - start) >> TV_PAGE_SHIFT);
        if (scan.walk_end <= at || scan.walk_end > end)
            return EIO; /* it must come forward, or this never ends */
        at = scan.walk_end;
    }
    return 0;
}
