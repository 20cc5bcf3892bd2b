/* qcow2 images, hostile and right. A case lays out an image at random and does one of
 *  - mutate it, open it if that is possible, and use it: nothing but the image's file changes;
 *  - use it as it is, beside a model of the disk: what is read is what the model says, nothing contradicts itself, and
 *    after a flush every reference is counted, no more and no less;
 *  - the same, but from the N-th write on nothing reaches the file any more, as if the process had been killed there:
 *    no reference is counted too low, the image opens again, and what was answered is there.
 * What is behind it, where something is, never changes.
 *
 * links: qcow2_alloc.c qcow2_cache.c qcow2_entries.c qcow2_file.c qcow2_flush.c qcow2_grow.c qcow2_header.c
 * links: qcow2_inflate.c qcow2_map.c qcow2_open.c qcow2_read.c qcow2_repair.c qcow2_set.c qcow2_write.c qcow2_zero.c
 * links: -lpthread -ldl -Wl,--wrap=pwrite -Wl,--wrap=pwritev -Wl,--wrap=fallocate -Wl,--wrap=fdatasync
 * short: 600
 * full: 100000
 */
#define _GNU_SOURCE
#include "qcow2_layout.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/uio.h>

static struct layout layout, below;
static struct {
    uint64_t refused, opened, failed, right, killed, leaks, mended, early;
} met;

/* --- the file, which may die ------------------------------------------------------------------------------------ */

static int image_fd, behind_fd;
static int64_t writes_left; /* -1: as many as it likes */
static int keeps_holes;     /* a file system that can't punch them: what was in a free cluster is still there */

static int dies(int fd)
{
    FUZZ_CHECK(fd == image_fd); /* nothing else is ever written */
    if (writes_left < 0 || writes_left--)
        return 0;
    writes_left = 0;
    errno = EIO;
    return 1;
}

ssize_t __real_pwrite(int fd, const void *from, size_t length, off_t at);
ssize_t __real_pwritev(int fd, const struct iovec *iov, int count, off_t at);
int __real_fallocate(int fd, int mode, off_t at, off_t length);

ssize_t __wrap_pwrite(int fd, const void *from, size_t length, off_t at)
{
    return dies(fd) ? -1 : __real_pwrite(fd, from, length, at);
}

ssize_t __wrap_pwritev(int fd, const struct iovec *iov, int count, off_t at)
{
    return dies(fd) ? -1 : __real_pwritev(fd, iov, count, at);
}

int __wrap_fallocate(int fd, int mode, off_t at, off_t length)
{
    if (dies(fd))
        return -1;
    errno = EOPNOTSUPP;
    return keeps_holes ? -1 : __real_fallocate(fd, mode, at, length);
}

int __wrap_fdatasync(int fd) /* memory */
{
    errno = EIO;
    return writes_left == 0 ? -1 : 0;
}

static void set_file(int fd, const uint8_t *bytes, uint64_t length)
{
    FUZZ_CHECK(!ftruncate(fd, 0) && !ftruncate(fd, (off_t)length));
    FUZZ_CHECK(__real_pwrite(fd, bytes, length, 0) == (ssize_t)length);
}

/* --- using it --------------------------------------------------------------------------------------------------- */

struct use {
    struct fuzz *fuzz;
    struct tv_qcow2 *image, *behind;
    uint8_t *model;   /* NULL: whatever is read is right */
    uint64_t vague, vague_length; /* of the model: what was under way when the file died */
};

static int64_t move(struct use *use, uint8_t *bytes, uint64_t at, uint64_t length, int write)
{
    struct iovec iov[3];
    uint64_t first = fuzz_below(use->fuzz, length + 1), second = fuzz_below(use->fuzz, length - first + 1);
    iov[0] = (struct iovec){bytes, first};
    iov[1] = (struct iovec){bytes + first, second};
    iov[2] = (struct iovec){bytes + first + second, length - first - second};
    struct tv_image *seam = tv_qcow2_image(use->image);
    return write ? seam->ops->write(seam, iov, 3, at) : seam->ops->read(seam, iov, 3, at, 0);
}

