#include "util.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

static void clear_error(kvs_error *err, int code) {
    uint32_t size = err->struct_size;
    memset(err, 0, sizeof *err);
    err->struct_size = size;
    err->code = code;
    err->offset = -1;
}

int kvs_fail(kvs_error *err, int code, const char *format, ...) {
    if (!err) return code;
    clear_error(err, code);
    va_list args;
    va_start(args, format);
    vsnprintf(err->message, sizeof err->message, format, args);
    va_end(args);
    return code;
}

/* Copies text that came from a file: control characters would reach somebody's terminal. */
static void copy_clean(char *dst, size_t size, const char *src) {
    size_t n = strlen(src);
    if (n >= size) src += n - size + 1; /* the end of a path says more than its beginning */
    size_t i = 0;
    for (; src[i] && i + 1 < size; i++) dst[i] = (unsigned char)src[i] < 32 || src[i] == 127 ? '?' : src[i];
    dst[i] = 0;
}

int kvs_fail_file(kvs_error *err, int code, const char *path, const char *what, int64_t offset, const char *format, ...) {
    if (!err) return code;
    clear_error(err, code);
    err->offset = offset;
    copy_clean(err->path, sizeof err->path, path ? path : "");
    copy_clean(err->what, sizeof err->what, what ? what : "");
    char reason[320];
    va_list args;
    va_start(args, format);
    vsnprintf(reason, sizeof reason, format, args);
    va_end(args);
    char clean[320];
    copy_clean(clean, sizeof clean, reason);
    int n = snprintf(err->message, sizeof err->message, "%s: %s%s%s", err->path, err->what, err->what[0] ? ": " : "", clean);
    if (offset >= 0 && code != KVS_E_IO && n > 0 && (size_t)n < sizeof err->message)
        snprintf(err->message + n, sizeof err->message - (size_t)n, " (at byte %lld)", (long long)offset);
    return code;
}

int kvs_fail_memory(kvs_error *err, uint64_t needed, const char *what) {
    kvs_fail(err, KVS_E_MEMORY, "out of memory: %.1f MiB needed for %s", (double)needed / 1048576.0, what);
    if (err) err->needed = needed;
    return KVS_E_MEMORY;
}

int kvs_fail_numeric(kvs_error *err, const char *where, float value, const char *reason) {
    kvs_fail(err, KVS_E_NUMERIC, "%s: %g: %s", where, (double)(value == value ? value : fabsf(value)), reason);
    if (err) snprintf(err->what, sizeof err->what, "%s", where);
    return KVS_E_NUMERIC;
}

#ifdef KVS_INJECT
#undef free
static int64_t calls, first_to_fail, looks, first_to_cancel, blocks;
static bool all_behind_fail;

static void *counted(void *block) {
    if (block) __atomic_add_fetch(&blocks, 1, __ATOMIC_RELAXED);
    return block;
}

static void uncount(const void *block) {
    if (block) __atomic_sub_fetch(&blocks, 1, __ATOMIC_RELAXED);
}

void kvs_counted_free(void *block) {
    uncount(block);
    free(block);
}

bool kvs_refused(void) {
    int64_t first = __atomic_load_n(&first_to_fail, __ATOMIC_RELAXED), call = __atomic_add_fetch(&calls, 1, __ATOMIC_RELAXED);
    bool refused = first && (call == first || (call > first && all_behind_fail));
    if (refused) errno = ENOMEM;
    return refused;
}

void kvs_test_fail_after(int64_t n, int32_t and_all_behind) {
    __atomic_store_n(&first_to_fail, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&calls, 0, __ATOMIC_RELAXED);
    all_behind_fail = and_all_behind;
    __atomic_store_n(&first_to_fail, n, __ATOMIC_RELAXED);
}

int64_t kvs_test_calls(void) { return __atomic_load_n(&calls, __ATOMIC_RELAXED); }

bool kvs_cancelled(const int32_t *flag) {
    if (!flag) return false;
    int64_t first = __atomic_load_n(&first_to_cancel, __ATOMIC_RELAXED), look = __atomic_add_fetch(&looks, 1, __ATOMIC_RELAXED);
    return __atomic_load_n(flag, __ATOMIC_RELAXED) != 0 || (first && look >= first);
}

