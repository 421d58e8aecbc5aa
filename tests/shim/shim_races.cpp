/* shim_races.cpp - see shim_races.h. Kernels are compiled with -fsanitize=thread, which calls a function before each access to memory; here are
 * these functions, in place of ThreadSanitizer's, which knows of no fibers, blocks or warps.
 *
 * What orders two accesses: they are by one thread; a barrier of their block came between them; a __syncwarp of their warp did; or different
 * launches. Atomics go with atomics. Of each byte the last write and the last two reads are known, so some races may be missed in one
 * order of threads and seen in another. */
#ifdef KVS_SHIM_RACES
#include "shim_races.h"

#include "shim_inside.h"

#include <unordered_map>
#include <vector>

typedef struct visit {
    uint32_t launch, block, phase; /* numbers that never come again; 0: there was none. phase: between two barriers of a block */
    uint32_t warp_phase;
    int32_t thread; /* in its block */
    bool atomic;
    const void *code;
} visit;

typedef struct cell { /* of a byte */
    visit write, reads[2];
    bool written; /* since it was allocated */
} cell;

enum { PAGE = 4096, THREADS = 1024, WARP = 32 };
typedef std::vector<cell> page;

static std::unordered_map<uintptr_t, page> pages; /* of what kernels came to */
static struct {
    const uint8_t *p;
    size_t bytes;
} shared[2]; /* of the block that runs */
static uint32_t launch, block, phase, warp_phases[THREADS / WARP];
static uint32_t chain;   /* the first launch of those that may run while this one has not waited: itself, or one that did not begin early */
bool kvs_shim_in_atomic; /* shim.h sets it */

static cell *cell_of(const uint8_t *p) {
    page &there = pages[(uintptr_t)p / PAGE];
    if (there.empty()) there.resize(PAGE);
    return &there[(uintptr_t)p % PAGE];
}

void kvs_races_launch(bool early) {
    launch++;
    if (!early) chain = launch;
}
void kvs_races_block(void *p, size_t bytes, void *statics, size_t statics_bytes) {
    shared[0] = {(const uint8_t *)p, bytes};
    shared[1] = {(const uint8_t *)statics, statics_bytes};
    block++;
    phase++;
    memset(warp_phases, 0, sizeof warp_phases);
}
void kvs_races_barrier(void) { phase++; }
void kvs_races_warp(int32_t warp) { warp_phases[warp]++; }

void kvs_races_device(const void *p, size_t bytes) {
    for (uintptr_t at = (uintptr_t)p / PAGE; at <= ((uintptr_t)p + bytes) / PAGE; at++) {
        auto found = pages.find(at);
        if (found == pages.end()) continue;
        if (at * PAGE >= (uintptr_t)p && (at + 1) * PAGE <= (uintptr_t)p + bytes) {
            pages.erase(found); /* a hundred times the memory that it stands for */
            continue;
        }
        for (uintptr_t i = 0; i < PAGE; i++)
            if (at * PAGE + i >= (uintptr_t)p && at * PAGE + i < (uintptr_t)p + bytes) found->second[i] = cell{};
    }
}
void kvs_races_written(const void *p, size_t bytes) {
    for (size_t i = 0; i < bytes; i++) cell_of((const uint8_t *)p + i)->written = true;
}

static bool is_shared(const uint8_t *p) {
    for (const auto &one : shared)
        if (p >= one.p && p < one.p + one.bytes) return true;
    return false;
}

static int32_t thread_now(void) {
    const uint3 &t = kvs_shim_self->index;
    const dim3 &dim = kvs_shim_self->block->dim;
    return (int32_t)(t.x + dim.x * (t.y + dim.y * t.z));
}

static bool ordered(const visit &before, const visit &now, bool of_block) {
    if (before.launch != now.launch || (before.atomic && now.atomic)) return true;
    if (before.block != now.block) return of_block; /* shared memory of another block is other memory */
    if (before.thread == now.thread || before.phase != now.phase) return true;
    return before.thread / WARP == now.thread / WARP && before.warp_phase != now.warp_phase;
}

