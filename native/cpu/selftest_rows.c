/* selftest_rows.c - the ops of rows.c, attention and the cache one by one, for tests. They go through the op table. */
#include "cpu.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A backend with the kernels of that name; NULL if this CPU can't run them. */
static kvs_backend *open_isa(const char *isa, int32_t threads, int *status) {
    const kvs_isa *chosen;
    kvs_backend *be = NULL;
    *status = kvs_isa_choose(isa, &chosen, NULL);
    if (!*status) *status = kvs_cpu_open(threads, &be, NULL);
    if (be) {
        ((kvs_cpu *)be)->isa = chosen;
        ((kvs_cpu *)be)->bf16 = kvs_isa_bf16(chosen);
    }
    return be;
}

static void begin(kvs_backend *be, kvs_step *step, const kvs_row *rows, int32_t n) {
    *step = (kvs_step){.rows = rows, .n = n};
    be->ops->begin(be, step);
}

static int finish(kvs_backend *be) {
    int status = be->ops->end(be, NULL);
    be->ops->close(be);
    return status;
}

int32_t kvs_test_norm(const char *isa, const float *x, const float *w, const float *b, float eps, int32_t n, int32_t cols, float *y) {
    int status;
    kvs_step step;
    kvs_backend *be = open_isa(isa, 1, &status);
    if (!be) return status;
    begin(be, &step, NULL, 0);
    be->ops->norm(be, y, x, w, b, eps, n, cols);
    return finish(be);
}

int32_t kvs_test_rope(const char *isa, float *x, const int32_t *pos, int32_t n, int32_t n_head, int32_t head_dim, const float *inv_freq,
                      int32_t n_rot) {
    int status;
    if (n < 1 || n_rot < 0 || n_rot > head_dim || n_rot % 2) return KVS_E_ARGUMENT;
    kvs_backend *be = open_isa(isa, 1, &status);
    if (!be) return status;
    kvs_step step;
    kvs_row *rows = kvs_calloc((uint64_t)n, sizeof *rows);
    kvs_rope rope = {.n_rot = n_rot, .inv_freq = inv_freq, .table = kvs_calloc((uint64_t)n * (uint64_t)n_rot, sizeof(float))};
    if (rows && rope.table) {
        for (int32_t i = 0; i < n; i++) rows[i].pos = pos[i];
        begin(be, &step, rows, n);
        be->ops->angles(be, &rope);
        be->ops->rope(be, x, &rope, n, n_head, head_dim);
        status = be->ops->end(be, NULL);
    } else
        status = KVS_E_MEMORY;
    be->ops->close(be);
    free(rope.table);
    free(rows);
    return status;
}

int32_t kvs_test_unary(const char *isa, const char *op, float *x, const float *y, int64_t n) {
    static const char *const names[] = {[KVS_GELU] = "gelu", [KVS_GELU_TANH] = "gelu_tanh", [KVS_GELU_QUICK] = "gelu_quick"};
    int status;
    kvs_step step;
    kvs_backend *be = open_isa(isa, 1, &status);
    if (!be) return status;
    begin(be, &step, NULL, 0);
    bool known = true;
    if (!strcmp(op, "add"))
        be->ops->add(be, x, y, n);
    else if (!strcmp(op, "silu_mul"))
        be->ops->gate(be, x, y, n);
    else {
        int32_t kind = KVS_GELU;
        while (kind <= KVS_GELU_QUICK && strcmp(op, names[kind])) kind++;
        known = kind <= KVS_GELU_QUICK;
        if (known) be->ops->unary(be, kind, x, n);
    }
    status = finish(be);
    return known ? status : KVS_E_ARGUMENT;
}

int32_t kvs_test_finite(const char *isa, int32_t threads, const float *x, int32_t n, int32_t cols, float limit, int32_t *row,
                        float *value) {
    int status;
    kvs_backend *be = open_isa(isa, threads, &status);
    if (!be) return status;
    kvs_fault fault = {0};
    kvs_step step = {.fault = &fault};
    be->ops->begin(be, &step);
    be->ops->finite(be, x, n, cols, limit, 1);
    be->ops->finite(be, x, n, cols, 0, 2); /* what comes after the first one is not looked at */
    status = finish(be);
    *row = fault.row;
    *value = fault.value;
    return fault.place == 2 ? KVS_OK : status;
}