static void check_read(struct use *use, uint64_t at, uint64_t length)
{
    static uint8_t bytes[ROOM];
    int64_t got = move(use, bytes, at, length, 0);
    FUZZ_CHECK(got == (int64_t)length || (got == -1 && !use->model));
    if (got >= 0 && length) { /* the same, where that does not wait: some of it, or nothing */
        static uint8_t early[ROOM];
        struct iovec iov = {early, length};
        struct tv_image *seam = tv_qcow2_image(use->image);
        int64_t some = seam->ops->read(seam, &iov, 1, at, TV_IMAGE_NOWAIT);
        FUZZ_CHECK(some == -1 || (some > 0 && some <= got && !memcmp(early, bytes, (size_t)some)));
        met.early += some > 0;
    }
    for (uint64_t each = 0; use->model && each < length; each++)
        FUZZ_CHECK(bytes[each] == use->model[at + each] || at + each - use->vague < use->vague_length);
    met.failed += got < 0;
}

/* A discarded range is read again: it may be what it was, or zeros. */
static void learn(struct use *use, uint64_t at, uint64_t length)
{
    static uint8_t bytes[ROOM];
    FUZZ_CHECK(move(use, bytes, at, length, 0) == (int64_t)length);
    for (uint64_t each = 0; each < length; each++)
        FUZZ_CHECK(!bytes[each] || bytes[each] == use->model[at + each]);
    memcpy(use->model + at, bytes, length);
}

/* 0, or -1: the file has died in it. */
static int one_step(struct use *use)
{
    static uint8_t bytes[ROOM];
    struct tv_image *seam = tv_qcow2_image(use->image);
    uint64_t size = tv_qcow2_size(use->image) & ~511ull;
    if (!size)
        return 0;
    uint64_t at = fuzz_below(use->fuzz, size / 512) * 512, length = 512 * (1 + fuzz_below(use->fuzz, 24));
    if (length > size - at)
        length = size - at;
    uint64_t what = fuzz_below(use->fuzz, 10);
    int64_t done = 0;
    if (what < 4) {
        fuzz_fill(use->fuzz, bytes, length);
        done = move(use, bytes, at, length, 1);
    } else if (what < 6) {
        check_read(use, at, length);
    } else if (what == 6) {
        done = seam->ops->discard(seam, at, length);
    } else if (what == 7) {
        done = seam->ops->write_zeroes(seam, at, length, (int)fuzz_below(use->fuzz, 2));
    } else if (what == 8) {
        done = seam->ops->flush(seam);
    } else if (fuzz_one_in(use->fuzz, 4)) {
        done = tv_qcow2_settle(use->image, image_fd);
    }
    FUZZ_CHECK(done >= 0 || !use->model || !writes_left);
    met.failed += done < 0;
    if (done < 0 && use->model) {
        use->vague = at;
        use->vague_length = what < 8 ? length : 0;
        return -1;
    }
    if (use->model && what < 4)
        memcpy(use->model + at, bytes, length);
    else if (use->model && what == 6)
        learn(use, at, length);
    else if (use->model && what == 7)
        memset(use->model + at, 0, length);
    return 0;
}

static struct tv_qcow2 *open_image(struct use *use, int writable)
{
    struct tv_qcow2_error error;
    struct tv_qcow2 *image = tv_qcow2_open(image_fd, writable, &error);
    FUZZ_CHECK(!image == !!*error.problem);
    if (!image)
        FUZZ_CHECK(*error.field && *error.value && *error.remedy);
    if (image && behind_fd >= 0)
        tv_qcow2_back(image, use->behind, behind_fd, below.size);
    return image;
}

/* --- the three kinds of cases ----------------------------------------------------------------------------------- */

static void hostile(struct use *use)
{
    uint64_t length = layout_mutate(use->fuzz, &layout);
    set_file(image_fd, layout.bytes, length);
    use->image = open_image(use, !fuzz_one_in(use->fuzz, 4));
    if (!use->image) {
        met.refused++;
        return;
    }
    met.opened++;
    for (uint64_t left = 1 + fuzz_below(use->fuzz, 24); left; left--)
        (void)one_step(use);
    tv_qcow2_close(use->image);
}

