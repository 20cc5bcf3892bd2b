/* A hostile guest: each digit on COM1 is one attack that the VMM outlived; it ends by a triple fault, and is booted again. Assembled by
 * test_hostile_guest.py. 32-bit, no paging: disk 0 is slot 1 with its BAR at 0xc0000000. */
.section .note.Xen, "a", @note
.align 4
.long 4,4,18
.asciz "Xen"
.long start
.text
.code32
.globl start
# 32-bit, paging off: physical addresses. disk is slot 1 with BAR0 at 0xc0000000
.macro cfg reg, val
 mov $0x80000800 + \reg, %eax
 mov $0xcf8, %dx
 out %eax, %dx
 mov $\val, %eax
 mov $0xcfc, %dx
 out %eax, %dx
.endm
start:
 mov $stack, %esp
 # 1 BAR over RAM, over LAPIC, over itself, back
 cfg 0x10, 0x00100000
 cfg 0x10, 0xfee00000
 cfg 0x10, 0xfff80000
 cfg 0x10, 0xc0080000
 cfg 0x10, 0xc0000000
 cfg 4, 6
 mov $'1', %al
 mov $0x3f8, %dx
 out %al, %dx
 # 2 MSI-X enable at nonsense: find cap 0x11 by walking is skipped: enable all dwords 0x40..0xfc upper bits
 mov $0x40, %ebx
1: mov $0x80000800, %eax
 or %ebx, %eax
 mov $0xcf8, %dx
 out %eax, %dx
 mov $0xcfc, %dx
 in %dx, %eax
 cmp $0x11, %al
 jne 2f
 or $0x80000000, %eax
 out %eax, %dx
2: add $4, %ebx
 cmp $0x100, %ebx
 jb 1b
 movl $0x12345678, 0xc0008000
 movl $0xffffffff, 0xc0008004
 movl $0xffffffff, 0xc0008008
 movl $0, 0xc000800c
 movl $0xffffffff, 0xc0008010
 movl $0, 0xc000801c
 mov $'2', %al
 mov $0x3f8, %dx
 out %al, %dx
 # 3 device with queue addresses outside RAM
 movb $0, 0xc0000014
 movb $3, 0xc0000014
 movl $1, 0xc0000008
 movl $1, 0xc000000c
 movb $11, 0xc0000014
 movw $1, 0xc0000010   # config vector
 movw $0, 0xc0000016
 movw $0, 0xc0000018   # size 0
 movw $0xffff, 0xc0000018
 movw $0, 0xc000001a
 movl $0xfffffff0, 0xc0000020
 movl $0xffffffff, 0xc0000024
 movl $0xfffffffe, 0xc0000028
 movl $0xfffffffc, 0xc0000030
 movw $1, 0xc000001c
 movb $15, 0xc0000014
 movb 0xc0000014, %al
 add $'0'-64-15+10, %al
 mov $0x3f8, %dx
 out %al, %dx
 # notify storm
 mov $3000, %ecx
3: movw $0, 0xc0006000
 movl $0, 0xc0006ffc
 loop 3b
 movb $0, 0xc0000014
 mov $'3', %al
 mov $0x3f8, %dx
 out %al, %dx
 # 4 string I/O over all ports but the power one
 xor %edx, %edx
4: mov %edx, %eax
 and $0xfffc, %eax
 cmp $0x600, %eax
 je 5f
 cmp $0x64, %eax
 je 5f
 cmp $0x60, %eax
 je 5f
 mov $0x300000, %edi
 mov $3, %ecx
 rep insw
 mov $0x300000, %esi
 mov $2, %ecx
 cmp $0x3f8, %dx
 jb 6f
 cmp $0x400, %dx
 jb 5f
6: cmp $0xcf8, %dx
 jb 7f
 cmp $0xd00, %dx
 jb 5f
7: rep outsb
5: add $7, %edx
 cmp $0x10000, %edx
 jb 4b
 mov $'4', %al
 mov $0x3f8, %dx
 out %al, %dx
 # LAPIC off by register and by MSR
 movl $0xff, 0xfee000f0
 mov $0x1b, %ecx
 rdmsr
 and $~0x800, %eax
 wrmsr
 mov $'5', %al
 mov $0x3f8, %dx
 out %al, %dx
 lidt zero
 ud2
zero: .long 0,0,0
.bss
 .skip 4096
stack:
