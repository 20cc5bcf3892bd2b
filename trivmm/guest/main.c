/* The probe guest: tables (ring 0, once), command line, application processors, and the loop of each CPU. */
#include "driver.h"

#define TSS_SIZE (104 + 8192 + 8)
#define KSTACK_SIZE 0x1000
#define TRAMPOLINE 0x8000
#define LAPIC 0xfee00000ul
#define POWER_PORT 0x600
#define POWER_OFF 0x34

struct options options = {
    .cpus = 1, .beat_ms = 100, .report_ms = 1000, .tsc_khz = 2000000,
};
struct counters counters[MAX_CPUS];

extern uint8_t gdt[], idt[], tss[], kernel_stacks[], irq_stubs[], exception_stubs[], irq_spurious[];
extern uint8_t trampoline[], trampoline_end[];
extern uint64_t pdpt[], pdpt_high[];

static uint64_t page_directories[64][512] __attribute__((aligned(4096)));
static uint32_t directories_used;
static volatile uint32_t cpus_ready;
static volatile uint32_t go;
static uint64_t test_pages;

/* --- ring 0, CPU 0, once ---------------------------------------------------------------------------------------- */

static void gate(uint32_t vector, const uint8_t *handler, uint32_t dpl)
{
    uint64_t address = (uint64_t)handler;
    uint32_t *entry = (uint32_t *)(idt + 16 * vector);
    entry[0] = 0x08u << 16 | (address & 0xffff);
    entry[1] = (uint32_t)(address & 0xffff0000u) | 0x8e00u | dpl << 13;
    entry[2] = (uint32_t)(address >> 32);
}

void setup_tables(void)
{
    for (uint32_t vector = 0; vector < 32; vector++)
        gate(vector, exception_stubs + 16 * vector, 0);
    for (uint32_t vector = 32; vector < 256; vector++)
        gate(vector, irq_spurious, 0);
    for (uint32_t i = 0; i < IRQ_COUNT; i++)
        gate(IRQ_BASE + i, irq_stubs + 32 * i, 0);
    for (uint32_t cpu = 0; cpu < MAX_CPUS; cpu++) {
        uint8_t *at = tss + TSS_SIZE * cpu;
        uint64_t stack = (uint64_t)(kernel_stacks + KSTACK_SIZE * (cpu + 1));
        uint64_t base = (uint64_t)at, limit = TSS_SIZE - 1;
        *(uint32_t *)(at + 4) = (uint32_t)stack; /* rsp0 */
        *(uint32_t *)(at + 8) = (uint32_t)(stack >> 32);
        *(uint16_t *)(at + 102) = 104; /* the I/O bitmap, all zero: every port is ring 3's */
        at[104 + 8192] = 0xff;
        uint64_t *descriptor = (uint64_t *)(gdt + 0x40 + 16 * cpu);
        descriptor[0] = (limit & 0xffff) | (base & 0xffffff) << 16 | 0x89ull << 40 | (limit >> 16 & 0xf) << 48 |
                        (base >> 24 & 0xff) << 56;
        descriptor[1] = base >> 32;
    }
}

/* --- ring 3 ------------------------------------------------------------------------------------------------------ */

/* Map the 2 MiB around an address below 1 TiB (the low 4 GiB are mapped already). */
void *map_mmio(uint64_t address)
{
    if (address >> 32) {
        uint64_t *slot = &(address >> 39 ? pdpt_high : pdpt)[address >> 30 & 511];
        if (!*slot)
            *slot = (uint64_t)page_directories[directories_used++ % 64] | 7;
        uint64_t *directory = (uint64_t *)(*slot & ~0xfffull);
        directory[address >> 21 & 511] = (address & ~0x1fffffull) | 0x97; /* large, user, uncached */
        barrier();
    }
    return (void *)address;
}

static int starts(const char *text, const char *word)
{
    while (*word)
        if (*text++ != *word++)
            return 0;
    return 1;
}

static uint64_t number(const char *text)
{
    uint64_t value = 0;
    while (*text >= '0' && *text <= '9')
        value = value * 10 + (uint64_t)(*text++ - '0');
    return value;
}

static void take(const char *word, const struct word *known)
{
    for (; known && known->name; known++) {
        const char *value = word;
        if (!starts(word, known->name))
            continue;
        while (*value++ != '=')
            ;
        *known->value = (uint32_t)number(value);
    }
}

static void parse_word(const char *word)
{
    static const struct word words[] = {
        {"cpus=", &options.cpus},       {"rate=", &options.rate},           {"mem=", &options.mem_mib},
        {"beat=", &options.beat_ms},    {"report=", &options.report_ms},    {"once=", &options.once},
        {"window=", &options.window},   {"race=", &options.race},           {"corrupt=", &options.corrupt},
        {"reboot=", &options.reboot},   {"event_idx=", &options.event_idx}, {"indirect=", &options.indirect},
        {"keys=", &options.keys},       {NULL, NULL},
    };
    take(word, words);
    for (struct driver *const *each = drivers; *each; each++)
        take(word, (*each)->words);
    if (starts(word, "tsc_khz=") && number(word + 8))
        options.tsc_khz = number(word + 8);
    if (starts(word, "cycle=")) {
        for (const char *at = word + 6; *at && *at != ' '; at++)
            for (struct driver *const *each = drivers; *each; each++)
                (*each)->wanted |= starts(at, (*each)->name) && (at[-1] == '=' || at[-1] == ',');
    }
}

static void parse_cmdline(void)
{
    const char *text = (const char *)*(uint64_t *)(start_info + 24);
    while (text && *text) {
        while (*text == ' ')
            text++;
        if (*text)
            parse_word(text);
        while (*text && *text != ' ')
            text++;
    }
    if (!options.cpus || options.cpus > MAX_CPUS)
        options.cpus = 1;
    if (!options.beat_ms)
        options.beat_ms = 100;
    if (!options.report_ms)
        options.report_ms = 1000;
}

/* Bytes of RAM in the entry of the memory map that holds the test area. */
static uint64_t ram_end(void)
{
    uint64_t table = *(uint64_t *)(start_info + 40);
    uint32_t entries = *(uint32_t *)(start_info + 48);
    for (uint32_t i = 0; i < entries; i++) {
        uint64_t *entry = (uint64_t *)(table + 24ull * i);
        if ((uint32_t)entry[2] == 1 && entry[0] <= TEST_BASE && entry[0] + entry[1] > TEST_BASE)
            return entry[0] + entry[1];
    }
    return TEST_BASE;
}

static volatile uint32_t *lapic(uint32_t reg)
{
    return (volatile uint32_t *)(LAPIC + reg);
}

static void wait_ms(uint64_t ms)
{
    for (uint64_t until = rdtsc() + milliseconds(ms); rdtsc() < until;)
        pause();
}

static void send_ipi(uint32_t apic_id, uint32_t command)
{
    *lapic(0x310) = apic_id << 24;
    *lapic(0x300) = command;
    while (*lapic(0x300) & 1u << 12)
        pause();
}

static void start_cpus(void)
{
    volatile uint8_t *to = (volatile uint8_t *)TRAMPOLINE;
    for (uint64_t i = 0; i < (uint64_t)(trampoline_end - trampoline); i++)
        to[i] = trampoline[i];
    barrier();
    for (uint32_t cpu = 1; cpu < options.cpus; cpu++) {
        ap_index = cpu;
        barrier();
        send_ipi(cpu, 0x4500); /* INIT */
        wait_ms(10);
        uint64_t began = rdtsc();
        send_ipi(cpu, 0x4600 | TRAMPOLINE >> 12); /* SIPI */
        while (cpus_ready < cpu) {
            pause();
            if (rdtsc() - began > milliseconds(1000ull * STUCK_SECONDS)) {
                put_number("PROBE fail: no cpu ", cpu);
                put_line();
                options.cpus = cpu;
                return;
            }
        }
    }
}

static void power_off(void)
{
    put("PROBE off\n");
    outb(POWER_PORT, POWER_OFF);
}