/* Each reference is counted; without `leaky`, none but these. */
static void judge(int leaky)
{
    off_t length = lseek(image_fd, 0, SEEK_END);
    uint8_t *bytes = malloc((size_t)length);
    uint64_t leaks = 0;
    FUZZ_CHECK(bytes && pread(image_fd, bytes, (size_t)length, 0) == length);
    FUZZ_CHECK(!layout_low(bytes, (uint64_t)length, &leaks));
    FUZZ_CHECK(leaky || !leaks);
    met.leaks += leaks != 0;
    free(bytes);
}

static void right(struct use *use, int killed)
{
    use->model = layout.disk;
    set_file(image_fd, layout.bytes, layout.clusters << layout.bits);
    judge(0);
    use->image = open_image(use, 1);
    FUZZ_CHECK(use->image);
    if (killed)
        writes_left = (int64_t)fuzz_below(use->fuzz, 150);
    for (uint64_t left = 1 + fuzz_below(use->fuzz, 40); left && !one_step(use); left--)
        ;
    int dead = writes_left == 0;
    writes_left = -1;
    tv_qcow2_close(use->image);
    judge(dead);
    use->image = open_image(use, 1);
    FUZZ_CHECK(use->image);
    struct tv_qcow2_counts counts;
    tv_qcow2_count(use->image, &counts);
    met.mended += counts.mended != 0;
    check_read(use, 0, layout.size);
    for (uint64_t left = fuzz_below(use->fuzz, 8); !use->vague_length && left; left--)
        FUZZ_CHECK(!one_step(use));
    FUZZ_CHECK(!tv_qcow2_settle(use->image, image_fd));
    tv_qcow2_count(use->image, &counts);
    FUZZ_CHECK(!counts.spoilt);
    tv_qcow2_close(use->image);
    judge(0);
    met.right += !killed;
    met.killed += dead;
}

static void one(struct fuzz *fuzz)
{
    struct use use = {.fuzz = fuzz};
    int backed = (int)fuzz_below(fuzz, 3); /* 0: no, 1: by qcow2, 2: by a raw file */
    uint64_t kind = fuzz_below(fuzz, 4), behind_length = 0;
    image_fd = memfd_create("image", 0);
    behind_fd = -1;
    writes_left = -1;
    keeps_holes = (int)fuzz_below(fuzz, 2);
    if (backed) {
        layout_make(fuzz, &below, NULL, 0);
        behind_fd = memfd_create("behind", 0);
        behind_length = backed == 1 ? below.clusters << below.bits : below.size;
        if (kind < 2 && backed == 1)
            behind_length = layout_mutate(fuzz, &below);
        set_file(behind_fd, backed == 1 ? below.bytes : below.disk, behind_length);
        struct tv_qcow2_error error;
        use.behind = backed == 1 ? tv_qcow2_open(behind_fd, 0, &error) : NULL;
        if (backed == 1 && !use.behind)
            kind = 0;
    }
    int usable = backed == 2 || use.behind;
    layout_make(fuzz, &layout, usable ? below.disk : NULL, usable ? below.size : 0);
    if (!usable && behind_fd >= 0) {
        close(behind_fd);
        behind_fd = -1;
    }
    if (kind < 2)
        hostile(&use);
    else
        right(&use, kind == 3);
    tv_qcow2_close(use.behind);
    close(image_fd);
    if (behind_fd >= 0)
        close(behind_fd);
}

static void summarize(char *into, size_t size)
{
    snprintf(into, size,
             "%llu refused, %llu opened, %llu calls failed; %llu right, %llu killed, %llu of these with leaks, "
             "%llu mended; %llu reads without waiting",
             (unsigned long long)met.refused, (unsigned long long)met.opened, (unsigned long long)met.failed,
             (unsigned long long)met.right, (unsigned long long)met.killed, (unsigned long long)met.leaks,
             (unsigned long long)met.mended, (unsigned long long)met.early);
}

int main(int argc, char **argv)
{
    return fuzz_main(argc, argv, one, summarize);
}
