#define _GNU_SOURCE
#include "pages.h"

#include <emmintrin.h>
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "crc32c.h"
#include "pages_io.h"

_Static_assert((TV_FRAME_HEADER + 8u + TV_FRAME_PAGES * 4u) % 64 == 0, "a full frame's pages begin on a multiple of 64");
_Static_assert(8u + TV_FRAME_PAGES * 4u <= TV_BODY_MAX, "one buffer serves both bodies");

/* Whether a page is all zero. Leaves at the first 64 bytes of most pages that are not. The guest may write it at
 * the same time: then either answer is right, since that write is in the next harvest. */
static int page_is_zero(const uint8_t *page)
{
    for (uint64_t offset = 0; offset < TV_PAGE_SIZE; offset += 64) {
        const __m128i *at = (const __m128i *)(page + offset);
        __m128i some = _mm_or_si128(_mm_or_si128(_mm_load_si128(at), _mm_load_si128(at + 1)),
                                    _mm_or_si128(_mm_load_si128(at + 2), _mm_load_si128(at + 3)));
        if (_mm_movemask_epi8(_mm_cmpeq_epi8(some, _mm_setzero_si128())) != 0xffff)
            return 0;
    }
    return 1;
}

/* Where a region has no memory: to read there through the mapping would bring some. */
struct holes {
    uint64_t first, after;               /* pages of the last hole that was found */
    uint64_t looked_at, looked_to;       /* pages of `there` */
    uint8_t there[TV_FRAME_PAGES];
};

/* Whether a page has no memory, and so is zero. No by default. A page that gets memory meanwhile is written by somebody,
 * whom the next harvest has seen. */
static int is_hole(const struct tv_page_send *job, struct holes *holes, uint64_t page)
{
    if (job->memfd < 0)
        return 0;
    if (page >= holes->first && page < holes->after)
        return 1;
    if (page < holes->looked_at || page >= holes->looked_to) {
        uint64_t left = job->pages - page, count = left < sizeof holes->there ? left : sizeof holes->there;
        if (mincore(job->hva + page * TV_PAGE_SIZE, count * TV_PAGE_SIZE, holes->there))
            return 0;
        holes->looked_at = page;
        holes->looked_to = page + count;
    }
    if (holes->there[page - holes->looked_at] & 1)
        return 0;
    off_t data = lseek(job->memfd, (off_t)(page * TV_PAGE_SIZE), SEEK_DATA); /* what is swapped out is data too */
    uint64_t after = data >= 0 ? (uint64_t)data / TV_PAGE_SIZE : errno == ENXIO ? job->pages : page;
    if (after <= page)
        return 0;
    holes->first = page;
    holes->after = after;
    return 1;
}

/* Frames under construction; `head` is header and body of the frame on its way out. */
struct outgoing {
    uint8_t head[TV_FRAME_HEADER + TV_BODY_MAX];
    uint32_t pages[TV_FRAME_PAGES];
    uint32_t page_count;
    uint32_t runs[TV_FRAME_RUNS][2];
    uint32_t run_count;
    uint64_t zero_count;
};

static void fill_header(struct tv_page_send *job, struct outgoing *out, uint16_t type, uint32_t body, uint32_t payload,
                        uint32_t pages_crc)
{
    uint8_t *head = out->head;
    tv_put32(head, TV_FRAME_MAGIC);
    memcpy(head + 4, &job->version, 2);
    memcpy(head + 6, &type, 2);
    tv_put32(head + 8, body + payload);
    tv_put32(head + 12, body);
    memcpy(head + TV_FRAME_SEQUENCE, &job->sequence, 8);
    tv_put32(head + TV_FRAME_BODY_CRC, tv_crc32c(0, head + TV_FRAME_HEADER, body));
    tv_put32(head + TV_FRAME_PAGES_CRC, pages_crc);
    memset(head + TV_FRAME_PAGES_CRC + 4, 0, TV_FRAME_CRC - TV_FRAME_PAGES_CRC - 4);
    tv_put32(head + TV_FRAME_CRC, tv_crc32c(0, head, TV_FRAME_CRC));
}

