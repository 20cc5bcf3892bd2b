/* One block of LZ4, unpacked: what is inside many distributions' kernels. Source: the LZ4 Block Format Description. */
#ifndef TV_LZ4_H
#define TV_LZ4_H
#include <stdint.h>

/* Unpack `length` bytes into at most `room`. Gives the bytes made, or -1 when it is no such block or `room` is too
 * little; then `to` holds anything. Any thread; reads and writes nothing outside of the two, whatever they hold. */
int64_t tv_lz4_block(const uint8_t *from, uint64_t length, uint8_t *to, uint64_t room);

#endif
