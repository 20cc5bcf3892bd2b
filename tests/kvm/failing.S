/* A guest whose ring 0 executes, for ever, what KVM's emulator lacks: instructions that end, a run of them, and some that
 * raise an exception instead (its handlers go on at r15). A '.' on COM1 after each ROUND rounds; after its first one the
 * guest that is built with END executes an instruction of AVX-512, and says 'u' if that is undefined. It begins at a
 * bzImage's 64-bit entry. Assembled by test_failing_guest.py. */
.code64
.globl start
.macro gate vector, handler
 lea \handler(%rip), %rax
 mov %ax, idt + 16 * \vector(%rip)
 movw $0x10, idt + 16 * \vector + 2(%rip)
 movw $0x8e00, idt + 16 * \vector + 4(%rip)
 shr $16, %rax
 mov %ax, idt + 16 * \vector + 6(%rip)
.endm
.macro say what
 mov \what, %al
 mov $0x3f8, %dx
 out %al, %dx
.endm
.macro expect label
 lea \label(%rip), %r15
.endm
start:
.skip 0x200, 0xf4
 cli
 lea stack(%rip), %rsp
 mov $0x18, %eax
 mov %eax, %ds
 mov %eax, %es
 mov %eax, %ss
 gate 3, plain
 gate 6, undefined
 gate 13, with_error
 gate 14, with_error
 gate 19, plain
 lea idt(%rip), %rax
 mov %rax, idtr + 2(%rip)
 lidt idtr(%rip)
 mov %cr0, %rax
 and $~0xc, %eax
 or $0x22, %eax
 mov %rax, %cr0
 mov %cr4, %rax
 or $0x600, %eax
 mov %rax, %cr4
 mov $0xff, %al
 out %al, $0x21
 out %al, $0xa1
 lea data(%rip), %rsi
 mov $0xffff900000000000, %rdi
again:
 mov $ROUND, %ebx
1: expect 2f
 popcnt %eax, %ecx
2: expect 2f
 stac
2: expect 2f
 int3
2: expect 2f
 movaps 1(%rsi), %xmm0 /* out of line: #GP */
2: expect 2f
 paddd (%rdi), %xmm0 /* nothing there: #PF */
2: expect 2f
 .rept 16
 paddd %xmm0, %xmm1
 .endr
2: expect 2f
 lock cmpxchg16b 8(%rsi) /* out of line: #GP */
2: expect 2f
 ldmxcsr zero(%rip)
 divps %xmm2, %xmm2 /* 0 / 0, unmasked */
2: ldmxcsr masked(%rip)
 dec %ebx
 jnz 1b
 say $'.'
#ifdef END
 expect 3f
 .byte 0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1 /* vaddps %zmm1, %zmm0, %zmm0 */
3: say $'u'
#endif
 jmp again
undefined:
plain:
 mov %r15, (%rsp)
 iretq
with_error:
 add $8, %rsp
 mov %r15, (%rsp)
 iretq
.balign 16
zero: .long 0
masked: .long 0x1f80
idtr: .word 20 * 16 - 1
 .quad 0
.balign 16
data: .skip 64
idt: .skip 20 * 16
.skip 1024
stack:
