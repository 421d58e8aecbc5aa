/* shim.cpp - runs kernels: which thread goes on, what primitives give, what is an error. See shim.h.
 *
 * A thread that comes to a primitive notes what it wants and picks the next thread itself, so there is one switch for it, not two. A thread that
 * returns leaves its stack to the next one that has not begun: threads without primitives cost a call each. */
#include "shim_inside.h"
#include "shim_races.h"

#include <cstdarg>
#include <mutex>
#include <string>
#include <unistd.h>
#include <vector>

enum { WARP = 32, MAX_THREADS = 1024, MAX_SHARED = 99 * 1024, ZONE = 64, POISON = 0xff, ZONE_BYTE = 0xa5 };
enum order { FORWARD, REVERSE, RANDOM };

struct async_copy {
    void *to;
    const void *from;
    uint32_t group;
};

struct warp { /* a bit per lane; one of ready, calling, barrier, done, or running */
    uint32_t all, ready, calling, barrier, done;
};

struct thread {
    kvs_shim_place place; /* first: kvs_shim_self points to it */
    struct warp *warp;
    uint32_t bit;        /* its own in the warp */
    kvs_fiber *fiber;    /* while it has begun and not returned */
    kvs_shim_call *call; /* the primitive that it waits at */
    const char *file;    /* the barrier */
    int32_t line;
    std::vector<async_copy> copies;
    uint32_t groups; /* that were committed */
    bool awaited;    /* the kernel in front */
};

struct machine { /* what the launch that runs needs */
    thread threads[MAX_THREADS];
    warp warps[MAX_THREADS / WARP];
    alignas(32) uint8_t shared[16 + MAX_SHARED + ZONE + 32];
    kvs_shim_block block;
    const char *name;
    const std::function<void()> *body;
    int32_t n_threads, n_warps, at; /* at: the warp that runs */
    uint32_t ready;                 /* a bit per warp that may have ready lanes */
    order how;
    bool awaited; /* by some thread of the launch */
    bool at_once; /* asynchronous copies: before 8.0 they are plain ones (device.cuh) */
    uint64_t seed, random;
    std::vector<uint32_t> blocks;
};

/* One launch at a time, so that all this, and __shared__ arrays, are plain static memory: as thread_local they would have to be found at
 * every use, by a function, in a library that is loaded late. */
kvs_shim_place *kvs_shim_self;
static machine *const m = new machine();
static std::mutex turn;
static const char *last_kernel;

void kvs_shim_fatal(const char *format, ...) {
    char text[800];
    size_t n = 0;
    auto add = [&](int written) { n = KVS_MIN(n + (size_t)KVS_MAX(written, 0), sizeof text - 2); };
    if (kvs_shim_self) {
        const uint3 &b = kvs_shim_self->block->index, &t = kvs_shim_self->index;
        add(snprintf(text, sizeof text, "kvs shim: %s, block (%u, %u, %u), thread (%u, %u, %u): ", m->name, b.x, b.y, b.z, t.x, t.y, t.z));
    } else
        add(snprintf(text, sizeof text, "kvs shim: %s%s", m->name ? m->name : "", m->name ? ": " : ""));
    va_list args;
    va_start(args, format);
    add(vsnprintf(text + n, sizeof text - n - 1, format, args));
    va_end(args);
    if (m->name && m->how == RANDOM)
        add(snprintf(text + n, sizeof text - n - 1, " (KVS_SHIM_ORDER=random:%llu)", (unsigned long long)m->seed));
    text[n++] = '\n';
    if (write(STDERR_FILENO, text, n) < 0) {} /* nothing could be done about it */
    abort();
}

/* ---- who runs next ---- */

static uint32_t next_random(uint32_t n) {
    m->random ^= m->random << 13, m->random ^= m->random >> 7, m->random ^= m->random << 17;
    return (uint32_t)((m->random >> 32) * n >> 32);
}

static int32_t pick(uint32_t bits) { /* one that is set */
    if (m->how == FORWARD) return __builtin_ctz(bits);
    if (m->how == REVERSE) return 31 - __builtin_clz(bits);
    for (uint32_t skip = next_random((uint32_t)__builtin_popcount(bits)); skip; skip--) bits &= bits - 1;
    return __builtin_ctz(bits);
}

