/* Guest memory by linear address, through the guest's own page tables (Intel SDM volume 3, chapter 4). */
#include "assist.h"

#include <string.h>

#define PRESENT 1ull
#define WRITABLE 2ull
#define USER 4ull
#define ACCESSED 0x20ull
#define DIRTY 0x40ull
#define LARGE 0x80ull
#define NO_EXECUTE (1ull << 63)
#define ADDRESS 0x000ffffffffff000ull
#define CR0_WP (1ull << 16)
#define CR4_LA57 (1ull << 12)
#define CR4_SMEP (1ull << 20)
#define CR4_SMAP (1ull << 21)
#define EFER_NXE (1ull << 11)
#define FLAG_AC (1ull << 18)
#define PAGE_FAULT 14
#define PROTECTION 13

/* -1, with the fault noted. `error` below 0: it has none. */
int tv_assist_raise(struct tv_assist *assist, uint8_t vector, int64_t error)
{
    assist->fault = (struct tv_exception){.vector = vector, .has_error = error >= 0};
    if (error >= 0)
        assist->fault.error = (uint32_t)error;
    assist->has_fault = 1;
    return -1;
}

static int page_fault(struct tv_assist *assist, uint64_t va, enum tv_access access, int user, int present)
{
    uint32_t error = (present ? 1u : 0u) | (access == TV_WRITE ? 2u : 0u) | (user ? 4u : 0u);
    if (access == TV_FETCH && (assist->sregs.efer & EFER_NXE || assist->sregs.cr4 & CR4_SMEP))
        error |= 16;
    tv_assist_raise(assist, PAGE_FAULT, error);
    assist->fault.cr2 = va;
    return -1;
}

/* Whether a leaf with the rights `rights` (AND of all levels but NX, which is OR) may be accessed so. */
static int allowed(const struct tv_assist *assist, uint64_t rights, enum tv_access access, int user)
{
    const struct kvm_sregs *sregs = &assist->sregs;
    if (access == TV_FETCH)
        return !(rights & NO_EXECUTE && sregs->efer & EFER_NXE) && (!user || rights & USER) &&
               (user || !(rights & USER) || !(sregs->cr4 & CR4_SMEP));
    if (user && !(rights & USER))
        return 0;
    if (!user && rights & USER && sregs->cr4 & CR4_SMAP && (assist->implicit || !(assist->regs.rflags & FLAG_AC)))
        return 0;
    return access != TV_WRITE || rights & WRITABLE || (!user && !(sregs->cr0 & CR0_WP));
}

/* Walks four or five levels of 64-bit mode, sets accessed and dirty bits. Entries are read once each, from wherever in
 * RAM the guest says; the level count bounds the walk. */
int tv_assist_translate(struct tv_assist *assist, uint64_t va, enum tv_access access, uint64_t *gpa)
{
    int user = !assist->implicit && (assist->sregs.cs.selector & 3) == 3;
    int top = assist->sregs.cr4 & CR4_LA57 ? 48 : 39;
    int64_t sign = (int64_t)va >> (top + 8);
    if (sign != 0 && sign != -1)
        return tv_assist_raise(assist, PROTECTION, 0);
    uint64_t table = assist->sregs.cr3 & ADDRESS, rights = WRITABLE | USER;
    for (int shift = top;; shift -= 9) {
        uint64_t at = table + (va >> shift & 511) * 8;
        uint64_t *entry = tv_ptr(assist->memory, at, 8);
        if (!entry)
            return -2;
        uint64_t seen = __atomic_load_n(entry, __ATOMIC_RELAXED);
        if (!(seen & PRESENT))
            return page_fault(assist, va, access, user, 0);
        rights = (rights & seen & (WRITABLE | USER)) | ((rights | seen) & NO_EXECUTE);
        int last = shift == 12 || (shift <= 30 && seen & LARGE);
        if (last && !allowed(assist, rights, access, user))
            return page_fault(assist, va, access, user, 1);
        uint64_t marks = ACCESSED | (last && access == TV_WRITE ? DIRTY : 0);
        if ((seen & marks) != marks) {
            __atomic_fetch_or(entry, marks, __ATOMIC_SEQ_CST);
            tv_mark_dirty(assist->memory, at, 8);
        }
        if (last) {
            uint64_t inside = (1ull << shift) - 1;
            *gpa = (seen & ADDRESS & ~inside) | (va & inside);
            return 0;
        }
        table = seen & ADDRESS;
    }
}

static uint32_t piece_of(uint64_t va, uint32_t length)
{
    uint32_t room = TV_PAGE_SIZE - (uint32_t)(va & (TV_PAGE_SIZE - 1));
    return length < room ? length : room;
}

/* Every page of it may be accessed and is RAM. */
int tv_assist_check(struct tv_assist *assist, uint64_t va, uint32_t length, enum tv_access access)
{
    for (uint32_t piece; length; va += piece, length -= piece) {
        uint64_t gpa;
        piece = piece_of(va, length);
        int problem = tv_assist_translate(assist, va, access, &gpa);
        if (problem)
            return problem;
        if (!tv_ptr(assist->memory, gpa, piece))
            return -2;
    }
    return 0;
}

int tv_assist_read(struct tv_assist *assist, uint64_t va, void *to, uint32_t length)
{
    uint8_t *into = to;
    for (uint32_t piece; length; va += piece, into += piece, length -= piece) {
        uint64_t gpa;
        piece = piece_of(va, length);
        int problem = tv_assist_translate(assist, va, TV_READ, &gpa);
        if (problem)
            return problem;
        const void *from = tv_ptr(assist->memory, gpa, piece);
        if (!from)
            return -2;
        memcpy(into, from, piece);
    }
    return 0;
}

/* All of it or nothing. */
int tv_assist_write(struct tv_assist *assist, uint64_t va, const void *from, uint32_t length)
{
    const uint8_t *next = from;
    int problem = tv_assist_check(assist, va, length, TV_WRITE);
    if (problem)
        return problem;
    for (uint32_t piece; length; va += piece, next += piece, length -= piece) {
        uint64_t gpa;
        piece = piece_of(va, length);
        problem = tv_assist_translate(assist, va, TV_WRITE, &gpa);
        if (problem) /* another vCPU has changed the tables since */
            return problem;
        if (tv_memory_write(assist->memory, gpa, next, piece))
            return -2;
    }
    return 0;
}
