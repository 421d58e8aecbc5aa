/* selftest_mix.c - kv_mix and kv_scale on a cache of one layer, for tests. */
#include "selftest.h"

#include <stdlib.h>

typedef struct mix_test {
    kvs_lent lent;
    kvs_kv kv;
    kvs_row *rows;
    kvs_mix mix;
    kvs_rope rope;
} mix_test;

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

static int read_rows(mix_test *t, const uint8_t *base, float *out) {
    uint8_t *store = kvs_selftest_store(t->lent.be, &t->kv, base);
    if (!store) return KVS_E_MEMORY;
    for (int32_t i = 0; i < t->kv.n_ctx; i++) kvs_selftest_row(&t->kv, store, i, out + (int64_t)i * t->kv.n_kv_head * t->kv.head_dim);
    free(store);
    return KVS_OK;
}

static int read_all(mix_test *t, float *k_out, float *v_out, float *exact_k, float *exact_v) {
    const kvs_kv *kv = &t->kv;
    kvs_backend *be = t->lent.be;
    uint64_t ring = (uint64_t)kv->n_exact * (uint64_t)kv->n_kv_head * (uint64_t)kv->head_dim * sizeof(float);
    int status = read_rows(t, kv->k, k_out);
    if (!status) status = read_rows(t, kv->v, v_out);
    if (status || !ring) return status;
    be->ops->download(be, exact_k, kv->exact_k, ring);
    be->ops->download(be, exact_v, kv->exact_v, ring);
    return KVS_OK;
}

static int put(mix_test *t, const float *k, const float *v) {
    kvs_step step;
    kvs_backend *be = t->lent.be;
    kvs_selftest_begin(be, &step, t->rows, t->kv.n_ctx);
    be->ops->kv_put(be, 0, k, v);
    return be->ops->end(be, NULL);
}

static int put_and_mix(mix_test *t, kvs_mix_job *job, const float *k, const float *v) {
    kvs_step step;
    kvs_backend *be = t->lent.be;
    int status = put(t, k, v);
    if (status) return status;
    kvs_selftest_begin(be, &step, t->rows + job->index, job->mix->n);
    be->ops->angles(be, &t->rope);
    be->ops->kv_mix(be, 0, job, &t->rope);
    return be->ops->end(be, NULL);
}

int32_t kvs_test_mix(const char *isa, int32_t threads, int32_t kv_type, int32_t n_kv_head, int32_t head_dim, int32_t n_rows, int32_t first,
                     int32_t n, const float *w, float gamma, int32_t target, int32_t rope_pre, int32_t n_rot, const float *inv_freq,
                     const float *k, const float *v, int32_t n_exact, float *k_out, float *v_out, float *exact_k, float *exact_v) {
    int status;
    if (!kvs_selftest_shape(kv_type, n_kv_head, n_kv_head, head_dim) || n < 1 || first < 0 || first + n > n_rows || n_rot > head_dim)
        return KVS_E_ARGUMENT;
    mix_test t = {.lent = {.be = kvs_selftest_open(isa, threads, &status)}, .rope = {.n_rot = n_rot}};
    kvs_backend *be = t.lent.be;
    if (!be) return status;
    int64_t values = (int64_t)n_rows * n_kv_head * head_dim;
    t.kv = kvs_selftest_kv(kv_type, n_kv_head, n_kv_head, head_dim, n_rows);
    t.kv.n_exact = n_exact;
    t.rope.inv_freq = kvs_lend(&t.lent, inv_freq, n_rot / 2);
    t.rope.table = kvs_lend_new(&t.lent, ((uint64_t)n_rows * (uint64_t)n_rot + 1) * sizeof(float));
    t.rows = kvs_selftest_rows(&t.kv, n_rows);
    k = kvs_lend(&t.lent, k, values);
    v = kvs_lend(&t.lent, v, values);
    kvs_mix_job job = {&t.kv, &t.mix, 0, first, KVS_MAX(n_rows - n_exact, 0), gamma, target, rope_pre};
    bool ok = kvs_selftest_kv_memory(&t.lent, &t.kv) && t.rows && pack(&t.mix, w, n);
    status = ok ? put_and_mix(&t, &job, k, v) : KVS_E_MEMORY;
    if (!status) status = read_all(&t, k_out, v_out, exact_k, exact_v);
    kvs_mix_free(&t.mix);
    free(t.rows);
    return kvs_selftest_finish(&t.lent, status);
}

/* Once launched at once, where a step has no rows; then as a part of steps of one row, which are graphs on a GPU. */
static int scale(mix_test *t, kvs_scale_job *job, const int32_t *counts, int32_t n_steps) {
    kvs_step step;
    kvs_backend *be = t->lent.be;
    int status = KVS_OK;
    for (int32_t i = 0; i < n_steps && !status; i++) {
        job->n = counts[i];
        kvs_selftest_begin(be, &step, t->rows + t->kv.n_ctx - 1, i > 0);
        be->ops->kv_scale(be, 0, job);
        status = be->ops->end(be, NULL);
    }
    return status;
}

int32_t kvs_test_scale(const char *isa, int32_t threads, int32_t kv_type, int32_t n_kv_head, int32_t head_dim, int32_t n_rows,
                       const int32_t *indices, const int32_t *places, int32_t n_sets, int32_t room, const int32_t *counts, int32_t n_steps,
                       float factor, int32_t target, const float *k, const float *v, int32_t n_exact, float *k_out, float *v_out,
                       float *exact_k, float *exact_v) {
    int status;
    if (!kvs_selftest_shape(kv_type, n_kv_head, n_kv_head, head_dim) || n_rows < 1) return KVS_E_ARGUMENT;
    mix_test t = {.lent = {.be = kvs_selftest_open(isa, threads, &status)}};
    if (!t.lent.be) return status;
    int64_t values = (int64_t)n_rows * n_kv_head * head_dim;
    t.kv = kvs_selftest_kv(kv_type, n_kv_head, n_kv_head, head_dim, n_rows);
    t.kv.n_exact = n_exact;
    t.rows = kvs_selftest_rows(&t.kv, n_rows);
    k = kvs_lend(&t.lent, k, values);
    v = kvs_lend(&t.lent, v, values);
    kvs_scale_job job = {&t.kv, indices, places, 0, room, n_sets, KVS_MAX(n_rows - n_exact, 0), factor, target};
    status = kvs_selftest_kv_memory(&t.lent, &t.kv) && t.rows ? put(&t, k, v) : KVS_E_MEMORY;
    if (!status) status = scale(&t, &job, counts, n_steps);
    if (!status) status = read_all(&t, k_out, v_out, exact_k, exact_v);
    free(t.rows);
    return kvs_selftest_finish(&t.lent, status);
}
