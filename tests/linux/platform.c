/* The init of a Linux guest that is about its machine: says what SMBIOS told the kernel, and what the kernel complained
 * of; then it powers off or reboots, as its first argument says. */
#include "guest.h"

#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#define WARNING 4 /* of the kernel's log levels; what is below is worse */

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
    say_smbios();
    say_complaints();
    printf("GUEST done\n");
    fflush(stdout);
    sync();
    reboot(count > 1 && !strcmp(words[1], "again") ? RB_AUTOBOOT : RB_POWER_OFF);
    return 1;
}
