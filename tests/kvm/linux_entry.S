/* What a bzImage's 64-bit entry finds: it says its command line, its initramfs, the RSDP's signature, how many entries
 * the memory map has, and its code segment, each in angle brackets, and powers off. Lies at the image's preferred
 * address. Assembled by test_linux_entry.py. */
.code64
.globl start
start:
.skip 0x200, 0xf4
 lea stack(%rip), %rsp
 mov $0x18, %eax /* from the table that is there: none of the registers may be trusted otherwise */
 mov %eax, %ds
 mov %eax, %es
 mov %eax, %ss
 mov %rsi, %rbx
 cmpl $0x53726448, 0x202(%rbx)
 jne off
 mov 0x228(%rbx), %esi
 mov $-1, %ecx
 call say
 mov 0x218(%rbx), %esi
 mov 0x21c(%rbx), %ecx
 call say
 mov 0x70(%rbx), %rsi
 mov $8, %ecx
 call say
 mov 0x1e8(%rbx), %al
 add $'0', %al
 mov %al, digit(%rip)
 mov %cs, %eax
 shr $4, %eax
 add $'0', %al
 mov %al, digit + 1(%rip)
 lea digit(%rip), %rsi
 mov $2, %ecx
 call say
off: mov $0x34, %al
 mov $0x600, %dx
 out %al, %dx
1: hlt
 jmp 1b
say: mov $0x3f8, %dx
 mov $'<', %al
 out %al, %dx
2: test %ecx, %ecx
 jz 3f
 lodsb
 test %al, %al
 jz 3f
 out %al, %dx
 dec %ecx
 jmp 2b
3: mov $'>', %al
 out %al, %dx
 ret
digit: .byte 0, 0
.balign 16
.skip 256
stack:
