/* selftest_mix.c - kv_mix on a cache of one layer, for tests. It goes through the op table. */
#include "cpu.h"

#include <stdlib.h>
#include <string.h>

typedef struct mix_test {
    kvs_backend *be;
    kvs_kv kv;
    kvs_row *rows;
    kvs_mix mix;
    kvs_rope rope;
} mix_test;

static bool alloc_test(mix_test *t, int32_t n_rows) {
    kvs_kv *kv = &t->kv;
    uint64_t store = (uint64_t)kv->n_kv_head * (uint64_t)n_rows * (uint64_t)kv->row_bytes;
    uint64_t ring = (uint64_t)kv->n_exact * (uint64_t)kv->n_kv_head * (uint64_t)kv->head_dim * sizeof(float);
    kv->k = t->be->ops->alloc(t->be, store);
    kv->v = t->be->ops->alloc(t->be, store);
    if (kv->n_exact) kv->exact_k = t->be->ops->alloc(t->be, ring), kv->exact_v = t->be->ops->alloc(t->be, ring);
    t->rows = kvs_calloc((uint64_t)n_rows, sizeof *t->rows);
    t->rope.table = kvs_calloc((uint64_t)n_rows * (uint64_t)t->rope.n_rot + 1, sizeof(float));
    for (int32_t i = 0; t->rows && i < n_rows; i++) t->rows[i] = (kvs_row){.kv = kv, .index = i, .pos = i};
    return kv->k && kv->v && (!kv->n_exact || (kv->exact_k && kv->exact_v)) && t->rows && t->rope.table;
}

static void free_test(mix_test *t) {
    void *blocks[] = {t->kv.k, t->kv.v, t->kv.exact_k, t->kv.exact_v};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) t->be->ops->release(t->be, blocks[i]);
    t->be->ops->close(t->be);
    kvs_mix_free(&t->mix);
    free(t->rope.table);
    free(t->rows);
}

/* Columns of w (n, n), row-major, that are not zero. */
static bool pack(kvs_mix *mix, const float *w, int32_t n) {
    float *columns = kvs_calloc((uint64_t)n * KVS_MIX_COLUMNS, sizeof *columns);
    bool ok = columns && kvs_mix_reset(mix, n);
    int32_t target[KVS_MIX_COLUMNS], n_target = 0;
    for (int32_t j = 0; j < n && ok; j++) {
        bool used = false;
        for (int32_t i = 0; i < n; i++) {
            columns[(int64_t)n_target * n + i] = w[(int64_t)i * n + j];
            used = used || w[(int64_t)i * n + j] != 0.0f;
        }
        if (used) target[n_target++] = j;
        if (n_target == KVS_MIX_COLUMNS) ok = kvs_mix_add(mix, target, n_target, columns), n_target = 0;
    }
    if (ok && n_target) ok = kvs_mix_add(mix, target, n_target, columns);
    free(columns);
    return ok;
}

static void read_rows(const kvs_kv *kv, const uint8_t *base, float *out) {
    for (int32_t i = 0; i < kv->n_ctx; i++)
        for (int32_t h = 0; h < kv->n_kv_head; h++, out += kv->head_dim)
            kvs_kv_row_to_f32(kv->type, kvs_kv_rows(kv, (uint8_t *)base, 0, h) + i * kv->row_bytes, out, kv->head_dim);
}

static int put_and_mix(mix_test *t, kvs_mix_job *job, const float *k, const float *v) {
    const kvs_ops *ops = t->be->ops;
    kvs_step all = {.rows = t->rows, .n = t->kv.n_ctx};
    ops->begin(t->be, &all);
    ops->kv_put(t->be, 0, k, v);
    int status = ops->end(t->be, NULL);
    if (status) return status;
    kvs_step mixed = {.rows = t->rows + job->index, .n = job->mix->n};
    ops->begin(t->be, &mixed);
    ops->angles(t->be, &t->rope);
    ops->kv_mix(t->be, 0, job, &t->rope);
    return ops->end(t->be, NULL);
}

int32_t kvs_test_mix(const char *isa, int32_t threads, int32_t kv_type, int32_t n_kv_head, int32_t head_dim, int32_t n_rows, int32_t first,
                     int32_t n, const float *w, float gamma, int32_t target, int32_t rope_pre, int32_t n_rot, const float *inv_freq,
                     const float *k, const float *v, int32_t n_exact, float *k_out, float *v_out, float *exact_k, float *exact_v) {
    const kvs_isa *chosen;
    if (n_kv_head < 1 || head_dim < 1 || head_dim > KVS_MAX_HEAD_DIM || n < 1 || first < 0 || first + n > n_rows || n_rot > head_dim)
        return KVS_E_ARGUMENT;
    int status = kvs_isa_choose(isa, &chosen, NULL);
    mix_test t = {.rope = {.n_rot = n_rot, .inv_freq = inv_freq}};
    if (!status) status = kvs_cpu_open(threads, &t.be, NULL);
    if (status) return status;
    ((kvs_cpu *)t.be)->isa = chosen;
    t.kv = (kvs_kv){.type = kv_type,
                    .n_layer = 1,
                    .n_head = n_kv_head,
                    .n_kv_head = n_kv_head,
                    .head_dim = head_dim,
                    .n_ctx = n_rows,
                    .n_exact = n_exact,
                    .row_bytes = kvs_kv_row_bytes(kv_type, head_dim)};
    kvs_mix_job job = {&t.kv, &t.mix, 0, first, KVS_MAX(n_rows - n_exact, 0), gamma, target, rope_pre};
    status = alloc_test(&t, n_rows) && pack(&t.mix, w, n) ? put_and_mix(&t, &job, k, v) : KVS_E_MEMORY;
    if (!status) {
        uint64_t ring = (uint64_t)n_exact * (uint64_t)n_kv_head * (uint64_t)head_dim * sizeof(float);
        read_rows(&t.kv, t.kv.k, k_out);
        read_rows(&t.kv, t.kv.v, v_out);
        if (n_exact) memcpy(exact_k, t.kv.exact_k, ring), memcpy(exact_v, t.kv.exact_v, ring);
    }
    free_test(&t);
    return status;
}
