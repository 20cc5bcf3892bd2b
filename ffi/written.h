/* Which pages of a mapping were written, by the kernel's own account: for a CPU that writes guest memory as any thread
 * of this process does, and so has no log of its own.
 *
 * How: userfaultfd write-protects every page of the mapping in its asynchronous mode (Linux 6.7). The first write to a
 * page takes the protection off inside the kernel: there is no message, and nobody to answer one. PAGEMAP_SCAN finds
 * the pages that have none, and protects them again in the same step, under the page table's lock: a write comes before
 * that and is reported, or after it and is found by the next scan.
 *
 * A page whose entry in the page table is gone altogether (swapped out, or its memory was given back) counts as written
 * where it had been, so that none is forgotten; too many may be found.
 *
 * Invariants
 *  - Writes through *this* mapping are seen, the kernel's on our behalf (a read(2) into it) too; those through another
 *    mapping of the file, or by write(2) to the file, are not.
 *  - The log of a mapping lasts as long as the descriptor of tv_written_open; closing that takes the protection off.
 */
#ifndef TV_WRITTEN_H
#define TV_WRITTEN_H
#include <stdint.h>

int tv_written_open(void);
int tv_written_watch(int uffd, uintptr_t start, uint64_t size);
int tv_written_take(int pagemap, uintptr_t start, uint64_t size, uint64_t *into);

#endif