void kvs_test_cancel_after(int64_t n) {
    __atomic_store_n(&first_to_cancel, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&looks, 0, __ATOMIC_RELAXED);
    __atomic_store_n(&first_to_cancel, n, __ATOMIC_RELAXED);
}

int64_t kvs_test_looks(void) { return __atomic_load_n(&looks, __ATOMIC_RELAXED); }

int64_t kvs_test_blocks(void) { return __atomic_load_n(&blocks, __ATOMIC_RELAXED); }
#else
static inline void *counted(void *block) { return block; }
static inline void uncount(const void *block) { (void)block; }
#endif

bool kvs_mul_u64(uint64_t a, uint64_t b, uint64_t *product) { return !__builtin_mul_overflow(a, b, product); }

void *kvs_calloc(uint64_t count, uint64_t size) {
    uint64_t bytes;
    if (!kvs_mul_u64(count, size, &bytes) || bytes > SIZE_MAX / 2) return NULL;
    return kvs_refused() ? NULL : counted(calloc(1, bytes ? (size_t)bytes : 1));
}

void *kvs_realloc(void *block, uint64_t count, uint64_t size) {
    uint64_t bytes;
    if (!kvs_mul_u64(count, size, &bytes) || bytes > SIZE_MAX / 2) return NULL;
    if (kvs_refused()) return NULL;
    void *grown = realloc(block, bytes ? (size_t)bytes : 1);
    return block ? grown : counted(grown);
}

/* A header of 64 bytes in front of the block remembers its length (0 means that it came from malloc), and as much again if the block
 * asked for huge pages. */
enum { ALIGNMENT = 64, MMAP_FROM = 1 << 20, HUGE_FROM = 4 << 20 };
static uint64_t huge_bytes;

void *kvs_calloc_aligned(uint64_t count, uint64_t size) {
    uint64_t bytes;
    if (!kvs_mul_u64(count, size, &bytes) || bytes > SIZE_MAX / 2 || kvs_refused()) return NULL;
    uint64_t total = bytes + ALIGNMENT;
    void *base = NULL;
    bool mapped = total >= MMAP_FROM;
    if (mapped) {
        base = mmap(NULL, (size_t)total, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED) return NULL;
    } else {
        if (posix_memalign(&base, ALIGNMENT, (size_t)total)) return NULL;
        memset(base, 0, (size_t)total);
    }
    *(uint64_t *)base = mapped ? total : 0;
    counted(base);
    return (char *)base + ALIGNMENT;
}

void kvs_free_aligned(void *block) {
    if (!block) return;
    void *base = (char *)block - ALIGNMENT;
    uint64_t total = *(uint64_t *)base;
    __atomic_sub_fetch(&huge_bytes, ((uint64_t *)base)[1], __ATOMIC_RELAXED);
    uncount(base);
    if (total)
        munmap(base, (size_t)total);
    else
        free(base);
}

void *kvs_calloc_huge(uint64_t bytes) {
    void *block = kvs_calloc_aligned(bytes, 1);
#ifdef MADV_HUGEPAGE
    if (!block || bytes < HUGE_FROM) return block;
    uint64_t *base = (uint64_t *)(void *)((char *)block - ALIGNMENT);
    if (!madvise(base, (size_t)base[0], MADV_HUGEPAGE)) base[1] = base[0]; /* a kernel without them says no */
    __atomic_add_fetch(&huge_bytes, base[1], __ATOMIC_RELAXED);
#endif
    return block;
}

uint64_t kvs_huge_bytes(void) { return __atomic_load_n(&huge_bytes, __ATOMIC_RELAXED); }

uint64_t kvs_hash(uint64_t seed, const void *data, uint64_t n) {
    const unsigned char *p = data;
    uint64_t h = seed ^ (n * 0x9E3779B97F4A7C15u);
    while (n >= 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        h = (h ^ word) * 0xD6E8FEB86659FD93u;
        h ^= h >> 32;
        p += 8, n -= 8;
    }
    uint64_t tail = 0;
    if (n) memcpy(&tail, p, (size_t)n);
    h = (h ^ tail) * 0xD6E8FEB86659FD93u;
    h ^= h >> 32;
    h *= 0xD6E8FEB86659FD93u;
    return h ^ (h >> 32);
}

double kvs_now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}
