/* selftest_attn.c - attention, and what PruneHal asks of a cache, for tests. */
#include "selftest.h"

#include <stdlib.h>

int32_t kvs_test_attn(const char *isa, int32_t threads, int32_t kv_type, const float *q, const float *k, const float *v, int32_t n_q,
                      int32_t n_kv, int32_t n_head, int32_t n_head_kv, int32_t head_dim, int32_t exclude_self, float *out, float *entropy) {
    return kvs_test_taps(isa, threads, kv_type, q, k, v, n_q, n_kv, n_head, n_head_kv, head_dim, exclude_self, NULL, 0, out, entropy, NULL,
                         NULL);
}

/* Keys and values go into the cache, then the queries of its last n_q rows look at it. All arguments are on the device. */
static int attend(kvs_backend *be, kvs_kv *kv, int32_t n_q, const float *q, const float *k, const float *v, float *out,
                  const kvs_taps *taps) {
    kvs_step step;
    kvs_row *rows = kvs_selftest_rows(kv, kv->n_ctx);
    if (!rows) return KVS_E_MEMORY;
    kvs_selftest_begin(be, &step, rows, kv->n_ctx);
    be->ops->kv_put(be, 0, k, v);
    int status = be->ops->end(be, NULL);
    kvs_selftest_begin(be, &step, rows + kv->n_ctx - n_q, n_q);
    be->ops->attn(be, 0, q, out, taps);
    int second = be->ops->end(be, NULL);
    free(rows);
    return status ? status : second;
}

int32_t kvs_test_taps(const char *isa, int32_t threads, int32_t kv_type, const float *q, const float *k, const float *v, int32_t n_q,
                      int32_t n_kv, int32_t n_head, int32_t n_head_kv, int32_t head_dim, int32_t exclude_self, const int32_t *spans,
                      int32_t n_spans, float *out, float *entropy, float *mass, float *lse) {
    int status;
    if (!kvs_selftest_shape(kv_type, n_head, n_head_kv, head_dim) || n_q < 1 || n_q > n_kv) return KVS_E_ARGUMENT;
    kvs_lent lent = {.be = kvs_selftest_open(isa, threads, &status)};
    if (!lent.be) return status;
    kvs_kv kv = kvs_selftest_kv(kv_type, n_head, n_head_kv, head_dim, n_kv);
    kv.exclude_self = exclude_self;
    kv.spans = (kvs_range *)(void *)spans;
    kv.n_spans = kv.room_spans = n_spans;
    int64_t values = (int64_t)n_q * n_head, width = (int64_t)n_head_kv * head_dim;
    kvs_taps taps = {kvs_lend_back(&lent, entropy, values), kvs_lend_back(&lent, mass, values), kvs_lend_back(&lent, lse, values)};
    q = kvs_lend(&lent, q, values * head_dim);
    k = kvs_lend(&lent, k, n_kv * width);
    v = kvs_lend(&lent, v, n_kv * width);
    out = kvs_lend_back(&lent, out, values * head_dim);
    if (kvs_selftest_kv_memory(&lent, &kv)) status = attend(lent.be, &kv, n_q, q, k, v, out, &taps);
    return kvs_selftest_finish(&lent, status);
}

int32_t kvs_test_attn_full(const char *isa, int32_t threads, const float *q, const float *k, const float *v, int32_t n, int32_t n_head,
                           int32_t head_dim, int32_t rounding, float *out) {
    int status;
    kvs_step step;
    kvs_lent lent = {.be = kvs_selftest_open(isa, threads, &status)};
    if (!lent.be) return status;
    int64_t values = (int64_t)n * n_head * head_dim;
    q = kvs_lend(&lent, q, values);
    k = kvs_lend(&lent, k, values);
    v = kvs_lend(&lent, v, values);
    out = kvs_lend_back(&lent, out, values);
    if (lent.status) return kvs_selftest_finish(&lent, KVS_OK);
    kvs_selftest_begin(lent.be, &step, NULL, 0);
    lent.be->ops->attn_full(lent.be, q, k, v, out, n, n_head, head_dim, rounding);
    return kvs_selftest_finish(&lent, lent.be->ops->end(lent.be, NULL));
}

/* ---- PruneHal ---- */

/* The query of one row behind all keys, through kv_record, then kv_score. */
static int score(kvs_lent *lent, kvs_kv *kv, const float *q, const float *k, int32_t maximum, float *scores) {
    kvs_step step;
    kvs_backend *be = lent->be;
    int32_t n = kv->n_ctx;
    uint64_t heads = (uint64_t)kv->n_head * sizeof(float), query = heads * (uint64_t)kv->head_dim;
    float *out = kvs_lend_new(lent, query);
    kvs_taps taps = {kvs_lend_new(lent, heads), kvs_lend_new(lent, heads), kvs_lend_new(lent, heads)};
    kv->query = kvs_lend_new(lent, query);
    kv->lse = kvs_lend_new(lent, heads);
    kvs_row *rows = kvs_selftest_rows(kv, n);
    if (!kvs_selftest_kv_memory(lent, kv) || !rows) {
        free(rows);
        return KVS_E_MEMORY;
    }
    kvs_selftest_begin(be, &step, rows, n);
    be->ops->kv_put(be, 0, k, k);
    int status = be->ops->end(be, NULL);
    kvs_selftest_begin(be, &step, rows + n - 1, 1);
    be->ops->attn(be, 0, q, out, &taps);
    be->ops->kv_record(be, 0, q, &taps);
    be->ops->kv_score(be, kv, 0, maximum, scores);
    int second = be->ops->end(be, NULL);
    free(rows);
    return status ? status : second;
}

