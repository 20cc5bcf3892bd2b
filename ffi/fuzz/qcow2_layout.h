/* qcow2 images for the harness: laid out at random and right, mutated at random, and a count of references of its own.
 * Small clusters and few of them, so that a case takes microseconds and tables are met at every turn. */
#ifndef TV_FUZZ_QCOW2_LAYOUT_H
#define TV_FUZZ_QCOW2_LAYOUT_H
#include "../qcow2_image.h"
#include "fuzz.h"

#define ROOM (1u << 20) /* no image that is made is larger */

struct layout {
    uint8_t bytes[ROOM];
    uint32_t bits, cluster, order, version;
    uint64_t clusters, size; /* of the file; of the disk, in bytes */
    uint64_t l1_entries;
    uint8_t disk[ROOM]; /* what the disk holds */
};

static inline void layout_count(struct layout *image, uint64_t cluster, uint64_t more)
{
    uint64_t per_block = (uint64_t)image->cluster * 8 >> image->order;
    uint8_t *table = image->bytes + image->cluster;
    uint64_t block = qcow2_get64(table + 8 * (cluster / per_block));
    uint64_t index = cluster % per_block, now = qcow2_entry(image->bytes + block, image->order, index) + more;
    for (uint32_t bit = 0; bit < 1u << image->order; bit++) { /* big-endian, but least significant first below a byte */
        uint64_t at = (index << image->order) + bit;
        uint64_t wide = (index << image->order >> 3) + (image->order > 3 ? 1u << (image->order - 3) : 0) - 1 - bit / 8;
        uint64_t byte = image->order > 3 ? wide : at / 8;
        uint8_t mask = (uint8_t)(1u << (image->order > 3 ? bit % 8 : at % 8));
        image->bytes[block + byte] = (uint8_t)((image->bytes[block + byte] & ~mask) | (now >> bit & 1 ? mask : 0));
    }
}

static inline uint64_t layout_new(struct layout *image)
{
    layout_count(image, image->clusters, 1);
    return image->clusters++ << image->bits;
}

/* A stored deflate block: as good as any compressed cluster. */
static inline uint64_t layout_squeezed(struct fuzz *fuzz, struct layout *image, uint8_t *disk)
{
    uint64_t at = layout_new(image) + fuzz_below(fuzz, 400), length = image->cluster + 5;
    uint64_t last = (at + length - 1) >> image->bits;
    while (image->clusters <= last)
        layout_new(image);
    uint8_t *to = image->bytes + at;
    to[0] = 1;
    to[1] = (uint8_t)image->cluster;
    to[2] = (uint8_t)(image->cluster >> 8);
    to[3] = (uint8_t)~to[1];
    to[4] = (uint8_t)~to[2];
    fuzz_fill(fuzz, disk, image->cluster);
    memcpy(to + 5, disk, image->cluster);
    return QCOW2_COMPRESSED | (((at + length - 1) / 512 - at / 512) << (62 - (image->bits - 8))) | at;
}

static inline void layout_entry(struct fuzz *fuzz, struct layout *image, uint8_t *to, uint8_t *disk, int backed)
{
    if (fuzz_one_in(fuzz, 8)) /* a free cluster, with what somebody left there */
        fuzz_fill(fuzz, image->bytes + (image->clusters++ << image->bits), image->cluster);
    switch (fuzz_below(fuzz, 6)) {
    case 0: {
        uint64_t at = layout_new(image);
        fuzz_fill(fuzz, disk, image->cluster);
        memcpy(image->bytes + at, disk, image->cluster);
        qcow2_put64(to, at | QCOW2_COPIED);
        break;
    }
    case 1:
        qcow2_put64(to, layout_squeezed(fuzz, image, disk));
        break;
    case 2:
        if (image->version == 3) {
            qcow2_put64(to, fuzz_one_in(fuzz, 2) ? QCOW2_ZERO : layout_new(image) | QCOW2_COPIED | QCOW2_ZERO);
            memset(disk, 0, image->cluster);
        }
        break;
    default:
        if (!backed)
            memset(disk, 0, image->cluster);
    }
}

