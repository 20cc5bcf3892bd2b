#include "crc32c.h"

#include <immintrin.h>
#include <string.h>

#include "memory.h"

/* Polynomials over GF(2) modulo P = 0x11edc6f41, in 32 bits, lowest power in the highest bit: the order in which the
 * CRC's register has them. */
#define POLYNOMIAL 0x82f63b78u
#define ONE 0x80000000u /* x^0 */
#define X 0x40000000u   /* x^1 */
#define WORDS (TV_PAGE_SIZE / 8)
#define LANES_MAX 128u /* pages of a lane that are joined in one step; longer ones take more steps */

static uint32_t table[8][256];
static uint32_t pages_on[LANES_MAX + 1]; /* x^(8 * 4096 * n): what moves a CRC on by n pages */
static uint64_t fold[17][2];             /* by n x 128 bits, see folding() */
static int best = TV_CRC_PORTABLE;

/* --- arithmetic ------------------------------------------------------------------------------------------------ */

static uint32_t times(uint32_t a, uint32_t b)
{
    uint32_t product = 0;
    for (uint32_t bit = ONE; bit; bit >>= 1) {
        product ^= b & -(uint32_t)!!(a & bit);
        b = (b >> 1) ^ (POLYNOMIAL & -(b & 1));
    }
    return product;
}

static uint32_t x_to_the(uint32_t power)
{
    uint32_t result = ONE, square = X;
    for (; power; power >>= 1) {
        if (power & 1)
            result = times(result, square);
        square = times(square, square);
    }
    return result;
}

/* Runs once, when the shared object is loaded: no thread can look at a half-made table. */
__attribute__((constructor)) static void prepare(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ (POLYNOMIAL & -(crc & 1));
        table[0][byte] = crc;
    }
    for (int slice = 1; slice < 8; slice++)
        for (uint32_t byte = 0; byte < 256; byte++)
            table[slice][byte] = (table[slice - 1][byte] >> 8) ^ table[0][table[slice - 1][byte] & 0xff];
    uint32_t one_page = x_to_the(8 * TV_PAGE_SIZE);
    pages_on[0] = ONE;
    for (uint32_t n = 1; n <= LANES_MAX; n++)
        pages_on[n] = times(pages_on[n - 1], one_page);
    for (uint32_t n = 1; n < 17; n++) {
        /* A product of reflected numbers lies one bit too low: the factor lies one higher instead. */
        fold[n][0] = (uint64_t)x_to_the(128 * n + 32) << 1;
        fold[n][1] = (uint64_t)x_to_the(128 * n - 32) << 1;
    }
    __builtin_cpu_init();
    if (__builtin_cpu_supports("sse4.2"))
        best = TV_CRC_SSE42;
    if (best == TV_CRC_SSE42 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("vpclmulqdq"))
        best = TV_CRC_AVX512;
}

/* --- kernels ---------------------------------------------------------------------------------------------------
 *
 * `crc` is the register, neither inverted on the way in nor out. What is copied goes through registers that an empty
 * asm statement has in its hands: the compiler can't read it twice, so the CRC is that of the copy. */

static uint32_t bytes_portable(uint32_t crc, const uint8_t *data, uint64_t length)
{
    while (length >= 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        word ^= crc;
        crc = 0;
        for (int slice = 0; slice < 8; slice++)
            crc ^= table[7 - slice][(word >> (8 * slice)) & 0xff];
        data += 8;
        length -= 8;
    }
    while (length--)
        crc = (crc >> 8) ^ table[0][(crc ^ *data++) & 0xff];
    return crc;
}

static uint32_t pages_portable(uint32_t crc, uint8_t *to, const uint8_t *const *pages, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *page = pages[i];
        if (to)
            page = memcpy(to + i * TV_PAGE_SIZE, page, TV_PAGE_SIZE);
        crc = bytes_portable(crc, page, TV_PAGE_SIZE);
    }
    return crc;
}

__attribute__((target("sse4.2"))) static uint32_t bytes_sse42(uint32_t crc, const uint8_t *data, uint64_t length)
{
    uint64_t wide = crc;
    while (length >= 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        wide = __builtin_ia32_crc32di(wide, word);
        data += 8;
        length -= 8;
    }
    uint32_t narrow = (uint32_t)wide;
    while (length--)
        narrow = __builtin_ia32_crc32qi(narrow, *data++);
    return narrow;
}

/* Three lanes side by side, each a third of the pages: the instruction takes three cycles, and one can begin in each.
 * Lanes are joined at their end: a lane's CRC moves on by what follows it. */
__attribute__((target("sse4.2"), always_inline)) static inline uint32_t
three_lanes(uint32_t crc, uint8_t *to, const uint8_t *const *pages, uint32_t count, int copies)
{
    while (count >= 3) {
        uint32_t each = count / 3 < LANES_MAX ? count / 3 : LANES_MAX;
        uint64_t a = crc, b = 0, c = 0;
        for (uint32_t i = 0; i < each; i++) {
            const uint64_t *from_a = (const uint64_t *)pages[i], *from_b = (const uint64_t *)pages[each + i],
                           *from_c = (const uint64_t *)pages[2 * each + i];
            uint64_t *to_a = (uint64_t *)(to + i * TV_PAGE_SIZE), *to_b = to_a + each * WORDS,
                     *to_c = to_b + each * WORDS;
            for (uint64_t word = 0; word < WORDS; word++) {
                uint64_t word_a = from_a[word], word_b = from_b[word], word_c = from_c[word];
                if (copies)
                    __asm__("" : "+r"(word_a), "+r"(word_b), "+r"(word_c)); /* read once: see above */
                a = __builtin_ia32_crc32di(a, word_a);
                b = __builtin_ia32_crc32di(b, word_b);
                c = __builtin_ia32_crc32di(c, word_c);
                if (copies) {
                    to_a[word] = word_a;
                    to_b[word] = word_b;
                    to_c[word] = word_c;
                }
            }
        }
        crc = times((uint32_t)a, pages_on[each]) ^ (uint32_t)b;
        crc = times(crc, pages_on[each]) ^ (uint32_t)c;
        pages += 3 * each;
        count -= 3 * each;
        if (copies)
            to += 3 * each * TV_PAGE_SIZE;
    }
    for (uint32_t i = 0; i < count; i++) {
        const uint8_t *page = pages[i];
        if (copies)
            page = memcpy(to + i * TV_PAGE_SIZE, page, TV_PAGE_SIZE);
        crc = bytes_sse42(crc, page, TV_PAGE_SIZE);
    }
    return crc;
}

