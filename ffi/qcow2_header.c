/* The header of an image, its features and extensions, each field checked before anything is done with it. */
#define _GNU_SOURCE
#include "qcow2_image.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define V2_BYTES 72u
#define V3_BYTES 104u
#define AT_COMPRESSION 104u
#define CLUSTER_BITS_LEAST 9u
#define CLUSTER_BITS_MOST 21u /* QEMU's limit */
#define NAME_MOST 1023u
#define EXTENSIONS 64u /* more than anybody writes */
#define EXT_END 0u
#define EXT_BACKING_FORMAT 0xe2792acau
#define EXT_FEATURE_NAMES 0x6803f857u
#define AREA (64u << 10) /* of the first cluster, in which extensions and the backing name are looked for */

static const char REPAIR[] = "mend it (qemu-img check -r all IMAGE), or give an intact copy";
static const char CONVERT[] = "convert it (qemu-img convert -O qcow2 OLD NEW)";

static int features(struct tv_qcow2_header *header, const uint8_t *bytes, uint32_t length, struct tv_qcow2_error *error)
{
    uint64_t bits = header->incompatible;
    if (bits & QCOW2_EXTERNAL_DATA)
        return qcow2_wrong(error, "incompatible_features", CONVERT, bits, "an external data file, not supported yet");
    if (bits & QCOW2_EXTENDED_L2)
        return qcow2_wrong(error, "incompatible_features",
                           "convert it (qemu-img convert -O qcow2 -o extended_l2=off OLD NEW)", bits,
                           "extended L2 entries (subclusters), not supported yet");
    if (bits & ~(QCOW2_DIRTY | QCOW2_CORRUPT | QCOW2_COMPRESSION))
        return qcow2_wrong(error, "incompatible_features", "convert it with the program that made it", bits,
                           "a feature that is not known here");
    header->compression = length > AT_COMPRESSION ? bytes[AT_COMPRESSION] : 0;
    if (header->compression > 1)
        return qcow2_wrong(error, "compression_type", CONVERT, header->compression, "neither zlib nor zstd");
    if (!header->compression != !(bits & QCOW2_COMPRESSION))
        return qcow2_wrong(error, "compression_type", REPAIR, header->compression,
                           "contradicts the feature bit that announces it");
    return 0;
}

/* Extensions from `at` on, inside the first `size` bytes. */
static int extensions(struct tv_qcow2_header *header, const uint8_t *bytes, uint32_t size, uint32_t at,
                      struct tv_qcow2_error *error)
{
    for (uint32_t number = 0; number < EXTENSIONS && at + 8 <= size; number++) {
        uint32_t type = qcow2_get32(bytes + at), length = qcow2_get32(bytes + at + 4);
        if (type == EXT_END)
            return 0;
        at += 8;
        if (length > size - at)
            return qcow2_wrong(error, "header extension", REPAIR, length, "0x%x is longer than its cluster", type);
        if (type == EXT_BACKING_FORMAT) {
            if (length >= sizeof header->backing_format)
                return qcow2_wrong(error, "backing format", "say raw or qcow2 (qemu-img rebase -u -F …)", length,
                                   "too long a name");
            memcpy(header->backing_format, bytes + at, length);
        } else if (type != EXT_FEATURE_NAMES) {
            header->owns_more = 1;
        }
        at += (length + 7) & ~7u;
    }
    return 0;
}

static int backing_name(struct tv_qcow2_header *header, const uint8_t *bytes, uint32_t size,
                        struct tv_qcow2_error *error)
{
    uint64_t offset = qcow2_get64(bytes + 8);
    uint32_t length = qcow2_get32(bytes + 16);
    if (!offset || !length)
        return 0;
    if (length > NAME_MOST)
        return qcow2_wrong(error, "backing_file_size", REPAIR, length, "more than %u bytes", NAME_MOST);
    if (offset > size || length > size - offset)
        return qcow2_wrong(error, "backing_file_offset", REPAIR, offset, "the name lies outside the first cluster");
    if (memchr(bytes + offset, 0, length))
        return qcow2_wrong(error, "backing_file", REPAIR, offset, "the name has a zero byte in it");
    memcpy(header->backing_name, bytes + offset, length);
    return 0;
}

static int table(const struct tv_qcow2_header *header, const char *field, uint64_t offset, uint64_t bytes, uint64_t end,
                 struct tv_qcow2_error *error)
{
    uint64_t cluster = 1ull << header->cluster_bits;
    if (offset & (cluster - 1) || offset >= QCOW2_HOST_MAX)
        return qcow2_wrong(error, field, REPAIR, offset, "not at the beginning of a cluster");
    if (!offset)
        return qcow2_wrong(error, field, REPAIR, offset, "it lies on the header");
    end = (end + cluster - 1) & ~(cluster - 1); /* the last cluster may be short */
    if (offset >= end || bytes > end - offset)
        return qcow2_wrong(error, field, REPAIR, offset, "it goes past the end of the file");
    return 0;
}

