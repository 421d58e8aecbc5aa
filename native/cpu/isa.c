/* isa.c - which kernels this CPU, this operating system and this build can run. */
#include "cpu.h"
#include "dots.h"
#include "roofs.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#ifdef KVS_HAVE_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum feature {
    F_AVX2 = 1,
    F_FMA = 2,
    F_F16C = 4,
    F_AVX512F = 8,
    F_AVX512BW = 16,
    F_AVX512VL = 32,
    F_AVX512DQ = 64,
    F_AVX512VNNI = 128,
    F_AVX512BF16 = 256,
    F_AMX_INT8 = 512,
    F_AMX_BF16 = 1024,
    NEED_AVX2 = F_AVX2 | F_FMA | F_F16C,
    NEED_AVX512 = NEED_AVX2 | F_AVX512F | F_AVX512BW | F_AVX512VL | F_AVX512DQ | F_AVX512VNNI,
    NEED_AMX = NEED_AVX512 | F_AMX_INT8
};
static const char *const feature_names[] = {"avx2",     "fma",        "f16c",       "avx512f",  "avx512bw", "avx512vl",
                                            "avx512dq", "avx512vnni", "avx512bf16", "amx_int8", "amx_bf16"};
enum { N_FEATURES = sizeof feature_names / sizeof *feature_names };

#ifdef KVS_HAVE_X86
/* What the operating system saves and restores: a CPU may have registers that its kernel knows nothing of. */
static uint32_t enabled_state(void) {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low;
}

static int32_t cpu_features(void) {
    uint32_t a, b, c, d, has = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 0; /* OSXSAVE */
    uint32_t state = enabled_state();
    bool ymm = (state & 0x6) == 0x6, zmm = (state & 0xe6) == 0xe6, tiles = (state & 0x60000) == 0x60000;
    if (!ymm) return 0;
    has |= (c >> 12 & 1 ? F_FMA : 0) | (c >> 29 & 1 ? F_F16C : 0);
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return (int32_t)has;
    has |= b >> 5 & 1 ? F_AVX2 : 0;
    if (zmm)
        has |= (b >> 16 & 1 ? F_AVX512F : 0) | (b >> 17 & 1 ? F_AVX512DQ : 0) | (b >> 30 & 1 ? F_AVX512BW : 0) |
               (b >> 31 & 1 ? F_AVX512VL : 0) | (c >> 11 & 1 ? F_AVX512VNNI : 0);
    if (tiles) has |= (d >> 24 & 1 ? F_AMX_INT8 : 0) | (d >> 22 & 1 ? F_AMX_BF16 : 0);
    if (zmm && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) has |= a >> 5 & 1 ? F_AVX512BF16 : 0;
    return (int32_t)has;
}

static void cpu_name(char name[64]) {
    uint32_t words[12];
    for (uint32_t i = 0; i < 3; i++) {
        uint32_t *w = words + 4 * i;
        if (!__get_cpuid(0x80000002 + i, &w[0], &w[1], &w[2], &w[3])) {
            strcpy(name, "unknown x86-64 CPU");
            return;
        }
    }
    char brand[49] = {0};
    memcpy(brand, words, 48);
    const char *p = brand;
    while (*p == ' ') p++;
    size_t n = strlen(p);
    while (n && p[n - 1] == ' ') n--;
    memcpy(name, p, n);
    name[n] = 0;
}
#else
static int32_t cpu_features(void) { return 0; }
static void cpu_name(char name[64]) { strcpy(name, "CPU without kernels of its own"); }
#endif

bool kvs_cpu_has(const char *feature) {
    for (int i = 0; i < N_FEATURES; i++)
        if (!strcmp(feature_names[i], feature)) return cpu_features() >> i & 1;
    return false;
}

/* The family of a processor by AMD; 0: it is somebody else's */
static uint32_t amd_family(void) {
#ifdef KVS_HAVE_X86
    uint32_t a, b, c, d;
    if (!__get_cpuid(0, &a, &b, &c, &d) || b != signature_AMD_ebx || !__get_cpuid(1, &a, &b, &c, &d)) return 0;
    return (a >> 8 & 15) + (a >> 20 & 255);
#else
    return 0;
#endif
}

/* Zen 5 asks memory for too little by itself: without this, stripes come at half of the bandwidth (SPEED.md). Zen 4 is slower with it. */
int64_t kvs_isa_ahead(void) { return amd_family() >= 0x1a ? 4096 : 0; }

/* Both kinds convert by AVX512-BF16. Intel's processors have its products for compatibility, at half the rate of float32's. */
static bool fast_bf16(bool tiles) {
#ifdef KVS_EMULATE_AMX
    const bool has_tiles = true;
#else
    const bool has_tiles = kvs_cpu_has("amx_bf16");
#endif
    return kvs_cpu_has("avx512bf16") && (tiles ? has_tiles : amd_family() != 0);
}

const kvs_bf16 *kvs_isa_bf16(const kvs_isa *isa) {
    return isa->dots->bf16 && fast_bf16(!strcmp(isa->name, "amx")) ? isa->dots->bf16 : NULL;
}

