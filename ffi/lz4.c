#include "lz4.h"

#include <string.h>

#define NIBBLE 15u      /* a length of 15 goes on in the bytes that follow, until one is not 255 */
#define SHORTEST_MATCH 4u

struct input {
    const uint8_t *from;
    uint64_t at, length; /* at <= length, always */
};

/* The rest of a length whose nibble was 15, added to it. 0, or -1 at the end of the input. No overflow: a byte adds
 * at most 255, and there are fewer than 2^56 of them. */
static int long_length(struct input *in, uint64_t *value)
{
    uint8_t more;
    do {
        if (in->at == in->length)
            return -1;
        more = in->from[in->at++];
        *value += more;
    } while (more == 255);
    return 0;
}

int64_t tv_lz4_block(const uint8_t *from, uint64_t length, uint8_t *to, uint64_t room)
{
    struct input in = {from, 0, length};
    uint64_t made = 0; /* <= room, always */
    while (in.at < in.length) {
        uint8_t token = from[in.at++];
        uint64_t literals = token >> 4, match = token & NIBBLE;
        if (literals == NIBBLE && long_length(&in, &literals))
            return -1;
        if (literals > in.length - in.at || literals > room - made)
            return -1;
        memcpy(to + made, from + in.at, literals);
        in.at += literals;
        made += literals;
        if (in.at == in.length)
            return (int64_t)made; /* the last sequence has no match */
        if (in.length - in.at < 2)
            return -1;
        uint64_t offset = from[in.at] | (uint64_t)from[in.at + 1] << 8;
        in.at += 2;
        if (match == NIBBLE && long_length(&in, &match))
            return -1;
        match += SHORTEST_MATCH;
        if (!offset || offset > made || match > room - made)
            return -1;
        if (offset >= match) {
            memcpy(to + made, to + made - offset, match);
            made += match;
        } else { /* it reads what it writes: a repetition */
            for (uint64_t end = made + match; made < end; made++)
                to[made] = to[made - offset];
        }
    }
    return -1;
}
