/* The init of a Linux guest that is about its small devices: stores in its persistent memory, gives memory away as it is
 * asked to and takes it back, and panics in the end. Every step is a line on the serial port. */
#include "guest.h"

#include <sys/mount.h>
#include <sys/stat.h>
#include <termios.h>

#define BLOCK 4096
#define MIB 1024l /* KiB */
#define LONG 3000 /* tenths of a second */

static const char *const MODULES[] = {
    "virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_balloon",
    "libnvdimm", "nd_btt", "nd_pmem", "nd_virtio", "virtio_pmem", "pvpanic", "pvpanic-pci",
};

static long memory_kib(void)
{
    char text[256];
    long found = -1;
    int fd = open("/proc/meminfo", O_RDONLY);
    ssize_t length = read(fd, text, sizeof text - 1);
    text[length > 0 ? length : 0] = 0;
    sscanf(text, "MemTotal: %ld", &found);
    close(fd);
    return found;
}

/* What a balloon gives away is no part of the total. */
static void until(const char *what, long least, long most)
{
    long now = 0;
    for (int tries = 0; tries < LONG; tries++, tenth()) {
        now = memory_kib();
        if (now >= least && now <= most) {
            printf("GUEST %s\n", what);
            return;
        }
    }
    printf("GUEST problem: not %s: %ld KiB\n", what, now);
}

static void use_pmem(const char *text)
{
    static char _Alignas(BLOCK) out[BLOCK], in[BLOCK];
    int fd = open_soon("/dev/pmem0", O_RDWR);
    snprintf(out, sizeof out, "%s", text);
    int good = pwrite(fd, out, BLOCK, 5 * BLOCK) == BLOCK && !fsync(fd) && pread(fd, in, BLOCK, 5 * BLOCK) == BLOCK &&
               !memcmp(in, out, BLOCK);
    printf("GUEST pmem %s: %s\n", text, good ? "good" : "bad");
    close(fd);
}

int main(void)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    mkdir("/proc", 0755);
    mkdir("/sys", 0755);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sys", "/sys", "sysfs", 0, NULL);
    LOAD_ALL(MODULES);
    use_pmem("first");
    long all = memory_kib();
    printf("GUEST has %ld KiB\n", all);
    until("gave", 0, all - 30 * MIB);
    use_pmem("second");
    until("took", all - 1 * MIB, all);
    printf("GUEST panics\n");
    tcdrain(STDOUT_FILENO); /* what the terminal still holds is lost in a panic */
    int trigger = open("/proc/sysrq-trigger", O_WRONLY);
    if (write(trigger, "c", 1) != 1)
        printf("GUEST problem: no panic: %s\n", strerror(errno));
    for (;;)
        tenth();
}
