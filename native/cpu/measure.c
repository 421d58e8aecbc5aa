/* measure.c - the loops of roofs.h on a pool of threads, for a while. */
#include "../measure.h"

#include "cpu.h"
#include "roofs.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* A thread looks at the clock after each piece: short against a measurement, long against the look. */
enum { HUGE_PAGE = 2 << 20, PIECE_BYTES = 1 << 20 };
#define PIECE_SECONDS 20e-6

typedef struct cpu_roofs {
    kvs_roofs base;
    kvs_pool *pool;
    const kvs_isa *isa;
    int64_t span;      /* bytes that one thread reads */
    int64_t ahead;     /* kvs_isa_ahead() */
    uint8_t *pages[2]; /* mapped when they are first read: by kvs_roof, ordinary and huge */
} cpu_roofs;

typedef struct measurement {
    const cpu_roofs *roofs;
    const kvs_roof_loop *loop;
    uint8_t *buffer;
    double until;
    _Atomic int64_t done;  /* bytes or operations */
    _Atomic uint64_t sink; /* what a loop gives, so that it counts as needed */
} measurement;

/* ---- memory ---- */

static int64_t mapped_bytes(const cpu_roofs *r) { return r->span * kvs_pool_threads(r->pool) + HUGE_PAGE; }

static uint8_t *first_whole(uint8_t *base) { return (uint8_t *)(((uintptr_t)base + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE); }

/* Each thread touches what it will read. Not zeros: pages that were only read would all be the kernel's one page of zeros. */
static void touch(void *arg, int64_t begin, int64_t end, int32_t thread) {
    measurement *m = arg;
    (void)thread;
    memset(m->buffer + begin * m->roofs->span, 1, (size_t)((end - begin) * m->roofs->span));
}

static int map_pages(cpu_roofs *r, int32_t kind, kvs_error *err) {
    if (r->pages[kind]) return KVS_OK;
    size_t bytes = (size_t)mapped_bytes(r);
    void *base = kvs_refused() ? MAP_FAILED : mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return kvs_fail_memory(err, bytes, "a buffer to read");
#if defined(MADV_HUGEPAGE) && defined(MADV_NOHUGEPAGE)
    madvise(base, bytes,
            kind == KVS_ROOF_READ_HUGE ? MADV_HUGEPAGE : MADV_NOHUGEPAGE); /* a kernel without them says no: then both are alike */
#endif
    r->pages[kind] = base;
    measurement m = {.roofs = r, .buffer = first_whole(base)};
    kvs_pool_run(r->pool, touch, &m, kvs_pool_threads(r->pool), 1, NULL);
    return KVS_OK;
}

/* ---- loops ---- */

static void read_span(void *arg, int64_t begin, int64_t end, int32_t thread) {
    measurement *m = arg;
    const cpu_roofs *r = m->roofs;
    const uint8_t *span = m->buffer + begin * r->span;
    uint64_t all = 0;
    int64_t at = 0, done = 0;
    (void)thread, (void)end;
    do { /* once at least: on a busy machine the time may be over before a thread begins, and no roof is 0 */
        all ^= r->isa->roofs->read((const uint64_t *)(span + at), PIECE_BYTES / 8, r->ahead);
        done += PIECE_BYTES;
        at = (at + PIECE_BYTES) % r->span;
    } while (kvs_now() < m->until);
    m->sink = all;
    m->done += done;
}

static void run_rounds(void *arg, int64_t begin, int64_t end, int32_t thread) {
    measurement *m = arg;
    float all = 0;
    int64_t done = 0, rounds = 64;
    (void)begin, (void)end, (void)thread;
    double before, now = kvs_now();
    do {
        all += m->loop->run(rounds);
        done += rounds * m->loop->operations;
        before = now;
        now = kvs_now();
        if (now - before < PIECE_SECONDS) rounds *= 2;
    } while (now < m->until);
    m->sink = all > 0;
    m->done += done;
}

/* ---- the handle ---- */

static void close_roofs(kvs_roofs *roofs) {
    cpu_roofs *r = (cpu_roofs *)roofs;
    for (int i = 0; i < 2; i++)
        if (r->pages[i]) munmap(r->pages[i], (size_t)mapped_bytes(r));
    kvs_pool_free(r->pool);
    free(r);
}

static int find_loop(const cpu_roofs *r, int32_t kind, const kvs_roof_loop **out, kvs_error *err) {
    const kvs_roof_loop *loop = &r->isa->roofs->loops[kind];
    if (!loop->operations) return kvs_fail(err, KVS_E_DEVICE, "the kernels %s of this build have no unit of this kind", r->isa->name);
    if (loop->feature && !kvs_cpu_has(loop->feature))
        return kvs_fail(err, KVS_E_DEVICE, "this CPU, or its operating system, does not offer %s", loop->feature);
    *out = loop;
    return KVS_OK;
}

static int measure(kvs_roofs *roofs, int32_t kind, double seconds, double *per_second, kvs_error *err) {
    cpu_roofs *r = (cpu_roofs *)roofs;
    bool reads = kind == KVS_ROOF_READ || kind == KVS_ROOF_READ_HUGE;
    measurement m = {.roofs = r};
    int status = reads ? map_pages(r, kind, err) : find_loop(r, kind, &m.loop, err);
    if (status) return status;
    if (reads) m.buffer = first_whole(r->pages[kind]);
    double begin = kvs_now();
    m.until = begin + seconds;
    kvs_pool_run(r->pool, reads ? read_span : run_rounds, &m, kvs_pool_threads(r->pool), 1, NULL);
    *per_second = (double)m.done / (kvs_now() - begin);
    return KVS_OK;
}

int kvs_cpu_roofs_open(int32_t threads, int64_t bytes, kvs_roofs **out, kvs_error *err) {
    static const kvs_roofs_ops ops = {.free = close_roofs, .measure = measure};
    cpu_roofs *r = kvs_calloc(1, sizeof *r);
    if (!r) return kvs_fail_memory(err, sizeof *r, "a measurement");
    int status = kvs_isa_choose(NULL, &r->isa, err);
    if (!status) status = kvs_pool_new(threads ? threads : kvs_pool_default_threads(), &r->pool, err);
    if (status) {
        free(r);
        return status;
    }
    int64_t share = (bytes + kvs_pool_threads(r->pool) - 1) / kvs_pool_threads(r->pool);
    r->span = (share + PIECE_BYTES - 1) / PIECE_BYTES * PIECE_BYTES;
    r->ahead = kvs_isa_ahead();
    r->base.ops = &ops;
    *out = &r->base;
    return KVS_OK;
}
