/* Interrupt and exception entries. Ring 0 is slow: an interrupt only counts and acknowledges. */

    .text
    .code64

/* device vectors from 0x50 on (IRQ_BASE, IRQ_COUNT): irq_count[vector]++, EOI */
    .altmacro
.macro irq_stub vector
    .globl irq_\vector
irq_\vector:
    lock incl irq_count + 4 * \vector
    push %rax
    mov $0xfee000b0, %eax /* the LAPIC's EOI register; the address zero-extends */
    movl $0, (%rax)
    pop %rax
    iretq
    .balign 32
.endm
    .balign 32
    .globl irq_stubs
irq_stubs:
.set v, 0x50
.rept 96
    irq_stub %v
.set v, v + 1
.endr

    .globl irq_spurious
irq_spurious:
    iretq

/* Exceptions: push vector and a uniform frame, tell, stop. */
.macro exception vector, has_code
    .balign 16
    .if \has_code == 0
    pushq $0
    .endif
    pushq $\vector
    jmp exception_common
.endm
    .balign 16
    .globl exception_stubs
exception_stubs:
.set v, 0
.rept 32
    .if v == 8 || (v >= 10 && v <= 14) || v == 17 || v == 21 || v == 29 || v == 30
    exception %v, 1
    .else
    exception %v, 0
    .endif
.set v, v + 1
.endr
    .balign 16
exception_common:
    pop %rdi        /* vector */
    pop %rsi        /* error code */
    mov (%rsp), %rdx /* rip */
    mov %cr2, %rcx
    call exception_report
1:  hlt
    jmp 1b

    .bss
    .align 64
    .globl irq_count
irq_count: .skip 4 * 256
    .section .note.GNU-stack, "", @progbits
