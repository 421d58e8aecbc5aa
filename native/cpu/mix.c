/* mix.c - kv_mix: rows of the cache become weighted sums of them, head by head. A head's rows are widened to float32 once and turned
 * back if keys are to be mixed without their positions; what comes out of the sums goes to the store, rounded once. */
#include "cpu.h"

#include <string.h>

enum { LINE = 16 }; /* floats of a cache line: rows in scratch begin on one, zeros fill the last */

typedef struct mixer {
    const kvs_cpu *cpu;
    const kvs_mix_job *job;
    const kvs_rope *rope;
    int32_t layer, width; /* head_dim in whole lines */
    int64_t scratch;      /* floats of one thread: the rows, then KVS_MIX_COLUMNS sums */
    int32_t sides[2], n_sides;
} mixer;

/* Angles of the run's row i, or the turn back. */
static void turn(const mixer *m, float *x, int32_t i, bool back) {
    int32_t n_rot = m->rope->n_rot;
    const float *angles = m->rope->table + (int64_t)(m->job->row + i) * n_rot;
    float reversed[KVS_MAX_HEAD_DIM];
    for (int32_t j = 0; j < n_rot; j++) reversed[j] = back && j % 2 ? -angles[j] : angles[j];
    m->cpu->isa->rows->rope(x, reversed, 1, m->job->kv->head_dim, n_rot);
}

static void store_mixed(const mixer *m, bool key, int32_t head, int32_t j, float *mixed) {
    const kvs_mix_job *job = m->job;
    const kvs_kv *kv = job->kv;
    const kvs_rowops *ops = m->cpu->isa->rows;
    uint8_t *row =
        kvs_kv_rows(kv, key ? kv->k : kv->v, m->layer, head) + (kvs_kv_place(kv, m->layer, job->index) + (int64_t)j) * kv->row_bytes;
    float *ring = key ? kv->exact_k : kv->exact_v, own[KVS_MAX_HEAD_DIM];
    if (key && job->rope_pre) turn(m, mixed, j, false);
    if (job->gamma != 1.0f) {
        ops->load(kv->type, row, own, kv->head_dim);
        ops->mix(mixed, own, job->gamma, 1.0f - job->gamma, kv->head_dim);
    }
    ops->store(kv->type, row, mixed, kv->head_dim);
    if (!ring || job->index + j < job->exact_from) return;
    ring += kvs_kv_exact(kv, m->layer, job->index + j, kv->n_kv_head) + (int64_t)head * kv->head_dim;
    memcpy(ring, mixed, (size_t)kv->head_dim * sizeof *ring);
}

static void mix_head(const mixer *m, bool key, int32_t head, float *x) {
    const kvs_kv *kv = m->job->kv;
    const kvs_mix *mix = m->job->mix;
    const kvs_rowops *ops = m->cpu->isa->rows;
    const uint8_t *rows =
        kvs_kv_rows(kv, key ? kv->k : kv->v, m->layer, head) + (int64_t)kvs_kv_place(kv, m->layer, m->job->index) * kv->row_bytes;
    float *sums = x + (int64_t)mix->n * m->width;
    for (int32_t i = 0; i < mix->n; i++) {
        float *row = x + (int64_t)i * m->width;
        ops->load(kv->type, rows + i * kv->row_bytes, row, kv->head_dim);
        memset(row + kv->head_dim, 0, (size_t)(m->width - kv->head_dim) * sizeof *row);
        if (key && m->job->rope_pre) turn(m, row, i, true);
    }
    for (int32_t p = 0; p < mix->n_panel; p++) {
        int32_t at = mix->start[p];
        ops->combine(sums, x, m->width, mix->source + at, mix->weight + (int64_t)at * KVS_MIX_COLUMNS, mix->start[p + 1] - at);
        for (int32_t c = 0; c < KVS_MIX_COLUMNS; c++) {
            int32_t j = mix->target[p * KVS_MIX_COLUMNS + c];
            if (j >= 0) store_mixed(m, key, head, j, sums + (int64_t)c * m->width);
        }
    }
}

static void mix_some(void *arg, int64_t begin, int64_t end, int32_t thread) {
    const mixer *m = arg;
    int32_t heads = m->job->kv->n_kv_head;
    for (int64_t i = begin; i < end; i++)
        mix_head(m, m->sides[i / heads] == KVS_TARGET_K, (int32_t)(i % heads), m->cpu->thread_scratch + thread * m->scratch);
}

void kvs_cpu_kv_mix(kvs_backend *be, int32_t layer, const kvs_mix_job *job, const kvs_rope *rope) {
    kvs_cpu *cpu = (kvs_cpu *)be;
    if (kvs_cpu_stopped(cpu)) return;
    mixer m = {.cpu = cpu, .job = job, .rope = rope, .layer = layer, .width = (job->kv->head_dim + LINE - 1) / LINE * LINE};
    m.scratch = ((int64_t)job->mix->n + KVS_MIX_COLUMNS) * m.width;
    if (!kvs_cpu_scratch(cpu, m.scratch)) return;
    if (job->target & KVS_TARGET_K) m.sides[m.n_sides++] = KVS_TARGET_K;
    if (job->target & KVS_TARGET_V) m.sides[m.n_sides++] = KVS_TARGET_V;
    kvs_cpu_loop(cpu, mix_some, &m, (int64_t)m.n_sides * job->kv->n_kv_head, 1);
}
