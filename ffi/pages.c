#define _GNU_SOURCE
#include "pages.h"

#include "crc32c.h"

#include <errno.h>
#include <emmintrin.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define POLL_SLICE_MS 1000 /* upper bound of one poll, so that no wait rests on one wake-up alone */
#define BODY_MAX (8u + TV_FRAME_RUNS * 8u)

_Static_assert((TV_FRAME_HEADER + 8u + TV_FRAME_PAGES * 4u) % 64 == 0, "a full frame's pages begin on a multiple of 64");
_Static_assert(8u + TV_FRAME_PAGES * 4u <= BODY_MAX, "one buffer serves both bodies");

/* --- small parts ---------------------------------------------------------------------------------------------- */

static void put32(uint8_t *at, uint32_t value)
{
    memcpy(at, &value, 4); /* x86: little-endian */
}

static uint32_t get32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, 4);
    return value;
}

static uint64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

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

/* Wait until `fd` is ready for `events`. Gives a reason: DONE (ready), KICKED, STALLED or ERRNO (*error).
 * `kick_fd` < 0: no kick is looked at. */
static int wait_ready(int fd, short events, int kick_fd, uint64_t until_ms, int *error)
{
    for (;;) {
        uint64_t now = now_ms();
        if (now >= until_ms)
            return TV_PAGES_STALLED;
        uint64_t left = until_ms - now;
        struct pollfd polled[2] = {{.fd = fd, .events = events}, {.fd = kick_fd, .events = POLLIN}};
        int ready = poll(polled, 2, left < POLL_SLICE_MS ? (int)left : POLL_SLICE_MS);
        if (ready < 0) {
            if (errno == EINTR)
                continue;
            *error = errno;
            return TV_PAGES_ERRNO;
        }
        if (kick_fd >= 0 && polled[1].revents)
            return TV_PAGES_KICKED;
        if (polled[0].revents)
            return TV_PAGES_DONE;
    }
}

static int kicked(int kick_fd)
{
    struct pollfd polled = {.fd = kick_fd, .events = POLLIN};
    return poll(&polled, 1, 0) > 0;
}

/* The number of bits set in `words` 64-bit words. */
uint64_t tv_pages_count(const uint64_t *bitmap, uint64_t words)
{
    uint64_t count = 0;
    for (uint64_t i = 0; i < words; i++)
        count += (uint64_t)__builtin_popcountll(bitmap[i]);
    return count;
}

/* Set the bits of every page of a memfd that was ever touched (holes read as zero, and so does the destination's
 * fresh RAM). The dirty log must be on before. 0 or -errno; where holes can't be asked for, every bit is set. */
int tv_pages_mark_data(int memfd, uint64_t size, uint64_t *dirty)
{
    off_t end = 0;
    while ((uint64_t)end < size) {
        off_t start = lseek(memfd, end, SEEK_DATA);
        if (start < 0 && errno == ENXIO)
            return 0;
        if (start < 0)
            start = end, end = (off_t)size;
        else if ((end = lseek(memfd, start, SEEK_HOLE)) < 0)
            end = (off_t)size;
        if ((uint64_t)end > size)
            end = (off_t)size;
        uint64_t last = ((uint64_t)end + TV_PAGE_SIZE - 1) >> TV_PAGE_SHIFT;
        for (uint64_t page = (uint64_t)start >> TV_PAGE_SHIFT; page < last; page++)
            dirty[page / 64] |= 1ull << (page % 64);
    }
    return 0;
}

/* --- sending -------------------------------------------------------------------------------------------------- */

