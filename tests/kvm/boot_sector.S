/* A boot sector: what firmware has to give one. It says <boot> by INT 10h and on COM1, reads 32 KiB by INT 13h and sums
 * them (<read>), writes itself to sector 100 (<write>), waits for three ticks of the BIOS' clock (<tick>), and ends as
 * its byte `how` says. Where that is a reset, CMOS byte 0x50 tells the second boot from the first: <again>, and off.
 * Assembled by bootsector.py, which patches `sum` and `how`. */
.code16
.globl start
start:
 ljmp $0, $1f
1: xor %ax, %ax
 mov %ax, %ds
 mov %ax, %ss
 mov $0x7c00, %sp
 sti
 mov %dl, drive
 mov $0x0e2a, %ax
 mov $7, %bx
 int $0x10
 mov $boot, %si
 call say
 mov $from, %si
 mov $0x4200, %ax
 call disk
 mov $0x1000, %ax
 mov %ax, %ds
 xor %si, %si
 xor %bx, %bx
 mov $0x4000, %cx
2: lodsw
 add %ax, %bx
 loop 2b
 xor %ax, %ax
 mov %ax, %ds
 cmp %bx, sum
 jne bad
 mov $read, %si
 call say
 mov $to, %si
 mov $0x4300, %ax
 call disk
 mov $write, %si
 call say
 mov 0x46c, %cx
 add $3, %cx
3: hlt
 mov 0x46c, %bx
 sub %cx, %bx
 js 3b
 mov $tick, %si
 call say
 mov how, %al
 test %al, %al
 jz off
 mov $0x50, %al
 out %al, $0x70
 in $0x71, %al
 cmp $0xa5, %al
 mov $again, %si
 je 4f
 mov $0xa5, %al
 out %al, $0x71
 mov how, %al
 dec %al
 jz triple
 dec %al
 jz keyboard
 dec %al
 jz port
 mov $1, %al
 jmp acpi
4: call say
off: mov $0x34, %al
acpi: mov $0x600, %dx
 out %al, %dx
stop: hlt
 jmp stop
triple: cli /* in 32-bit mode: a KVM that emulates real mode tries there for ever */
 lgdt gdtr
 lidt nothing
 mov %cr0, %eax
 or $1, %al
 mov %eax, %cr0
 ljmp $8, $7f
.code32
7: ud2
.code16
keyboard: mov $0xfe, %al
 out %al, $0x64
 jmp stop
port: mov $0xcf9, %dx
 mov $2, %al
 out %al, %dx
 mov $6, %al
 out %al, %dx
 jmp stop
disk: mov drive, %dl
 int $0x13
 jc bad
 ret
bad: mov $wrong, %si
 call say
 jmp stop
say: mov $0x3f8, %dx
5: lodsb
 test %al, %al
 jz 6f
 out %al, %dx
 jmp 5b
6: ret
nothing: .word 0
 .long 0
gdtr: .word 15
 .long gdt
gdt: .quad 0, 0x00cf9b000000ffff
from: .word 16, 64, 0, 0x1000
 .quad 1
to: .word 16, 1, 0x7c00, 0
 .quad 100
boot: .asciz "<boot>"
read: .asciz "<read>"
write: .asciz "<write>"
tick: .asciz "<tick>"
again: .asciz "<again>"
wrong: .asciz "<wrong>"
drive: .byte 0
.org 505
how: .byte 0
sum: .word 0
.org 510
 .word 0xaa55
