/* bf16.c - the loops around the kernels of dots_bf16.h, attn_bf16.h and amx_bf16.h: what is rounded and turned once, and pieces for
 * threads. */
#include "cpu.h"
#include "dots.h"

#include <math.h>

enum { PIECES_PER_THREAD = 4 };

/* n rows to pieces of whole groups: as few as give every thread its share, heads (or panels) being that many already */
static int64_t piece_rows(kvs_cpu *cpu, int64_t n, int64_t heads) {
    int64_t groups = (n + cpu->bf16->group - 1) / cpu->bf16->group, wanted = (int64_t)PIECES_PER_THREAD * kvs_pool_threads(cpu->pool);
    int64_t pieces = KVS_MIN(groups, (wanted + heads - 1) / heads);
    return (groups + pieces - 1) / pieces * cpu->bf16->group;
}

static int64_t turned_bytes(int64_t rows, int64_t cols, int64_t group) {
    int64_t bytes = (rows + group - 1) / group * group * kvs_bf16_pairs(cols) * (int64_t)sizeof(uint32_t);
    return (bytes + 63) / 64 * 64;
}

/* scratch of all threads, then bytes more */
static uint8_t *reserve(kvs_cpu *cpu, int64_t bytes) {
    uint8_t *memory = kvs_cpu_reserve(cpu, (uint64_t)(kvs_pool_threads(cpu->pool) * KVS_DOTS_SCRATCH + bytes));
    if (!memory) cpu->status = KVS_E_MEMORY;
    return memory;
}

/* ---- products ---- */

typedef struct product {
    const kvs_bf16 *ops;
    const kvs_matmul *jobs;
    const float *x;
    int64_t n, rows, n_pieces; /* activation rows, those of a piece */
    uint32_t *turned;
    uint8_t *scratch;
} product;

static int64_t units(const kvs_weight *w) { return (w->rows + KVS_UNIT - 1) / KVS_UNIT; }

static void round_groups(void *arg, int64_t begin, int64_t end, int32_t thread) {
    const product *p = arg;
    int64_t cols = p->jobs[0].w->cols, first = begin * p->ops->group, last = KVS_MIN(end * p->ops->group, p->n);
    (void)thread;
    p->ops->round(p->x + first * cols, cols, last - first, cols, p->turned + first * kvs_bf16_pairs(cols));
}

/* Work i is piece i % n_pieces of the activation rows times unit i / n_pieces of weight rows, counted through all jobs. */
static void multiply(void *arg, int64_t begin, int64_t end, int32_t thread) {
    const product *p = arg;
    for (int64_t i = begin; i < end; i++) {
        const kvs_matmul *job = p->jobs;
        int64_t unit = i / p->n_pieces, first = i % p->n_pieces * p->rows;
        while (unit >= units(job->w)) unit -= units(job++->w);
        const kvs_weight *w = job->w;
        int64_t row = unit * KVS_UNIT;
        kvs_panel panel = {w->type, (const uint8_t *)w->data + row * w->row_bytes, w->row_bytes, KVS_MIN(KVS_UNIT, w->rows - row), w->cols,
                           0};
        p->ops->many(&panel, p->turned + first * kvs_bf16_pairs(w->cols), KVS_MIN(p->rows, p->n - first),
                     job->bias ? job->bias + row : NULL, job->y + first * w->rows + row, w->rows,
                     p->scratch + (int64_t)thread * KVS_DOTS_SCRATCH);
    }
}

void kvs_cpu_matmul_bf16(kvs_cpu *cpu, const kvs_matmul *jobs, int32_t n_jobs, const float *x, int32_t n) {
    product p = {.ops = cpu->bf16, .jobs = jobs, .x = x, .n = n};
    p.scratch = reserve(cpu, turned_bytes(n, jobs[0].w->cols, cpu->bf16->group));
    if (!p.scratch) return;
    p.turned = (uint32_t *)(void *)(p.scratch + (int64_t)kvs_pool_threads(cpu->pool) * KVS_DOTS_SCRATCH);
    int64_t panels = 0;
    for (int32_t j = 0; j < n_jobs; j++) panels += units(jobs[j].w);
    p.rows = piece_rows(cpu, n, panels);
    p.n_pieces = (n + p.rows - 1) / p.rows;
    kvs_cpu_loop(cpu, round_groups, &p, (n + cpu->bf16->group - 1) / cpu->bf16->group, 1);
    kvs_cpu_loop(cpu, multiply, &p, panels * p.n_pieces, 1);
}

/* ---- attention ---- */

typedef struct heads {
    const kvs_bf16 *ops;
    const float *q, *k, *v;
    float *out;
    int64_t n, n_head, head_dim;
    int64_t rows, n_pieces; /* queries of a piece, pieces of a head */
    int64_t bytes, k_bytes; /* of a head's keys and values, turned; of its keys */
    uint8_t *turned, *scratch;
} heads;

static uint32_t *keys_of(const heads *h, int64_t head) { return (uint32_t *)(void *)(h->turned + head * h->bytes); }
static uint32_t *values_of(const heads *h, int64_t head) { return (uint32_t *)(void *)(h->turned + head * h->bytes + h->k_bytes); }

static void turn_heads(void *arg, int64_t begin, int64_t end, int32_t thread) {
    const heads *h = arg;
    int64_t step = h->n_head * h->head_dim;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        h->ops->keys(h->k + i * h->head_dim, step, h->n, h->head_dim, keys_of(h, i));
        h->ops->values(h->v + i * h->head_dim, step, h->n, h->head_dim, values_of(h, i));
    }
}

static void attend(void *arg, int64_t begin, int64_t end, int32_t thread) {
    const heads *h = arg;
    for (int64_t i = begin; i < end; i++) {
        int64_t head = i / h->n_pieces, first = i % h->n_pieces * h->rows, step = h->n_head * h->head_dim;
        int64_t at = first * step + head * h->head_dim;
        kvs_bf16_attn task = {keys_of(h, head), values_of(h, head), h->n, h->head_dim, step, 1.0f / sqrtf((float)h->head_dim)};
        h->ops->attend(&task, h->q + at, KVS_MIN(h->rows, h->n - first), h->out + at, h->scratch + (int64_t)thread * KVS_DOTS_SCRATCH);
    }
}

void kvs_cpu_attn_full_bf16(kvs_cpu *cpu, const float *q, const float *k, const float *v, float *out, int32_t n, int32_t n_head,
                            int32_t head_dim) {
    if (n < 1 || kvs_cpu_stopped(cpu)) return;
    heads h = {.ops = cpu->bf16, .q = q, .k = k, .v = v, .out = out, .n = n, .n_head = n_head, .head_dim = head_dim};
    h.k_bytes = turned_bytes(n, head_dim, KVS_UNIT);
    h.bytes = h.k_bytes + turned_bytes(head_dim, n, KVS_UNIT);
    h.scratch = reserve(cpu, n_head * h.bytes);
    if (!h.scratch) return;
    h.turned = h.scratch + (int64_t)kvs_pool_threads(cpu->pool) * KVS_DOTS_SCRATCH;
    h.rows = piece_rows(cpu, n, n_head);
    h.n_pieces = (n + h.rows - 1) / h.rows;
    kvs_cpu_loop(cpu, turn_heads, &h, n_head, 1);
    kvs_cpu_loop(cpu, attend, &h, n_head * h.n_pieces, 1);
}
