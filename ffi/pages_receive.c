#define _GNU_SOURCE
#include "pages.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "crc32c.h"
#include "pages_huge.h"
#include "pages_inbox.h"
#include "pages_io.h"

/* KICKED also when a frame could not land: tv_inbox_end() says which. */
static int wait_for_more(struct tv_page_intake *job, uint64_t until_ms, struct tv_fault *fault)
{
    return tv_wait_ready(job->fd, POLLIN, job->kick_fd, tv_inbox_alarm(job->inbox), until_ms, &fault->error);
}

/* Fill `parts` from the socket until job->until_ms. Gives a reason; EOF when the peer closed before the last byte. */
static int receive_parts(struct tv_page_intake *job, struct iovec *parts, uint64_t count, struct tv_fault *fault)
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
                fault->error = errno;
                return TV_PAGES_EOF;
            }
            if (errno != EAGAIN && errno != EWOULDBLOCK) {
                fault->error = errno;
                return TV_PAGES_ERRNO;
            }
            int reason = wait_for_more(job, job->until_ms, fault);
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
static int receive_header(struct tv_page_intake *job, struct tv_entry *entry, struct tv_fault *fault, int *ours)
{
    struct iovec part = {job->header, TV_FRAME_HEADER};
    int reason = receive_parts(job, &part, 1, fault);
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
        fault->problem = TV_BAD_LENGTH;
        return TV_PAGES_BAD;
    }
    return TV_PAGES_DONE;
}

/* Where a PAGES frame begins to fill a chunk, make that huge, if that is worth it. The other thread has nothing to do
 * meanwhile: what it landed there would be written over. */
static int take_huge(struct tv_page_intake *job, const struct tv_entry *entry)
{
    uint64_t chunk;
    int reason = TV_PAGES_DONE;
    if (!tv_land_fills(job->landing, entry, &chunk))
        return reason;
    if (!tv_huge_is_wanted(job->landing))
        job->landing->chunks[tv_entry_slot(entry)][chunk] = TV_CHUNK_SMALL;
    else if ((reason = tv_inbox_drain(job->inbox)) == TV_PAGES_DONE)
        tv_huge_take(job->landing, tv_entry_slot(entry), chunk);
    return reason;
}

/* Receive the rest of a frame, and land it or have it landed. */
static int receive_frame(struct tv_page_intake *job, struct tv_entry *entry, struct tv_fault *fault)
{
    struct tv_landing *landing = job->landing;
    struct iovec part = {entry->body, entry->body_length}, parts[TV_FRAME_PAGES];
    int reason = receive_parts(job, &part, 1, fault);
    if (reason != TV_PAGES_DONE)
        return reason;
    if (tv_crc32c(0, entry->body, entry->body_length) != tv_get32(job->header + TV_FRAME_BODY_CRC)) {
        fault->problem = TV_BAD_BODY_CRC;
        return TV_PAGES_BAD;
    }
    int full = entry->type == TV_TYPE_PAGES;
    reason = tv_land_check(landing, entry, fault);
    if (reason == TV_PAGES_DONE && full)
        reason = take_huge(job, entry);
    if (reason != TV_PAGES_DONE)
        return reason;
    int alone = !tv_inbox_waits(job->inbox);
    if (full && alone && tv_land_is_there(landing, entry)) {
        reason = receive_parts(job, parts, tv_land_parts(landing, entry, parts), fault);
        return reason == TV_PAGES_DONE ? tv_land_in_place(landing, entry, fault) : reason;
    }
    if (!full && alone)
        return tv_land(landing, entry, fault);
    part = (struct iovec){entry->bytes, entry->payload_length};
    reason = receive_parts(job, &part, 1, fault);
    return reason == TV_PAGES_DONE ? tv_inbox_push(job->inbox, landing, fault) : reason;
}

static uint64_t pages_in(const struct tv_entry *entry)
{
    uint32_t count = tv_get32(entry->body + 4);
    uint64_t pages = 0;
    if (entry->type != TV_TYPE_ZERO)
        return count;
    for (uint32_t i = 0; i < count; i++)
        pages += tv_get32(entry->body + 12 + i * 8);
    return pages;
}

/* Receive page frames into guest RAM until a frame comes that is none or is not the next one (its header, unchecked
 * beyond what tells them apart, is left in job->header: DONE), about max_pages were taken (BUDGET, between two frames)
 * or it can't go on. On DONE and BUDGET all of them have landed; after anything else the stream is good for nothing, and
 * job->sequence is the frame at fault. Runs on any one thread, and lands on a second one, which ends before it returns. */
int tv_pages_receive(struct tv_page_intake *job)
{
    struct tv_entry *entry;
    struct tv_fault fault = {0}, earlier = {0};
    uint64_t taken = 0;
    int reason = TV_PAGES_DONE, ours = 1;

    while (reason == TV_PAGES_DONE) {
        /* A frame may be stall_ms in coming, and then as long in becoming whole; its clock runs when there is room. */
        job->until_ms = 0;
        reason = tv_inbox_room(job->inbox, &entry);
        if (reason == TV_PAGES_DONE)
            reason = wait_for_more(job, tv_now_ms() + job->stall_ms, &fault);
        if (reason != TV_PAGES_DONE)
            break;
        job->until_ms = tv_now_ms() + job->stall_ms;
        reason = receive_header(job, entry, &fault, &ours);
        if (reason != TV_PAGES_DONE || !ours)
            break;
        reason = receive_frame(job, entry, &fault);
        if (reason != TV_PAGES_DONE)
            break;
        job->sequence++;
        taken += pages_in(entry);
        if (taken >= job->max_pages)
            reason = TV_PAGES_BUDGET;
    }
    int landed = tv_inbox_end(job->inbox, reason == TV_PAGES_KICKED, &earlier); /* then in a hurry */
    if (landed != TV_PAGES_DONE) {
        reason = landed;
        fault = earlier;
        job->sequence = earlier.sequence;
    }
    job->error = fault.error;
    job->problem = fault.problem;
    job->bad_slot = fault.slot;
    job->bad_page = fault.page;
    return job->reason = reason;
}
