/* The init of a Linux guest that is about its machine: says what SMBIOS told the kernel, and what the kernel complained
 * of; then it powers off or reboots, as its first argument says. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define WARNING 4 /* of the kernel's log levels; what is below is worse */

static const char *const NAMES[] = {
    "sys_vendor", "product_name", "product_version", "product_serial", "product_uuid", "product_sku",
    "product_family", "chassis_asset_tag",
};

static void say_names(void)
{
    for (size_t n = 0; n < sizeof NAMES / sizeof *NAMES; n++) {
        char path[64], text[256];
        snprintf(path, sizeof path, "/sys/class/dmi/id/%s", NAMES[n]);
        int fd = open(path, O_RDONLY);
        ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof text);
        printf("GUEST dmi %s: %.*s\n", NAMES[n], length > 0 ? (int)length - 1 : 0, text);
        close(fd);
    }
}

/* Type 11, as dmidecode finds it: the kernel has no file for it. */
static void say_oem_strings(void)
{
    static unsigned char table[1 << 16];
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

/* A record of /dev/kmsg: "priority,sequence,time,flags;text\n", and more. */
static void say_complaints(void)
{
    char record[8192];
    unsigned priority;
    ssize_t length;
    mknod("/dev/kmsg", S_IFCHR | 0600, makedev(1, 11));
    int fd = open("/dev/kmsg", O_RDONLY | O_NONBLOCK);
    if (fd < 0)
        printf("GUEST problem: kmsg: %s\n", strerror(errno));
    while (fd >= 0 && (length = read(fd, record, sizeof record - 1)) > 0) {
        record[length] = 0;
        char *text = strchr(record, ';');
        if (text && sscanf(record, "%u", &priority) == 1 && (priority & 7) <= WARNING)
            printf("GUEST complaint %u: %.*s\n", priority & 7, (int)strcspn(text + 1, "\n"), text + 1);
    }
    close(fd);
}

int main(int count, char **words)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    mkdir("/sys", 0755);
    if (mount("sysfs", "/sys", "sysfs", 0, NULL))
        printf("GUEST problem: sysfs: %s\n", strerror(errno));
    say_names();
    say_oem_strings();
    say_complaints();
    printf("GUEST done\n");
    fflush(stdout);
    sync();
    reboot(count > 1 && !strcmp(words[1], "again") ? RB_AUTOBOOT : RB_POWER_OFF);
    return 1;
}
