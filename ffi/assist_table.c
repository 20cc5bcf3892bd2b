/* What assist_native.c may execute, and how large the one memory operand is (Intel SDM volume 2, the opcode maps).
 *
 * Not here, and so refused: what traps by design, reaches memory by a register that ModRM does not name (MASKMOV,
 * gathers, string instructions), changes control flow, needs ring 0, or is encoded with EVEX. */
#include "assist.h"

#define IN(kind_, size_) ((struct tv_operand){.kind = (kind_), .size = (uint8_t)(size_)})
#define OUT(kind_, size_) ((struct tv_operand){.kind = (kind_), .size = (uint8_t)(size_), .writes = 1})
#define NOTHING ((struct tv_operand){.kind = TV_ASSIST_NONE})
#define RAX 1u
#define RDX 4u
#define W(insn) ((insn)->rex & 8 ? 8 : 4)

static uint8_t vector_kind(const struct tv_insn *insn)
{
    return insn->vex ? TV_ASSIST_AVX : TV_ASSIST_SSE;
}

/* 16 or 32 bytes; 8 for an MMX instruction, which has neither prefix. */
static int width(const struct tv_insn *insn)
{
    return insn->vex_l ? 32 : 16;
}

/* No prefix and 66: packed; F3: a float; F2: a double. */
static int float_size(const struct tv_insn *insn)
{
    return insn->rep == 0xf3 ? 4 : insn->rep == 0xf2 ? 8 : width(insn);
}

static int mmx_or_packed(const struct tv_insn *insn)
{
    return insn->opsize ? width(insn) : 8;
}

static struct tv_operand with_immediate(struct tv_operand operand)
{
    operand.immediate = 1;
    return operand;
}

static struct tv_operand moves(const struct tv_insn *insn)
{
    uint8_t kind = vector_kind(insn);
    switch (insn->opcode) {
    case 0x10:
        return IN(kind, float_size(insn));
    case 0x11:
        return OUT(kind, float_size(insn));
    case 0x12:
        if (insn->rep == 0xf3)
            return IN(kind, width(insn));
        return IN(kind, insn->rep == 0xf2 && insn->vex_l ? 32 : 8);
    case 0x16:
        return insn->rep == 0xf3 ? IN(kind, width(insn)) : IN(kind, 8);
    case 0x13:
    case 0x17:
        return OUT(kind, 8);
    case 0x28:
        return IN(kind, width(insn));
    case 0x29:
        return OUT(kind, width(insn));
    case 0x2b:
        return insn->rep ? NOTHING : OUT(kind, width(insn)); /* with F2 and F3 AMD's SSE4A */
    case 0x6e:
        return IN(kind, W(insn));
    case 0x7e:
        return insn->rep == 0xf3 ? IN(kind, 8) : OUT(kind, W(insn));
    case 0x6f:
        if (insn->rep == 0xf3)
            return IN(kind, width(insn));
        return insn->opsize ? IN(kind, width(insn)) : IN(kind, 8);
    case 0x7f:
        if (insn->rep == 0xf3)
            return OUT(kind, width(insn));
        return insn->opsize ? OUT(kind, width(insn)) : OUT(kind, 8);
    case 0xd6:
        return insn->opsize ? OUT(kind, 8) : IN(kind, 8); /* F3, F2: between MMX and SSE */
    case 0xe7:
        return insn->opsize ? OUT(kind, width(insn)) : OUT(kind, 8);
    case 0xf0:
        return insn->rep == 0xf2 ? IN(kind, width(insn)) : NOTHING;
    }
    return NOTHING;
}

static struct tv_operand conversions(const struct tv_insn *insn)
{
    uint8_t kind = vector_kind(insn);
    switch (insn->opcode) {
    case 0x2a:
        return IN(kind, insn->rep ? W(insn) : 8);
    case 0x2c:
    case 0x2d:
        if (insn->rep)
            return IN(kind, insn->rep == 0xf3 ? 4 : 8);
        return insn->opsize ? IN(kind, 16) : IN(kind, 8);
    case 0x2e:
    case 0x2f:
        return IN(kind, insn->opsize ? 8 : 4);
    case 0x5a:
        if (insn->rep)
            return IN(kind, insn->rep == 0xf3 ? 4 : 8);
        return insn->opsize ? IN(kind, width(insn)) : IN(kind, width(insn) / 2);
    case 0xe6:
        return insn->rep == 0xf3 ? IN(kind, width(insn) / 2) : IN(kind, width(insn));
    }
    return NOTHING;
}

/* PSLLW and its like by a register: 16 bytes of count, whatever the width. */
static int is_shift(uint8_t opcode)
{
    return (opcode >= 0xd1 && opcode <= 0xd3) || (opcode >= 0xe1 && opcode <= 0xe2) ||
           (opcode >= 0xf1 && opcode <= 0xf3);
}

