/* A set of cluster numbers, at most two thirds full, in one allocation. Cluster 0 is never a member. */
#include "qcow2_image.h"

#include <errno.h>
#include <stdlib.h>

#define LEAST 256u

static uint64_t place(const struct qcow2_set *set, uint64_t key)
{
    return (key * 0x9e3779b97f4a7c15ull >> 20) & set->mask;
}

static uint64_t *find(const struct qcow2_set *set, uint64_t key)
{
    uint64_t at = place(set, key);
    while (set->keys[at] && set->keys[at] != key)
        at = (at + 1) & set->mask;
    return &set->keys[at];
}

static int grow(struct qcow2_set *set)
{
    struct qcow2_set wider = {.mask = set->keys ? set->mask * 2 + 1 : LEAST - 1, .used = set->used};
    wider.keys = calloc(wider.mask + 1, sizeof *wider.keys);
    if (!wider.keys)
        return -1;
    if (set->keys)
        for (uint64_t at = 0; at <= set->mask; at++)
            if (set->keys[at])
                *find(&wider, set->keys[at]) = set->keys[at];
    free(set->keys);
    *set = wider;
    return 0;
}

/* 1: it is a member now and was none before. 0: it was one. -1 with errno. */
int qcow2_set_add(struct qcow2_set *set, uint64_t cluster)
{
    if ((!set->keys || set->used * 3 >= set->mask * 2) && grow(set)) {
        errno = ENOMEM;
        return -1;
    }
    uint64_t *at = find(set, cluster);
    if (*at)
        return 0;
    *at = cluster;
    set->used++;
    return 1;
}

int qcow2_set_has(const struct qcow2_set *set, uint64_t cluster)
{
    return !cluster || (set->keys && *find(set, cluster));
}

/* What follows it moves up, so that no search ends early at the gap. */
void qcow2_set_drop(struct qcow2_set *set, uint64_t cluster)
{
    if (!set->keys || !cluster)
        return;
    uint64_t gap = (uint64_t)(find(set, cluster) - set->keys), at = gap;
    if (!set->keys[gap])
        return;
    for (;;) {
        at = (at + 1) & set->mask;
        if (!set->keys[at])
            break;
        uint64_t home = place(set, set->keys[at]);
        if (((at - home) & set->mask) >= ((at - gap) & set->mask)) {
            set->keys[gap] = set->keys[at];
            gap = at;
        }
    }
    set->keys[gap] = 0;
    set->used--;
}

void qcow2_set_free(struct qcow2_set *set)
{
    free(set->keys);
    memset(set, 0, sizeof *set);
}