/* Frames under construction; `head` is header and body of the frame on its way out. */
struct outgoing {
    uint8_t head[TV_FRAME_HEADER + BODY_MAX];
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
    put32(head, TV_FRAME_MAGIC);
    memcpy(head + 4, &job->version, 2);
    memcpy(head + 6, &type, 2);
    put32(head + 8, body + payload);
    put32(head + 12, body);
    memcpy(head + TV_FRAME_SEQUENCE, &job->sequence, 8);
    put32(head + TV_FRAME_BODY_CRC, tv_crc32c(0, head + TV_FRAME_HEADER, body));
    put32(head + TV_FRAME_PAGES_CRC, pages_crc);
    memset(head + TV_FRAME_PAGES_CRC + 4, 0, TV_FRAME_CRC - TV_FRAME_PAGES_CRC - 4);
    put32(head + TV_FRAME_CRC, tv_crc32c(0, head, TV_FRAME_CRC));
}

/* Send a whole frame: `head_bytes` of out->head, then `payload` bytes of staging. Once its first byte is out the
 * frame is only given up on error, after stall_ms for all of it, or grace_ms after a kick; then job->broken is set.
 * Gives a reason. */
static int send_frame(struct tv_page_send *job, struct outgoing *out, uint64_t head_bytes, uint64_t payload)
{
    struct iovec parts[2] = {{out->head, head_bytes}, {job->staging, payload}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = payload ? 2 : 1};
    uint64_t left = head_bytes + payload;
    uint64_t until = now_ms() + job->stall_ms;
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
            reason = wait_ready(job->fd, POLLOUT, kick_fd, until, &job->error);
            if (reason == TV_PAGES_KICKED && started) {
                kick_fd = -1; /* let the frame end, so that the stream stays usable, but not for long */
                until = now_ms() + job->grace_ms;
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
    put32(body, job->slot);
    put32(body + 4, out->page_count);
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
    put32(body, job->slot);
    put32(body + 4, out->run_count);
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
        if (taken % TV_FRAME_PAGES == 0 && kicked(job->kick_fd)) {
            reason = TV_PAGES_KICKED;
            break;
        }
        const uint8_t *from = job->hva + page * TV_PAGE_SIZE;
        if (page_is_zero(from)) {
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

/* --- receiving ------------------------------------------------------------------------------------------------ */

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
            int reason = wait_ready(job->fd, POLLIN, job->kick_fd, job->until_ms, &job->error);
            if (reason != TV_PAGES_DONE)
                return reason;
            continue;
        }
        job->bytes += (uint64_t)got;
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

static int bad(struct tv_page_intake *job, int problem, uint32_t slot, uint64_t page)
{
    job->problem = problem;
    job->bad_slot = slot;
    job->bad_page = page;
    return TV_PAGES_BAD;
}

/* The i-th page of a PAGES frame. */
static uint64_t page_of(const uint8_t *body, uint32_t i)
{
    return get32(body + 8 + i * 4);
}

static int has_landed(const struct tv_page_intake *job, uint32_t slot, uint64_t page)
{
    return (int)(job->landed[slot][page / 64] >> (page % 64) & 1);
}

/* A frame of pages that all landed before: they are allocated, so the socket may fill them in place. Nothing runs on
 * this RAM yet, and a bad CRC or a cut frame ends the migration and this memory with it. */
static int fill_pages(struct tv_page_intake *job, uint32_t slot, const uint8_t *body, uint32_t count, uint32_t *crc)
{
    uint8_t *hva = job->memory->regions[slot].hva;
    struct iovec parts[TV_FRAME_PAGES];
    const uint8_t *pages[TV_FRAME_PAGES];
    uint32_t runs = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint8_t *to = hva + page_of(body, i) * TV_PAGE_SIZE;
        pages[i] = to;
        if (runs && (uint8_t *)parts[runs - 1].iov_base + parts[runs - 1].iov_len == to)
            parts[runs - 1].iov_len += TV_PAGE_SIZE;
        else
            parts[runs++] = (struct iovec){to, TV_PAGE_SIZE};
    }
    int reason = receive_parts(job, parts, runs);
    if (reason == TV_PAGES_DONE)
        *crc = tv_crc32c_pages(pages, count);
    return reason;
}

/* Put whole pages into RAM that landed before, or not. Fresh ones go through the region's memfd and not through its
 * mapping: that needs no page fault and no zeroing first (twice as fast), and memory that ran out is an errno, not a
 * SIGBUS. Those that landed before are allocated; for them a plain copy is the faster way. */
static int write_pages(struct tv_page_intake *job, uint32_t slot, uint64_t page, const uint8_t *from, uint64_t count,
                       int landed)
{
    if (landed) {
        memcpy(job->memory->regions[slot].hva + page * TV_PAGE_SIZE, from, count * TV_PAGE_SIZE);
        return TV_PAGES_DONE;
    }
    uint64_t left = count * TV_PAGE_SIZE, at = page * TV_PAGE_SIZE;
    while (left) {
        ssize_t wrote = pwrite(job->memfd[slot], from, left, (off_t)at);
        if (wrote < 0 && errno == EINTR)
            continue;
        if (wrote <= 0) {
            job->error = wrote < 0 ? errno : EIO;
            return TV_PAGES_ERRNO;
        }
        from += wrote;
        at += (uint64_t)wrote;
        left -= (uint64_t)wrote;
    }
    return TV_PAGES_DONE;
}

/* A PAGES frame, its body read and its CRC checked: every number is checked before the first page lands. */
static int take_pages(struct tv_page_intake *job, const uint8_t *body, uint32_t body_length, uint32_t payload)
{
    uint32_t slot = get32(body), count = get32(body + 4);
    if (count == 0 || count > TV_FRAME_PAGES || body_length != 8 + count * 4 || payload != count * TV_PAGE_SIZE)
        return bad(job, TV_BAD_LENGTH, slot, 0);
    if (slot >= job->memory->count)
        return bad(job, TV_BAD_SLOT, slot, 0);
    struct tv_region *region = &job->memory->regions[slot];
    uint64_t limit = region->size / TV_PAGE_SIZE, after = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t page = page_of(body, i);
        if (page >= limit || (i && page < after))
            return bad(job, TV_BAD_PAGE, slot, page);
        after = page + 1;
    }
    uint32_t crc = 0, landed_before = 0;
    while (landed_before < count && has_landed(job, slot, page_of(body, landed_before)))
        landed_before++;
    int in_place = landed_before == count, reason;
    if (in_place) {
        reason = fill_pages(job, slot, body, count, &crc);
    } else {
        struct iovec part = {job->staging, payload};
        reason = receive_parts(job, &part, 1);
        const uint8_t *pages[TV_FRAME_PAGES];
        for (uint32_t i = 0; i < count; i++)
            pages[i] = job->staging + i * TV_PAGE_SIZE;
        if (reason == TV_PAGES_DONE)
            crc = tv_crc32c_pages(pages, count);
    }
    if (reason != TV_PAGES_DONE)
        return reason;
    if (crc != get32(job->header + TV_FRAME_PAGES_CRC))
        return bad(job, TV_BAD_PAGES_CRC, slot, 0);
    for (uint32_t i = in_place ? count : 0; i < count;) {
        uint64_t page = page_of(body, i);
        uint32_t run = 1;
        int landed = has_landed(job, slot, page);
        while (i + run < count && page_of(body, i + run) == page + run &&
               has_landed(job, slot, page + run) == landed)
            run++;
        reason = write_pages(job, slot, page, job->staging + i * TV_PAGE_SIZE, run, landed);
        if (reason != TV_PAGES_DONE)
            return reason;
        for (uint64_t each = page; each < page + run; each++)
            job->landed[slot][each / 64] |= 1ull << (each % 64);
        i += run;
    }
    job->sent_pages += count;
    return TV_PAGES_DONE;
}

