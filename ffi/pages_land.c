#define _GNU_SOURCE
#include "pages_land.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "crc32c.h"
#include "pages_huge.h"
#include "pages_io.h"

#define DENSE 96u /* pages of one frame in one chunk: three quarters of the frame */
#define WORTH_GIVING_BACK 16u /* zero pages in a row: one call for them costs as much as clearing them */
#define WORTH_TIMING 32u /* pages in a row: fewer, and the clock counts */

static uint32_t count_of(const struct tv_entry *entry)
{
    return tv_get32(entry->body + 4);
}

/* The i-th page of a PAGES frame. */
static uint64_t page_of(const struct tv_entry *entry, uint32_t i)
{
    return tv_get32(entry->body + 8 + i * 4);
}

/* The i-th run of a ZERO frame. */
static uint64_t first_of(const struct tv_entry *entry, uint32_t i)
{
    return tv_get32(entry->body + 8 + i * 8);
}

static uint64_t pages_of(const struct tv_entry *entry, uint32_t i)
{
    return tv_get32(entry->body + 12 + i * 8);
}

/* Whether the memory of a page is there: it landed before, or is part of a huge page. */
static int is_there(const struct tv_landing *landing, uint32_t slot, uint64_t page)
{
    return (landing->landed[slot][page / 64] >> (page % 64) & 1) || tv_huge_is_there(landing, slot, page);
}

static int bad(struct tv_fault *fault, int problem, uint32_t slot, uint64_t page)
{
    *fault = (struct tv_fault){.problem = problem, .slot = slot, .page = page};
    return TV_PAGES_BAD;
}

/* Whether a frame's list, all of which came, makes sense: lengths, slot, every page inside its region and none twice.
 * Gives DONE or BAD. */
int tv_land_check(const struct tv_landing *landing, const struct tv_entry *entry, struct tv_fault *fault)
{
    int full = entry->type == TV_TYPE_PAGES;
    uint32_t slot = tv_entry_slot(entry), count = count_of(entry);
    if (count == 0 || count > (full ? TV_FRAME_PAGES : TV_FRAME_RUNS) ||
        entry->body_length != 8 + count * (full ? 4 : 8) ||
        entry->payload_length != (full ? count * TV_PAGE_SIZE : 0))
        return bad(fault, TV_BAD_LENGTH, slot, 0);
    if (slot >= landing->memory->count)
        return bad(fault, TV_BAD_SLOT, slot, 0);
    uint64_t limit = landing->memory->regions[slot].size / TV_PAGE_SIZE, after = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint64_t first = full ? page_of(entry, i) : first_of(entry, i), pages = full ? 1 : pages_of(entry, i);
        if (!pages || first < after || first + pages > limit)
            return bad(fault, TV_BAD_PAGE, slot, first);
        after = first + pages;
    }
    return TV_PAGES_DONE;
}

/* Whether the memory of each of a PAGES frame's pages is there: then the socket may fill it in place. */
int tv_land_is_there(const struct tv_landing *landing, const struct tv_entry *entry)
{
    uint32_t slot = tv_entry_slot(entry), count = count_of(entry);
    for (uint32_t i = 0; i < count; i++)
        if (!is_there(landing, slot, page_of(entry, i)))
            return 0;
    return 1;
}

/* Whether a PAGES frame, whose list was checked, begins to fill a chunk that nothing is known of: at most one. */
int tv_land_fills(const struct tv_landing *landing, const struct tv_entry *entry, uint64_t *chunk)
{
    uint32_t slot = tv_entry_slot(entry), count = count_of(entry);
    for (uint32_t i = 0, here; i < count; i += here) {
        *chunk = page_of(entry, i) / TV_CHUNK_PAGES;
        here = 1;
        while (i + here < count && page_of(entry, i + here) / TV_CHUNK_PAGES == *chunk)
            here++;
        if (here >= DENSE)
            return *chunk < landing->chunk_count[slot] && landing->chunks[slot][*chunk] == TV_CHUNK_UNKNOWN;
    }
    return 0;
}

/* Where a PAGES frame goes in place: at most TV_FRAME_PAGES `parts`. Gives how many. */
uint32_t tv_land_parts(const struct tv_landing *landing, const struct tv_entry *entry, struct iovec *parts)
{
    uint8_t *hva = landing->memory->regions[tv_entry_slot(entry)].hva;
    uint32_t runs = 0, count = count_of(entry);
    for (uint32_t i = 0; i < count; i++) {
        uint8_t *to = hva + page_of(entry, i) * TV_PAGE_SIZE;
        if (runs && (uint8_t *)parts[runs - 1].iov_base + parts[runs - 1].iov_len == to)
            parts[runs - 1].iov_len += TV_PAGE_SIZE;
        else
            parts[runs++] = (struct iovec){to, TV_PAGE_SIZE};
    }
    return runs;
}

/* Put whole pages into RAM whose memory is there, or is not. Fresh ones go through the region's memfd and not through
 * its mapping: that needs no page fault and no zeroing first (twice as fast), and memory that ran out is an errno, not a
 * SIGBUS. Where memory is there a plain copy is the faster way. */
