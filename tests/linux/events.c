/* The init of a Linux guest that lives four times, told apart by a counter on its disk: it reboots, it lets its watchdog
 * starve, it panics and is booted again, and it powers off when the power button is pressed.
 *
 * Linux has no driver for the watchdog: this one is in user space, over the device's BAR. */
#include "guest.h"

#include <linux/input.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <termios.h>

#define BLOCK 4096
#define PAGE 4096
#define SLOT "/sys/bus/pci/devices/%s/%s"

static const char *const MODULES[] = {
    "virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk",
    "button",      "evdev",  "pvpanic",               "pvpanic-pci",
};

/* How often this disk has been asked before. */
static int life(void)
{
    static char _Alignas(BLOCK) block[BLOCK];
    int disk = open_soon("/dev/vda", O_RDWR | O_DIRECT), number;
    if (pread(disk, block, BLOCK, 0) != BLOCK)
        printf("GUEST problem: read: %s\n", strerror(errno));
    number = block[0]++;
    if (pwrite(disk, block, BLOCK, 0) != BLOCK || fsync(disk))
        printf("GUEST problem: write: %s\n", strerror(errno));
    close(disk);
    return number;
}

static uint64_t physical(void *page)
{
    uint64_t entry = 0;
    int fd = open("/proc/self/pagemap", O_RDONLY);
    pread(fd, &entry, sizeof entry, (off_t)((uintptr_t)page / PAGE * sizeof entry));
    close(fd);
    return (entry & ((1ull << 55) - 1)) * PAGE;
}

/* The PCI slot of virtio device 35 (id 0x1040 + 35), whose memory and bus master bits are set. */
static int find_watchdog(char *bar, size_t size)
{
    for (int slot = 0; slot < 32; slot++) {
        char path[128], name[16];
        uint16_t ids[2], command;
        snprintf(name, sizeof name, "0000:00:%02x.0", slot);
        snprintf(path, sizeof path, SLOT, name, "config");
        int fd = open(path, O_RDWR);
        if (fd < 0)
            continue;
        if (pread(fd, ids, sizeof ids, 0) == sizeof ids && ids[0] == 0x1af4 && ids[1] == 0x1040 + 35) {
            pread(fd, &command, sizeof command, 4);
            command |= 6;
            pwrite(fd, &command, sizeof command, 4);
            close(fd);
            snprintf(bar, size, SLOT, name, "resource0");
            return 1;
        }
        close(fd);
    }
    return 0;
}

/* One ping: a driver that offers one buffer and then nothing more (virtio 1.2, 3.1.1 and 2.7). */
static void ping_once(void)
{
    char path[128];
    const struct timespec pause = {0, 10000000};
    if (!find_watchdog(path, sizeof path)) {
        printf("GUEST problem: no watchdog\n");
        return;
    }
    int fd = open(path, O_RDWR | O_SYNC);
    volatile uint8_t *bar = mmap(NULL, 0x80000, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    uint8_t *ring = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_LOCKED | MAP_POPULATE, -1, 0);
    if (bar == MAP_FAILED || ring == MAP_FAILED) {
        printf("GUEST problem: watchdog: %s\n", strerror(errno));
        return;
    }
    uint64_t gpa = physical(ring), parts[] = {gpa, gpa + 0x400, gpa + 0x800};
    volatile uint16_t *avail = (void *)(ring + 0x400), *used = (void *)(ring + 0x800);
    uint64_t address = gpa + 0xc00;
    memcpy(ring, &address, 8);
    memcpy(ring + 8, &(uint32_t[]){4, 2}, 8); /* 4 bytes, which the device writes */
    avail[1] = 1;                             /* entry 0 is descriptor 0 */
    bar[0x14] = 0;
    while (bar[0x14])
        nanosleep(&pause, NULL);
    bar[0x14] = 3;
    *(volatile uint32_t *)(bar + 0x08) = 1; /* the high half: VERSION_1 alone */
    *(volatile uint32_t *)(bar + 0x0c) = 1;
    bar[0x14] = 11;
    *(volatile uint16_t *)(bar + 0x16) = 0;
    for (int part = 0; part < 3; part++) {
        *(volatile uint32_t *)(bar + 0x20 + 8 * part) = (uint32_t)parts[part];
        *(volatile uint32_t *)(bar + 0x24 + 8 * part) = (uint32_t)(parts[part] >> 32);
    }
    *(volatile uint16_t *)(bar + 0x1c) = 1;
    bar[0x14] = 15;
    for (int tries = 0; used[1] != 1 && tries < 1000; tries++)
        nanosleep(&pause, NULL);
    printf("GUEST pinged %d, status %d\n", used[1], bar[0x14]);
}

static int pressed(void)
{
    struct pollfd wait = {open_soon("/dev/input/event0", O_RDONLY), POLLIN, 0};
    struct input_event event;

    printf("GUEST waits for the button\n");
    while (poll(&wait, 1, 300000) == 1 && read(wait.fd, &event, sizeof event) == sizeof event)
        if (event.type == EV_KEY && event.code == KEY_POWER && event.value == 1)
            return 1;
    return 0;
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
    int number = life();
    printf("GUEST life %d\n", number);
    tcdrain(STDOUT_FILENO); /* what the terminal still holds is lost with this life */
    switch (number) {
    case 0:
        reboot(RB_AUTOBOOT);
        break;
    case 1:
        ping_once();
        break;
    case 2:;
        int trigger = open("/proc/sysrq-trigger", O_WRONLY);
        if (write(trigger, "c", 1) != 1)
            printf("GUEST problem: no panic: %s\n", strerror(errno));
        break;
    default:
        printf(pressed() ? "GUEST power button\n" : "GUEST problem: no power button\n");
        tcdrain(STDOUT_FILENO);
        reboot(RB_POWER_OFF);
    }
    for (;;)
        pause();
}