int32_t kvs_test_score(const char *isa, int32_t threads, int32_t kv_type, const float *q, const float *k, int32_t n_kv, int32_t n_head,
                       int32_t n_head_kv, int32_t head_dim, const int32_t *spans, int32_t n_spans, int32_t maximum, float *scores) {
    int status;
    if (!kvs_selftest_shape(kv_type, n_head, n_head_kv, head_dim) || n_kv < 1) return KVS_E_ARGUMENT;
    kvs_lent lent = {.be = kvs_selftest_open(isa, threads, &status)};
    if (!lent.be) return status;
    kvs_kv kv = kvs_selftest_kv(kv_type, n_head, n_head_kv, head_dim, n_kv);
    kv.spans = (kvs_range *)(void *)spans;
    kv.n_spans = kv.room_spans = n_spans;
    int64_t n_scores = 0;
    for (int32_t i = 0; i < n_spans; i++) n_scores += kv.spans[i].n;
    q = kvs_lend(&lent, q, (int64_t)n_head * head_dim);
    k = kvs_lend(&lent, k, (int64_t)n_kv * n_head_kv * head_dim);
    scores = kvs_lend_back(&lent, scores, n_head_kv * n_scores);
    return kvs_selftest_finish(&lent, score(&lent, &kv, q, k, maximum, scores));
}

/* The first n rows of all heads, K and V: (n_kv_head, n, head_dim) */
static int read_heads(kvs_backend *be, const kvs_kv *kv, int32_t n, float *const out[2]) {
    for (int side = 0; side < 2; side++) {
        uint8_t *store = kvs_selftest_store(be, kv, side ? kv->v : kv->k);
        if (!store) return KVS_E_MEMORY;
        for (int32_t h = 0; h < kv->n_kv_head; h++) kvs_selftest_head(kv, store, h, n, out[side] + (int64_t)h * n * kv->head_dim);
        free(store);
    }
    return KVS_OK;
}

static int leave_and_return(kvs_backend *be, kvs_kv *kv, const kvs_move *moves, float *const left[2], float *const back[2]) {
    kvs_step step;
    int32_t n = moves->n_rows;
    kvs_selftest_begin(be, &step, NULL, 0);
    be->ops->kv_gather(be, kv, moves, kv->n_kv_head);
    be->ops->kv_trim(be, kv, 0, n - moves->n);
    int status = be->ops->end(be, NULL);
    if (!status) status = read_heads(be, kv, n - moves->n, left);
    kvs_selftest_begin(be, &step, NULL, 0);
    be->ops->kv_scatter(be, kv, moves, kv->n_kv_head);
    int second = be->ops->end(be, NULL);
    if (!status) status = second;
    return status ? status : read_heads(be, kv, n, back);
}

int32_t kvs_test_gather(const char *isa, int32_t threads, int32_t kv_type, const float *k, const float *v, int32_t n_kv, int32_t n_head_kv,
                        int32_t head_dim, int32_t n_ctx, const int32_t *places, int32_t n, float *k_left, float *v_left, float *k_back,
                        float *v_back) {
    int status;
    if (!kvs_selftest_shape(kv_type, n_head_kv, n_head_kv, head_dim) || n < 1 || n_kv < n || n_ctx < n_kv) return KVS_E_ARGUMENT;
    kvs_lent lent = {.be = kvs_selftest_open(isa, threads, &status)};
    if (!lent.be) return status;
    kvs_step step;
    kvs_kv kv = kvs_selftest_kv(kv_type, n_head_kv, n_head_kv, head_dim, n_ctx);
    kvs_row *rows = kvs_selftest_rows(&kv, n_kv);
    kvs_move *moves = kvs_calloc((uint64_t)n_head_kv, sizeof *moves);
    uint8_t *kept = kvs_calloc((uint64_t)n_head_kv * 2 * (uint64_t)n, (uint64_t)kv.row_bytes);
    k = kvs_lend(&lent, k, (int64_t)n_kv * n_head_kv * head_dim);
    v = kvs_lend(&lent, v, (int64_t)n_kv * n_head_kv * head_dim);
    if (kvs_selftest_kv_memory(&lent, &kv) && rows && moves && kept) {
        kvs_selftest_begin(lent.be, &step, rows, n_kv);
        lent.be->ops->kv_put(lent.be, 0, k, v);
        status = lent.be->ops->end(lent.be, NULL);
        for (int32_t h = 0; h < n_head_kv; h++)
            moves[h] = (kvs_move){0, h, places + (int64_t)h * n, n, n_kv, kept + (int64_t)h * 2 * n * kv.row_bytes};
        if (!status) status = leave_and_return(lent.be, &kv, moves, (float *[]){k_left, v_left}, (float *[]){k_back, v_back});
    } else
        status = KVS_E_MEMORY;
    free(kept);
    free(moves);
    free(rows);
    return kvs_selftest_finish(&lent, status);
}