static int write_pages(struct tv_landing *landing, uint32_t slot, uint64_t page, const uint8_t *from, uint64_t count,
                       int there, struct tv_fault *fault)
{
    if (there) {
        memcpy(landing->memory->regions[slot].hva + page * TV_PAGE_SIZE, from, count * TV_PAGE_SIZE);
        return TV_PAGES_DONE;
    }
    uint64_t left = count * TV_PAGE_SIZE, at = page * TV_PAGE_SIZE, began = count >= WORTH_TIMING ? tv_cpu_ns() : 0;
    while (left) {
        ssize_t wrote = pwrite(landing->memfd[slot], from, left, (off_t)at);
        if (wrote < 0 && errno == EINTR)
            continue;
        if (wrote <= 0) {
            fault->error = wrote < 0 ? errno : EIO;
            return TV_PAGES_ERRNO;
        }
        from += wrote;
        at += (uint64_t)wrote;
        left -= (uint64_t)wrote;
    }
    if (began)
        tv_huge_small_cost(landing, count, tv_cpu_ns() - began);
    return TV_PAGES_DONE;
}

static int crc_fits(const struct tv_entry *entry, const uint8_t *const *pages, struct tv_fault *fault)
{
    if (tv_crc32c_pages(pages, count_of(entry)) == entry->pages_crc)
        return TV_PAGES_DONE;
    return bad(fault, TV_BAD_PAGES_CRC, tv_entry_slot(entry), 0);
}

static void count_pages(struct tv_landing *landing, const struct tv_entry *entry)
{
    uint32_t slot = tv_entry_slot(entry), count = count_of(entry);
    for (uint32_t i = 0; i < count; i++)
        landing->landed[slot][page_of(entry, i) / 64] |= 1ull << (page_of(entry, i) % 64);
    landing->sent_pages += count;
}

/* Count a PAGES frame that was received in place. Gives DONE or BAD. */
int tv_land_in_place(struct tv_landing *landing, const struct tv_entry *entry, struct tv_fault *fault)
{
    const uint8_t *pages[TV_FRAME_PAGES] = {NULL};
    uint32_t slot = tv_entry_slot(entry), count = count_of(entry);
    for (uint32_t i = 0; i < count; i++)
        pages[i] = landing->memory->regions[slot].hva + page_of(entry, i) * TV_PAGE_SIZE;
    int reason = crc_fits(entry, pages, fault);
    if (reason == TV_PAGES_DONE)
        count_pages(landing, entry);
    return reason;
}

static int land_pages(struct tv_landing *landing, const struct tv_entry *entry, struct tv_fault *fault)
{
    const uint8_t *pages[TV_FRAME_PAGES] = {NULL};
    uint32_t slot = tv_entry_slot(entry), count = count_of(entry);
    for (uint32_t i = 0; i < count; i++)
        pages[i] = entry->bytes + i * TV_PAGE_SIZE;
    int reason = crc_fits(entry, pages, fault);
    for (uint32_t i = 0, run; i < count && reason == TV_PAGES_DONE; i += run) {
        uint64_t page = page_of(entry, i);
        int there = is_there(landing, slot, page);
        run = 1;
        while (i + run < count && page_of(entry, i + run) == page + run &&
               is_there(landing, slot, page + run) == there)
            run++;
        reason = write_pages(landing, slot, page, pages[i], run, there, fault);
    }
    if (reason == TV_PAGES_DONE)
        count_pages(landing, entry);
    return reason;
}

/* Clear pages that landed before. Many in a row are given back: at the source they have no memory either, as a rule (a
 * balloon's), and where they have, a touch brings it again. Part of a huge page stays: whoever sees one takes all of its
 * memory for there. */
static void clear_pages(struct tv_region *region, uint64_t page, uint64_t count, int huge)
{
    uint64_t offset = page * TV_PAGE_SIZE, length = count * TV_PAGE_SIZE;
    if (huge || count < WORTH_GIVING_BACK || tv_memory_give_back(region, offset, length))
        memset(region->hva + offset, 0, length);
}

/* Clears the pages that landed before; the others are zero already, untouched and unallocated. */
static int land_zero(struct tv_landing *landing, const struct tv_entry *entry, struct tv_fault *fault)
{
    uint32_t slot = tv_entry_slot(entry), count = count_of(entry);
    if (entry->pages_crc) /* of no pages: 0 */
        return bad(fault, TV_BAD_PAGES_CRC, slot, 0);
    for (uint32_t i = 0; i < count; i++) {
        uint64_t first = first_of(entry, i), pages = pages_of(entry, i);
        for (uint64_t page = first, run; page < first + pages; page += run) {
            int huge = tv_huge_is_there(landing, slot, page);
            for (run = 0; page + run < first + pages; run++) {
                uint64_t bit = 1ull << ((page + run) % 64), *word = &landing->landed[slot][(page + run) / 64];
                if (!(*word & bit) || tv_huge_is_there(landing, slot, page + run) != huge)
                    break;
                *word &= ~bit;
            }
            if (run)
                clear_pages(&landing->memory->regions[slot], page, run, huge);
            else
                run = 1;
        }
        landing->zero_pages += pages;
    }
    return TV_PAGES_DONE;
}

/* Land a frame whose list was checked and whose pages are in its bytes. Gives DONE, BAD or ERRNO. */
int tv_land(struct tv_landing *landing, const struct tv_entry *entry, struct tv_fault *fault)
{
    return entry->type == TV_TYPE_PAGES ? land_pages(landing, entry, fault) : land_zero(landing, entry, fault);
}
