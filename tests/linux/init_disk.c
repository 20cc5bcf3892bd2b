/* The init of a Linux guest that is there for its disk: sums up all of it, mounts the ext4 that is on it, and does what
 * the command line says (mode=…).
 *   use     copies files, deletes others, trims, and sums up the disk again
 *   write   writes files, each durable before it is told, for ever
 *   verify  looks whether the first kept=N of these are whole */
#include "guest.h"

#include <ftw.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>

#define BLOCK (1 << 20)
#define COPIES 60 /* files */

static const char *const MODULES[] = {"virtio_ring",           "virtio",     "virtio_pci_legacy_dev",
                                      "virtio_pci_modern_dev", "virtio_pci", "virtio_blk"};
static uint64_t words[BLOCK / 8];
static unsigned copied;

static void problem(const char *what)
{
    printf("GUEST problem: %s: %s\n", what, strerror(errno));
}

/* FNV-1a over words of 8 bytes, little-endian. */
static void sum_up(const char *when)
{
    uint64_t sum = 0xcbf29ce484222325u, size = 0;
    int fd = open("/dev/vda", O_RDONLY);
    for (ssize_t got; (got = read(fd, words, sizeof words)) > 0; size += (uint64_t)got)
        for (ssize_t at = 0; at < got / 8; at++)
            sum = (sum ^ words[at]) * 0x100000001b3u;
    close(fd);
    printf("GUEST %s %llu bytes, %016llx\n", when, (unsigned long long)size, (unsigned long long)sum);
}

static int copy(const char *path, const struct stat *about, int kind, struct FTW *walk)
{
    if (kind != FTW_F || !S_ISREG(about->st_mode) || !about->st_size || copied >= COPIES)
        return 0;
    char to[64];
    snprintf(to, sizeof to, "/mnt/made/%u", copied++);
    int from_fd = open(path, O_RDONLY), to_fd = open(to, O_RDWR | O_CREAT | O_TRUNC, 0600);
    for (ssize_t got; (got = read(from_fd, words, sizeof words)) > 0;)
        if (write(to_fd, words, (size_t)got) != got)
            problem(to);
    if (copied % 8 == 0 && fsync(to_fd))
        problem(to);
    close(from_fd);
    close(to_fd);
    if (copied % 3 == 0 && unlink(path))
        problem(path);
    return 0;
}

static void use(void)
{
    struct fstrim_range all = {.len = UINT64_MAX};
    mkdir("/mnt/made", 0700);
    nftw("/mnt", copy, 16, FTW_PHYS | FTW_MOUNT);
    sync();
    int fd = open("/mnt", O_RDONLY);
    printf("GUEST trim %s\n", ioctl(fd, FITRIM, &all) ? strerror(errno) : "done");
    close(fd);
    printf("GUEST copied %u\n", copied);
}

static void fill(unsigned number, size_t length)
{
    for (size_t at = 0; at < length / 8; at++)
        words[at] = (number + 1) * 0x9e3779b97f4a7c15u + at;
}

static size_t length_of(unsigned number)
{
    return 4096 * (1 + number * 7 % 23);
}

static void write_on(void)
{
    for (unsigned number = 0;; number++) {
        char path[64];
        snprintf(path, sizeof path, "/mnt/kept-%u", number % 200);
        int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
        fill(number, length_of(number));
        if (write(fd, words, length_of(number)) != (ssize_t)length_of(number) || fsync(fd))
            problem(path);
        close(fd);
        printf("GUEST kept %u\n", number + 1);
    }
}

static void verify(unsigned kept)
{
    static uint64_t is_to_be[BLOCK / 8];
    unsigned whole = 0;
    for (unsigned number = kept > 199 ? kept - 199 : 0; number < kept; number++) {
        char path[64];
        snprintf(path, sizeof path, "/mnt/kept-%u", number % 200);
        fill(number, length_of(number));
        memcpy(is_to_be, words, length_of(number));
        int fd = open(path, O_RDONLY);
        if (read(fd, words, sizeof words) == (ssize_t)length_of(number) && !memcmp(words, is_to_be, length_of(number)))
            whole++;
        else
            problem(path);
        close(fd);
    }
    printf("GUEST whole %u\n", whole);
}

int main(void)
{
    const char *mode = getenv("mode"), *kept = getenv("kept");
    setvbuf(stdout, NULL, _IOLBF, 0);
    mkdir("/mnt", 0700);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    LOAD_ALL(MODULES);
    for (int tries = 0; access("/dev/vda", F_OK) && tries < 100; tries++)
        usleep(100000);
    if (mode && !strcmp(mode, "use"))
        sum_up("found");
    if (mount("/dev/vda1", "/mnt", "ext4", 0, NULL) && mount("/dev/vda", "/mnt", "ext4", 0, NULL))
        problem("mount");
    if (mode && !strcmp(mode, "write"))
        write_on();
    if (mode && !strcmp(mode, "use"))
        use();
    if (mode && !strcmp(mode, "verify"))
        verify(kept ? (unsigned)atoi(kept) : 0);
    if (umount("/mnt"))
        problem("umount");
    if (mode && !strcmp(mode, "use"))
        sum_up("left");
    sync();
    printf("GUEST done\n");
    reboot(RB_POWER_OFF);
    return 1;
}
