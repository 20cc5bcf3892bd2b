#define _GNU_SOURCE
#include "pages.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "crc32c.h"
#include "pages_io.h"
#include "pages_land.h"

struct tv_inbox {
    struct tv_entry entry;
};

/* NULL and errno where there is no memory. Its bytes are a mapping of their own: the host has them back with it. */
struct tv_inbox *tv_inbox_new(void)
{
    struct tv_inbox *inbox = calloc(1, sizeof *inbox);
    if (!inbox)
        return NULL;
    void *bytes =
        mmap(NULL, TV_FRAME_PAGES * TV_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (bytes == MAP_FAILED) {
        free(inbox);
        return NULL;
    }
    inbox->entry.bytes = bytes;
    return inbox;
}

/* No call uses it any more. */
void tv_inbox_free(struct tv_inbox *inbox)
{
    if (!inbox)
        return;
    munmap(inbox->entry.bytes, TV_FRAME_PAGES * TV_PAGE_SIZE);
    free(inbox);
}

/* Fill `parts` from the socket until job->until_ms. Gives a reason; EOF when the peer closed before the last byte. */
static int receive_parts(struct tv_page_intake *job, struct iovec *parts, uint64_t count)
{
    while (count) {
        if (!parts->iov_len) {
            parts++;
            count--;
            continue;
        }
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = count};
        ssize_t got = recvmsg(job->fd, &message, MSG_DONTWAIT);
        if (got == 0)
            return TV_PAGES_EOF;
        if (got < 0) {
            if (errno == EINTR)
                continue;
            if (errno == ECONNRESET) {
                job->error = errno;
                return TV_PAGES_EOF;
            }
            if (errno != EAGAIN && errno != EWOULDBLOCK) {
                job->error = errno;
                return TV_PAGES_ERRNO;
            }
            int reason = tv_wait_ready(job->fd, POLLIN, job->kick_fd, job->until_ms, &job->error);
            if (reason != TV_PAGES_DONE)
                return reason;
            continue;
        }
        job->landing->bytes += (uint64_t)got;
        while (got > 0) {
            uint64_t step = (uint64_t)got < parts->iov_len ? (uint64_t)got : parts->iov_len;
            parts->iov_base = (uint8_t *)parts->iov_base + step;
            parts->iov_len -= step;
            got -= (ssize_t)step;
            if (!parts->iov_len) {
                parts++;
                count--;
            }
        }
    }
    return TV_PAGES_DONE;
}

/* Receive the next header. DONE: it is in job->header, and *ours says whether it is that of a page frame, the next one,
 * in which case all of it that the list does not say is in `entry`. */
static int receive_header(struct tv_page_intake *job, struct tv_entry *entry, int *ours)
{
    struct iovec part = {job->header, TV_FRAME_HEADER};
    int reason = receive_parts(job, &part, 1);
    if (reason != TV_PAGES_DONE)
        return reason;
    uint16_t version;
    memcpy(&version, job->header + 4, 2);
    memcpy(&entry->type, job->header + 6, 2);
    memcpy(&entry->sequence, job->header + TV_FRAME_SEQUENCE, 8);
    entry->pages_crc = tv_get32(job->header + TV_FRAME_PAGES_CRC);
    uint32_t length = tv_get32(job->header + 8);
    entry->body_length = tv_get32(job->header + 12);
    entry->payload_length = length - entry->body_length;
    *ours = tv_get32(job->header) == TV_FRAME_MAGIC && version == job->version &&
            tv_get32(job->header + TV_FRAME_CRC) == tv_crc32c(0, job->header, TV_FRAME_CRC) &&
            (entry->type == TV_TYPE_PAGES || entry->type == TV_TYPE_ZERO) && entry->sequence == job->sequence;
    if (*ours && (entry->body_length < 8 || entry->body_length > TV_BODY_MAX || entry->body_length > length)) {
        job->problem = TV_BAD_LENGTH;
        return TV_PAGES_BAD;
    }
    return TV_PAGES_DONE;
}

/* Receive the rest of a frame and land it. */
static int receive_frame(struct tv_page_intake *job, struct tv_entry *entry, struct tv_fault *fault)
{
    struct iovec part = {entry->body, entry->body_length}, parts[TV_FRAME_PAGES];
    int reason = receive_parts(job, &part, 1);
    if (reason != TV_PAGES_DONE)
        return reason;
    if (tv_crc32c(0, entry->body, entry->body_length) != tv_get32(job->header + TV_FRAME_BODY_CRC)) {
        fault->problem = TV_BAD_BODY_CRC;
        return TV_PAGES_BAD;
    }
    reason = tv_land_check(job->landing, entry, fault);
    if (reason != TV_PAGES_DONE)
        return reason;
    if (entry->type == TV_TYPE_PAGES)
        tv_land_prepare(job->landing, entry);
    if (entry->type == TV_TYPE_PAGES && tv_land_is_there(job->landing, entry)) {
        reason = receive_parts(job, parts, tv_land_parts(job->landing, entry, parts));
        return reason == TV_PAGES_DONE ? tv_land_in_place(job->landing, entry, fault) : reason;
    }
    part = (struct iovec){entry->bytes, entry->payload_length};
    reason = receive_parts(job, &part, 1);
    return reason == TV_PAGES_DONE ? tv_land(job->landing, entry, fault) : reason;
}

/* Receive page frames into guest RAM until a frame comes that is none or is not the next one (its header, unchecked
 * beyond what tells them apart, is left in job->header: DONE), about max_pages were taken (BUDGET, between two frames)
 * or it can't go on. After anything but DONE and BUDGET the stream is good for nothing. Runs on any one thread. */
int tv_pages_receive(struct tv_page_intake *job)
{
    struct tv_landing *landing = job->landing;
    struct tv_entry *entry = &job->inbox->entry;
    struct tv_fault fault = {0};
    uint64_t limit = landing->sent_pages + landing->zero_pages + job->max_pages;
    int reason = TV_PAGES_DONE, ours = 1;
    job->error = job->problem = 0;

    while (reason == TV_PAGES_DONE) {
        /* A frame may be stall_ms in coming, and then as long in becoming whole. */
        job->until_ms = 0;
        reason = tv_wait_ready(job->fd, POLLIN, job->kick_fd, tv_now_ms() + job->stall_ms, &job->error);
        if (reason != TV_PAGES_DONE)
            break;
        job->until_ms = tv_now_ms() + job->stall_ms;
        reason = receive_header(job, entry, &ours);
        if (reason != TV_PAGES_DONE || !ours)
            break;
        reason = receive_frame(job, entry, &fault);
        if (reason == TV_PAGES_DONE)
            job->sequence++;
        if (reason == TV_PAGES_DONE && landing->sent_pages + landing->zero_pages >= limit)
            reason = TV_PAGES_BUDGET;
    }
    if (fault.error)
        job->error = fault.error;
    if (fault.problem)
        job->problem = fault.problem;
    job->bad_slot = fault.slot;
    job->bad_page = fault.page;
    return job->reason = reason;
}