[[noreturn]] static void tell(const char *what, const uint8_t *p, bool of_block, const visit &before, const visit &now) {
    const char *where = of_block ? "shared" : "device";
    if (before.launch != now.launch)
        kvs_shim_fatal("%s %s memory at %p that nobody has written (code %p)", what, where, (const void *)p, now.code);
    kvs_shim_fatal("%s %s memory at %p (code %p) where thread %d of %s block has been (code %p), and nothing orders them", what, where,
                   (const void *)p, now.code, before.thread, before.block == now.block ? "the same" : "another", before.code);
}

static void look(const uint8_t *p, const visit &now, bool writes, bool of_block) {
    cell *c = cell_of(p);
    if (!writes && (of_block ? c->write.block != now.block : !c->written)) tell("reads", p, of_block, visit{}, now);
    if (!ordered(c->write, now, of_block)) tell(writes ? "writes" : "reads", p, of_block, c->write, now);
    if (!writes) {
        if (c->reads[0].thread != now.thread || c->reads[0].block != now.block) c->reads[1] = c->reads[0];
        c->reads[0] = now;
        return;
    }
    for (const visit &read : c->reads)
        if (!ordered(read, now, of_block)) tell("writes", p, of_block, read, now);
    c->write = now;
    c->written = true;
}

/* By a thread that has not waited for the kernel in front */
static void look_early(const uint8_t *p, size_t bytes, bool writes, const void *code) {
    if (writes) kvs_shim_fatal("writes device memory at %p (code %p) before it has waited for the kernel in front", (const void *)p, code);
    for (size_t i = 0; i < bytes; i++)
        if (cell_of(p + i)->write.launch >= chain)
            kvs_shim_fatal("reads device memory at %p (code %p), which a kernel in front of it writes, before it has waited for that",
                           (const void *)(p + i), code);
}

static void note(const void *at, size_t bytes, bool writes, const void *code) {
    if (!kvs_shim_self) return; /* the host */
    const uint8_t *p = (const uint8_t *)at;
    const bool of_block = is_shared(p);
    if (!of_block && !kvs_shim_on_device(p)) return; /* a thread's own, or the shim's */
    if (!of_block && chain != launch && !kvs_shim_awaited()) look_early(p, bytes, writes, code);
    const int32_t thread = thread_now();
    const visit now = {launch, block, phase, warp_phases[thread / WARP], thread, kvs_shim_in_atomic, code};
    for (size_t i = 0; i < bytes; i++) look(p + i, now, writes, of_block);
}

void kvs_races_access(const void *p, size_t bytes, bool writes) { note(p, bytes, writes, __builtin_return_address(0)); }

/* ---- what the compiler calls ---- */

#define HOOK(name, bytes, writes)                                                                                                          \
    void name(void *p) { note(p, bytes, writes, __builtin_return_address(0)); }
extern "C" {
void __tsan_init(void) {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit(void) {}
void __tsan_vptr_update(void **, void *) {}
HOOK(__tsan_read1, 1, false)
HOOK(__tsan_read2, 2, false)
HOOK(__tsan_read4, 4, false)
HOOK(__tsan_read8, 8, false)
HOOK(__tsan_read16, 16, false)
HOOK(__tsan_write1, 1, true)
HOOK(__tsan_write2, 2, true)
HOOK(__tsan_write4, 4, true)
HOOK(__tsan_write8, 8, true)
HOOK(__tsan_write16, 16, true)
HOOK(__tsan_unaligned_read2, 2, false)
HOOK(__tsan_unaligned_read4, 4, false)
HOOK(__tsan_unaligned_read8, 8, false)
HOOK(__tsan_unaligned_read16, 16, false)
HOOK(__tsan_unaligned_write2, 2, true)
HOOK(__tsan_unaligned_write4, 4, true)
HOOK(__tsan_unaligned_write8, 8, true)
HOOK(__tsan_unaligned_write16, 16, true)
void __tsan_read_range(void *p, unsigned long bytes) { note(p, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void *p, unsigned long bytes) { note(p, bytes, true, __builtin_return_address(0)); }
/* of the host */
int __tsan_atomic32_load(const volatile int *p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
long __tsan_atomic64_load(const volatile long *p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
void __tsan_atomic64_store(volatile long *p, long value, int) { __atomic_store_n(p, value, __ATOMIC_SEQ_CST); }
}
#endif