__attribute__((target("sse4.2"))) static uint32_t pages_sse42(uint32_t crc, uint8_t *to, const uint8_t *const *pages,
                                                              uint32_t count)
{
    return to ? three_lanes(crc, to, pages, count, 1) : three_lanes(crc, NULL, pages, count, 0);
}

#define AVX512 __attribute__((target("avx512f,vpclmulqdq,pclmul,sse4.2")))

/* Move 128-bit lanes on by n x 128 bits and add what is there: congruent modulo P, and no longer than before. */
AVX512 static inline __m512i folded(__m512i sum, __m512i by, __m512i next)
{
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(sum, by, 0x00), _mm512_clmulepi64_epi128(sum, by, 0x11),
                                     next, 0x96 /* three-way XOR */);
}

AVX512 static inline __m128i folded_128(__m128i sum, uint32_t n, __m128i next)
{
    __m128i by = _mm_set_epi64x((long long)fold[n][1], (long long)fold[n][0]);
    return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(sum, by, 0x00), _mm_clmulepi64_si128(sum, by, 0x11)), next);
}

/* Folding, as in Intel's "Fast CRC computation using PCLMULQDQ": sixteen lanes of 128 bits each move on by 2048 bits
 * and add the next 2048, through all pages; at the end they are folded into one, whose CRC is that of the whole. */
AVX512 static uint32_t pages_avx512(uint32_t crc, uint8_t *to, const uint8_t *const *pages, uint32_t count)
{
    if (!count)
        return crc;
    __m512i by = _mm512_broadcast_i32x4(_mm_set_epi64x((long long)fold[16][1], (long long)fold[16][0]));
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    __m512i first = _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)crc)); /* the register goes into the first bytes */
    for (uint32_t i = 0; i < count; i++) {
        for (uint64_t offset = 0; offset < TV_PAGE_SIZE; offset += 256) {
            const __m512i *from = (const __m512i *)(pages[i] + offset);
            __m512i next_a = from[0], next_b = from[1], next_c = from[2], next_d = from[3];
            __asm__("" : "+v"(next_a), "+v"(next_b), "+v"(next_c), "+v"(next_d)); /* read once: see above */
            if (to) {
                __m512i *into = (__m512i *)(to + i * TV_PAGE_SIZE + offset);
                _mm512_store_si512(into, next_a);
                _mm512_store_si512(into + 1, next_b);
                _mm512_store_si512(into + 2, next_c);
                _mm512_store_si512(into + 3, next_d);
            }
            a = folded(a, by, _mm512_xor_si512(next_a, first));
            b = folded(b, by, next_b);
            c = folded(c, by, next_c);
            d = folded(d, by, next_d);
            first = _mm512_setzero_si512();
        }
    }
    __m128i lanes[16], sum = _mm_setzero_si128();
    memcpy(lanes, &a, 64);
    memcpy(lanes + 4, &b, 64);
    memcpy(lanes + 8, &c, 64);
    memcpy(lanes + 12, &d, 64);
    for (uint32_t i = 0; i < 15; i++)
        sum = folded_128(lanes[i], 15 - i, sum);
    sum = _mm_xor_si128(sum, lanes[15]);
    uint64_t low = (uint64_t)_mm_cvtsi128_si64(sum), high = (uint64_t)_mm_cvtsi128_si64(_mm_srli_si128(sum, 8));
    return (uint32_t)__builtin_ia32_crc32di(__builtin_ia32_crc32di(0, low), high);
}

/* --- what others call ------------------------------------------------------------------------------------------- */

/* The best kernel of this CPU. */
int tv_crc32c_kernel(void)
{
    return best;
}

/* `crc` is the CRC of what came before (0 at the start). Pure; any thread. */
uint32_t tv_crc32c(uint32_t crc, const uint8_t *data, uint64_t length)
{
    return ~(best >= TV_CRC_SSE42 ? bytes_sse42(~crc, data, length) : bytes_portable(~crc, data, length));
}

/* The CRC of `count` pages one after another, and with `to` (64-byte aligned) a copy of them, side by side. Pages are
 * 64-byte aligned. With a kernel that this CPU has not, the best that it has. Any thread. */
uint32_t tv_crc32c_by(int kernel, uint8_t *to, const uint8_t *const *pages, uint32_t count)
{
    switch (kernel < best ? kernel : best) {
    case TV_CRC_AVX512:
        return ~pages_avx512(~0u, to, pages, count);
    case TV_CRC_SSE42:
        return ~pages_sse42(~0u, to, pages, count);
    default:
        return ~pages_portable(~0u, to, pages, count);
    }
}

uint32_t tv_crc32c_pages(const uint8_t *const *pages, uint32_t count)
{
    return tv_crc32c_by(best, NULL, pages, count);
}

uint32_t tv_crc32c_copy(uint8_t *to, const uint8_t *const *pages, uint32_t count)
{
    return tv_crc32c_by(best, to, pages, count);
}