/* ---- a cache of one layer ---- */

static void free_kv(kvs_backend *be, kvs_kv *kv) {
    void *blocks[] = {kv->k, kv->v, kv->entropy, kv->strength, kv->mass, kv->exact_k, kv->exact_v, kv->exact_o};
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; i++) be->ops->release(be, blocks[i]);
}

/* A cache of one layer, without its memory. */
static kvs_kv one_layer(int32_t type, int32_t n_head, int32_t n_kv_head, int32_t head_dim, int32_t n_ctx) {
    return (kvs_kv){.type = type,
                    .n_layer = 1,
                    .n_head = n_head,
                    .n_kv_head = n_kv_head,
                    .head_dim = head_dim,
                    .n_ctx = n_ctx,
                    .n_group = 1,
                    .row_bytes = kvs_kv_row_bytes(type, head_dim)};
}

static bool alloc_kv(kvs_backend *be, kvs_kv *kv) {
    uint64_t store = (uint64_t)kv->n_kv_head * (uint64_t)kv->n_ctx * (uint64_t)kv->row_bytes;
    uint64_t history = (uint64_t)kv->n_ctx * (uint64_t)kv->n_group * sizeof(float);
    uint64_t ring = (uint64_t)kv->n_exact * (uint64_t)kv->head_dim * sizeof(float);
    kv->k = be->ops->alloc(be, store);
    kv->v = be->ops->alloc(be, store);
    kv->entropy = be->ops->alloc(be, history);
    kv->strength = be->ops->alloc(be, history);
    kv->mass = be->ops->alloc(be, (uint64_t)kv->n_ctx * sizeof(float));
    if (!kv->k || !kv->v || !kv->entropy || !kv->strength || !kv->mass) return false;
    if (!kv->n_exact) return true;
    kv->exact_k = be->ops->alloc(be, ring * (uint64_t)kv->n_kv_head);
    kv->exact_v = be->ops->alloc(be, ring * (uint64_t)kv->n_kv_head);
    kv->exact_o = be->ops->alloc(be, ring * (uint64_t)kv->n_head);
    return kv->exact_k && kv->exact_v && kv->exact_o;
}

static kvs_row *number_rows(kvs_kv *kv, int32_t n) {
    kvs_row *rows = kvs_calloc((uint64_t)n, sizeof *rows);
    for (int32_t i = 0; rows && i < n; i++) rows[i] = (kvs_row){.kv = kv, .index = i, .pos = i};
    return rows;
}

static bool good_shape(int32_t kv_type, int32_t n_head, int32_t n_kv_head, int32_t head_dim) {
    return (kv_type == KVS_TYPE_F32 || kv_type == KVS_TYPE_F16 || kv_type == KVS_TYPE_Q8_0) && n_kv_head > 0 && n_head > 0 &&
           n_head % n_kv_head == 0 && head_dim > 0 && head_dim <= KVS_MAX_HEAD_DIM;
}

int32_t kvs_test_attn(const char *isa, int32_t threads, int32_t kv_type, const float *q, const float *k, const float *v, int32_t n_q,
                      int32_t n_kv, int32_t n_head, int32_t n_head_kv, int32_t head_dim, int32_t exclude_self, float *out, float *entropy) {
    return kvs_test_taps(isa, threads, kv_type, q, k, v, n_q, n_kv, n_head, n_head_kv, head_dim, exclude_self, NULL, 0, out, entropy, NULL,
                         NULL);
}

int32_t kvs_test_taps(const char *isa, int32_t threads, int32_t kv_type, const float *q, const float *k, const float *v, int32_t n_q,
                      int32_t n_kv, int32_t n_head, int32_t n_head_kv, int32_t head_dim, int32_t exclude_self, const int32_t *spans,
                      int32_t n_spans, float *out, float *entropy, float *mass, float *lse) {
    int status;
    if (!good_shape(kv_type, n_head, n_head_kv, head_dim) || n_q < 1 || n_q > n_kv) return KVS_E_ARGUMENT;
    kvs_backend *be = open_isa(isa, threads, &status);
    if (!be) return status;
    kvs_kv kv = one_layer(kv_type, n_head, n_head_kv, head_dim, n_kv);
    kv.exclude_self = exclude_self;
    kv.spans = (kvs_range *)(void *)spans;
    kv.n_spans = n_spans;
    kvs_step step;
    kvs_row *rows = number_rows(&kv, n_kv);
    if (rows && alloc_kv(be, &kv)) {
        begin(be, &step, rows, n_kv);
        be->ops->kv_put(be, 0, k, v);
        be->ops->end(be, NULL);
        begin(be, &step, rows + n_kv - n_q, n_q);
        be->ops->attn(be, 0, q, out, &(kvs_taps){entropy, mass, lse});
        status = be->ops->end(be, NULL);
    } else
        status = KVS_E_MEMORY;
    free_kv(be, &kv);
    be->ops->close(be);
    free(rows);
    return status;
}

int32_t kvs_test_attn_full(const char *isa, int32_t threads, const float *q, const float *k, const float *v, int32_t n, int32_t n_head,
                           int32_t head_dim, int32_t rounding, float *out) {
    int status;
    kvs_step step;
    kvs_backend *be = open_isa(isa, threads, &status);
    if (!be) return status;
    begin(be, &step, NULL, 0);
    be->ops->attn_full(be, q, k, v, out, n, n_head, head_dim, rounding);
    return finish(be);
}

/* ---- PruneHal ---- */

/* The query of one row behind all keys, through kv_record, then kv_score. */
static int score(kvs_backend *be, kvs_kv *kv, kvs_row *rows, const float *q, const float *k, int32_t maximum, float *scores) {
    kvs_step step;
    int32_t n = kv->n_ctx;
    float *out = kvs_calloc(3 * (uint64_t)kv->n_head * (uint64_t)kv->head_dim, sizeof *out);
    float *taps = kvs_calloc(3 * (uint64_t)kv->n_head, sizeof *taps);
    kv->query = out ? out + kv->n_head * kv->head_dim : NULL;
    kv->lse = out ? out + 2 * kv->n_head * kv->head_dim : NULL;
    int status = KVS_E_MEMORY;
    if (rows && out && taps && alloc_kv(be, kv)) {
        begin(be, &step, rows, n);
        be->ops->kv_put(be, 0, k, k);
        be->ops->end(be, NULL);
        begin(be, &step, rows + n - 1, 1);
        kvs_taps t = {taps, taps + kv->n_head, taps + 2 * kv->n_head};
        be->ops->attn(be, 0, q, out, &t);
        be->ops->kv_record(be, 0, q, &t);
        be->ops->kv_score(be, kv, 0, maximum, scores);
        status = be->ops->end(be, NULL);
    }
    free(out);
    free(taps);
    return status;
}

int32_t kvs_test_score(const char *isa, int32_t threads, int32_t kv_type, const float *q, const float *k, int32_t n_kv, int32_t n_head,
                       int32_t n_head_kv, int32_t head_dim, const int32_t *spans, int32_t n_spans, int32_t maximum, float *scores) {
    int status;
    if (!good_shape(kv_type, n_head, n_head_kv, head_dim) || n_kv < 1) return KVS_E_ARGUMENT;
    kvs_backend *be = open_isa(isa, threads, &status);
    if (!be) return status;
    kvs_kv kv = one_layer(kv_type, n_head, n_head_kv, head_dim, n_kv);
    kv.spans = (kvs_range *)(void *)spans;
    kv.n_spans = n_spans;
    kvs_row *rows = number_rows(&kv, n_kv);
    status = score(be, &kv, rows, q, k, maximum, scores);
    free_kv(be, &kv);
    be->ops->close(be);
    free(rows);
    return status;
}

