/* Hostile block requests through the disk's own serve hook (ffi/block.c and its files, ffi/raw.c).
 *
 * A case is a queue with a handful of requests: any type, sector and length, headers and ranges that are cut short or
 * too long, data in segments of any size, no room for a status. A plain model of section 5.2.6 says what each of them
 * must come to. The image is bytes in memory that moves less than it was asked for, is interrupted and fails, or the
 * raw format over a file, directly and with blocks of 4 KiB, or through io_uring. Then:
 *  - status and used length are the model's, and so are the bytes that were read;
 *  - the disk has what the model's has, and nothing beyond its capacity;
 *  - of guest memory nothing changed but what was to be written, and that is marked dirty.
 *
 * Over 400 lines: the guest that makes requests and the model of what they come to belong to one harness.
 *
 * links: block.c block_clear.c block_counts.c block_ring.c uring.c limit.c raw.c ring.c worker.c park.c -lpthread
 * short: 5000
 * full: 1000000
 */
#define _GNU_SOURCE
#include "fuzz.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

#include "block.h"
#include "raw.h"

#define RAM 0xe000u
#define SECTORS 32u
#define DISK (SECTORS * 512)
#define BEYOND 4096 /* of the file, behind the disk */
#define QUEUE 64u
#define REQUESTS 6
#define DATA 0x2000u

enum { NEXT = 1, WRITE = 2 };
enum { IN = 0, OUT = 1, FLUSH = 4, GET_ID = 8, DISCARD = 11, ZEROES = 13 };
enum way { IN_RAM, PLAIN, DIRECT, RING, WAYS };

struct range {
    uint64_t sector;
    uint32_t sectors, flags;
};

struct expected {
    uint8_t status;
    uint32_t used;
    uint64_t status_gpa;
    uint8_t broken; /* a mistake that the queue is closed for */
};

static struct tv_memory memory;
static uint8_t *model, *disk, *ram; /* the model's disk, IN_RAM's, and guest memory as it should be */
static struct tv_block *block;
static struct fuzz *random_of;
static int file, injected; /* injected: the request under way was made to fail */
static uint32_t isr;
static struct tv_irq irq = {.fd = -1, .isr = &isr};
static struct {
    uint64_t statuses[3], broken, failed, ways[WAYS], limited;
} met;

/* --- an image that does as little as it may ---------------------------------------------------------------------- */

static int64_t some_of(uint64_t length)
{
    if (fuzz_one_in(random_of, 16)) {
        errno = EINTR;
        return -1;
    }
    if (fuzz_one_in(random_of, 64)) {
        injected = 1;
        errno = fuzz_one_in(random_of, 2) ? EIO : ENOSPC;
        return fuzz_one_in(random_of, 4) ? 0 : -1;
    }
    return (int64_t)(fuzz_one_in(random_of, 2) ? length : 1 + fuzz_below(random_of, length));
}

static int64_t move(const struct iovec *iov, int count, uint64_t at, int write)
{
    uint64_t length = 0;
    FUZZ_CHECK(count <= TV_QUEUE_MAX);
    for (int i = 0; i < count; i++)
        length += iov[i].iov_len;
    FUZZ_CHECK(length && length <= TV_BLOCK_PIECE && at <= DISK && length <= DISK - at);
    int64_t done = some_of(length), left = done;
    for (int i = 0; i < count && left > 0; i++) {
        int64_t part = left < (int64_t)iov[i].iov_len ? left : (int64_t)iov[i].iov_len;
        if (write)
            memcpy(disk + at, iov[i].iov_base, (size_t)part);
        else
            memcpy(iov[i].iov_base, disk + at, (size_t)part);
        at += (uint64_t)part;
        left -= part;
    }
    return done;
}

static int64_t ram_read(struct tv_image *image, const struct iovec *iov, int count, uint64_t at, int flags)
{
    return move(iov, count, at, 0);
}

static int64_t ram_write(struct tv_image *image, const struct iovec *iov, int count, uint64_t at)
{
    FUZZ_CHECK(!block->readonly);
    return move(iov, count, at, 1);
}

static int ram_flush(struct tv_image *image)
{
    return some_of(1) > 0 ? 0 : injected ? -1 : (errno = EINTR, -1);
}

static int64_t ram_zeroes(struct tv_image *image, uint64_t at, uint64_t length, int unmap)
{
    FUZZ_CHECK(!block->readonly && at <= DISK && length && length <= DISK - at);
    int64_t done = some_of(length);
    if (done > 0)
        memset(disk + at, 0, (size_t)done);
    return done;
}

static int64_t ram_discard(struct tv_image *image, uint64_t at, uint64_t length)
{
    return ram_zeroes(image, at, length, 1);
}

static const struct tv_image_ops RAM_OPS = {ram_read, ram_write, ram_flush, ram_discard, ram_zeroes, NULL};

/* --- the model --------------------------------------------------------------------------------------------------- */

static int in_range(uint64_t sector, uint64_t length)
{
    unsigned __int128 end = (unsigned __int128)sector * 512 + length;
    return length % 512 == 0 && end <= DISK;
}

static uint8_t model_clear(const uint8_t *data, uint64_t length, int zeroes)
{
    uint64_t bit = zeroes ? TV_BLOCK_F_WRITE_ZEROES : TV_BLOCK_F_DISCARD, count = length / sizeof(struct range);
    struct range ranges[TV_BLOCK_CLEAR_SEGMENTS];
    if (!(block->features & bit))
        return 2;
    if (block->readonly || !length || length % sizeof *ranges || count > TV_BLOCK_CLEAR_SEGMENTS)
        return 1;
    memcpy(ranges, data, length);
    for (uint64_t i = 0; i < count; i++) {
        if (ranges[i].flags & ~(zeroes ? 1u : 0u))
            return 2;
        if (ranges[i].sectors > TV_BLOCK_CLEAR_SECTORS || !in_range(ranges[i].sector, 512ull * ranges[i].sectors))
            return 1;
    }
    for (uint64_t i = 0; i < count; i++)
        if (ranges[i].sectors)
            memset(model + ranges[i].sector * 512, 0, 512ull * ranges[i].sectors);
    return 0;
}

/* `readable` are the bytes of the readable half, `gpa` where the writable one begins: it is in one piece. */
static void model_serve(const uint8_t *readable, uint64_t length, uint64_t gpa, uint64_t writable, struct expected *want)
{
    uint64_t room = writable - 1, written = 0, sector = 0;
    uint32_t type = 0;
    want->broken = !writable;
    if (want->broken)
        return;
    want->status = 1;
    want->status_gpa = gpa + room;
    if (length >= 16) {
        memcpy(&type, readable, 4);
        memcpy(&sector, readable + 8, 8);
        readable += 16;
        length -= 16;
        switch (type) {
        case IN:
            if (in_range(sector, room)) {
                want->status = 0;
                written = room;
                if (room)
                    memcpy(ram + gpa, model + sector * 512, room);
            }
            break;
        case OUT:
            if (!block->readonly && in_range(sector, length)) {
                want->status = 0;
                if (length)
                    memcpy(model + sector * 512, readable, length);
            }
            break;
        case FLUSH:
            want->status = 0;
            break;
        case GET_ID:
            want->status = 0;
            written = room < 20 ? room : 20;
            memcpy(ram + gpa, block->id, written);
            break;
        case DISCARD:
        case ZEROES:
            want->status = model_clear(readable, length, type == ZEROES);
            break;
        default:
            want->status = 2;
        }
    }
    want->used = (uint32_t)(written == room ? room + 1 : written);
    ram[want->status_gpa] = want->status;
}

/* --- the guest --------------------------------------------------------------------------------------------------- */

static void guest_writes(uint64_t gpa, const void *from, uint64_t length)
{
    memcpy(memory.regions[0].hva + gpa, from, length);
    memcpy(ram + gpa, from, length);
}

static uint64_t some_sector(struct fuzz *fuzz)
{
    static const uint64_t odd[] = {SECTORS, SECTORS - 1, 1ull << 55, UINT64_MAX, UINT64_MAX / 512, 1ull << 63};
    return fuzz_one_in(fuzz, 6) ? odd[fuzz_below(fuzz, 6)] : fuzz_below(fuzz, SECTORS);
}

static uint64_t some_length(struct fuzz *fuzz)
{
    switch (fuzz_below(fuzz, 10)) {
    case 0:
        return fuzz_below(fuzz, 1200);
    case 1:
        return 0;
    case 2:
        return 512 * fuzz_below(fuzz, SECTORS + 2);
    default:
        return 512 * (1 + fuzz_below(fuzz, 9));
    }
}

static uint64_t some_ranges(struct fuzz *fuzz, uint8_t *into)
{
    uint64_t count = fuzz_one_in(fuzz, 32) ? 30 + fuzz_below(fuzz, 5) : 1 + fuzz_below(fuzz, 3);
    for (uint64_t i = 0; i < count; i++) {
        struct range range = {some_sector(fuzz), (uint32_t)fuzz_below(fuzz, 12), (uint32_t)fuzz_below(fuzz, 2)};
        if (fuzz_one_in(fuzz, 24))
            range.flags = (uint32_t)fuzz_next(fuzz);
        if (fuzz_one_in(fuzz, 24))
            range.sectors = (uint32_t)fuzz_next(fuzz);
        memcpy(into + i * sizeof range, &range, sizeof range);
    }
    uint64_t length = count * sizeof(struct range);
    return fuzz_one_in(fuzz, 24) ? fuzz_below(fuzz, length + 1) : length;
}

static uint16_t next_descriptor;

static void describe(uint64_t gpa, uint32_t length, uint16_t flags)
{
    struct {
        uint64_t addr;
        uint32_t len;
        uint16_t flags, next;
    } desc = {gpa, length, (uint16_t)(flags | NEXT), (uint16_t)(next_descriptor + 1)};
    guest_writes(16ull * next_descriptor, &desc, sizeof desc);
    next_descriptor++;
}

/* [gpa, gpa + length) in up to three segments. */
static void describe_cut(struct fuzz *fuzz, uint64_t gpa, uint64_t length, uint16_t flags)
{
    for (int left = 3; length; left--) {
        uint64_t part = left == 1 || fuzz_one_in(fuzz, 2) ? length : 1 + fuzz_below(fuzz, length);
        if (!fuzz_one_in(fuzz, 4) && part > 512)
            part -= part % 512;
        describe(gpa, (uint32_t)part, flags);
        gpa += part;
        length -= part;
    }
}

/* Lay out a request at `gpa`, with what the model says of it; gives its head. */
static uint16_t some_request(struct fuzz *fuzz, uint64_t gpa, struct expected *want)
{
    static const uint32_t types[] = {IN, IN, IN, OUT, OUT, OUT, FLUSH, GET_ID, DISCARD, ZEROES};
    static uint8_t readable[DISK + 2048];
    uint32_t type = fuzz_one_in(fuzz, 24) ? (uint32_t)fuzz_below(fuzz, 20) : types[fuzz_below(fuzz, 10)];
    uint64_t sector = some_sector(fuzz), out = 0, room = 0;
    uint16_t head = next_descriptor;
    memset(readable, 0, 16);
    memcpy(readable, &type, 4);
    memcpy(readable + 8, &sector, 8);
    if (type == DISCARD || type == ZEROES)
        out = some_ranges(fuzz, readable + 16);
    else if (type == OUT || fuzz_one_in(fuzz, 12))
        fuzz_fill(fuzz, readable + 16, out = some_length(fuzz));
    if (type == IN || fuzz_one_in(fuzz, 12))
        room = some_length(fuzz);
    if (type == GET_ID)
        room = fuzz_below(fuzz, 40);
    uint64_t length = fuzz_one_in(fuzz, 48) ? fuzz_below(fuzz, 16) : 16 + out;
    uint64_t writable = fuzz_one_in(fuzz, 64) ? 0 : room + 1;
    gpa += fuzz_below(fuzz, 4) ? 0 : fuzz_below(fuzz, 600);
    guest_writes(gpa, readable, length);
    describe_cut(fuzz, gpa, length, 0);
    gpa = (gpa + length + 511) & ~511ull; /* aligned, mostly: only then a move is made in place */
    gpa += fuzz_one_in(fuzz, 4) ? fuzz_below(fuzz, 600) : 0;
    describe_cut(fuzz, gpa, writable, WRITE);
    if (next_descriptor == head) /* a descriptor of nothing is one too */
        describe(gpa, 0, 0);
    uint8_t *last = memory.regions[0].hva + 16 * (next_descriptor - 1u) + 12;
    *last &= (uint8_t)~NEXT;
    ram[last - memory.regions[0].hva] = *last;
    model_serve(readable, length, gpa, writable, want);
    return head;
}