static thread *lane_of(int32_t w, int32_t lane) { return &m->threads[w * WARP + lane]; }

static const char *kind_name(int32_t kind) {
    static const char *const names[] = {"__shfl_sync", "__shfl_xor_sync", "__shfl_up_sync",  "__shfl_down_sync",      "a vote",
                                        "__syncwarp",  "kvs_mma_f16",     "kvs_ldmatrix_x4", "kvs_ldmatrix_x4_turned"};
    return names[kind];
}

static void finish_call(int32_t w, uint32_t mask);

static bool same_call(const kvs_shim_call *a, const kvs_shim_call *b) {
    bool one_place = a->kind < KVS_MMA || (a->line == b->line && a->file == b->file); /* these are instructions of a whole warp */
    return a->kind == b->kind && a->mask == b->mask && one_place;
}

/* Lanes of w that wait for nobody any more, since all of their mask have come, are ready. */
static bool finish_calls(int32_t w) {
    warp *warp = &m->warps[w];
    bool any = false;
    for (uint32_t rest = warp->calling; rest;) {
        const kvs_shim_call *call = lane_of(w, __builtin_ctz(rest))->call;
        bool together = !(call->mask & ~warp->calling);
        for (uint32_t bits = call->mask & warp->calling; bits && together; bits &= bits - 1)
            together = same_call(call, lane_of(w, __builtin_ctz(bits))->call);
        rest &= together ? ~call->mask : rest - 1;
        if (!together) continue;
        finish_call(w, call->mask);
        warp->calling &= ~call->mask;
        warp->ready |= call->mask;
        any = true;
    }
    return any;
}

/* Nobody in w is ready, and some lanes wait for others of their mask. */
[[noreturn]] static void stuck_warp(int32_t w) {
    const warp *warp = &m->warps[w];
    int32_t lane = __builtin_ctz(warp->calling);
    const thread *t = lane_of(w, lane);
    const kvs_shim_call *call = t->call;
    kvs_shim_self = &m->threads[w * WARP + lane].place;
    const char *what = kind_name(call->kind);
    if (call->mask & ~warp->all)
        kvs_shim_fatal("%s (line %d) with mask %08x, but the block ends at lanes %08x", what, call->line, call->mask, warp->all);
    if (call->mask & warp->done)
        kvs_shim_fatal("%s (line %d) waits for lanes %08x, which have returned", what, call->line, call->mask & warp->done);
    if (call->mask & warp->barrier)
        kvs_shim_fatal("%s (line %d) waits for lanes %08x, which wait at __syncthreads", what, call->line, call->mask & warp->barrier);
    for (uint32_t bits = call->mask; bits; bits &= bits - 1) {
        int32_t other = __builtin_ctz(bits);
        const kvs_shim_call *its = lane_of(w, other)->call;
        if (!same_call(call, its))
            kvs_shim_fatal("%s (line %d, mask %08x), but lane %d of its mask is at %s (line %d, mask %08x)", what, call->line, call->mask,
                           other, kind_name(its->kind), its->line, its->mask);
    }
    kvs_shim_fatal("%s (line %d) waits for ever", what, call->line);
}

/* Nobody of the block is ready: all are done, or at one barrier that they now leave. */
static bool finish_barrier(void) {
    const thread *first = nullptr, *returned = nullptr;
    for (int32_t w = 0; w < m->n_warps; w++) {
        const warp *warp = &m->warps[w];
        if (warp->done) returned = lane_of(w, __builtin_ctz(warp->done));
        for (uint32_t bits = warp->barrier; bits; bits &= bits - 1) {
            thread *t = lane_of(w, __builtin_ctz(bits));
            if (!first) first = t;
            if (t->line == first->line && t->file == first->file) continue;
            kvs_shim_self = &t->place;
            kvs_shim_fatal("waits at __syncthreads of line %d, others at that of line %d", t->line, first->line);
        }
    }
    if (first && returned) {
        const uint3 &r = returned->place.index;
        kvs_shim_self = &m->threads[first - m->threads].place;
        kvs_shim_fatal("waits at __syncthreads (line %d) for thread (%u, %u, %u), which has returned", first->line, r.x, r.y, r.z);
    }
    if (!first) return false;
    for (int32_t w = 0; w < m->n_warps; w++) {
        m->warps[w].ready = m->warps[w].barrier;
        m->warps[w].barrier = 0;
    }
    m->ready = m->n_warps == 32 ? ~0u : (1u << m->n_warps) - 1;
    m->at = pick(m->ready);
    kvs_races_barrier();
    return true;
}