static struct tv_operand two_byte(const struct tv_insn *insn)
{
    uint8_t opcode = insn->opcode, kind = vector_kind(insn);
    switch (opcode) {
    case 0x14: case 0x15: case 0x51: case 0x52: case 0x53: case 0x54: case 0x55: case 0x56: case 0x57: case 0x58:
    case 0x59: case 0x5c: case 0x5d: case 0x5e: case 0x5f: case 0x7c: case 0x7d: case 0xd0:
        return IN(kind, opcode < 0x50 || opcode >= 0x7c ? width(insn) : float_size(insn));
    case 0x5b:
        return IN(kind, width(insn));
    case 0x2a: case 0x2c: case 0x2d: case 0x2e: case 0x2f: case 0x5a: case 0xe6:
        return conversions(insn);
    case 0x50: case 0xd7:
        return insn->is_memory ? NOTHING : IN(kind, 0);
    case 0x60: case 0x61: case 0x62:
        return IN(kind, insn->opsize ? width(insn) : 4);
    case 0x70: case 0xc6:
        if (opcode == 0x70 && !insn->rep && !insn->opsize)
            return with_immediate(IN(kind, 8));
        return with_immediate(IN(kind, width(insn)));
    case 0x71: case 0x72: case 0x73:
        return insn->is_memory ? NOTHING : with_immediate(IN(kind, 0));
    case 0x77:
        return IN(kind, 0);
    case 0xc2:
        return with_immediate(IN(kind, float_size(insn)));
    case 0xc4:
        return with_immediate(IN(kind, 2));
    case 0xc5:
        return insn->is_memory ? NOTHING : with_immediate(IN(kind, 0));
    case 0xb8: case 0xbc: case 0xbd: /* POPCNT, TZCNT, LZCNT */
        return insn->rep == 0xf3 && !insn->vex ? IN(TV_ASSIST_INTEGER, insn->rex & 8 ? 8 : insn->opsize ? 2 : 4) : NOTHING;
    case 0xc3: /* MOVNTI */
        return insn->rep || insn->vex || !insn->is_memory ? NOTHING : OUT(TV_ASSIST_INTEGER, W(insn));
    }
    struct tv_operand move = moves(insn);
    if (move.kind != TV_ASSIST_NONE || opcode == 0xf0)
        return move;
    if (is_shift(opcode))
        return IN(kind, insn->opsize ? 16 : 8);
    if ((opcode >= 0x63 && opcode <= 0x6d) || (opcode >= 0x74 && opcode <= 0x76) ||
        (opcode >= 0xd4 && opcode <= 0xfe && opcode != 0xf7))
        return IN(kind, mmx_or_packed(insn));
    return NOTHING;
}

/* BMI1, BMI2, ADX, MOVBE, CRC32: 0F38 F0 to F7. */
static struct tv_operand integers(const struct tv_insn *insn)
{
    int size = W(insn);
    struct tv_operand operand = NOTHING;
    switch (insn->opcode) {
    case 0xf0:
    case 0xf1:
        if (insn->vex)
            return NOTHING;
        if (insn->rep == 0xf2) /* CRC32 of a byte, or of the operand's width */
            return IN(TV_ASSIST_INTEGER, insn->opcode == 0xf0 ? 1 : insn->rex & 8 ? 8 : insn->opsize ? 2 : 4);
        size = insn->rex & 8 ? 8 : insn->opsize ? 2 : 4;
        if (!insn->is_memory)
            return NOTHING;
        return insn->opcode == 0xf0 ? IN(TV_ASSIST_INTEGER, size) : OUT(TV_ASSIST_INTEGER, size);
    case 0xf2:
    case 0xf3:
    case 0xf5:
    case 0xf7:
        return insn->vex && !insn->vex_l ? IN(TV_ASSIST_INTEGER, size) : NOTHING;
    case 0xf6:
        if (!insn->vex && (insn->rep == 0xf3 || insn->opsize))
            return IN(TV_ASSIST_INTEGER, size); /* ADOX, ADCX */
        if (!insn->vex || insn->rep != 0xf2 || insn->vex_l)
            return NOTHING;
        operand = IN(TV_ASSIST_INTEGER, size); /* MULX */
        operand.implicit = RDX;
        return operand;
    }
    return NOTHING;
}

