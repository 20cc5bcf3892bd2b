/* virtio-balloon (virtio 1.2 section 5.5): takes pages that the guest gives back and returns their memory to the host.
 *
 * Invariants
 *  - A page that was given back reads as zero from then on, in every CPU and every device. Its bit in the region's dirty
 *    bitmap is set after its memory is gone and before the driver is told, so a migration that has sent it sends it
 *    again, as zero.
 *  - Only pages of guest RAM are given back, whatever a list says; anything else in it is counted and left alone.
 *  - To give a page back twice, or one that a device works with, harms the guest's own data and nothing else: rings
 *    and buffers are used through the same mapping, which stays.
 *  - The worker's stop word is looked at between pieces of a bounded size. What was done of a chain that goes back is
 *    done again later, when it changes nothing.
 */
#ifndef TV_BALLOON_H
#define TV_BALLOON_H
#include "worker.h"

#define TV_BALLOON_INFLATE 0u /* queues */
#define TV_BALLOON_DEFLATE 1u
#define TV_BALLOON_REPORT 2u /* of those that are there: statistics and hints are not offered */

#define TV_BALLOON_LIST 1024u          /* page numbers read, sorted and merged at a time; a usual driver's list has 256 */
#define TV_BALLOON_LISTS 256u          /* of these at most in one chain: a gigabyte of RAM */
#define TV_BALLOON_PIECE (16ull << 20) /* bytes given back between two looks at the stop word */

struct tv_balloon {
    struct tv_worker worker;
    /* Counted in pages, atomically: any thread may read them. */
    uint64_t inflated; /* named in lists, as often as they were */
    uint64_t deflated;
    uint64_t reported;
    uint64_t released; /* whose memory was given back, in `ranges` calls */
    uint64_t ranges;
    uint64_t refused; /* outside RAM, cut short, or in a list that no driver makes */
    uint64_t failed;  /* the kernel would not */
    uint32_t list[TV_BALLOON_LIST];
};

void tv_balloon_init(struct tv_balloon *balloon);

#endif