/* Send a whole frame: `head_bytes` of out->head, then `payload` bytes of staging. Once its first byte is out the
 * frame is only given up on error, after stall_ms for all of it, or grace_ms after a kick; then job->broken is set.
 * Gives a reason. */
static int send_frame(struct tv_page_send *job, struct outgoing *out, uint64_t head_bytes, uint64_t payload)
{
    struct iovec parts[2] = {{out->head, head_bytes}, {job->staging, payload}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = payload ? 2 : 1};
    uint64_t left = head_bytes + payload;
    uint64_t until = tv_now_ms() + job->stall_ms;
    int kick_fd = job->kick_fd, reason = TV_PAGES_DONE, started = 0;

    while (left) {
        ssize_t sent = sendmsg(job->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0) {
            if (errno == EINTR)
                continue;
            if (errno != EAGAIN && errno != EWOULDBLOCK) {
                job->error = errno;
                reason = errno == EPIPE || errno == ECONNRESET ? TV_PAGES_EOF : TV_PAGES_ERRNO;
                break;
            }
            reason = tv_wait_ready(job->fd, POLLOUT, kick_fd, -1, until, &job->error);
            if (reason == TV_PAGES_KICKED && started) {
                kick_fd = -1; /* let the frame end, so that the stream stays usable, but not for long */
                until = tv_now_ms() + job->grace_ms;
                continue;
            }
            if (reason != TV_PAGES_DONE) {
                if (reason == TV_PAGES_STALLED && kick_fd < 0)
                    reason = TV_PAGES_KICKED;
                break;
            }
            continue;
        }
        started = 1;
        left -= (uint64_t)sent;
        job->bytes += (uint64_t)sent;
        while (message.msg_iovlen && (size_t)sent >= message.msg_iov->iov_len) {
            sent -= (ssize_t)message.msg_iov->iov_len;
            message.msg_iov++;
            message.msg_iovlen--;
        }
        if (message.msg_iovlen) {
            message.msg_iov->iov_base = (uint8_t *)message.msg_iov->iov_base + sent;
            message.msg_iov->iov_len -= (size_t)sent;
        }
    }
    if (left && started)
        job->broken = 1;
    if (!left)
        job->sequence++;
    return left ? reason : TV_PAGES_DONE;
}

static int flush_pages(struct tv_page_send *job, struct outgoing *out)
{
    if (!out->page_count)
        return TV_PAGES_DONE;
    uint8_t *body = out->head + TV_FRAME_HEADER;
    const uint8_t *from[TV_FRAME_PAGES];
    for (uint32_t i = 0; i < out->page_count; i++)
        from[i] = job->hva + out->pages[i] * TV_PAGE_SIZE;
    uint32_t crc = tv_crc32c_copy(job->staging, from, out->page_count);
    tv_put32(body, job->slot);
    tv_put32(body + 4, out->page_count);
    memcpy(body + 8, out->pages, out->page_count * 4);
    uint32_t length = 8 + out->page_count * 4;
    fill_header(job, out, TV_TYPE_PAGES, length, out->page_count * TV_PAGE_SIZE, crc);
    int reason = send_frame(job, out, TV_FRAME_HEADER + length, out->page_count * TV_PAGE_SIZE);
    if (reason != TV_PAGES_DONE)
        return reason;
    for (uint32_t i = 0; i < out->page_count; i++)
        job->dirty[out->pages[i] / 64] &= ~(1ull << (out->pages[i] % 64));
    job->sent_pages += out->page_count;
    out->page_count = 0;
    return TV_PAGES_DONE;
}