static struct tv_operand three_byte_38(const struct tv_insn *insn)
{
    static const uint8_t WIDENED[6] = {2, 4, 8, 2, 4, 2}; /* PMOVSX, PMOVZX: the source is a part of the width */
    uint8_t opcode = insn->opcode, kind = vector_kind(insn);
    if (opcode >= 0xf0)
        return integers(insn);
    if (opcode >= 0xc8 && opcode <= 0xcd)
        return insn->vex ? NOTHING : IN(TV_ASSIST_SSE, 16); /* SHA */
    if (opcode <= 0x0b || (opcode >= 0x1c && opcode <= 0x1e))
        return IN(kind, mmx_or_packed(insn));
    if (!insn->opsize)
        return NOTHING;
    if ((opcode >= 0x20 && opcode <= 0x25) || (opcode >= 0x30 && opcode <= 0x35))
        return IN(kind, width(insn) / WIDENED[opcode & 7]);
    switch (opcode) {
    case 0x10: case 0x14: case 0x15: case 0x17: case 0x28: case 0x29: case 0x2a: case 0x2b: case 0x37: case 0x38:
    case 0x39: case 0x3a: case 0x3b: case 0x3c: case 0x3d: case 0x3e: case 0x3f: case 0x40: case 0x41: case 0xcf:
    case 0xdb: case 0xdc: case 0xdd: case 0xde: case 0xdf:
        return IN(kind, width(insn));
    }
    if (!insn->vex)
        return NOTHING;
    switch (opcode) {
    case 0x0c: case 0x0d: case 0x0e: case 0x0f: case 0x16: case 0x36: case 0x45: case 0x46: case 0x47:
        return IN(kind, width(insn));
    case 0x13:
        return IN(kind, width(insn) / 2);
    case 0x18: case 0x58:
        return IN(kind, 4);
    case 0x19: case 0x59:
        return IN(kind, 8);
    case 0x1a: case 0x5a:
        return insn->is_memory ? IN(kind, 16) : NOTHING;
    case 0x78:
        return IN(kind, 1);
    case 0x79:
        return IN(kind, 2);
    }
    if (opcode >= 0x96 && opcode <= 0xbf && (opcode & 15) >= 6) /* FMA: packed, or scalar where the last bit says so */
        return IN(kind, (opcode & 15) >= 8 && opcode & 1 && (opcode & 15) != 7 ? W(insn) : width(insn));
    return NOTHING;
}

static struct tv_operand three_byte_3a(const struct tv_insn *insn)
{
    uint8_t opcode = insn->opcode, kind = vector_kind(insn);
    if (opcode == 0xf0) /* RORX */
        return insn->vex && insn->rep == 0xf2 && !insn->vex_l ? with_immediate(IN(TV_ASSIST_INTEGER, W(insn))) : NOTHING;
    if (opcode == 0x0f)
        return with_immediate(IN(kind, mmx_or_packed(insn)));
    if (opcode == 0xcc)
        return insn->vex ? NOTHING : with_immediate(IN(TV_ASSIST_SSE, 16));
    if (!insn->opsize)
        return NOTHING;
    switch (opcode) {
    case 0x08: case 0x09: case 0x0c: case 0x0d: case 0x0e: case 0x40: case 0x41: case 0x42: case 0x44: case 0x60:
    case 0x61: case 0x62: case 0x63: case 0xce: case 0xcf: case 0xdf:
        return with_immediate(IN(kind, width(insn)));
    case 0x0a: case 0x21:
        return with_immediate(IN(kind, 4));
    case 0x0b:
        return with_immediate(IN(kind, 8));
    case 0x14:
        return with_immediate(OUT(kind, 1));
    case 0x15:
        return with_immediate(OUT(kind, 2));
    case 0x16:
        return with_immediate(OUT(kind, W(insn)));
    case 0x17:
        return with_immediate(OUT(kind, 4));
    case 0x20:
        return with_immediate(IN(kind, 1));
    case 0x22:
        return with_immediate(IN(kind, W(insn)));
    }
    if (!insn->vex)
        return NOTHING;
    switch (opcode) {
    case 0x00: case 0x01: case 0x02: case 0x04: case 0x05: case 0x06: case 0x46: case 0x4a: case 0x4b: case 0x4c:
        return with_immediate(IN(kind, width(insn)));
    case 0x18: case 0x38:
        return with_immediate(IN(kind, 16));
    case 0x19: case 0x39:
        return with_immediate(OUT(kind, 16));
    }
    return NOTHING;
}

/* D8 to DF with a memory operand, by opcode and the ModRM's middle bits; what stores is negative. FLDENV, FRSTOR and
 * their like are not here: their form depends on the mode. */
static struct tv_operand x87(const struct tv_insn *insn)
{
    static const int8_t SIZES[8][8] = {
        {4, 4, 4, 4, 4, 4, 4, 4},     {4, 0, -4, -4, 0, 2, 0, -2}, {4, 4, 4, 4, 4, 4, 4, 4},
        {4, -4, -4, -4, 0, 10, 0, -10}, {8, 8, 8, 8, 8, 8, 8, 8},  {8, -8, -8, -8, 0, 0, 0, -2},
        {2, 2, 2, 2, 2, 2, 2, 2},     {2, -2, -2, -2, 10, 8, -10, -8},
    };
    if (!insn->is_memory) /* FNSTSW AX is the one that writes a general register, and KVM has it */
        return insn->opcode == 0xdf && insn->modrm == 0xe0 ? NOTHING : IN(TV_ASSIST_X87, 0);
    int size = SIZES[insn->opcode & 7][insn->modrm >> 3 & 7];
    return size > 0 ? IN(TV_ASSIST_X87, size) : size < 0 ? OUT(TV_ASSIST_X87, -size) : NOTHING;
}

struct tv_operand tv_assist_operand(const struct tv_insn *insn)
{
    if (insn->lock)
        return NOTHING;
    switch (insn->map) {
    case 0:
        return insn->opcode >= 0xd8 && insn->opcode <= 0xdf ? x87(insn) : NOTHING;
    case 1:
        return two_byte(insn);
    case 2:
        return three_byte_38(insn);
    default:
        return three_byte_3a(insn);
    }
}