static void report(uint64_t began, uint64_t beats, uint64_t gap)
{
    uint64_t dirtied = 0, checked = 0, errors = device_errors;
    for (uint32_t cpu = 0; cpu < options.cpus; cpu++) {
        dirtied += counters[cpu].dirtied;
        checked += counters[cpu].checked;
        errors += counters[cpu].errors;
    }
    print_problems();
    put_number("PROBE t=", (rdtsc() - began) / options.tsc_khz);
    put_number(" beats=", beats);
    put_number(" gap_ms=", gap / options.tsc_khz);
    put_number(" pages=", test_pages);
    put_number(" dirtied=", dirtied);
    put_number(" checked=", checked);
    put_number(" errors=", errors);
    put_number(" stuck=", requests_stuck);
    put_number(" needs_reset=", resets_needed);
    put_number(" raced=", resets_raced);
    for (struct driver *const *each = drivers; *each; each++)
        if ((*each)->wanted && (*each)->report)
            (*each)->report();
    put_line();
}

/* One key a report. With keys=1 all that was typed, which is shown as a terminal shows it: control keys with a caret. */
static int key_q(void)
{
    int key = console_key(), quit = key == 'q';
    if (!options.keys || !key)
        return quit;
    put("TYPED ");
    for (int shown = 0; key && shown < KEYS_A_REPORT; shown++) {
        quit |= key == 'q';
        char text[3] = {(char)key, 0, 0};
        if (key < 0x20)
            text[0] = '^', text[1] = (char)(key + '@');
        put(text);
        key = console_key();
    }
    put_line();
    return quit;
}

/* `done`: activations before the report, which has them all. */
static void leave_if_done(uint64_t done)
{
    if (key_q() || (options.once && done >= options.once))
        power_off();
    if (options.reboot && done >= options.reboot) {
        put("PROBE reboot\n");
        outb(0x64, 0xfe);
    }
}

static void drive_devices(void)
{
    for (struct driver *const *each = drivers; *each; each++)
        if ((*each)->wanted)
            (*each)->step();
}

static void disturb_devices(uint64_t now)
{
    for (struct driver *const *each = drivers; *each; each++)
        if ((*each)->wanted && (*each)->disturb)
            (*each)->disturb(now);
}

static void boss_loop(void)
{
    uint64_t began = rdtsc(), beat = began, reported = began, last = began, beats = 0, gap = 0;
    for (;;) {
        uint64_t now = rdtsc();
        if (now - last > gap)
            gap = now - last;
        last = now;
        if (now - beat >= milliseconds(options.beat_ms)) {
            beats++;
            beat = now;
        }
        memory_step(0, now);
        if (options.cpus == 1)
            drive_devices();
        else if (options.race)
            disturb_devices(now);
        if (now - reported >= milliseconds(options.report_ms)) {
            uint64_t done = activations;
            reported = now;
            barrier();
            report(began, beats, gap);
            leave_if_done(done);
        }
    }
}

void cpu_main(uint32_t cpu)
{
    if (cpu == 0) {
        parse_cmdline();
        uint64_t room = (ram_end() - TEST_BASE) / 4096;
        test_pages = options.mem_mib ? options.mem_mib * 256ull : room;
        if (test_pages > room)
            test_pages = room;
        for (struct driver *const *each = drivers; *each; each++)
            if ((*each)->wanted)
                (*each)->find();
        start_cpus();
        memory_start(0, options.cpus, test_pages);
        barrier();
        go = 1;
        while (options.cpus > 1 && cpus_ready < 2 * (options.cpus - 1))
            pause();
        put_number("PROBE ready cpus=", options.cpus);
        put_number(" pages=", test_pages);
        put_line();
        boss_loop();
    }
    __atomic_fetch_add(&cpus_ready, 1, __ATOMIC_SEQ_CST);
    while (!go)
        pause();
    memory_start(cpu, options.cpus, test_pages);
    __atomic_fetch_add(&cpus_ready, 1, __ATOMIC_SEQ_CST);
    for (;;) {
        memory_step(cpu, rdtsc());
        if (cpu == 1)
            drive_devices();
    }
}