static int tables(struct tv_qcow2_header *header, uint64_t end, struct tv_qcow2_error *error)
{
    uint32_t l2_bits = header->cluster_bits - 3;
    uint64_t span = 1ull << (header->cluster_bits + l2_bits), cluster = 1ull << header->cluster_bits;
    if (header->size > 1ull << 62)
        return qcow2_wrong(error, "size", REPAIR, header->size, "larger than any disk");
    if (header->l1_size > QCOW2_L1_BYTES / 8)
        return qcow2_wrong(error, "l1_size", REPAIR, header->l1_size, "more than %u entries", QCOW2_L1_BYTES / 8);
    if (header->l1_size < header->size / span + !!(header->size % span))
        return qcow2_wrong(error, "l1_size", REPAIR, header->l1_size, "too few entries for a disk of this size");
    if (header->l1_size && table(header, "l1_table_offset", header->l1_offset, 8ull * header->l1_size, end, error))
        return -1;
    if (!header->reftable_clusters || header->reftable_clusters > QCOW2_REFTABLE_BYTES >> header->cluster_bits)
        return qcow2_wrong(error, "refcount_table_clusters", REPAIR, header->reftable_clusters, "out of range, 1 to %u",
                           QCOW2_REFTABLE_BYTES >> header->cluster_bits);
    return table(header, "refcount_table_offset", header->reftable_offset, header->reftable_clusters * cluster, end,
                 error);
}

static int parse(const uint8_t *bytes, uint32_t size, uint64_t end, struct tv_qcow2_header *header,
                 struct tv_qcow2_error *error)
{
    if (size < V2_BYTES || qcow2_get32(bytes) != QCOW2_MAGIC)
        return qcow2_wrong(error, "magic", "give a qcow2 image, or say its format (image_type=raw)", 0,
                           "not a qcow2 image");
    header->version = qcow2_get32(bytes + 4);
    if (header->version != 2 && header->version != 3)
        return qcow2_wrong(error, "version", "convert it (qemu-img convert -O qcow2 OLD NEW)", header->version,
                           "neither 2 nor 3");
    header->cluster_bits = qcow2_get32(bytes + 20);
    if (header->cluster_bits < CLUSTER_BITS_LEAST || header->cluster_bits > CLUSTER_BITS_MOST)
        return qcow2_wrong(error, "cluster_bits", REPAIR, header->cluster_bits, "out of range, %u to %u",
                           CLUSTER_BITS_LEAST, CLUSTER_BITS_MOST);
    header->size = qcow2_get64(bytes + 24);
    if (qcow2_get32(bytes + 32))
        return qcow2_wrong(error, "crypt_method", "convert it (qemu-img convert), or have the guest encrypt its disk",
                           qcow2_get32(bytes + 32), "an encrypted image, not supported yet");
    header->l1_size = qcow2_get32(bytes + 36);
    header->l1_offset = qcow2_get64(bytes + 40);
    header->reftable_offset = qcow2_get64(bytes + 48);
    header->reftable_clusters = qcow2_get32(bytes + 56);
    header->snapshots = qcow2_get32(bytes + 60);
    header->refcount_order = 4;
    uint32_t length = V2_BYTES, first = 1u << header->cluster_bits;
    if (header->version == 3) {
        length = size < V3_BYTES ? 0 : qcow2_get32(bytes + 100);
        if (length < V3_BYTES || length % 8 || length > first || length > size)
            return qcow2_wrong(error, "header_length", REPAIR, length, "out of range, or no multiple of 8");
        header->incompatible = qcow2_get64(bytes + QCOW2_AT_INCOMPATIBLE);
        header->autoclear = qcow2_get64(bytes + QCOW2_AT_AUTOCLEAR);
        header->refcount_order = qcow2_get32(bytes + 96);
        if (header->refcount_order > 6)
            return qcow2_wrong(error, "refcount_order", REPAIR, header->refcount_order, "out of range, 0 to 6");
        if (features(header, bytes, length, error))
            return -1;
    }
    if (size > first)
        size = first;
    if (extensions(header, bytes, size, length, error) || backing_name(header, bytes, size, error))
        return -1;
    return tables(header, end, error);
}

/* Look at an image without believing more of it than its header. 0, or -1 with `error`. */
int tv_qcow2_probe(int fd, struct tv_qcow2_header *into, struct tv_qcow2_error *error)
{
    struct stat about;
    uint8_t *bytes = calloc(1, AREA);
    int64_t got = -1;
    memset(into, 0, sizeof *into);
    memset(error, 0, sizeof *error);
    off_t end = fstat(fd, &about) ? -1 : S_ISBLK(about.st_mode) ? lseek(fd, 0, SEEK_END) : about.st_size;
    if (bytes && end >= 0)
        got = end < (off_t)AREA ? end : (off_t)AREA;
    if (got < 0 || qcow2_read_all(fd, bytes, (uint64_t)got, 0)) {
        free(bytes);
        return qcow2_wrong(error, "header", "look after its storage", 0, "can't be read (%s)", strerror(errno));
    }
    int result = parse(bytes, (uint32_t)got, (uint64_t)end, into, error);
    free(bytes);
    return result;
}