/* The thread that is to go on; NULL: all have returned. */
static thread *next_thread(void) {
    for (;;) {
        warp *warp = &m->warps[m->at];
        if (warp->ready) {
            int32_t lane = pick(warp->ready);
            warp->ready &= ~(1u << lane);
            return lane_of(m->at, lane);
        }
        if (warp->calling) {
            if (!finish_calls(m->at)) stuck_warp(m->at);
            if (m->how == RANDOM) m->at = pick(m->ready);
            continue;
        }
        m->ready &= ~(1u << m->at);
        if (m->ready)
            m->at = pick(m->ready);
        else if (!finish_barrier())
            return nullptr;
    }
}

static void run_threads(void);

static void resume(kvs_fiber *from, thread *t) {
    kvs_shim_self = &t->place;
    if (!t->fiber) t->fiber = kvs_fiber_new(run_threads);
    kvs_fiber_switch(from, t->fiber);
}

static void give_way(thread *self) { /* it has noted what it waits for */
    thread *next = next_thread();
    if (next != self)
        resume(self->fiber, next);
    else
        kvs_shim_self = &self->place; /* which has been others in between */
}

/* A stack's whole life: threads that begin on it, one after the other. */
static void run_threads(void) {
    kvs_fiber *fiber = ((thread *)(void *)kvs_shim_self)->fiber;
    kvs_fiber_arrived(fiber);
    for (;;) {
        (*m->body)();
        thread *self = (thread *)(void *)kvs_shim_self;
        self->warp->done |= self->bit;
        self->fiber = nullptr;
        thread *next = next_thread();
        if (!next || next->fiber) {
            kvs_shim_self = next ? &next->place : nullptr;
            kvs_fiber_leave(fiber, next ? next->fiber : kvs_fiber_host());
        }
        next->fiber = fiber;
        kvs_shim_self = &next->place;
    }
}

void kvs_shim_barrier(const char *file, int32_t line) {
    thread *self = (thread *)(void *)kvs_shim_self;
    self->file = file;
    self->line = line;
    self->warp->barrier |= self->bit;
    give_way(self);
}

void kvs_shim_warp(kvs_shim_call *call) {
    thread *self = (thread *)(void *)kvs_shim_self;
    if (!(call->mask & self->bit))
        kvs_shim_fatal("%s (line %d) with mask %08x, which leaves its own lane %d out", kind_name(call->kind), call->line, call->mask,
                       __builtin_ctz(self->bit));
    if (call->kind <= KVS_SHFL_DOWN && (call->width < 1 || call->width > WARP || (call->width & (call->width - 1))))
        kvs_shim_fatal("%s (line %d) with width %d", kind_name(call->kind), call->line, call->width);
    self->call = call;
    self->warp->calling |= self->bit;
    give_way(self);
}

/* ---- what warp primitives give ---- */

static int32_t source_of(const kvs_shim_call *call, int32_t lane) {
    int32_t first = lane & -call->width, at = lane - first;
    switch (call->kind) {
    case KVS_SHFL: return first + (call->lane & (call->width - 1));
    case KVS_SHFL_XOR: return (lane ^ call->lane) < first + call->width ? lane ^ call->lane : lane;
    case KVS_SHFL_UP: return at >= call->lane ? lane - call->lane : lane;
    default: return at + call->lane < call->width ? lane + call->lane : lane;
    }
}

static void shuffle(int32_t w, uint32_t mask) {
    uint64_t values[WARP];
    for (uint32_t bits = mask; bits; bits &= bits - 1) {
        int32_t lane = __builtin_ctz(bits);
        values[lane] = lane_of(w, lane)->call->value;
    }
    for (uint32_t bits = mask; bits; bits &= bits - 1) {
        int32_t lane = __builtin_ctz(bits);
        thread *t = lane_of(w, lane);
        int32_t source = source_of(t->call, lane);
        if (!(mask >> source & 1)) {
            kvs_shim_self = &t->place;
            kvs_shim_fatal("%s (line %d) from lane %d, which is not in mask %08x", kind_name(t->call->kind), t->call->line, source, mask);
        }
        t->call->value = values[source];
    }
}

static void vote(int32_t w, uint32_t mask) {
    uint32_t votes = 0;
    for (uint32_t bits = mask; bits; bits &= bits - 1)
        votes |= (uint32_t)lane_of(w, __builtin_ctz(bits))->call->value << __builtin_ctz(bits);
    for (uint32_t bits = mask; bits; bits &= bits - 1) lane_of(w, __builtin_ctz(bits))->call->value = votes;
}

/* The layouts of device.cuh's comment. */
static void multiply(int32_t w) {
    float a[16][16], b[16][8], c[16][8];
    auto row_of = [](int32_t lane, int32_t i) { return lane / 4 + i / 2 * 8; }; /* of c[i]; its column: */
    auto col_of = [](int32_t lane, int32_t i) { return lane % 4 * 2 + i % 2; };
    for (int32_t lane = 0; lane < WARP; lane++) {
        const kvs_shim_call *call = lane_of(w, lane)->call;
        const uint32_t *pairs_a = (const uint32_t *)call->a, *pairs_b = (const uint32_t *)call->b;
        int32_t g = lane / 4, t = lane % 4 * 2;
        for (int32_t i = 0; i < 8; i++)
            a[g + i / 2 % 2 * 8][t + i % 2 + i / 4 * 8] = kvs_half_float((uint16_t)(pairs_a[i / 2] >> 16 * (i % 2)));
        for (int32_t i = 0; i < 4; i++) b[t + i % 2 + i / 2 * 8][g] = kvs_half_float((uint16_t)(pairs_b[i / 2] >> 16 * (i % 2)));
        for (int32_t i = 0; i < 4; i++) c[row_of(lane, i)][col_of(lane, i)] = call->c[i];
    }
    for (int32_t row = 0; row < 16; row++)
        for (int32_t k = 0; k < 16; k++)
            for (int32_t col = 0; col < 8; col++) c[row][col] += a[row][k] * b[k][col];
    for (int32_t lane = 0; lane < WARP; lane++)
        for (int32_t i = 0; i < 4; i++) lane_of(w, lane)->call->c[i] = c[row_of(lane, i)][col_of(lane, i)];
}

static void load_matrices(int32_t w, bool turned) {
    uint16_t rows[WARP][8];
    for (int32_t lane = 0; lane < WARP; lane++) {
        thread *t = lane_of(w, lane);
        kvs_shim_self = &t->place;
        kvs_shim_aligned(t->call->a, 16, kind_name(t->call->kind));
        kvs_races_access(t->call->a, 16, false);
        memcpy(rows[lane], t->call->a, 16);
    }
    for (int32_t lane = 0; lane < WARP; lane++) {
        int32_t g = lane / 4, t = 2 * (lane % 4);
        for (int32_t i = 0; i < 4; i++) {
            uint16_t low = turned ? rows[8 * i + t][g] : rows[8 * i + g][t],
                     high = turned ? rows[8 * i + t + 1][g] : rows[8 * i + g][t + 1];
            lane_of(w, lane)->call->r[i] = low | (uint32_t)high << 16;
        }
    }
}

static void finish_call(int32_t w, uint32_t mask) {
    int32_t kind = lane_of(w, __builtin_ctz(mask))->call->kind;
    if (kind <= KVS_SHFL_DOWN)
        shuffle(w, mask);
    else if (kind == KVS_VOTE)
        vote(w, mask);
    else if (kind == KVS_MMA)
        multiply(w);
    else if (kind != KVS_SYNCWARP)
        load_matrices(w, kind == KVS_LDMATRIX_TURNED);
    else if (mask == m->warps[w].all)
        kvs_races_warp(w);
}

