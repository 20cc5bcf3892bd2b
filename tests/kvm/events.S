/* A guest that waits for the host: 'r' on COM1 when it is ready, 'N' for each NMI. It looks at COM1's input with
 * interrupts off; the first byte there lets it take interrupts. The GED's makes it read the register twice, each time a
 * digit, and power off. 64-bit (KVM's emulator has no 32-bit IRET), 4 GiB mapped one to one. Assembled by
 * test_guest_events.py. */
.section .note.Xen, "a", @note
.align 4
.long 4,4,18
.asciz "Xen"
.long start
.text
.globl start
.macro gate vector, handler
 mov $\handler, %eax
 mov %ax, idt + 16 * \vector
 movw $8, idt + 16 * \vector + 2
 movw $0x8e00, idt + 16 * \vector + 4
 shr $16, %eax
 mov %ax, idt + 16 * \vector + 6
.endm
.macro ioapic register, value
 movl $\register, 0xfec00000
 movl $\value, 0xfec00010
.endm
.macro say what
 mov \what, %al
 mov $0x3f8, %dx
 out %al, %dx
.endm
.code32
start:
 mov $stack, %esp
 gate 2, nmi
 gate 0x45, ged
 movl $pdpt + 3, pml4
 movl $pages + 0x0003, pdpt
 movl $pages + 0x1003, pdpt + 8
 movl $pages + 0x2003, pdpt + 16
 movl $pages + 0x3003, pdpt + 24
 mov $pages, %edi
 mov $0x83, %eax
1: mov %eax, (%edi)
 add $8, %edi
 add $0x200000, %eax
 jnc 1b
 movl $0x1ff, 0xfee000f0
 ioapic 0x2b, 0
 ioapic 0x2a, 0x45
 mov $0xff, %al
 out %al, $0x21
 out %al, $0xa1
 mov $0x20, %eax
 mov %eax, %cr4
 mov $pml4, %eax
 mov %eax, %cr3
 mov $0xc0000080, %ecx
 mov $0x100, %eax
 xor %edx, %edx
 wrmsr
 mov $0x80000011, %eax
 mov %eax, %cr0
 lgdt gdtr
 lidt idtr
 ljmp $8, $long
.code64
long:
 mov $16, %eax
 mov %eax, %ds
 mov %eax, %es
 mov %eax, %ss
 say $'r'
2: mov $0x3fd, %dx
 in %dx, %al
 test $1, %al
 jz 2b
3: sti
 hlt
 jmp 3b
nmi: push %rax
 push %rdx
 say $'N'
 pop %rdx
 pop %rax
 iretq
ged: mov $0xfed00000, %ebx
 mov (%rbx), %cl
 add $'0', %cl
 say %cl
 mov (%rbx), %cl
 add $'0', %cl
 say %cl
 mov $0xfee000b0, %ebx
 movl $0, (%rbx)
 mov $0x34, %al
 mov $0x600, %dx
 out %al, %dx
4: cli
 hlt
 jmp 4b
.align 8
gdt: .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdtr: .word 23
 .long gdt, 0
idtr: .word 0x46 * 16 - 1
 .long idt, 0
.bss
.align 4096
pml4: .skip 4096
pdpt: .skip 4096
pages: .skip 4 * 4096
idt: .skip 0x46 * 16
 .skip 4096
stack:
