#include "memory.h"

#include <string.h>

/* Copy into guest RAM and mark it dirty. 0, or -1 when the range is not inside one region. Any thread. */
int tv_memory_write(struct tv_memory *mem, uint64_t gpa, const uint8_t *from, uint64_t len)
{
    void *to = tv_ptr(mem, gpa, len);
    if (!to)
        return -1;
    memcpy(to, from, len);
    tv_mark_dirty(mem, gpa, len);
    return 0;
}

/* Copy out of guest RAM. 0, or -1 when the range is not inside one region. Any thread. */
int tv_memory_read(struct tv_memory *mem, uint64_t gpa, uint8_t *to, uint64_t len)
{
    void *from = tv_ptr(mem, gpa, len);
    if (!from)
        return -1;
    memcpy(to, from, len);
    return 0;
}