/* --- a case ------------------------------------------------------------------------------------------------------ */

static void open_image(enum way way, struct tv_raw *raw)
{
    static struct tv_image image = {.ops = &RAM_OPS};
    block->image = way == IN_RAM ? &image : &raw->image;
    if (way == IN_RAM)
        return;
    *raw = (struct tv_raw){.fd = file, .direct_fd = way == DIRECT ? file : -1, .in_memory = way == PLAIN};
    raw->memory_align = 512;
    raw->block_align = fuzz_one_in(random_of, 2) ? 512 : 4096;
    tv_raw_init(raw);
    raw->image.waits = way == RING; /* writes too */
    FUZZ_CHECK(pwrite(file, model, DISK, 0) == DISK);
}

static void check_disk(enum way way)
{
    static uint8_t found[DISK + BEYOND], beyond[BEYOND];
    if (way == IN_RAM) {
        FUZZ_CHECK(!memcmp(disk, model, DISK));
        return;
    }
    FUZZ_CHECK(pread(file, found, sizeof found, 0) == sizeof found);
    FUZZ_CHECK(!memcmp(found, model, DISK) && !memcmp(found + DISK, beyond, BEYOND));
}

static void check_memory(void)
{
    const struct tv_region *region = &memory.regions[0];
    FUZZ_CHECK(!memcmp(region->hva + DATA, ram + DATA, RAM - DATA));
}

/* One request at a time: what the model expects of it depends on those before. 1: the queue goes on. */
static int ask(struct fuzz *fuzz, uint16_t number, enum way way)
{
    struct tv_queue *queue = &block->worker.queues[0];
    uint8_t *base = memory.regions[0].hva;
    struct expected want;
    uint32_t used[2];
    uint16_t index = (uint16_t)(number + 1);
    next_descriptor = 0;
    injected = 0;
    memset(memory.regions[0].dirty, 0, RAM / TV_PAGE_SIZE / 8);
    uint16_t head = some_request(fuzz, DATA, &want);
    memcpy(base + queue->avail_gpa + 4 + 2 * (number % QUEUE), &head, 2);
    memcpy(base + queue->avail_gpa + 2, &index, 2);
    for (int turns = 0; queue->next_used != index && !queue->broken; turns++) {
        tv_block_ready(&block->worker, 0);
        if (block->worker.later) {
            met.limited++;
            FUZZ_CHECK(block->limiter);
            block->limiter->ops.tokens = 2; /* its time has come */
            block->worker.later = 0;
        }
        FUZZ_CHECK(turns < 1000000);
    }
    FUZZ_CHECK(!!queue->broken == want.broken);
    if (want.broken) {
        met.broken++;
        return 0;
    }
    memcpy(used, base + queue->used_gpa + 4 + 8 * (number % QUEUE), sizeof used);
    FUZZ_CHECK(used[0] == head);
    uint8_t status = base[want.status_gpa];
    if (injected) { /* what a failed request has done is anything between nothing and all */
        FUZZ_CHECK(status == 1);
        met.failed++;
        memcpy(model, disk, DISK);
        memcpy(ram, base, RAM);
        return 1;
    }
    FUZZ_CHECK(status == want.status);
    FUZZ_CHECK(used[1] == want.used);
    met.statuses[status]++;
    check_disk(way);
    check_memory();
    uint64_t page = want.status_gpa >> TV_PAGE_SHIFT;
    FUZZ_CHECK(memory.regions[0].dirty[page / 64] >> page % 64 & 1);
    return 1;
}

static void one(struct fuzz *fuzz)
{
    static struct tv_limiter limiter;
    struct tv_raw raw;
    enum way way = fuzz_one_in(fuzz, 8) ? (enum way)(1 + fuzz_below(fuzz, fuzz_one_in(fuzz, 8) ? 3 : 2)) : IN_RAM;
    random_of = fuzz;
    met.ways[way]++;
    fuzz_fill(fuzz, model, DISK);
    memcpy(disk, model, DISK);
    memset(memory.regions[0].hva, 0x5a, RAM);
    memset(memory.regions[0].hva, 0, DATA);
    memcpy(ram, memory.regions[0].hva, RAM);
    int kick = block->worker.kick_fd;
    memset(block, 0, sizeof *block);
    block->worker.kick_fd = kick;
    block->features = fuzz_next(fuzz);
    block->readonly = fuzz_one_in(fuzz, 8);
    block->keeps_room = fuzz_one_in(fuzz, 2);
    block->sectors = SECTORS;
    fuzz_fill(fuzz, block->id, sizeof block->id);
    tv_block_init(block);
    open_image(way, &raw);
    if (fuzz_one_in(fuzz, 8)) {
        tv_bucket_init(&limiter.ops, 2, 0, 1u << 30, tv_now_ns());
        tv_limiter_init(&limiter);
        limiter.bytes.size = 0;
        block->limiter = &limiter;
    }
    struct tv_queue queue = {.memory = &memory, .irq = &irq, .size = QUEUE};
    queue.desc_gpa = 0;
    queue.avail_gpa = 16 * QUEUE;
    queue.used_gpa = 32 * QUEUE;
    FUZZ_CHECK(tv_worker_add(&block->worker, &queue, -1) == 0);
    for (uint16_t number = 0; number < REQUESTS; number++)
        if (!ask(fuzz, number, way))
            break;
    tv_block_leave(&block->worker);
    random_of = NULL;
}

static void summarize(char *into, size_t size)
{
    snprintf(into, size, "%llu fine, %llu I/O errors, %llu unsupported, %llu broken, %llu made to fail, %llu limited, "
             "in RAM %llu, plain %llu, direct %llu, io_uring %llu",
             (unsigned long long)met.statuses[0], (unsigned long long)met.statuses[1],
             (unsigned long long)met.statuses[2], (unsigned long long)met.broken, (unsigned long long)met.failed,
             (unsigned long long)met.limited, (unsigned long long)met.ways[IN_RAM], (unsigned long long)met.ways[PLAIN],
             (unsigned long long)met.ways[DIRECT], (unsigned long long)met.ways[RING]);
}

int main(int argc, char **argv)
{
    struct tv_region *region = &memory.regions[0];
    memory.count = 1;
    *region = (struct tv_region){.gpa = 0, .size = RAM};
    region->hva = aligned_alloc(TV_PAGE_SIZE, RAM);
    region->dirty = calloc(RAM / TV_PAGE_SIZE / 64 + 1, 8);
    model = malloc(DISK);
    disk = malloc(DISK);
    ram = malloc(RAM);
    block = calloc(1, sizeof *block);
    block->worker.kick_fd = eventfd(0, EFD_NONBLOCK);
    file = memfd_create("disk", 0);
    if (file < 0 || ftruncate(file, DISK + BEYOND))
        return 2;
    return fuzz_main(argc, argv, one, summarize);
}
