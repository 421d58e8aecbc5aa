/* selftest_smooth.c - kv_smooth on a cache of one layer, for tests. */
#include "selftest.h"

#include <math.h>
#include <stdlib.h>

typedef struct smooth_test {
    kvs_lent lent;
    kvs_kv kv;
    const kvs_smooth_params *params;
    kvs_rope rope; /* theta 10000 over the whole head */
    kvs_row *rows;
    int32_t *queue;
    const float *k, *v, *entropy; /* [dev] (n, n_kv_head, head_dim), and (n, n_kv_head) */
    float *out;                   /* [dev] of one row */
} smooth_test;

static bool make(smooth_test *t, int32_t n, const float *k, const float *v, const float *entropy) {
    int64_t width = (int64_t)t->kv.n_kv_head * t->kv.head_dim;
    float inv_freq[KVS_MAX_HEAD_DIM / 2];
    for (int32_t i = 0; i < t->kv.head_dim / 2; i++) inv_freq[i] = powf(10000.0f, -2.0f * (float)i / (float)t->kv.head_dim);
    float *frequencies = kvs_lend_new(&t->lent, sizeof inv_freq);
    if (frequencies) t->lent.be->ops->upload(t->lent.be, frequencies, inv_freq, (uint64_t)(t->kv.head_dim / 2) * sizeof *inv_freq);
    t->rope = (kvs_rope){.n_rot = t->kv.head_dim / 2 * 2, .inv_freq = frequencies};
    t->rows = kvs_selftest_rows(&t->kv, n);
    t->queue = kvs_calloc((uint64_t)n, sizeof *t->queue);
    for (int32_t i = 0; t->queue && i < n; i++) t->queue[i] = i;
    t->k = kvs_lend(&t->lent, k, n * width);
    t->v = kvs_lend(&t->lent, v, n * width);
    t->entropy = kvs_lend(&t->lent, entropy, (int64_t)n * t->kv.n_kv_head);
    t->out = kvs_lend_new(&t->lent, (uint64_t)width * sizeof *t->out);
    return kvs_selftest_kv_memory(&t->lent, &t->kv) && t->rows && t->queue;
}

/* Row i as a step of its own; rows that end the prompt (row 0) enter the queue where warm_start asks for it. */
static int smooth_row(smooth_test *t, int32_t i) {
    const kvs_smooth_params *p = t->params;
    kvs_backend *be = t->lent.be;
    int64_t width = (int64_t)t->kv.n_kv_head * t->kv.head_dim;
    float *entropy = (float *)(void *)(t->entropy + (int64_t)i * t->kv.n_kv_head);
    int32_t oldest = KVS_MAX(i - p->window + 1, p->warm_start ? 0 : 1);
    kvs_smooth_job job = {.params = p,
                          .kv = &t->kv,
                          .index = i,
                          .prev = p->skip_first && i == 1 ? -1 : i - 1,
                          .pos_delta = 1,
                          .queue = t->queue + oldest,
                          .n_queue = i - oldest + 1};
    kvs_step step;
    be->ops->copy(be, t->out, t->v + i * width, (uint64_t)width * sizeof *t->out);
    kvs_selftest_begin(be, &step, t->rows + i, 1);
    be->ops->kv_put(be, 0, t->k + i * width, t->v + i * width);
    be->ops->kv_record(be, 0, NULL, &(kvs_taps){.entropy = entropy, .mass = entropy});
    be->ops->kv_put_out(be, 0, t->out);
    if (i) be->ops->kv_smooth(be, 0, &job, 1, &t->rope, t->out);
    return be->ops->end(be, NULL);
}

/* Rows 0..n of a store: (n, n_kv_head, head_dim) */
static int read_rows(smooth_test *t, const uint8_t *base, int32_t n, float *out) {
    uint8_t *store = kvs_selftest_store(t->lent.be, &t->kv, base);
    if (!store) return KVS_E_MEMORY;
    for (int32_t i = 0; i < n; i++) kvs_selftest_row(&t->kv, store, i, out + (int64_t)i * t->kv.n_kv_head * t->kv.head_dim);
    free(store);
    return KVS_OK;
}

/* With target O alone v stands for the attention outputs, too, and v_out takes the smoothed ones: K and V keep their values then. */
static int run(smooth_test *t, int32_t n, float *k_out, float *v_out, float *strength) {
    kvs_backend *be = t->lent.be;
    bool outputs = t->params->target == KVS_TARGET_O;
    int64_t width = (int64_t)t->kv.n_kv_head * t->kv.head_dim;
    int status = KVS_OK;
    for (int32_t i = 0; i < n && !status; i++) {
        status = smooth_row(t, i);
        if (outputs) be->ops->download(be, v_out + i * width, t->out, (uint64_t)width * sizeof *v_out);
    }
    if (!status) status = read_rows(t, t->kv.k, n, k_out);
    if (!status && !outputs) status = read_rows(t, t->kv.v, n, v_out);
    be->ops->download(be, strength, t->kv.strength, (uint64_t)n * (uint64_t)t->kv.n_group * sizeof *strength);
    return status;
}

int32_t kvs_test_smooth(const char *isa, const kvs_smooth_params *p, int32_t kv_type, int32_t n_kv_head, int32_t head_dim, int32_t n,
                        const float *k, const float *v, const float *entropy, float *k_out, float *v_out, float *strength) {
    int status;
    if (!kvs_selftest_shape(kv_type, n_kv_head, n_kv_head, head_dim) || n < 1 || p->window < 1) return KVS_E_ARGUMENT;
    smooth_test t = {.lent = {.be = kvs_selftest_open(isa, 1, &status)}, .params = p};
    if (!t.lent.be) return status;
    t.kv = kvs_selftest_kv(kv_type, n_kv_head, n_kv_head, head_dim, n);
    t.kv.n_group = p->per_kv_head ? n_kv_head : 1;
    t.kv.n_exact = 3;
    t.kv.exclude_self = p->exclude_self;
    status = make(&t, n, k, v, entropy) ? run(&t, n, k_out, v_out, strength) : KVS_E_MEMORY;
    free(t.queue);
    free(t.rows);
    return kvs_selftest_finish(&t.lent, status);
}
