/* What the harnesses share: numbered cases, random numbers, and how a finding is told.
 *
 * A harness is one ffi/fuzz/NAME.c with a main of its own, called with COUNT SEED [FIRST]. It calls fuzz_main, which
 * runs the cases FIRST .. FIRST + COUNT - 1; what a case does depends on the seed and its number alone, so one case can
 * be run again. Whatever breaks a promise is a finding: a sanitizer's report, FUZZ_CHECK, a crash, a case that does not
 * end. It is told with its number, and the exit code is 1. Otherwise the last line of stdout is a summary.
 *
 * Its head says, each on a line of its own, for `python -m trivmm.testing.fuzz`, which builds and runs it:
 *     links: ring.c worker.c      files of ffi/ that it is linked with (also `links: -lpthread`; several such lines)
 *     short: 20000                cases of a run of a second or two
 *     full: 1000000               cases of a thorough one
 */
#ifndef TV_FUZZ_H
#define TV_FUZZ_H
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define FUZZ_CASE_LIMIT_S 60 /* one case takes microseconds */

struct fuzz {
    uint64_t state;
    uint64_t number; /* of the case */
};

static uint64_t fuzz_number, fuzz_seed; /* of the case under way, for the handlers */

/* splitmix64 */
static inline uint64_t fuzz_next(struct fuzz *fuzz)
{
    uint64_t z = fuzz->state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

/* 0 .. below - 1 */
static inline uint64_t fuzz_below(struct fuzz *fuzz, uint64_t below)
{
    return below ? fuzz_next(fuzz) % below : 0;
}

static inline int fuzz_one_in(struct fuzz *fuzz, uint64_t many)
{
    return fuzz_below(fuzz, many) == 0;
}

static inline void fuzz_fill(struct fuzz *fuzz, void *to, size_t length)
{
    uint8_t *at = to;
    while (length) {
        uint64_t word = fuzz_next(fuzz);
        size_t part = length < sizeof word ? length : sizeof word;
        memcpy(at, &word, part);
        at += part;
        length -= part;
    }
}

/* Async-signal-safe. */
static inline void fuzz_tell_case(const char *what)
{
    char line[200];
    int length = snprintf(line, sizeof line, "finding: %s in case %llu of seed %llu\n", what,
                          (unsigned long long)fuzz_number, (unsigned long long)fuzz_seed);
    ssize_t written = write(STDERR_FILENO, line, (size_t)length);
    (void)written;
}

/* A promise of the code under test that does not hold. */
#define FUZZ_CHECK(holds)                                                                                              \
    do {                                                                                                               \
        if (!(holds)) {                                                                                                \
            fuzz_tell_case(__FILE__ ": " #holds);                                                                      \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)

/* Sanitizers abort (the runner sets abort_on_error), and an alarm ends a case that does not. */
static inline void fuzz_on_signal(int number)
{
    fuzz_tell_case(number == SIGALRM ? "no end" : number == SIGABRT ? "abort" : "signal");
    _exit(1);
}

/* `one` runs a case. `summarize` (or NULL) adds to the last line what the cases met with, so that a reader sees that
 * they reached what they are for. */
static inline int fuzz_main(int argc, char **argv, void (*one)(struct fuzz *fuzz),
                            void (*summarize)(char *into, size_t size))
{
    if (argc < 3 || argc > 4) {
        fprintf(stderr, "usage: %s COUNT SEED [FIRST]\n", argv[0]);
        return 2;
    }
    uint64_t count = strtoull(argv[1], NULL, 0), first = argc > 3 ? strtoull(argv[3], NULL, 0) : 0;
    char more[1024] = "";
    time_t told = 0;
    fuzz_seed = strtoull(argv[2], NULL, 0);
    signal(SIGABRT, fuzz_on_signal);
    signal(SIGALRM, fuzz_on_signal);
    for (uint64_t number = first; number < first + count; number++) {
        struct fuzz fuzz = {.state = fuzz_seed, .number = number};
        fuzz.state = fuzz_next(&fuzz) + number * 0xd1342543de82ef95ull;
        fuzz_number = number;
        alarm(FUZZ_CASE_LIMIT_S);
        one(&fuzz);
        if (time(NULL) != told) {
            told = time(NULL);
            printf("at %llu\n", (unsigned long long)(number - first));
            fflush(stdout);
        }
    }
    alarm(0);
    if (summarize)
        summarize(more, sizeof more);
    printf("%llu cases, no finding%s%s\n", (unsigned long long)count, *more ? ": " : "", more);
    return 0;
}

#endif
