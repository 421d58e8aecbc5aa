/* matmul.c - y = x W^T + bias on the pool: several matrices that share x are one parallel loop over units of weight rows. */
#include "cpu.h"
#include "dots.h"

typedef struct run {
    const kvs_dots *dots;
    const kvs_matmul *jobs;
    const float *x;
    int64_t n, n_tiles, ahead;
    kvs_acts acts[2]; /* blocks of 32, blocks of 256 */
    uint8_t *scratch; /* KVS_DOTS_SCRATCH per thread */
} run;

/* 0: activations stay float */
static int32_t block_of(const kvs_matmul *job) { return job->rounding == KVS_ROUND_INT8 ? kvs_acts_block(job->w->type) : 0; }
static int64_t units(const kvs_weight *w) { return (w->rows + KVS_UNIT - 1) / KVS_UNIT; }
static const kvs_acts *acts_of(const run *r, int32_t type) { return &r->acts[kvs_acts_block(type) == 256]; }

/* ---- memory for activations: one block of cpu->x_scratch, its parts at multiples of 64 ---- */
static uint64_t take(uint64_t *at, uint64_t bytes) {
    uint64_t begin = *at;
    *at += (bytes + 63) / 64 * 64;
    return begin;
}

/* Places for n rows of cols; lays the arrays out from *at in memory, or only counts when memory is NULL. */
static void acts_layout(kvs_acts *a, uint64_t *at, uint8_t *memory, int32_t block, int64_t n, int64_t cols) {
    uint64_t places = (uint64_t)(n * (cols / block)), size = (uint64_t)block;
    *a = (kvs_acts){.block = block, .n = n};
    uint64_t q = take(at, (places + KVS_ACTS_MORE) * size), d = take(at, places * sizeof *a->d);
    uint64_t s32 = take(at, places * size / 32 * sizeof *a->s32), s16 = take(at, block == 256 ? places * 16 * sizeof *a->s16 : 0);
    if (!memory) return;
    a->q = (int8_t *)(memory + q);
    a->d = (float *)(void *)(memory + d);
    a->s32 = (int16_t *)(void *)(memory + s32);
    a->s16 = (int16_t *)(void *)(memory + s16);
}

uint8_t *kvs_cpu_reserve(kvs_cpu *cpu, uint64_t bytes) {
    if (bytes <= cpu->x_scratch_bytes) return cpu->x_scratch;
    kvs_free_aligned(cpu->x_scratch);
    cpu->x_scratch = kvs_calloc_aligned(bytes, 1);
    cpu->x_scratch_bytes = cpu->x_scratch ? bytes : 0;
    return cpu->x_scratch;
}

static bool prepare(kvs_cpu *cpu, run *r, int32_t n_jobs) {
    int64_t cols = r->jobs[0].w->cols;
    bool need[2] = {false, false};
    for (int32_t j = 0; j < n_jobs; j++) {
        int32_t block = block_of(&r->jobs[j]);
        if (block) need[block == 256] = true;
    }
    uint64_t threads = (uint64_t)kvs_pool_threads(cpu->pool), bytes = threads * KVS_DOTS_SCRATCH;
    for (int i = 0; i < 2; i++)
        if (need[i]) acts_layout(&r->acts[i], &bytes, NULL, i ? 256 : 32, r->n, cols);
    r->scratch = kvs_cpu_reserve(cpu, bytes);
    if (!r->scratch) return false;
    uint64_t at = threads * KVS_DOTS_SCRATCH;
    for (int i = 0; i < 2; i++)
        if (need[i]) acts_layout(&r->acts[i], &at, r->scratch, i ? 256 : 32, r->n, cols);
    return true;
}

static void quantize_rows(void *arg, int64_t begin, int64_t end, int32_t thread) {
    (void)thread;
    const run *r = arg;
    int64_t cols = r->jobs[0].w->cols;
    for (int64_t i = begin; i < end; i++)
        for (int k = 0; k < 2; k++)
            if (r->acts[k].block) r->dots->quantize(r->x + i * cols, cols, &r->acts[k], i);
}

/* ---- products ---- */
static void add_bias(const kvs_matmul *job, int64_t row, int64_t rows, int64_t first, int64_t n) {
    if (!job->bias) return;
    for (int64_t i = first; i < first + n; i++)
        for (int64_t k = row; k < row + rows; k++) job->y[i * job->w->rows + k] += job->bias[k];
}

