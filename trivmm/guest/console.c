/* COM1 by polling LSR.THRE, and the short list of problems that other CPUs report through CPU 0. */
#include "probe.h"

#define COM1 0x3f8
#define PROBLEMS 32

struct problem {
    const char *volatile what;
    uint64_t which, want, got;
};

static struct problem problems[PROBLEMS];
static volatile uint32_t problems_noted;
static uint32_t problems_printed;

static void put_char(char c)
{
    while (!(inb(COM1 + 5) & 0x20))
        pause();
    outb(COM1, (uint8_t)c);
}

void put(const char *text)
{
    while (*text)
        put_char(*text++);
}

void put_line(void)
{
    put_char('\n');
}

static void put_digits(uint64_t value, uint32_t base)
{
    char digits[24];
    int at = 0;
    do {
        digits[at++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    while (at)
        put_char(digits[--at]);
}

void put_number(const char *name, uint64_t value)
{
    put(name);
    put_digits(value, 10);
}

void put_hex(const char *name, uint64_t value)
{
    put(name);
    put("0x");
    put_digits(value, 16);
}

/* A key that somebody typed, or 0. */
int console_key(void)
{
    return inb(COM1 + 5) & 1 ? inb(COM1) : 0;
}

/* Any CPU. The first PROBLEMS are printed, all are counted elsewhere. */
void note_problem(const char *what, uint64_t which, uint64_t want, uint64_t got)
{
    uint32_t at = __atomic_fetch_add(&problems_noted, 1, __ATOMIC_SEQ_CST);
    if (at >= PROBLEMS)
        return;
    problems[at].which = which;
    problems[at].want = want;
    problems[at].got = got;
    barrier();
    problems[at].what = what;
}

/* CPU 0. */
void print_problems(void)
{
    while (problems_printed < PROBLEMS && problems[problems_printed].what) {
        struct problem *problem = &problems[problems_printed++];
        put("PROBE ");
        put(problem->what);
        put_number(" which=", problem->which);
        put_hex(" want=", problem->want);
        put_hex(" got=", problem->got);
        put_line();
    }
}

/* Ring 0, from traps.S. */
void exception_report(uint64_t vector, uint64_t code, uint64_t rip, uint64_t cr2)
{
    put_number("\nPROBE fail: vector=", vector);
    put_hex(" rip=", rip);
    put_hex(" code=", code);
    put_hex(" cr2=", cr2);
    put_line();
}