/* A ZERO frame: clears the pages that landed before; the others are zero already, untouched and unallocated. */
static int take_zero(struct tv_page_intake *job, const uint8_t *body, uint32_t body_length, uint32_t payload)
{
    uint32_t slot = get32(body), count = get32(body + 4);
    if (count == 0 || count > TV_FRAME_RUNS || body_length != 8 + count * 8 || payload)
        return bad(job, TV_BAD_LENGTH, slot, 0);
    if (slot >= job->memory->count)
        return bad(job, TV_BAD_SLOT, slot, 0);
    struct tv_region *region = &job->memory->regions[slot];
    uint64_t limit = region->size / TV_PAGE_SIZE, after = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t first = get32(body + 8 + i * 8), pages = get32(body + 12 + i * 8);
        if (!pages || first < after || first + pages > limit)
            return bad(job, TV_BAD_PAGE, slot, first);
        after = first + pages;
    }
    if (get32(job->header + TV_FRAME_PAGES_CRC)) /* of no pages: 0 */
        return bad(job, TV_BAD_PAGES_CRC, slot, 0);
    for (uint32_t i = 0; i < count; i++) {
        uint64_t first = get32(body + 8 + i * 8), pages = get32(body + 12 + i * 8);
        for (uint64_t page = first; page < first + pages; page++) {
            uint64_t bit = 1ull << (page % 64);
            if (job->landed[slot][page / 64] & bit) {
                memset(region->hva + page * TV_PAGE_SIZE, 0, TV_PAGE_SIZE);
                job->landed[slot][page / 64] &= ~bit;
            }
        }
        job->zero_pages += pages;
    }
    return TV_PAGES_DONE;
}

