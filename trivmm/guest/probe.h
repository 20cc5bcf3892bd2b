/* The probe guest's shared declarations. Freestanding: no libc, no SSE; runs in ring 3 with the identity map. */
#ifndef PROBE_H
#define PROBE_H
#include <stddef.h>
#include <stdint.h>

#define MAX_CPUS 8
#define IRQ_BASE 0x50
#define IRQ_COUNT 96
#define GENERATIONS 0x00800000ul /* the truth about each page: 7 MiB, enough for 7 GiB */
#define TEST_BASE 0x01000000ul
#define STUCK_SECONDS 30
#define KEYS_A_REPORT 64

struct options {
    uint32_t cpus, rate, mem_mib, beat_ms, report_ms, once, reboot;
    uint32_t window, race, corrupt, event_idx, indirect, keys;
    uint64_t tsc_khz;
};

struct counters {
    volatile uint64_t dirtied, checked, errors;
};

extern struct options options;
extern struct counters counters[MAX_CPUS];
extern volatile uint32_t irq_count[256];
extern volatile uint32_t ap_index;
extern uint64_t start_info;

/* main.c */
static inline uint64_t rdtsc(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}
static inline uint64_t milliseconds(uint64_t ms)
{
    return ms * options.tsc_khz;
}
static inline void outb(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port));
}
static inline uint8_t inb(uint16_t port)
{
    uint8_t value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline void outl(uint16_t port, uint32_t value)
{
    __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port));
}
static inline uint32_t inl(uint16_t port)
{
    uint32_t value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline void outw(uint16_t port, uint16_t value)
{
    __asm__ volatile("outw %0, %1" ::"a"(value), "Nd"(port));
}
static inline uint16_t inw(uint16_t port)
{
    uint16_t value;
    __asm__ volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline void pause(void)
{
    __asm__ volatile("pause" ::: "memory");
}
static inline void barrier(void)
{
    __asm__ volatile("mfence" ::: "memory");
}

/* console.c: CPU 0 only, except for say_error, which any CPU may call */
void put(const char *text);
void put_number(const char *name, uint64_t value);
void put_hex(const char *name, uint64_t value);
void put_line(void);
int console_key(void);
void note_problem(const char *what, uint64_t which, uint64_t want, uint64_t got);
void print_problems(void);

/* memory.c */
void memory_start(uint32_t cpu, uint32_t cpus, uint64_t pages);
void memory_step(uint32_t cpu, uint64_t now);

void *map_mmio(uint64_t address);

#endif
