/* What the inits of these guests share: modules of their own kernel, files that come, SMBIOS. A problem is a line that
 * begins with "GUEST problem". Each is compiled as one file with this in it, and uses what it needs. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define UNUSED __attribute__((unused))

UNUSED static void load(const char *name)
{
    char path[80];
    snprintf(path, sizeof path, "/modules/%s.ko", name);
    int fd = open(path, O_RDONLY);
    if (fd < 0)
        return; /* built into this kernel */
    if (syscall(SYS_finit_module, fd, "", 0) && errno != EEXIST)
        printf("GUEST problem: module %s: %s\n", name, strerror(errno));
    close(fd);
}

#define LOAD_ALL(names)                                              \
    do                                                               \
        for (unsigned n = 0; n < sizeof(names) / sizeof *(names); n++) \
            load((names)[n]);                                        \
    while (0)

UNUSED static void tenth(void)
{
    const struct timespec pause = {0, 100000000};
    nanosleep(&pause, NULL);
}

/* A device's node appears some time after its driver. */
UNUSED static int open_soon(const char *path, int flags)
{
    for (int tries = 0; tries < 100; tries++, tenth()) {
        int fd = open(path, flags);
        if (fd >= 0)
            return fd;
    }
    printf("GUEST problem: %s: %s\n", path, strerror(errno));
    return -1;
}

/* "GUEST dmi NAME: TEXT" for each, and "GUEST oem: TEXT" for each OEM string. /sys is mounted. */
UNUSED static void say_smbios(void)
{
    static const char *const NAMES[] = {
        "sys_vendor", "product_name", "product_version", "product_serial", "product_uuid", "product_sku",
        "product_family", "chassis_asset_tag",
    };
    static unsigned char table[1 << 16];
    for (size_t n = 0; n < sizeof NAMES / sizeof *NAMES; n++) {
        char path[64], text[256];
        snprintf(path, sizeof path, "/sys/class/dmi/id/%s", NAMES[n]);
        int fd = open(path, O_RDONLY);
        ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof text);
        printf("GUEST dmi %s: %.*s\n", NAMES[n], length > 0 ? (int)length - 1 : 0, text);
        close(fd);
    }
    /* Type 11, as dmidecode finds it: the kernel has no file for it. */
    int fd = open("/sys/firmware/dmi/tables/DMI", O_RDONLY);
    ssize_t size = fd < 0 ? 0 : read(fd, table, sizeof table - 2);
    for (unsigned char *at = table; at < table + size;) {
        unsigned char *text = at + at[1];
        for (; *text; text += strlen((char *)text) + 1)
            if (at[0] == 11)
                printf("GUEST oem: %s\n", text);
        at = text + (text == at + at[1] ? 2 : 1);
    }
    close(fd);
}
