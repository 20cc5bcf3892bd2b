/* Calling code that another wrote, with all registers, and coming back from it whatever it does. */
#ifndef TV_ASSIST_CALL_H
#define TV_ASSIST_CALL_H
#include "assist.h"

#define TV_CODE_BYTES 4096

struct tv_frame {
    uint64_t registers[16]; /* by their number in instructions; 4, RSP, is not used */
    uint64_t flags;
    uint64_t code;
    uint32_t trapped; /* the vector, 0: it came to its end */
};

extern uint8_t tv_assist_back[]; /* where the code jumps to at its end */
void tv_assist_guard(void);
void tv_assist_guarded(struct tv_frame *frame);

#endif