/* Receive page frames into guest RAM, each one's page numbers checked before anything lands and its CRCs before it
 * counts, until a frame comes that is none or is not the next one (its header, unchecked beyond what tells them apart,
 * is left in job->header: DONE), about max_pages were taken (BUDGET, between two frames) or it can't go on. After anything but
 * DONE and BUDGET the stream is good for nothing. Runs on any one thread. */
int tv_pages_receive(struct tv_page_intake *job)
{
    uint64_t limit = job->sent_pages + job->zero_pages + job->max_pages;
    uint8_t body[BODY_MAX];
    int reason = TV_PAGES_DONE;
    job->error = job->problem = 0;

    while (reason == TV_PAGES_DONE) {
        /* A frame may be stall_ms in coming, and then as long in becoming whole. */
        job->until_ms = 0;
        reason = wait_ready(job->fd, POLLIN, job->kick_fd, now_ms() + job->stall_ms, &job->error);
        if (reason != TV_PAGES_DONE)
            break;
        job->until_ms = now_ms() + job->stall_ms;
        struct iovec part = {job->header, TV_FRAME_HEADER};
        reason = receive_parts(job, &part, 1);
        if (reason != TV_PAGES_DONE)
            break;
        uint16_t version, type;
        memcpy(&version, job->header + 4, 2);
        memcpy(&type, job->header + 6, 2);
        uint32_t length = get32(job->header + 8), covered = get32(job->header + 12);
        uint64_t sequence;
        memcpy(&sequence, job->header + TV_FRAME_SEQUENCE, 8);
        if (get32(job->header) != TV_FRAME_MAGIC || version != job->version ||
            get32(job->header + TV_FRAME_CRC) != tv_crc32c(0, job->header, TV_FRAME_CRC) ||
            (type != TV_TYPE_PAGES && type != TV_TYPE_ZERO) || sequence != job->sequence)
            break;
        if (covered < 8 || covered > BODY_MAX || covered > length) {
            reason = bad(job, TV_BAD_LENGTH, 0, 0);
            break;
        }
        part = (struct iovec){body, covered};
        reason = receive_parts(job, &part, 1);
        if (reason != TV_PAGES_DONE)
            break;
        if (tv_crc32c(0, body, covered) != get32(job->header + TV_FRAME_BODY_CRC))
            reason = bad(job, TV_BAD_BODY_CRC, 0, 0);
        else if (type == TV_TYPE_PAGES)
            reason = take_pages(job, body, covered, length - covered);
        else
            reason = take_zero(job, body, covered, length - covered);
        if (reason == TV_PAGES_DONE)
            job->sequence++;
        if (reason == TV_PAGES_DONE && job->sent_pages + job->zero_pages >= limit)
            reason = TV_PAGES_BUDGET;
    }
    return job->reason = reason;
}
