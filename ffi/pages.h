/* Guest pages on a socket: page frames are built, sent, received and landed here, with the GIL released.
 *
 *   pages_dirty.c    bitmaps of dirty pages
 *   pages_send.c     dirty pages into frames, frames onto the socket
 *   pages_receive.c  frames off the socket
 *   pages_inbox.c    frames between the two, and the thread that lands them
 *   pages_land.c     frames into RAM
 *   pages_huge.c     huge pages under that RAM
 *   pages_io.c       the waits they share
 *
 * The frame format is that of trivmm/migration/wire/frame.py, which is its definition. In short, little-endian:
 *   header  magic u32, version u16, type u16, length u32, body u32, sequence u64, body_crc u32, pages_crc u32,
 *           20 bytes of zero, header_crc u32 (56 bytes)
 *   PAGES   slot u32, count u32, count x page u32, then count x 4096 bytes
 *   ZERO    slot u32, count u32, count x (first u32, pages u32)
 * `length` counts all bytes after the header; the first `body` of them are covered by `body_crc`, the pages by
 * `pages_crc`, both by the header's.
 *
 * Invariants
 *  - A job belongs to one thread for the length of a call; its buffers and file descriptors outlive the call.
 *  - `fd` is a non-blocking stream socket, `kick_fd` a non-blocking eventfd.
 *  - `sequence` is the number of the connection's next frame in this direction, in and out: it goes up with each
 *    whole frame and with nothing else. A page frame that is not that number is not taken: its header goes to the
 *    caller, as any frame's that is not ours, who counts on from the same number and names what is wrong.
 *  - A frame that has begun is whole within `stall_ms`, whatever trickles in: 512 KiB in 30 s is less than any link
 *    gives that a migration could use.
 */
#ifndef TV_PAGES_H
#define TV_PAGES_H
#include <stdint.h>

#include "memory.h"

#define TV_FRAME_MAGIC 0x674d5654u /* "TVMg" */
/* Header and page list of a full frame are 9 x 64 bytes: where they end off a multiple of 32, the kernel copies the
 * pages behind them a tenth slower, in and out. */
#define TV_FRAME_HEADER 56u
#define TV_FRAME_SEQUENCE 16u /* its place in the header */
#define TV_FRAME_BODY_CRC 24u
#define TV_FRAME_PAGES_CRC 28u
#define TV_FRAME_CRC 52u /* of all header bytes before it */
#define TV_FRAME_PAGES 128u /* pages a frame: 512 KiB; fewer, and its wake-ups show; more, and a slow link is held long */
#define TV_FRAME_RUNS 512u /* zero runs a frame: 4 KiB of body */
#define TV_BODY_MAX (8u + TV_FRAME_RUNS * 8u) /* of either type */
#define TV_TYPE_PAGES 16u
#define TV_TYPE_ZERO 17u

enum tv_pages_reason {
    TV_PAGES_DONE = 0,    /* sent: no dirty page is left; received: `header` holds a frame that is not ours */
    TV_PAGES_BUDGET = 1,  /* max_pages done; call again */
    TV_PAGES_KICKED = 2,
    TV_PAGES_STALLED = 3, /* no frame began, or one that did was not whole, within stall_ms */
    TV_PAGES_ERRNO = 4,   /* see `error` */
    TV_PAGES_EOF = 5,     /* the peer closed */
    TV_PAGES_BAD = 6,     /* the peer sent nonsense: see `problem` */
};

enum tv_pages_problem {
    TV_BAD_NONE = 0,
    TV_BAD_LENGTH = 1,
    TV_BAD_BODY_CRC = 2,
    TV_BAD_SLOT = 3,
    TV_BAD_PAGE = 4, /* outside the region, twice, or not ascending */
    TV_BAD_PAGES_CRC = 5,
};

struct tv_page_send {
    int fd;
    int kick_fd;
    uint32_t stall_ms;
    uint32_t grace_ms; /* after a kick a started frame may still end, for that long */
    uint16_t version;
    uint32_t slot;
    uint64_t pages; /* of the region */
    uint8_t *hva;
    uint64_t *dirty;  /* (pages + 63) / 64 words, this job's own */
    uint64_t cursor;  /* in and out: first page to look at */
    uint64_t max_pages;
    int memfd;         /* of the region, where its guest has given memory back; else -1 */
    uint8_t *staging;  /* TV_FRAME_PAGES pages */
    uint64_t sequence; /* in and out */
    uint64_t bytes;    /* out, like all below: added up over calls */
    uint64_t sent_pages;
    uint64_t zero_pages;
    int reason;
    int error;
    int broken; /* a frame was cut short: the stream is good for nothing any more */
};

/* A destination's RAM while pages land in it: of one migration, from its first page to its last. Nothing runs on it,
 * and nobody else touches it. */
struct tv_landing {
    struct tv_memory *memory;
    int memfd[TV_MAX_REGIONS];        /* of each region */
    uint64_t *landed[TV_MAX_REGIONS]; /* a bit a page: its frame is (or may be) not all zero */
    uint8_t *chunks[TV_MAX_REGIONS];  /* an enum tv_chunk for each 2 MiB */
    uint64_t chunk_count[TV_MAX_REGIONS]; /* whole ones */
    uint64_t huge_ns; /* what a chunk costs, made huge; 0: nothing known */
    uint64_t small_ns;
    uint32_t passed_over; /* chunks that were not asked for, since the last that was */
    int no_huge;          /* there are none to be had */
    uint64_t bytes;                   /* that came, of page frames and of the headers between them */
    uint64_t sent_pages;              /* that landed, each time that one did */
    uint64_t zero_pages;
};

struct tv_inbox; /* frames on their way from the socket into RAM; of one connection */

struct tv_page_intake {
    int fd;
    int kick_fd;
    uint32_t stall_ms;
    uint16_t version;
    struct tv_landing *landing;
    struct tv_inbox *inbox;
    uint64_t max_pages;
    uint64_t sequence;               /* in and out */
    uint64_t until_ms;               /* when the frame at hand must be whole; 0: none has begun */
    uint8_t header[TV_FRAME_HEADER]; /* out, like all below */
    int reason;
    int error;
    int problem;
    uint32_t bad_slot;
    uint64_t bad_page;
};

struct tv_inbox *tv_inbox_new(void);
void tv_inbox_free(struct tv_inbox *inbox);
int tv_pages_send(struct tv_page_send *job);
int tv_pages_receive(struct tv_page_intake *job);
int tv_pages_mark_data(int memfd, uint64_t size, uint64_t *dirty);
uint64_t tv_pages_count(const uint64_t *bitmap, uint64_t words);

#endif
