/* The floor for activation cycles: a bare KVM_RUN loop around a guest that resets and activates a device for ever, whose
 * registers are a few variables. Prints cycles a second.
 *
 * gcc -O2 -o bare_cycles bare_cycles.c && ./bare_cycles CODE BAR COUNT
 * CODE is the guest (activation_floor.py makes it), entered at 1 MiB in 32-bit flat mode; a byte written to BAR + 0x14
 * that is 15 ends a cycle. */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define RAM (4u << 20)
#define CODE 0x100000

static int need(int result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(1);
    }
    return result;
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    uint64_t bar = strtoull(argv[2], NULL, 0);
    long count = atol(argv[3]), done = 0;
    int kvm = need(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
    int vm = need(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    need(ioctl(vm, KVM_SET_TSS_ADDR, 0xfef00000ul), "KVM_SET_TSS_ADDR");
    need(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
    uint8_t *ram = mmap(NULL, RAM, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (ram == MAP_FAILED)
        return 1;
    int file = need(open(argv[1], O_RDONLY), argv[1]);
    need((int)read(file, ram + CODE, 0x10000), "read");
    struct kvm_userspace_memory_region region = {.memory_size = RAM, .userspace_addr = (uintptr_t)ram};
    need(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
    int vcpu = need(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    int size = need(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    struct kvm_run *run = mmap(NULL, (size_t)size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (run == MAP_FAILED)
        return 1;
    struct kvm_sregs sregs;
    need(ioctl(vcpu, KVM_GET_SREGS, &sregs), "KVM_GET_SREGS");
    struct kvm_segment flat = {
        .limit = 0xffffffff, .selector = 0x10, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1};
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = flat;
    flat.selector = 8;
    flat.type = 11;
    sregs.cs = flat;
    sregs.cr0 = 0x11;
    need(ioctl(vcpu, KVM_SET_SREGS, &sregs), "KVM_SET_SREGS");
    struct kvm_regs regs = {.rip = CODE, .rflags = 2};
    need(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
    uint8_t status = 0;
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    while (done < count) {
        need(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
        if (run->exit_reason == KVM_EXIT_IO)
            continue; /* once, to switch the device on */
        if (run->exit_reason != KVM_EXIT_MMIO)
            return 1;
        int is_status = run->mmio.phys_addr == bar + 0x14;
        if (!run->mmio.is_write)
            memset(run->mmio.data, is_status ? status : 0, sizeof run->mmio.data);
        else if (is_status)
            done += (status = run->mmio.data[0]) == 15;
    }
    clock_gettime(CLOCK_MONOTONIC, &to);
    printf("%.0f\n", count / ((double)(to.tv_sec - from.tv_sec) + (double)(to.tv_nsec - from.tv_nsec) / 1e9));
    return 0;
}