/* `backing`: its content, or NULL. */
static inline void layout_make(struct fuzz *fuzz, struct layout *image, const uint8_t *backing, uint64_t backing_size)
{
    memset(image->bytes, 0, sizeof image->bytes);
    memset(image->disk, 0, sizeof image->disk);
    image->version = fuzz_one_in(fuzz, 4) ? 2 : 3;
    image->bits = 9 + (uint32_t)fuzz_below(fuzz, 3);
    image->cluster = 1u << image->bits;
    image->order = image->version == 2 ? 4 : (uint32_t)fuzz_below(fuzz, 7);
    uint64_t span = (uint64_t)image->cluster * image->cluster / 8;
    uint64_t blocks = 64 * 1024 / ((image->cluster * 8) >> image->order);
    image->l1_entries = 1 + fuzz_below(fuzz, image->bits == 9 ? 4 : 2);
    image->size = (image->l1_entries - 1) * span + 512 * (1 + fuzz_below(fuzz, span / 512));
    if (image->size > ROOM / 4)
        image->size = ROOM / 4;
    image->l1_entries = (image->size + span - 1) / span;
    if (backing)
        memcpy(image->disk, backing, backing_size < image->size ? backing_size : image->size);
    if (blocks > image->cluster / 8)
        blocks = image->cluster / 8;
    blocks = blocks ? 1 + fuzz_below(fuzz, blocks) : 1;
    uint64_t fixed = 3 + blocks, need = fixed + 3 * (image->size / image->cluster) + 8;
    while (blocks * ((image->cluster * 8) >> image->order) < need && blocks < image->cluster / 8)
        blocks++, need++;
    image->clusters = 2;
    for (uint64_t at = 0; at < blocks; at++)
        qcow2_put64(image->bytes + image->cluster + 8 * at, (image->clusters++) << image->bits);
    for (uint64_t at = 0; at < image->clusters; at++)
        layout_count(image, at, 1);
    uint64_t l1 = layout_new(image);
    for (uint64_t at = 0; at < image->l1_entries; at++) {
        if (fuzz_one_in(fuzz, 3))
            continue;
        uint64_t l2 = layout_new(image);
        qcow2_put64(image->bytes + l1 + 8 * at, l2 | QCOW2_COPIED);
        for (uint64_t index = 0; index < image->cluster / 8; index++) {
            uint64_t where = at * span + index * image->cluster;
            if (where < image->size && image->clusters + 5 < blocks * ((image->cluster * 8) >> image->order) &&
                (image->clusters + 5) << image->bits < ROOM)
                layout_entry(fuzz, image, image->bytes + l2 + 8 * index, image->disk + where, where < backing_size);
        }
    }
    uint8_t *header = image->bytes;
    qcow2_put32(header, QCOW2_MAGIC);
    qcow2_put32(header + 4, image->version);
    qcow2_put32(header + 20, image->bits);
    qcow2_put64(header + 24, image->size);
    qcow2_put32(header + 36, (uint32_t)image->l1_entries);
    qcow2_put64(header + 40, l1);
    qcow2_put64(header + 48, image->cluster);
    qcow2_put32(header + 56, 1);
    if (image->version == 3) {
        qcow2_put32(header + 96, image->order);
        qcow2_put32(header + 100, 104);
    }
}

/* A number that some check has to do with. */
static inline uint64_t layout_odd(struct fuzz *fuzz, const struct layout *image)
{
    static const uint64_t ODD[] = {0, 1, 511, 512, 0x7fffffff, 0xffffffff, 1ull << 55, 1ull << 56, 1ull << 62, ~0ull};
    uint64_t value = fuzz_one_in(fuzz, 3) ? fuzz_next(fuzz) : ODD[fuzz_below(fuzz, sizeof ODD / sizeof *ODD)];
    if (fuzz_one_in(fuzz, 2))
        value = fuzz_below(fuzz, image->clusters + 3) << image->bits;
    if (fuzz_one_in(fuzz, 3))
        value |= QCOW2_COPIED;
    if (fuzz_one_in(fuzz, 5))
        value |= QCOW2_COMPRESSED | fuzz_below(fuzz, 16) << (62 - (image->bits - 8));
    return value;
}

