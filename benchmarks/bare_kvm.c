/* The floor for exits: a bare KVM_RUN loop around a guest that writes one port for ever. Prints exits per second.
 *
 * gcc -O2 -o bare_kvm bare_kvm.c && ./bare_kvm PORT COUNT
 * The guest and its entry state are those of exits.py: out imm8, al; jmp back, in 32-bit flat mode. */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

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
    if (argc != 3)
        return 2;
    int kvm = need(open("/dev/kvm", O_RDWR | O_CLOEXEC), "/dev/kvm");
    int vm = need(ioctl(kvm, KVM_CREATE_VM, 0), "KVM_CREATE_VM");
    need(ioctl(vm, KVM_SET_TSS_ADDR, 0xfef00000ul), "KVM_SET_TSS_ADDR");
    need(ioctl(vm, KVM_CREATE_IRQCHIP, 0), "KVM_CREATE_IRQCHIP");
    uint8_t *ram = mmap(NULL, 4 << 20, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (ram == MAP_FAILED)
        return 1;
    uint8_t code[] = {0xe6, (uint8_t)atoi(argv[1]), 0xeb, 0xfc};
    memcpy(ram + 0x100000, code, sizeof code);
    struct kvm_userspace_memory_region region = {.memory_size = 4 << 20, .userspace_addr = (uintptr_t)ram};
    need(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), "KVM_SET_USER_MEMORY_REGION");
    int vcpu = need(ioctl(vm, KVM_CREATE_VCPU, 0), "KVM_CREATE_VCPU");
    int size = need(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), "KVM_GET_VCPU_MMAP_SIZE");
    struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
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
    struct kvm_regs regs = {.rip = 0x100000, .rflags = 2};
    need(ioctl(vcpu, KVM_SET_REGS, &regs), "KVM_SET_REGS");
    long count = atol(argv[2]);
    struct timespec from, to;
    clock_gettime(CLOCK_MONOTONIC, &from);
    for (long i = 0; i < count; i++) {
        need(ioctl(vcpu, KVM_RUN, 0), "KVM_RUN");
        if (run->exit_reason != KVM_EXIT_IO)
            return 1;
    }
    clock_gettime(CLOCK_MONOTONIC, &to);
    printf("%.0f\n", count / (to.tv_sec - from.tv_sec + (to.tv_nsec - from.tv_nsec) / 1e9));
    return 0;
}
