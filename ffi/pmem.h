/* virtio-pmem (virtio 1.2 section 5.19): the guest's stores go to the file's pages by themselves; a request says that
 * they are to reach its storage.
 *
 * A file that is mapped may become shorter, or its storage may fail: then a touch of the page is a SIGBUS, of the whole
 * process, where this process makes it (the soft CPU, a crash report). So mappings are *guarded*: there a page of zeros
 * takes the place of the one that is gone, and the range is lost, which whoever runs the guest looks at. KVM's own touch
 * is an EFAULT of KVM_RUN instead.
 *
 * Invariants
 *  - A range is guarded from before its first touch until after its last, and unmapped after that.
 *  - The handler uses system calls and atomics only; a signal that is not of a guarded range goes where it went before.
 */
#ifndef TV_PMEM_H
#define TV_PMEM_H
#include "worker.h"

#define TV_GUARDS 64 /* of a process: more devices than two PCI buses have slots */

struct tv_pmem {
    struct tv_worker worker;
    int fd;      /* flushed; -1: what the guest writes is not kept */
    /* Atomic: any thread may read them. */
    uint64_t flushes;
    uint64_t errors; /* flushes that failed, and requests that are none */
};

void tv_pmem_init(struct tv_pmem *pmem);
int tv_watch_file(int fd);
int tv_guard(void *start, uint64_t size);
int tv_guard_lost(int guard);
void tv_unguard(int guard);

#endif
