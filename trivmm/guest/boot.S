/* PVH entry (32-bit, paging off, EBX = start_info), application processors, and the way to ring 3.
 *
 * Ring 0 may be emulated instruction by instruction, so it is kept short: tables, then iretq. The identity map is
 * user-accessible and the TSS's I/O bitmap is all zero, so ring 3 can do everything else. */

#define CODE64 0x08
#define DATA64 0x10
#define USER_DATA 0x2b
#define USER_CODE 0x33
#define CODE32 0x38
#define TSS_FIRST 0x40
#define MAX_CPUS 8
#define STACK_SIZE 0x4000
#define KSTACK_SIZE 0x1000
#define TSS_SIZE (104 + 8192 + 8)
#define TRAMPOLINE 0x8000

    .section .note.Xen, "a", @note
    .align 4
    .long 4, 4, 18 /* XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .long pvh_entry

    .text
    .code32
    .globl pvh_entry
pvh_entry:
    cli
    cld
    mov %ebx, start_info
    mov $0xff, %al /* the 8259s stay silent */
    out %al, $0x21
    out %al, $0xa1
    /* four page directories of 2 MiB pages map the low 4 GiB; present, writable, user, large */
    mov $page_dirs, %edi
    mov $0x87, %eax
1:  mov %eax, (%edi)
    movl $0, 4(%edi)
    add $0x200000, %eax
    add $8, %edi
    cmp $page_dirs + 0x4000, %edi
    jne 1b
    movl $page_dirs + 0x0007, pdpt
    movl $page_dirs + 0x1007, pdpt + 8
    movl $page_dirs + 0x2007, pdpt + 16
    movl $page_dirs + 0x3007, pdpt + 24
    movl $pdpt + 7, pml4
    movl $pdpt_high + 7, pml4 + 8 /* 512 GiB to 1 TiB: 64-bit BARs, mapped on demand, as from 4 GiB on */
    xor %esi, %esi /* CPU 0 */
    jmp enter_long

/* ESI = CPU index, 32-bit protected mode. */
enter_long:
    mov %cr4, %eax
    or $0x20, %eax /* PAE */
    mov %eax, %cr4
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax /* LME */
    wrmsr
    mov %cr0, %eax
    or $0x80000001, %eax
    mov %eax, %cr0
    lgdt gdt_pointer
    ljmp $CODE64, $long_mode

    .code64
long_mode:
    mov $DATA64, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    xor %eax, %eax
    mov %eax, %fs
    mov %eax, %gs
    /* kernel stack: only interrupts use it */
    mov %esi, %eax
    inc %eax
    imul $KSTACK_SIZE, %eax, %eax
    lea kernel_stacks(%eax), %esp
    test %esi, %esi
    jnz 2f
    call setup_tables /* CPU 0 fills GDT, TSSs and IDT for everybody */
    xor %esi, %esi
2:  lidt idt_pointer
    mov %esi, %eax
    shl $4, %eax
    add $TSS_FIRST, %eax
    ltr %ax
    mov $0xfee00000, %eax
    movl $0x1ff, 0xf0(%rax) /* LAPIC: enabled, spurious vector 0xff */
    movl $0, 0x80(%rax)     /* TPR */
    /* to ring 3: ss rsp rflags cs rip */
    mov %esi, %eax
    inc %eax
    imul $STACK_SIZE, %eax, %eax
    lea user_stacks(%eax), %eax
    sub $8, %eax /* as after a call */
    pushq $USER_DATA
    pushq %rax
    pushq $0x3202 /* IF, IOPL 3 */
    pushq $USER_CODE
    mov $cpu_main, %eax
    pushq %rax
    mov %esi, %edi
    iretq

/* --- application processors ---------------------------------------------------------------------------------- */

    .code16
    .globl trampoline, trampoline_end
trampoline:
    cli
    xor %ax, %ax
    mov %ax, %ds
    lgdtl TRAMPOLINE + (trampoline_gdt - trampoline)
    mov %cr0, %eax
    or $1, %eax
    mov %eax, %cr0
    ljmpl $CODE32, $ap_protected
    .align 8
trampoline_gdt:
    .word gdt_end - gdt - 1
    .long gdt
trampoline_end:

    .code32
ap_protected:
    mov $DATA64, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov ap_index, %esi
    jmp enter_long

    .data
    .align 16
    .globl gdt, gdt_end
gdt:
    .quad 0
    .quad 0x00af9b000000ffff /* 0x08 ring-0 code, 64-bit */
    .quad 0x00cf93000000ffff /* 0x10 ring-0 data */
    .quad 0
    .quad 0
    .quad 0x00cff3000000ffff /* 0x28 ring-3 data */
    .quad 0x00affb000000ffff /* 0x30 ring-3 code, 64-bit */
    .quad 0x00cf9b000000ffff /* 0x38 ring-0 code, 32-bit */
    .fill 2 * MAX_CPUS, 8, 0 /* 0x40 … one TSS a CPU */
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
    .globl idt_pointer
idt_pointer:
    .word 256 * 16 - 1
    .quad idt
    .globl start_info, ap_index
    .align 8
start_info: .quad 0
ap_index: .long 0

    .bss
    .align 4096
    .globl pml4, pdpt, pdpt_high, idt, tss, kernel_stacks, user_stacks
pml4: .skip 4096
pdpt: .skip 4096
pdpt_high: .skip 4096
page_dirs: .skip 4 * 4096
idt: .skip 4096
tss: .skip MAX_CPUS * TSS_SIZE
    .align 4096
kernel_stacks: .skip MAX_CPUS * KSTACK_SIZE
user_stacks: .skip MAX_CPUS * STACK_SIZE
    .section .note.GNU-stack, "", @progbits