/* Some entries of tables, fields of the header, or any bytes, become odd. Gives the file's length. */
static inline uint64_t layout_mutate(struct fuzz *fuzz, struct layout *image)
{
    uint64_t length = image->clusters << image->bits;
    for (uint64_t left = 1 + fuzz_below(fuzz, 6); left; left--) {
        uint64_t value = layout_odd(fuzz, image);
        switch (fuzz_below(fuzz, 8)) {
        case 0:
            qcow2_put32(image->bytes + 4 * fuzz_below(fuzz, 28), (uint32_t)value);
            break;
        case 1:
            qcow2_put64(image->bytes + 8 * fuzz_below(fuzz, 14), value);
            break;
        case 2:
            image->bytes[fuzz_below(fuzz, length)] ^= (uint8_t)(1u << fuzz_below(fuzz, 8));
            break;
        case 3: /* the refcount table, or one of its blocks */
            qcow2_put64(image->bytes + image->cluster + 8 * fuzz_below(fuzz, image->cluster / 4), value);
            break;
        case 4:
            if (fuzz_one_in(fuzz, 4))
                length = fuzz_below(fuzz, length + 1);
            break;
        default: /* mostly L1 and L2 tables */
            qcow2_put64(image->bytes + 8 * fuzz_below(fuzz, length / 8 + 1), value);
        }
    }
    return length < ROOM ? length : ROOM;
}

/* What the tables of a file refer to, and whether each reference is counted: an oracle of its own. Gives how many
 * clusters are counted too low (never right), *leaks how many too high. */
static inline uint64_t layout_low(const uint8_t *bytes, uint64_t length, uint64_t *leaks)
{
    static uint32_t seen[1u << 17];
    uint32_t bits = qcow2_get32(bytes + 20), version = qcow2_get32(bytes + 4), cluster = 1u << bits;
    uint32_t order = version == 3 ? qcow2_get32(bytes + 96) : 4;
    uint64_t l1 = qcow2_get64(bytes + 40), l1_entries = qcow2_get32(bytes + 36), table = qcow2_get64(bytes + 48);
    uint64_t entries = (uint64_t)qcow2_get32(bytes + 56) * cluster / 8, per_block = (uint64_t)cluster * 8 >> order;
    uint64_t count = (length + cluster - 1) / cluster, low = 0;
    FUZZ_CHECK(count < sizeof seen / sizeof *seen);
    memset(seen, 0, count * sizeof *seen);
#define SEE(offset)                                                                                                    \
    do {                                                                                                               \
        FUZZ_CHECK((offset) >> bits < count);                                                                          \
        seen[(offset) >> bits]++;                                                                                      \
    } while (0)
    SEE(0ull);
    for (uint64_t at = 0; at < l1_entries * 8; at += cluster)
        SEE(l1 + at);
    for (uint64_t at = 0; at < entries * 8; at += cluster)
        SEE(table + at);
    for (uint64_t at = 0; at < entries; at++)
        if (qcow2_get64(bytes + table + 8 * at))
            SEE(qcow2_get64(bytes + table + 8 * at));
    for (uint64_t at = 0; at < l1_entries; at++) {
        uint64_t l2 = qcow2_get64(bytes + l1 + 8 * at) & QCOW2_OFFSET;
        if (l2)
            SEE(l2);
        for (uint64_t index = 0; l2 && index < cluster / 8; index++) {
            uint64_t entry = qcow2_get64(bytes + l2 + 8 * index), shift = 62 - (bits - 8);
            if (entry & QCOW2_COMPRESSED) {
                uint64_t from = entry & ((1ull << shift) - 1);
                uint64_t sectors = (entry >> shift & ((1ull << (bits - 8)) - 1)) + 1;
                for (uint64_t each = from >> bits; each <= ((from & ~511ull) + 512 * sectors - 1) >> bits; each++)
                    SEE(each << bits);
            } else if (entry & QCOW2_OFFSET) {
                SEE(entry & QCOW2_OFFSET);
            }
        }
    }
    for (uint64_t at = 0; at < count; at++) {
        uint64_t block = at / per_block < entries ? qcow2_get64(bytes + table + 8 * (at / per_block)) : 0;
        uint64_t said = block ? qcow2_entry(bytes + block, order, at % per_block) : 0;
        low += said < seen[at];
        *leaks += said > seen[at];
    }
    return low;
}

#endif
