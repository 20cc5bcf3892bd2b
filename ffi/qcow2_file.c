/* The file under a qcow2 image, and what is said of it when it is wrong. */
#define _GNU_SOURCE
#include "qcow2_image.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <unistd.h>

/* What lies past the end of the file reads as zeros: the last cluster of an image is seldom whole. */
int qcow2_read_all(int fd, void *to, uint64_t length, uint64_t at)
{
    uint8_t *next = to;
    while (length) {
        ssize_t got = pread(fd, next, length, (off_t)at);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return -1;
        if (!got) {
            memset(next, 0, length);
            return 0;
        }
        next += got;
        at += (uint64_t)got;
        length -= (uint64_t)got;
    }
    return 0;
}

int qcow2_write_all(int fd, const void *from, uint64_t length, uint64_t at)
{
    const uint8_t *next = from;
    while (length) {
        ssize_t put = pwrite(fd, next, length, (off_t)at);
        if (put < 0 && errno == EINTR)
            continue;
        if (put <= 0) {
            if (!put)
                errno = EIO;
            return -1;
        }
        next += put;
        at += (uint64_t)put;
        length -= (uint64_t)put;
    }
    return 0;
}

int qcow2_sync(int fd)
{
    int result;
    do
        result = fdatasync(fd);
    while (result < 0 && errno == EINTR);
    return result;
}

/* The image contradicts itself here: an I/O error to the guest. */
int qcow2_spoilt(struct tv_qcow2 *image)
{
    qcow2_add(&image->counts.spoilt, 1);
    errno = EIO;
    return -1;
}

/* The part [offset, offset + length) of `iov`, as segments. Gives how many; as many bytes as `room` of them hold. */
int qcow2_slice(const struct iovec *iov, int count, uint64_t offset, uint64_t length, struct iovec *into, int room)
{
    int made = 0;
    for (int i = 0; i < count && length && made < room; i++) {
        if (offset >= iov[i].iov_len) {
            offset -= iov[i].iov_len;
            continue;
        }
        uint64_t here = iov[i].iov_len - offset;
        if (here > length)
            here = length;
        into[made].iov_base = (uint8_t *)iov[i].iov_base + offset;
        into[made++].iov_len = here;
        length -= here;
        offset = 0;
    }
    return made;
}

void qcow2_zero_iov(const struct iovec *iov, int count, uint64_t offset, uint64_t length)
{
    for (int i = 0; i < count && length; i++) {
        if (offset >= iov[i].iov_len) {
            offset -= iov[i].iov_len;
            continue;
        }
        uint64_t here = iov[i].iov_len - offset;
        if (here > length)
            here = length;
        memset((uint8_t *)iov[i].iov_base + offset, 0, here);
        length -= here;
        offset = 0;
    }
}

/* Fill `error` and give -1. */
int qcow2_wrong(struct tv_qcow2_error *error, const char *field, const char *remedy, uint64_t value,
                const char *problem, ...)
{
    snprintf(error->field, sizeof error->field, "%s", field);
    snprintf(error->remedy, sizeof error->remedy, "%s", remedy);
    snprintf(error->value, sizeof error->value, value < 65536 ? "%" PRIu64 : "0x%" PRIx64, value);
    va_list more;
    va_start(more, problem);
    vsnprintf(error->problem, sizeof error->problem, problem, more);
    va_end(more);
    errno = EINVAL;
    return -1;
}