/* Weight rows row..row + rows times activation rows first..first + n */
static void multiply(const run *r, const kvs_matmul *job, int64_t row, int64_t rows, int64_t first, int64_t n, int32_t thread) {
    const kvs_weight *w = job->w;
    kvs_panel p = {w->type, (const uint8_t *)w->data + row * w->row_bytes, w->row_bytes, rows, w->cols, r->ahead};
    float *y = job->y + first * w->rows + row;
    void *scratch = r->scratch + (int64_t)thread * KVS_DOTS_SCRATCH;
    if (!block_of(job))
        r->dots->floats(&p, r->x + first * w->cols, n, y, w->rows, scratch);
    else if (r->n <= KVS_FEW)
        r->dots->few(&p, acts_of(r, w->type), first, n, y, w->rows);
    else
        r->dots->many(&p, acts_of(r, w->type), first, n, y, w->rows, scratch);
    add_bias(job, row, rows, first, n);
}

/* Work i is tile i % n_tiles of activation rows of unit i / n_tiles, counted through all jobs. */
static void multiply_units(void *arg, int64_t begin, int64_t end, int32_t thread) {
    const run *r = arg;
    const kvs_matmul *job = r->jobs;
    int64_t base = 0; /* of this job's first unit */
    for (int64_t i = begin; i < end; i++) {
        for (; i / r->n_tiles - base >= units(job->w); job++) base += units(job->w);
        int64_t row = (i / r->n_tiles - base) * KVS_UNIT, first = i % r->n_tiles * KVS_XT;
        multiply(r, job, row, KVS_MIN(KVS_UNIT, job->w->rows - row), first, KVS_MIN(KVS_XT, r->n - first), thread);
    }
}

/* Pieces of some 5 microseconds and more: long against the price of taking one, short against a matrix. */
static int64_t grain(const run *r, int32_t threads, int64_t total) {
    const kvs_weight *w = r->jobs[0].w;
    double nanoseconds = KVS_UNIT * ((double)w->row_bytes / 25 + (double)KVS_MIN(r->n, KVS_XT) * (double)w->cols / 100);
    int64_t pieces = (int64_t)(5000 / nanoseconds), share = total / (8 * threads);
    return KVS_MAX(1, KVS_MIN(pieces, share));
}

static bool all_bf16(const kvs_matmul *jobs, int32_t n_jobs) {
    for (int32_t j = 0; j < n_jobs; j++)
        if (jobs[j].rounding != KVS_ROUND_BF16 || jobs[j].w->type == KVS_TYPE_F32) return false;
    return true;
}

void kvs_cpu_matmul(kvs_backend *be, const kvs_matmul *jobs, int32_t n_jobs, const float *x, int32_t n) {
    kvs_cpu *cpu = (kvs_cpu *)be;
    if (n_jobs < 1 || n < 1 || kvs_cpu_stopped(cpu)) return;
    if (cpu->bf16 && all_bf16(jobs, n_jobs)) {
        kvs_cpu_matmul_bf16(cpu, jobs, n_jobs, x, n);
        return;
    }
    run r = {.dots = cpu->isa->dots, .jobs = jobs, .x = x, .n = n, .n_tiles = (n + KVS_XT - 1) / KVS_XT, .ahead = cpu->ahead};
    if (!prepare(cpu, &r, n_jobs)) {
        cpu->status = KVS_E_MEMORY;
        return;
    }
    if (r.acts[0].block || r.acts[1].block) kvs_cpu_loop(cpu, quantize_rows, &r, n, n <= KVS_FEW ? n : 4);
    int64_t total = 0;
    for (int32_t j = 0; j < n_jobs; j++) total += units(jobs[j].w) * r.n_tiles;
    kvs_cpu_loop(cpu, multiply_units, &r, total, grain(&r, kvs_pool_threads(cpu->pool), total));
}

typedef struct lookup {
    const kvs_weight *table;
    const int32_t *ids;
    float *y;
} lookup;

static void look_up(void *arg, int64_t begin, int64_t end, int32_t thread) {
    (void)thread;
    const lookup *l = arg;
    const kvs_weight *t = l->table;
    for (int64_t i = begin; i < end; i++)
        kvs_type_get(t->type)->to_f32((const uint8_t *)t->data + l->ids[i] * t->row_bytes, l->y + i * t->cols, t->cols);
}

void kvs_cpu_rows(kvs_backend *be, float *y, const kvs_weight *table, const int32_t *ids, int32_t n) {
    kvs_cpu *cpu = (kvs_cpu *)be;
    lookup l = {table, ids, y};
    if (!kvs_cpu_stopped(cpu)) kvs_cpu_loop(cpu, look_up, &l, n, 8);
}