/* From the plainest to the best. */
static const struct {
    kvs_isa isa;
    int32_t need;
} table[] = {
    {{"base", &kvs_dots_base, &kvs_rowops_base, &kvs_roof_loops_base}, 0},
#ifdef KVS_HAVE_X86
    {{"avx2", &kvs_dots_avx2, &kvs_rowops_avx2, &kvs_roof_loops_avx2}, NEED_AVX2},
    {{"avx512", &kvs_dots_avx512, &kvs_rowops_avx512, &kvs_roof_loops_avx512}, NEED_AVX512},
#endif
#ifdef KVS_HAVE_AMX /* tiles for products of many rows, AVX-512 for the rest */
    {{"amx", &kvs_dots_amx, &kvs_rowops_avx512, &kvs_roof_loops_amx}, NEED_AMX},
#endif
};
enum { N_ISAS = sizeof table / sizeof *table };

static int32_t needed(int i, bool named) {
#ifdef KVS_EMULATE_AVX512 /* these kernels are AVX2 code underneath; only tests, by name, should meet them */
    if (named && table[i].need == NEED_AVX512) return NEED_AVX2;
#endif
#ifdef KVS_EMULATE_AMX /* plain C underneath */
    if (table[i].need == NEED_AMX) return named ? NEED_AVX512 : -1;
#endif
    (void)named;
    return table[i].need;
}

static void list_features(int32_t features, char *text, size_t size) {
    size_t n = 0;
    text[0] = 0;
    for (int i = 0; i < N_FEATURES && n < size; i++)
        if (features >> i & 1) n += (size_t)snprintf(text + n, size - n, "%s%s", n ? " " : "", feature_names[i]);
}

/* AMX's registers are given to processes that ask for them. */
static int ask_for_tiles(kvs_error *err) {
#if defined(__linux__) && defined(__x86_64__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18, NOT_ASKED = -1 };
    static _Atomic int answer = NOT_ASKED; /* of the whole process, once and for all */
    if (answer == NOT_ASKED) answer = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0 ? 0 : errno;
    if (answer == 0) return KVS_OK;
    return kvs_fail(err, KVS_E_DEVICE, "the kernel does not give this process the tile registers of AMX: %s", strerror(answer));
#else
    return kvs_fail(err, KVS_E_DEVICE, "this operating system gives no tile registers of AMX");
#endif
}

static int can_run(int i, bool named, kvs_error *err) {
    int32_t lacking = needed(i, named) & ~cpu_features();
    char text[160];
    list_features(lacking, text, sizeof text);
    if (lacking)
        return kvs_fail(err, KVS_E_DEVICE, "the kernels \"%s\" need %s, which this CPU or its operating system does not offer",
                        table[i].isa.name, text);
    return needed(i, named) & F_AMX_INT8 ? ask_for_tiles(err) : KVS_OK;
}

static const char *forced(void) {
    const char *name = getenv("KVS_CPU");
    return name && *name ? name : NULL;
}

const char *kvs_isa_why(void) { return forced() ? "forced by KVS_CPU" : "best of this CPU"; }

/* A list of them for people: a, b and c */
static void list_names(char *text, size_t size) {
    size_t n = 0;
    for (int i = 0; i < N_ISAS && n < size; i++)
        n += (size_t)snprintf(text + n, size - n, "%s%s", !i ? "" : i + 1 < N_ISAS ? ", " : " and ", table[i].isa.name);
}

int kvs_isa_choose(const char *name, const kvs_isa **out, kvs_error *err) {
    bool by_caller = name != NULL;
    if (!name) name = forced();
    *out = NULL;
    if (!name) {
        for (int i = 0; i < N_ISAS; i++)
            if (!can_run(i, false, NULL)) *out = &table[i].isa;
        return KVS_OK;
    }
    const char *source = by_caller ? "" : "KVS_CPU: ";
    for (int i = 0; i < N_ISAS; i++) {
        if (strcmp(table[i].isa.name, name)) continue;
        kvs_error why = {.struct_size = sizeof why};
        if (can_run(i, true, &why)) return kvs_fail(err, KVS_E_DEVICE, "%s%s", source, why.message);
        *out = &table[i].isa;
        return KVS_OK;
    }
    char text[64];
    list_names(text, sizeof text);
    return kvs_fail(err, KVS_E_DEVICE, "%sthere are no kernels \"%.32s\" in this build; it has %s", source, name, text);
}

int32_t kvs_cpu_info(char *text, int32_t size) {
    char name[64], features[160], line[640];
    kvs_error err = {.struct_size = sizeof err};
    const kvs_isa *isa;
    cpu_name(name);
    list_features(cpu_features(), features, sizeof features);
    int status = kvs_isa_choose(NULL, &isa, &err);
    int n = status ? snprintf(line, sizeof line, "%s; features: %s; kernels: none (%s)", name, features, err.message)
                   : snprintf(line, sizeof line, "%s; features: %s; kernels: %s (%s)", name, features[0] ? features : "none", isa->name,
                              kvs_isa_why());
    if (text && size > 0) snprintf(text, (size_t)size, "%s", line);
    return KVS_MIN(n, (int)sizeof line - 1);
}