static void read_heads(const kvs_kv *kv, const uint8_t *base, int32_t n, float *out) { /* (n_kv_head, n, head_dim) */
    for (int32_t h = 0; h < kv->n_kv_head; h++)
        for (int32_t i = 0; i < n; i++, out += kv->head_dim)
            kvs_kv_row_to_f32(kv->type, kvs_kv_rows(kv, (uint8_t *)base, 0, h) + i * kv->row_bytes, out, kv->head_dim);
}

static int gather(kvs_backend *be, kvs_kv *kv, const kvs_move *moves, float *left[2], float *back[2]) {
    kvs_step step;
    int32_t n = moves->n_rows;
    begin(be, &step, NULL, 0);
    be->ops->kv_gather(be, kv, moves, kv->n_kv_head);
    be->ops->kv_trim(be, kv, 0, n - moves->n);
    int status = be->ops->end(be, NULL);
    for (int side = 0; side < 2; side++) read_heads(kv, side ? kv->v : kv->k, n - moves->n, left[side]);
    begin(be, &step, NULL, 0);
    be->ops->kv_scatter(be, kv, moves, kv->n_kv_head);
    if (!status) status = be->ops->end(be, NULL);
    for (int side = 0; side < 2; side++) read_heads(kv, side ? kv->v : kv->k, n, back[side]);
    return status;
}

int32_t kvs_test_gather(const char *isa, int32_t threads, int32_t kv_type, const float *k, const float *v, int32_t n_kv, int32_t n_head_kv,
                        int32_t head_dim, int32_t n_ctx, const int32_t *places, int32_t n, float *k_left, float *v_left, float *k_back,
                        float *v_back) {
    int status;
    if (!good_shape(kv_type, n_head_kv, n_head_kv, head_dim) || n < 1 || n_kv < n || n_ctx < n_kv) return KVS_E_ARGUMENT;
    kvs_backend *be = open_isa(isa, threads, &status);
    if (!be) return status;
    kvs_kv kv = one_layer(kv_type, n_head_kv, n_head_kv, head_dim, n_ctx);
    kvs_step step;
    kvs_row *rows = number_rows(&kv, n_kv);
    kvs_move *moves = kvs_calloc((uint64_t)n_head_kv, sizeof *moves);
    uint8_t *kept = kvs_calloc((uint64_t)n_head_kv * 2 * (uint64_t)n, (uint64_t)kv.row_bytes);
    if (rows && moves && kept && alloc_kv(be, &kv)) {
        begin(be, &step, rows, n_kv);
        be->ops->kv_put(be, 0, k, v);
        be->ops->end(be, NULL);
        for (int32_t h = 0; h < n_head_kv; h++)
            moves[h] = (kvs_move){0, h, places + (int64_t)h * n, n, n_kv, kept + (int64_t)h * 2 * n * kv.row_bytes};
        status = gather(be, &kv, moves, (float *[]){k_left, v_left}, (float *[]){k_back, v_back});
    } else
        status = KVS_E_MEMORY;
    free_kv(be, &kv);
    be->ops->close(be);
    free(kept);
    free(moves);
    free(rows);
    return status;
}

/* ---- KVSmooth ---- */

typedef struct smooth_test {
    kvs_backend *be;
    kvs_kv kv;
    const kvs_smooth_params *params;
    kvs_rope rope; /* theta 10000 over the whole head */
    kvs_row *rows;
    int32_t *queue;
} smooth_test;

static bool make_smooth_test(smooth_test *t, int32_t n) {
    t->rows = number_rows(&t->kv, n);
    t->queue = kvs_calloc((uint64_t)n, sizeof *t->queue);
    float *inv_freq = kvs_calloc(KVS_MAX_HEAD_DIM, sizeof *inv_freq);
    t->rope = (kvs_rope){.n_rot = t->kv.head_dim / 2 * 2, .inv_freq = inv_freq};
    for (int32_t i = 0; inv_freq && i < t->kv.head_dim / 2; i++) inv_freq[i] = powf(10000.0f, -2.0f * (float)i / (float)t->kv.head_dim);
    for (int32_t i = 0; t->queue && i < n; i++) t->queue[i] = i;
    return t->rows && t->queue && inv_freq && alloc_kv(t->be, &t->kv);
}

