/* The init of a Linux guest: loads the drivers and says which device each has, then writes, reads back, asks for random
 * bytes and has a server echo datagrams, and powers off when the power button is pressed. Every round is a line with the
 * clock's time, on the serial port and on the virtio console, so that a lost or a doubled one is seen. After the rounds it
 * uses a disk that comes, until that is taken away again, twice. */
#include "guest.h"

#include <arpa/inet.h>
#include <linux/input.h>
#include <net/if.h>
#include <poll.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/reboot.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <termios.h>

#define ROUNDS 60
#define BLOCK 4096

static const char *const MODULES[] = {"virtio_ring",           "virtio",     "virtio_pci_legacy_dev",
                                      "virtio_pci_modern_dev", "virtio_pci", "virtio_blk",
                                      "virtio-rng",            "virtio_console", "button", "evdev", "failover", "net_failover",
                                      "virtio_net", "virtio_balloon", "vsock", "vmw_vsock_virtio_transport_common",
                                      "vmw_vsock_virtio_transport"};

/* "GUEST bound DRIVER" for each virtio device. */
static void say_bound(void)
{
    char path[64], driver[256];
    for (int number = 0; number < 16; number++) {
        snprintf(path, sizeof path, "/sys/bus/virtio/devices/virtio%d/driver", number);
        ssize_t length = readlink(path, driver, sizeof driver - 1);
        if (length < 0)
            continue;
        driver[length] = 0;
        printf("GUEST bound %s\n", strrchr(driver, '/') + 1);
    }
}

static long milliseconds(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* A disk that comes while this runs: it is written and read until it goes. */
static void use_plugged(char *out, char *in)
{
    int disk = -1;

    printf("GUEST wants a disk\n");
    for (int tries = 0; disk < 0 && tries < 3000; tries++) {
        disk = open("/dev/vdb", O_RDWR | O_DIRECT);
        if (disk < 0)
            tenth();
    }
    for (unsigned long round = 0;; round++) {
        off_t at = (off_t)(round % 64) * BLOCK;
        memset(out, (int)('a' + round % 26), BLOCK);
        snprintf(out, BLOCK, "plugged %lu", round);
        if (pwrite(disk, out, BLOCK, at) != BLOCK || fsync(disk) || pread(disk, in, BLOCK, at) != BLOCK)
            break;
        printf("GUEST plugged %lu %s\n", round, memcmp(in, out, BLOCK) ? "bad" : "good");
        tenth();
    }
    printf("GUEST disk gone: %s\n", strerror(errno));
    close(disk);
}

/* A socket to the server that echoes, over an interface with an address; -1 without. */
static int open_network(const char *mine, const char *server)
{
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    struct ifreq request = {.ifr_name = "eth0"};
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(7)};
    struct timeval patience = {0, 500000};

    inet_pton(AF_INET, mine, &address.sin_addr);
    memcpy(&request.ifr_addr, &address, sizeof address);
    if (ioctl(fd, SIOCSIFADDR, &request))
        goto failed;
    inet_pton(AF_INET, "255.255.255.0", &address.sin_addr);
    memcpy(&request.ifr_netmask, &address, sizeof address);
    if (ioctl(fd, SIOCSIFNETMASK, &request))
        goto failed;
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    if (ioctl(fd, SIOCSIFFLAGS, &request))
        goto failed;
    inet_pton(AF_INET, server, &address.sin_addr);
    if (connect(fd, (struct sockaddr *)&address, sizeof address))
        goto failed;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    return fd;
failed:
    printf("GUEST problem: network: %s\n", strerror(errno));
    close(fd);
    return -1;
}

/* A datagram of this round comes back as it was; one that a move has lost is sent again. */
static int echoed(int server, unsigned long round, char *out, char *in)
{
    memset(out, (int)('A' + round % 26), 1400);
    snprintf(out, 1400, "round %lu", round);
    for (int tries = 0; tries < 20; tries++) {
        send(server, out, 1400, 0);
        while (recv(server, in, BLOCK, 0) == 1400)
            if (!memcmp(in, out, 1400))
                return 1;
    }
    return 0;
}

/* Whether the button is pressed within five minutes. */
static int pressed(int button)
{
    struct pollfd wait = {button, POLLIN, 0};
    struct input_event event;

    while (poll(&wait, 1, 300000) == 1 && read(button, &event, sizeof event) == sizeof event)
        if (event.type == EV_KEY && event.code == KEY_POWER && event.value == 1)
            return 1;
    return 0;
}

int main(void)
{
    static char _Alignas(BLOCK) out[BLOCK], in[BLOCK];

    setvbuf(stdout, NULL, _IOLBF, 0);
    mkdir("/sys", 0755);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    mount("sys", "/sys", "sysfs", 0, NULL);
    LOAD_ALL(MODULES);
    int disk = open_soon("/dev/vda", O_RDWR | O_DIRECT), random = open_soon("/dev/hwrng", O_RDONLY);
    int button = open_soon("/dev/input/event0", O_RDONLY);
    int console = open_soon("/dev/hvc0", O_RDWR | O_NOCTTY | O_NONBLOCK);
    int server = open_network("10.9.8.2", "10.9.8.1");
    say_bound();
    say_smbios();
    struct winsize size = {0};
    struct termios raw;
    if (!tcgetattr(console, &raw)) {
        cfmakeraw(&raw);
        tcsetattr(console, TCSANOW, &raw);
    }
    for (unsigned long round = 0; round < ROUNDS; round++) {
        unsigned char bytes[8] = {0};
        off_t at = (off_t)(round % 64) * BLOCK;
        memset(out, (int)('a' + round % 26), sizeof out);
        snprintf(out, sizeof out, "round %lu", round);
        int good = pwrite(disk, out, BLOCK, at) == BLOCK && !fsync(disk) && pread(disk, in, BLOCK, at) == BLOCK &&
                   !memcmp(in, out, BLOCK);
        int got = (int)read(random, bytes, sizeof bytes);
        int net = echoed(server, round, out, in);
        printf("GUEST round %lu disk %s rng %d net %s at %ld real %ld\n", round, good ? "good" : "bad", got,
               net ? "good" : "bad", milliseconds(CLOCK_MONOTONIC), milliseconds(CLOCK_REALTIME));
        dprintf(console, "CONSOLE round %lu\n", round);
        int typed = (int)read(console, in, BLOCK);
        if (typed > 0 && !ioctl(console, TIOCGWINSZ, &size))
            printf("GUEST typed %.*s on %d x %d\n", typed, in, size.ws_col, size.ws_row);
        tenth();
    }
    use_plugged(out, in);
    use_plugged(out, in);
    sync();
    printf("GUEST done\n");
    printf(pressed(button) ? "GUEST power button\n" : "GUEST problem: no power button\n");
    reboot(RB_POWER_OFF);
    return 1;
}