static int flush_zero(struct tv_page_send *job, struct outgoing *out)
{
    if (!out->run_count)
        return TV_PAGES_DONE;
    uint8_t *body = out->head + TV_FRAME_HEADER;
    tv_put32(body, job->slot);
    tv_put32(body + 4, out->run_count);
    memcpy(body + 8, out->runs, out->run_count * 8);
    uint32_t length = 8 + out->run_count * 8;
    fill_header(job, out, TV_TYPE_ZERO, length, 0, 0);
    int reason = send_frame(job, out, TV_FRAME_HEADER + length, 0);
    if (reason != TV_PAGES_DONE)
        return reason;
    for (uint32_t i = 0; i < out->run_count; i++)
        for (uint64_t page = out->runs[i][0]; page < (uint64_t)out->runs[i][0] + out->runs[i][1]; page++)
            job->dirty[page / 64] &= ~(1ull << (page % 64));
    job->zero_pages += out->zero_count;
    out->run_count = 0;
    out->zero_count = 0;
    return TV_PAGES_DONE;
}

static int add_zero(struct tv_page_send *job, struct outgoing *out, uint32_t page)
{
    if (out->run_count) {
        uint32_t *last = out->runs[out->run_count - 1];
        if (last[0] + last[1] == page) {
            last[1]++;
            out->zero_count++;
            return TV_PAGES_DONE;
        }
    }
    if (out->run_count == TV_FRAME_RUNS) {
        int reason = flush_zero(job, out);
        if (reason != TV_PAGES_DONE)
            return reason;
    }
    out->runs[out->run_count][0] = page;
    out->runs[out->run_count++][1] = 1;
    out->zero_count++;
    return TV_PAGES_DONE;
}

/* Send the dirty pages of a region from `cursor` on, at most about max_pages of them. Bits of sent pages are
 * cleared, those of unsent pages stay. A page is in one frame a call, so its frames never overtake each other.
 * Gives, and leaves in job->reason, an enum tv_pages_reason; on BUDGET and KICKED the cursor says where to go on
 * (after a kick pages before it may still be dirty: start the next round at 0). Runs on any one thread. */
int tv_pages_send(struct tv_page_send *job)
{
    struct outgoing out;
    struct holes holes = {0};
    uint64_t words = (job->pages + 63) / 64, taken = 0;
    int reason = TV_PAGES_DONE;
    out.page_count = out.run_count = 0;
    out.zero_count = 0;
    job->error = 0;

    uint64_t page = job->cursor;
    while (page < job->pages && reason == TV_PAGES_DONE) {
        uint64_t bits = job->dirty[page / 64] >> (page % 64);
        if (!bits) {
            page = (page / 64 + 1) * 64;
            if (page / 64 >= words)
                break;
            continue;
        }
        page += (uint64_t)__builtin_ctzll(bits);
        if (page >= job->pages)
            break;
        if (taken == job->max_pages) {
            reason = TV_PAGES_BUDGET;
            break;
        }
        if (taken % TV_FRAME_PAGES == 0 && tv_kicked(job->kick_fd)) {
            reason = TV_PAGES_KICKED;
            break;
        }
        const uint8_t *from = job->hva + page * TV_PAGE_SIZE;
        if (is_hole(job, &holes, page) || page_is_zero(from)) {
            reason = add_zero(job, &out, (uint32_t)page);
        } else {
            out.pages[out.page_count++] = (uint32_t)page;
            if (out.page_count == TV_FRAME_PAGES)
                reason = flush_pages(job, &out);
        }
        taken++;
        page++;
    }
    job->cursor = page < job->pages ? page : job->pages;
    if (reason == TV_PAGES_DONE || reason == TV_PAGES_BUDGET) {
        int flushed = flush_pages(job, &out);
        if (flushed == TV_PAGES_DONE)
            flushed = flush_zero(job, &out);
        if (flushed != TV_PAGES_DONE)
            reason = flushed;
    }
    return job->reason = reason;
}
