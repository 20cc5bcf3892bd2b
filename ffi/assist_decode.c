/* Length and operands of one instruction of 64-bit mode (Intel SDM volume 2, chapter 2). */
#include "assist.h"

#include <string.h>

static const uint8_t REGISTERS[16] = {0, 2, 3, 1, 6, 7, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15};

/* Of the general registers, by their number in instructions; struct kvm_regs has them as rax rbx rcx rdx rsi rdi rsp
 * rbp r8 ... */
uint64_t *tv_insn_register(struct kvm_regs *regs, unsigned number)
{
    return &((uint64_t *)regs)[REGISTERS[number & 15]];
}

static int take(struct tv_insn *insn, uint8_t *byte)
{
    if (insn->at >= insn->available)
        return -1;
    *byte = insn->bytes[insn->at++];
    return 0;
}

static int take_prefixes(struct tv_insn *insn)
{
    for (;;) {
        uint8_t byte;
        if (take(insn, &byte))
            return -1;
        switch (byte) {
        case 0xf2:
        case 0xf3:
            insn->rep = byte;
            continue;
        case 0x66:
            insn->opsize = 1;
            continue;
        case 0x67:
            insn->addr32 = 1;
            continue;
        case 0xf0:
            insn->lock = 1;
            continue;
        case 0x64:
        case 0x65:
            insn->segment = byte;
            continue;
        case 0x26:
        case 0x2e:
        case 0x36:
        case 0x3e:
            continue; /* without meaning in 64-bit mode */
        }
        insn->at--;
        return 0;
    }
}

static int take_vex(struct tv_insn *insn, uint8_t first)
{
    static const uint8_t REPS[4] = {0, 0, 0xf3, 0xf2};
    uint8_t one, two;
    if (insn->rep || insn->opsize || insn->lock || insn->rex || take(insn, &one))
        return -1;
    insn->vex_at = (uint8_t)(insn->at - 2);
    insn->vex = first;
    insn->rex = (uint8_t)(~one >> 5 & 4); /* R */
    insn->map = 1;
    two = one;
    if (first == 0xc4) {
        insn->rex |= (uint8_t)(~one >> 5 & 3); /* X, B */
        insn->map = one & 31;
        if (insn->map < 1 || insn->map > 3 || take(insn, &two))
            return -1;
        insn->rex |= (uint8_t)(two >> 4 & 8); /* W */
    }
    insn->vex_vvvv = (uint8_t)(~two >> 3 & 15);
    insn->vex_l = two >> 2 & 1;
    insn->opsize = (two & 3) == 1;
    insn->rep = REPS[two & 3];
    return 0;
}

static int take_opcode(struct tv_insn *insn)
{
    uint8_t byte;
    if (take_prefixes(insn) || take(insn, &byte))
        return -1;
    if ((byte & 0xf0) == 0x40) {
        insn->rex = byte & 15;
        insn->vex_at = (uint8_t)(insn->at - 1);
        if (take(insn, &byte))
            return -1;
        if (byte == 0xc4 || byte == 0xc5)
            return -1;
    } else if (byte == 0xc4 || byte == 0xc5) {
        if (take_vex(insn, byte) || take(insn, &byte))
            return -1;
        insn->opcode = byte;
        insn->opcode_at = (uint8_t)(insn->at - 1);
        return 0;
    }
    if (byte == 0x0f) {
        insn->map = 1;
        if (take(insn, &byte))
            return -1;
        if (byte == 0x38 || byte == 0x3a) {
            insn->map = byte == 0x38 ? 2 : 3;
            if (take(insn, &byte))
                return -1;
        }
    }
    insn->opcode = byte;
    insn->opcode_at = (uint8_t)(insn->at - 1);
    return 0;
}

static int has_modrm(const struct tv_insn *insn)
{
    if (insn->map == 0)
        return insn->opcode >= 0xd8 && insn->opcode <= 0xdf; /* x87; of the others none needs it here */
    return !(insn->map == 1 && insn->opcode == 0x77); /* EMMS, VZEROUPPER */
}

static int take_displacement(struct tv_insn *insn, uint32_t size, int64_t *value)
{
    int32_t wide = 0;
    if (insn->at + size > insn->available)
        return -1;
    memcpy(&wide, insn->bytes + insn->at, size);
    insn->at += size;
    *value = size == 1 ? (int8_t)wide : wide;
    return 0;
}

/* The memory operand's address, but for what is relative to RIP, which needs the length. */
static int take_address(struct tv_insn *insn, struct kvm_regs *regs, int *relative)
{
    uint8_t mod = insn->modrm >> 6, rm = insn->modrm & 7, sib = 0;
    uint64_t base = 0;
    int64_t displacement = 0;
    uint32_t size = mod == 1 ? 1 : mod == 2 ? 4 : 0;
    if (rm == 4) {
        if (take(insn, &sib))
            return -1;
        unsigned index = (sib >> 3 & 7u) | (insn->rex & 2u) << 2, from = (sib & 7u) | (insn->rex & 1u) << 3;
        if (index != 4)
            base = *tv_insn_register(regs, index) << (sib >> 6);
        if ((sib & 7) == 5 && mod == 0)
            size = 4;
        else
            base += *tv_insn_register(regs, from);
    } else if (rm == 5 && mod == 0) {
        *relative = 1;
        size = 4;
    } else {
        base = *tv_insn_register(regs, rm | (insn->rex & 1u) << 3);
    }
    if (size && take_displacement(insn, size, &displacement))
        return -1;
    insn->address = base + (uint64_t)displacement;
    return 0;
}

/* 0, or -1: these bytes are not wholly one instruction that is known here. */
int tv_insn_decode(struct tv_assist *assist)
{
    struct tv_insn *insn = &assist->insn;
    int relative = 0;
    if (take_opcode(insn))
        return -1;
    if (has_modrm(insn)) {
        insn->has_modrm = 1;
        insn->modrm_at = (uint8_t)insn->at;
        if (take(insn, &insn->modrm))
            return -1;
        insn->is_memory = insn->modrm >> 6 != 3;
        if (insn->is_memory && take_address(insn, &assist->regs, &relative))
            return -1;
    }
    insn->immediate = tv_assist_operand(insn).immediate;
    insn->length = insn->at + insn->immediate;
    if (insn->length > insn->available)
        return -1;
    if (relative)
        insn->address += assist->regs.rip + insn->length;
    if (insn->addr32)
        insn->address &= 0xffffffffu;
    if (insn->segment)
        insn->address += insn->segment == 0x64 ? assist->sregs.fs.base : assist->sregs.gs.base;
    return 0;
}