/* ---- asynchronous copies ---- */

void kvs_shim_async(void *shared, const void *global) {
    thread *self = (thread *)(void *)kvs_shim_self;
    kvs_shim_aligned(shared, 16, "kvs_async16, shared memory");
    kvs_shim_aligned(global, 16, "kvs_async16, global memory");
    kvs_races_access(global, 16, false);
    kvs_races_access(shared, 16, true);
    if (m->at_once) {
        memcpy(shared, global, 16);
        return;
    }
    memset(shared, POISON, 16);
    self->copies.push_back({shared, global, self->groups});
}

void kvs_shim_async_commit(void) { ((thread *)(void *)kvs_shim_self)->groups++; }

void kvs_shim_async_wait(uint32_t n) {
    thread *self = (thread *)(void *)kvs_shim_self;
    size_t left = 0;
    for (const async_copy &copy : self->copies) {
        if (copy.group + n < self->groups) /* not one that is still to be committed, either */
            memcpy(copy.to, copy.from, 16);
        else
            self->copies[left++] = copy;
    }
    self->copies.resize(left);
}

/* ---- launches ---- */

void kvs_shim_await(void) { ((thread *)(void *)kvs_shim_self)->awaited = m->awaited = true; }
bool kvs_shim_awaited(void) { return ((thread *)(void *)kvs_shim_self)->awaited; }

static void read_order(void) {
    const char *text = getenv("KVS_SHIM_ORDER");
    m->how = FORWARD;
    if (!text || !*text || !strcmp(text, "forward")) return;
    if (!strcmp(text, "reverse")) {
        m->how = REVERSE;
        return;
    }
    if (strncmp(text, "random", 6)) kvs_shim_fatal("KVS_SHIM_ORDER=%s: it can be forward, reverse, random or random:seed", text);
    static uint64_t n;
    m->how = RANDOM;
    m->seed = text[6] == ':' ? strtoull(text + 7, nullptr, 10) : (uint64_t)getpid() << 32 | __atomic_add_fetch(&n, 1, __ATOMIC_RELAXED);
    m->random = (m->seed + 1) * 0x9e3779b97f4a7c15u | 1;
    for (int i = 0; i < 4; i++) next_random(2);
}

static void prepare_threads(dim3 dim) {
    m->n_threads = (int32_t)(dim.x * dim.y * dim.z);
    m->n_warps = (m->n_threads + WARP - 1) / WARP;
    m->block.dim = dim;
    int32_t i = 0;
    for (unsigned z = 0; z < dim.z; z++)
        for (unsigned y = 0; y < dim.y; y++)
            for (unsigned x = 0; x < dim.x; x++, i++) {
                m->threads[i].place = {{x, y, z}, &m->block};
                m->threads[i].warp = &m->warps[i / WARP];
                m->threads[i].bit = 1u << i % WARP;
            }
}

/* All static __shared__ arrays; none are there if no kernel has one, or under AddressSanitizer. The linker knows these names. */
extern uint8_t __start_kvs_shared[] __attribute__((weak, visibility("hidden")));
extern uint8_t __stop_kvs_shared[] __attribute__((weak, visibility("hidden")));

static void run_block(size_t shared) {
    uint8_t *zone = m->block.shared + shared;
    memset(m->block.shared, POISON, shared);
    const size_t statics = __start_kvs_shared ? (size_t)(__stop_kvs_shared - __start_kvs_shared) : 0;
    if (statics) memset(__start_kvs_shared, POISON, statics);
    kvs_races_block(m->block.shared, shared, __start_kvs_shared, statics);
    memset(zone, ZONE_BYTE, ZONE);
    for (int32_t i = 0; i < m->n_threads; i++) {
        m->threads[i].copies.clear();
        m->threads[i].groups = 0;
        m->threads[i].awaited = false;
    }
    for (int32_t w = 0; w < m->n_warps; w++) {
        int32_t lanes = KVS_MIN(m->n_threads - w * WARP, (int32_t)WARP);
        uint32_t all = lanes == WARP ? ~0u : (1u << lanes) - 1;
        m->warps[w] = {all, all, 0, 0, 0};
    }
    m->ready = m->n_warps == 32 ? ~0u : (1u << m->n_warps) - 1;
    m->at = pick(m->ready);
    resume(kvs_fiber_host(), next_thread());
    for (int32_t i = 0; i < ZONE; i++)
        if (zone[i] != ZONE_BYTE) kvs_shim_fatal("wrote behind its %zu bytes of dynamic shared memory", shared);
}

