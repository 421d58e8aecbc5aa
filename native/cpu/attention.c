/* attention.c - who attends to what, cut into pieces for threads. The arithmetic is attn_kernel.h, whose results do not
 * depend on how it is cut: a piece may hold any number of rows and heads. */
#include "cpu.h"

#include <math.h>

enum { MAX_QUERIES = 32, PIECES_PER_THREAD = 4 };

typedef struct attn_job {
    kvs_cpu *cpu;
    const float *q;
    float *out;
    kvs_taps taps;
    int32_t n_rows, n_head, n_kv_head, head_dim;
    int32_t block_rows;             /* rows of a piece */
    int32_t group, chunk, n_chunks; /* query heads of a KV head; of a piece; pieces of a group */
    int32_t n_blocks;
    int64_t scratch; /* floats of one thread */
    int32_t layer;
    /* full attention */
    const float *k, *v;
} attn_job;

typedef struct queries { /* of one task */
    const float *q[MAX_QUERIES];
    float *out[MAX_QUERIES], *entropy[MAX_QUERIES], *mass[MAX_QUERIES], *lse[MAX_QUERIES];
    int32_t n_visible[MAX_QUERIES];
    int32_t n;
} queries;

/* Cuts n_rows x n_head queries into pieces of at most MAX_QUERIES that share a KV head, and fewer where threads would idle. */
static bool cut(attn_job *job) {
    job->group = job->n_head / job->n_kv_head;
    job->chunk = KVS_MIN(job->group, (int32_t)MAX_QUERIES);
    job->n_chunks = (job->group + job->chunk - 1) / job->chunk;
    int64_t heads = (int64_t)job->n_kv_head * job->n_chunks;
    int64_t pieces = (int64_t)PIECES_PER_THREAD * kvs_pool_threads(job->cpu->pool);
    int64_t rows = (job->n_rows * heads + pieces - 1) / pieces;
    job->block_rows = (int32_t)KVS_MAX(KVS_MIN(rows, MAX_QUERIES / job->chunk), 1);
    job->n_blocks = (job->n_rows + job->block_rows - 1) / job->block_rows;
    job->scratch = (kvs_attn_scratch(job->head_dim, MAX_QUERIES) + 63) / 64 * 64; /* no line shared by two threads */
    return kvs_cpu_scratch(job->cpu, job->scratch) != NULL;
}

typedef struct piece {
    int32_t first, n; /* rows */
    int32_t kv_head, head, n_head;
} piece;

/* Head by head, so that its keys and values stay in a core's cache; the last block first: later rows see more keys, and no
 * long piece should be left over at the end. */
static piece find_piece(const attn_job *job, int64_t index) {
    int32_t block = job->n_blocks - 1 - (int32_t)(index % job->n_blocks), rest = (int32_t)(index / job->n_blocks);
    int32_t kv_head = rest / job->n_chunks, first = rest % job->n_chunks * job->chunk;
    return (piece){.first = block * job->block_rows,
                   .n = KVS_MIN(job->block_rows, job->n_rows - block * job->block_rows),
                   .kv_head = kv_head,
                   .head = kv_head * job->group + first,
                   .n_head = KVS_MIN(job->chunk, job->group - first)};
}

static void add_query(const attn_job *job, queries *qs, int64_t row, int32_t head, int32_t n_visible) {
    int64_t place = row * job->n_head + head;
    qs->q[qs->n] = job->q + place * job->head_dim;
    qs->out[qs->n] = job->out + place * job->head_dim;
    qs->entropy[qs->n] = job->taps.entropy ? job->taps.entropy + place : NULL;
    qs->mass[qs->n] = job->taps.mass ? job->taps.mass + place : NULL;
    qs->lse[qs->n] = job->taps.lse ? job->taps.lse + place : NULL;
    qs->n_visible[qs->n++] = n_visible;
}

static void attend(const attn_job *job, kvs_attn_task *task, const queries *qs, int32_t thread) {
    task->head_dim = job->head_dim;
    task->ahead = job->cpu->ahead;
    task->n_q = qs->n;
    task->q = qs->q;
    task->out = qs->out;
    task->entropy = job->taps.entropy ? qs->entropy : NULL;
    task->mass = job->taps.mass ? qs->mass : NULL;
    task->lse = job->taps.lse ? qs->lse : NULL;
    task->n_visible = qs->n_visible;
    task->scale = 1.0f / sqrtf((float)job->head_dim);
    task->scratch = job->cpu->thread_scratch + thread * job->scratch;
    job->cpu->isa->rows->attn(task);
}

/* next_head: the KV head that is read after this piece, or -1 */
static void causal_piece(const attn_job *job, piece p, int32_t next_head, int32_t thread) {
    const kvs_row *rows = job->cpu->step->rows;
    for (int32_t i = p.first; i < p.first + p.n;) {
        const kvs_kv *kv = rows[i].kv;
        queries qs = {.n = 0};
        for (; i < p.first + p.n && rows[i].kv == kv; i++)
            for (int32_t h = 0; h < p.n_head; h++) add_query(job, &qs, i, p.head + h, kvs_kv_place(kv, job->layer, rows[i].index));
        kvs_attn_task task = {.kv_type = kv->type,
                              .row_bytes = kv->row_bytes,
                              .k = kvs_kv_rows(kv, kv->k, job->layer, p.kv_head),
                              .v = kvs_kv_rows(kv, kv->v, job->layer, p.kv_head),
                              .next = next_head < 0 ? NULL : kvs_kv_rows(kv, kv->k, job->layer, next_head),
                              .spans = kvs_kv_spans(kv, job->layer, p.kv_head),
                              .n_spans = kv->n_spans,
                              .exclude_self = kv->exclude_self};
        attend(job, &task, &qs, thread);
    }
}

static void causal_task(void *arg, int64_t begin, int64_t end, int32_t thread) {
    const attn_job *job = arg;
    for (int64_t i = begin; i < end; i++)
        causal_piece(job, find_piece(job, i), job->n_rows == 1 && i + 1 < end ? find_piece(job, i + 1).kv_head : -1, thread);
}

static void full_task(void *arg, int64_t begin, int64_t end, int32_t thread) {
    const attn_job *job = arg;
    for (int64_t i = begin; i < end; i++) {
        piece p = find_piece(job, i);
        queries qs = {.n = 0};
        for (int32_t row = p.first; row < p.first + p.n; row++) add_query(job, &qs, row, p.head, job->n_rows - 1);
        kvs_attn_task task = {.kv_type = KVS_TYPE_F32,
                              .row_bytes = (int64_t)sizeof(float) * job->n_head * job->head_dim,
                              .k = (const uint8_t *)(job->k + (int64_t)p.head * job->head_dim),
                              .v = (const uint8_t *)(job->v + (int64_t)p.head * job->head_dim)};
        attend(job, &task, &qs, thread);
    }
}

static void run(attn_job *job, kvs_task task) {
    if (!job->n_rows || kvs_cpu_stopped(job->cpu) || !cut(job)) return;
    kvs_cpu_loop(job->cpu, task, job, (int64_t)job->n_blocks * job->n_kv_head * job->n_chunks, 1);
}

void kvs_cpu_attn(kvs_backend *be, int32_t layer, const float *q, float *out, const kvs_taps *taps) {
    kvs_cpu *cpu = (kvs_cpu *)be;
    if (!cpu->step->n) return;
    const kvs_kv *kv = cpu->step->rows[0].kv; /* all sessions of a step are of one model */
    attn_job job = {.cpu = cpu,
                    .q = q,
                    .out = out,
                    .taps = *taps,
                    .n_rows = cpu->step->n,
                    .n_head = kv->n_head,
                    .n_kv_head = kv->n_kv_head,
                    .head_dim = kv->head_dim,
                    .layer = layer};
    run(&job, causal_task);
}

void kvs_cpu_attn_full(kvs_backend *be, const float *q, const float *k, const float *v, float *out, int32_t n, int32_t n_head,
                       int32_t head_dim, int32_t rounding) {
    kvs_cpu *cpu = (kvs_cpu *)be;
    if (cpu->bf16 && rounding == KVS_ROUND_BF16) {
        kvs_cpu_attn_full_bf16(cpu, q, k, v, out, n, n_head, head_dim);
        return;
    }
    attn_job job = {
        .cpu = cpu, .q = q, .k = k, .v = v, .out = out, .n_rows = n, .n_head = n_head, .n_kv_head = n_head, .head_dim = head_dim};
    run(&job, full_task);
}
