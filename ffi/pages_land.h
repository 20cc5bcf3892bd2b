/* Frames into RAM. A frame's list is checked before its pages are received, so that they may be received in place where
 * their memory is there already; all others land here, from the frame's own bytes.
 *
 * Invariants
 *  - Nothing lands outside its region, whatever the list says, and no frame counts whose CRC does not fit. That some of
 *    its pages stand in RAM by then is no harm: nothing runs on that RAM before COMMIT, the migration ends here, and the
 *    RAM with it.
 *  - Memory is only ever touched through its mapping where a page is known to be there: memory that ran out is an
 *    errno, and not a SIGBUS.
 */
#ifndef TV_PAGES_LAND_H
#define TV_PAGES_LAND_H
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

#include "pages.h"

/* A frame that is being received, or waits to land. */
struct tv_entry {
    uint64_t sequence;
    uint16_t type;
    uint32_t pages_crc;
    uint32_t body_length, payload_length;
    uint8_t *bytes;            /* room for TV_FRAME_PAGES pages, page-aligned */
    uint8_t body[TV_BODY_MAX]; /* slot u32, count u32, then its list */
};

struct tv_fault {
    int error;
    int problem;
    uint32_t slot;
    uint64_t page;
    uint64_t sequence; /* of the frame at fault */
};

static inline uint32_t tv_entry_slot(const struct tv_entry *entry)
{
    uint32_t slot;
    memcpy(&slot, entry->body, 4);
    return slot;
}

int tv_land_check(const struct tv_landing *landing, const struct tv_entry *entry, struct tv_fault *fault);
int tv_land_fills(const struct tv_landing *landing, const struct tv_entry *entry, uint64_t *chunk);
int tv_land_is_there(const struct tv_landing *landing, const struct tv_entry *entry);
uint32_t tv_land_parts(const struct tv_landing *landing, const struct tv_entry *entry, struct iovec *parts);
int tv_land_in_place(struct tv_landing *landing, const struct tv_entry *entry, struct tv_fault *fault);
int tv_land(struct tv_landing *landing, const struct tv_entry *entry, struct tv_fault *fault);

#endif