/* One after the other, by their number in the grid. */
static void run_blocks(dim3 grid, size_t shared) {
    uint32_t n = grid.x * grid.y * grid.z;
    m->blocks.clear();
    for (uint32_t i = 0; i < n && m->how == RANDOM; i++) {
        uint32_t j = next_random(i + 1);
        m->blocks.push_back(i);
        std::swap(m->blocks[i], m->blocks[j]);
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t b = m->how == RANDOM ? m->blocks[i] : m->how == REVERSE ? n - 1 - i : i;
        m->block.index = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
        run_block(shared);
    }
}

/* Without parentheses and what a template is made of: "(matvec_kernel<1, true>)" is "matvec_kernel". */
static std::string plain_name(const char *name) {
    name += *name == '(';
    return std::string(name, strcspn(name, "<) "));
}

static void run_kernel(const char *name, dim3 grid, dim3 block, size_t shared, const std::function<void()> &body, int32_t begins) {
    std::lock_guard<std::mutex> hold(turn);
    if (getenv("KVS_SHIM_FAIL") && kvs_shim_asked(plain_name(name).c_str())) return;
    kvs_shim_so_far[KERNELS]++;
    kvs_shim_so_far[EARLY] += begins == KVS_SHIM_EARLY;
    kvs_races_launch(begins == KVS_SHIM_EARLY);
    m->name = name;
    __atomic_store_n(&last_kernel, name, __ATOMIC_RELAXED);
    m->body = &body;
    m->block.grid = grid;
    m->block.shared = m->shared + 16; /* a multiple of 16, not of 32 */
    read_order();
    prepare_threads(block);
    m->awaited = false;
    m->at_once = kvs_shim_capability() < 80;
    run_blocks(grid, shared);
    if (begins != KVS_SHIM_BEHIND && !m->awaited) kvs_shim_fatal("no thread has waited for the kernel in front");
    m->name = nullptr;
}

const char *kvs_shim_last(void) {
    const char *name = __atomic_load_n(&last_kernel, __ATOMIC_RELAXED);
    return name ? name : "none";
}

static void check_launch(const char *name, dim3 grid, dim3 block, size_t shared) {
    uint64_t threads = (uint64_t)block.x * block.y * block.z, blocks = (uint64_t)grid.x * grid.y;
    if (!threads || block.x > MAX_THREADS || block.y > MAX_THREADS || block.z > 64 || threads > MAX_THREADS)
        kvs_shim_fatal("%s: a block of %u x %u x %u threads", name, block.x, block.y, block.z);
    if (!blocks || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
        kvs_shim_fatal("%s: a grid of %u x %u x %u blocks", name, grid.x, grid.y, grid.z);
    if (blocks > 0x7fffffffu || blocks * grid.z > 0x7fffffffu) kvs_shim_fatal("%s: more blocks than this shim counts", name);
    if (shared > kvs_shim_max_shared()) kvs_shim_fatal("%s: %zu bytes of dynamic shared memory", name, shared);
}

void kvs_shim_launch(const char *name, dim3 grid, dim3 block, size_t shared, cudaStream_t stream, std::function<void()> body,
                     int32_t begins) {
    check_launch(name, grid, block, shared);
    if (stream && stream->device != kvs_shim_device())
        kvs_shim_fatal("%s: on a stream of cuda:%d, and this thread's device is cuda:%d", name, stream->device, kvs_shim_device());
    kvs_shim_do(stream, [=]() { run_kernel(name, grid, block, shared, body, begins); });
}
