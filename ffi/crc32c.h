/* CRC32C (Castagnoli, reflected 0x82f63b78, as in RFC 3720), of bytes and of pages that lie anywhere.
 *
 * A kernel is one way to compute it; they all give the same value, and the best one that this CPU has is chosen when
 * the shared object is loaded. Pages are read once: where they are copied too, the CRC is that of the very copy, also
 * when somebody writes the page meanwhile.
 */
#ifndef TV_CRC32C_H
#define TV_CRC32C_H
#include <stdint.h>

enum tv_crc_kernel {
    TV_CRC_PORTABLE = 0, /* tables, 8 bytes a step */
    TV_CRC_SSE42 = 1,    /* the CPU's crc32 instruction, three lanes side by side */
    TV_CRC_AVX512 = 2,   /* carry-less multiplication, 256 bytes a step */
};

int tv_crc32c_kernel(void);
uint32_t tv_crc32c(uint32_t crc, const uint8_t *data, uint64_t length);
uint32_t tv_crc32c_pages(const uint8_t *const *pages, uint32_t count);
uint32_t tv_crc32c_copy(uint8_t *to, const uint8_t *const *pages, uint32_t count);
uint32_t tv_crc32c_by(int kernel, uint8_t *to, const uint8_t *const *pages, uint32_t count);

#endif