static void free_smooth_test(smooth_test *t) {
    free_kv(t->be, &t->kv);
    t->be->ops->close(t->be);
    free((void *)t->rope.inv_freq);
    free(t->queue);
    free(t->rows);
}

/* Row i as a step of its own; rows that end the prompt (row 0) enter the queue where warm_start asks for it. */
static int smooth_row(smooth_test *t, int32_t i, const float *k, const float *v, const float *entropy, float *out) {
    const kvs_smooth_params *p = t->params;
    const kvs_ops *ops = t->be->ops;
    int32_t oldest = KVS_MAX(i - p->window + 1, p->warm_start ? 0 : 1);
    kvs_smooth_job job = {.params = p,
                          .kv = &t->kv,
                          .index = i,
                          .prev = p->skip_first && i == 1 ? -1 : i - 1,
                          .pos_delta = 1,
                          .queue = t->queue + oldest,
                          .n_queue = i - oldest + 1};
    kvs_step step;
    begin(t->be, &step, t->rows + i, 1);
    ops->kv_put(t->be, 0, k, v);
    ops->kv_record(t->be, 0, NULL, &(kvs_taps){.entropy = (float *)entropy, .mass = (float *)entropy});
    ops->kv_put_out(t->be, 0, out);
    if (i) ops->kv_smooth(t->be, 0, &job, 1, &t->rope, out);
    return ops->end(t->be, NULL);
}

static void read_row(const kvs_kv *kv, const uint8_t *base, int32_t i, float *out) {
    for (int32_t h = 0; h < kv->n_kv_head; h++)
        kvs_kv_row_to_f32(kv->type, kvs_kv_rows(kv, (uint8_t *)base, 0, h) + i * kv->row_bytes, out + h * kv->head_dim, kv->head_dim);
}

/* With target O alone v stands for the attention outputs, too, and v_out takes the smoothed ones: K and V keep their values then. */
int32_t kvs_test_smooth(const char *isa, const kvs_smooth_params *p, int32_t kv_type, int32_t n_kv_head, int32_t head_dim, int32_t n,
                        const float *k, const float *v, const float *entropy, float *k_out, float *v_out, float *strength) {
    int status;
    if (!good_shape(kv_type, n_kv_head, n_kv_head, head_dim) || n < 1 || p->window < 1) return KVS_E_ARGUMENT;
    smooth_test t = {.be = open_isa(isa, 1, &status), .params = p};
    if (!t.be) return status;
    int32_t n_group = p->per_kv_head ? n_kv_head : 1;
    int64_t width = (int64_t)n_kv_head * head_dim;
    t.kv = (kvs_kv){.type = kv_type,
                    .n_layer = 1,
                    .n_head = n_kv_head,
                    .n_kv_head = n_kv_head,
                    .head_dim = head_dim,
                    .n_ctx = n,
                    .n_group = n_group,
                    .n_exact = 3,
                    .exclude_self = p->exclude_self,
                    .row_bytes = kvs_kv_row_bytes(kv_type, head_dim)};
    float *out = kvs_calloc((uint64_t)width, sizeof *out);
    status = make_smooth_test(&t, n) && out ? KVS_OK : KVS_E_MEMORY;
    for (int32_t i = 0; i < n && !status; i++) {
        memcpy(out, v + i * width, (size_t)width * sizeof *out);
        status = smooth_row(&t, i, k + i * width, v + i * width, entropy + (int64_t)i * n_kv_head, out);
        if (p->target == KVS_TARGET_O) memcpy(v_out + i * width, out, (size_t)width * sizeof *out);
    }
    for (int32_t i = 0; i < n && !status; i++) {
        read_row(&t.kv, t.kv.k, i, k_out + i * width);
        if (p->target != KVS_TARGET_O) read_row(&t.kv, t.kv.v, i, v_out + i * width);
    }
    if (!status) memcpy(strength, t.kv.strength, (size_t)n * (size_t)n_group * sizeof *strength);
    free(out);
    free_smooth_test(&t);
    return status;
}
