/* policy_dscr.c - DSCR (ICLR 2026, docs/methods.md): K and V of a picture's patches become weighted sums of those of its other patches,
 * the nearer in depth and in the plane the heavier. Here are the weights, and when; the sums are the op kv_mix. */
#include "policy.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_GRID = 4096 };

typedef struct dscr {
    kvs_policy base;
    kvs_dscr_params params; /* its list is our own copy */
    int32_t n_layer;
    bool *on; /* (n_layer) */
    /* of the picture at hand; made anew for each */
    kvs_mix mix;
    int32_t begin, end; /* its rows; end 0 = none */
    kvs_row *rows;      /* (room) */
    int32_t room;
} dscr;

static int refuse(kvs_error *err, const char *what, const char *message) { return kvs_policy_refuse(err, "DSCR", what, message); }

/* ---- parameters ---- */

static bool positive(float x) { return x > 0 && isfinite(x); }
static bool not_negative(float x) { return x >= 0 && isfinite(x); }

static int check_kernel(const kvs_dscr_params *p, kvs_error *err) {
    if (!positive(p->sigma_d)) return refuse(err, "sigma_d", "sigma_d must be over 0");
    if (!positive(p->sigma_s)) return refuse(err, "sigma_s", "sigma_s must be over 0");
    if (!not_negative(p->alpha)) return refuse(err, "alpha", "alpha must be at least 0");
    if (!not_negative(p->beta)) return refuse(err, "beta", "beta must be at least 0");
    if (!(p->gamma >= 0 && p->gamma <= 1)) return refuse(err, "gamma", "gamma must be in [0, 1]");
    if (!(p->cut >= 0 && p->cut < 1)) return refuse(err, "cut", "cut must be in [0, 1)");
    if (p->kernel != KVS_DSCR_SUM && p->kernel != KVS_DSCR_PRODUCT) return refuse(err, "kernel", "kernel is unknown");
    if (!not_negative(p->step_x) || !not_negative(p->step_y)) return refuse(err, "coord_norm", "a step of coordinates must be at least 0");
    return KVS_OK;
}

static int check(const kvs_dscr_params *p, int32_t n_layer, kvs_error *err) {
    if (p->struct_size != sizeof *p) return refuse(err, "struct_size", "kvs_dscr_params of another version");
    int status = check_kernel(p, err);
    if (status) return status;
    if (p->phase < KVS_DSCR_BEFORE_QUESTION || p->phase > KVS_DSCR_IN_LAYER) return refuse(err, "phase", "phase is unknown");
    if (!p->target || (p->target & ~(KVS_TARGET_K | KVS_TARGET_V))) return refuse(err, "target", "target is unknown");
    if (p->grid_w < 1 || p->grid_h < 1 || p->grid_w > MAX_GRID || p->grid_h > MAX_GRID)
        return refuse(err, "grid", "a picture's grid must have 1..4096 patches a side");
    return kvs_policy_check_layers("DSCR", p->layers, p->n_layers, n_layer, err);
}

/* ---- weights ---- */

/* ln f_d^alpha and ln f_s^beta of the patches i and j. Without depth f_d is 1 for all, as with a constant one. */
typedef struct proximity {
    double depth, place;
} proximity;

static proximity log_proximity(const kvs_dscr_params *p, const float *depth, int32_t i, int32_t j) {
    double d = depth ? (double)depth[i] - (double)depth[j] : 0.0;
    double x = (double)(i % p->grid_w - j % p->grid_w) * (double)p->step_x, y = (double)(i / p->grid_w - j / p->grid_w) * (double)p->step_y;
    double sigma_d = (double)p->sigma_d, sigma_s = (double)p->sigma_s;
    return (proximity){-(double)p->alpha * d * d / (2 * sigma_d * sigma_d), -(double)p->beta * (x * x + y * y) / (2 * sigma_s * sigma_s)};
}

static bool is_patch(const float *depth, int32_t i) { return !depth || !isnan(depth[i]); }

/* Weights below it add up to at most allowed: n of them do if each is below allowed / n, and then up in powers of two. */
static double threshold(const double *w, int32_t n, double allowed) {
    double least = allowed / n, below = 0;
    while (least > 0) {
        below = 0;
        for (int32_t i = 0; i < n; i++) below += w[i] < 2 * least ? w[i] : 0;
        if (below > allowed || 2 * least > 1) break; /* the largest is 1 or more, and stays */
        least *= 2;
    }
    return least;
}

/* Column j: weights (n) that sum to one, its own 0; 0 for padding. Exponents are taken from the largest, so that a narrow kernel leaves
 * the nearest patches and never nothing. False where there is no other patch. */
static bool fill_column(const kvs_dscr_params *p, const float *depth, int32_t j, double *w, float *column) {
    int32_t n = p->grid_w * p->grid_h;
    bool product = p->kernel == KVS_DSCR_PRODUCT;
    double top = -INFINITY, sum = 0, kept = 0;
    for (int32_t i = 0; i < n; i++) {
        if (i == j || !is_patch(depth, i)) continue;
        proximity near = log_proximity(p, depth, i, j);
        top = KVS_MAX(top, product ? near.depth + near.place : KVS_MAX(near.depth, near.place));
    }
    if (isinf(top)) return false;
    for (int32_t i = 0; i < n; i++) {
        w[i] = 0;
        if (i == j || !is_patch(depth, i)) continue;
        proximity near = log_proximity(p, depth, i, j);
        w[i] = product ? exp(near.depth + near.place - top) : exp(near.depth - top) + exp(near.place - top);
        sum += w[i];
    }
    double least = threshold(w, n, (double)p->cut * sum);
    for (int32_t i = 0; i < n; i++)
        if (w[i] >= least) kept += w[i];
    for (int32_t i = 0; i < n; i++) column[i] = w[i] >= least ? (float)(w[i] / kept) : 0.0f;
    return true;
}

/* The weights of one picture; false = out of memory. */
static bool make_weights(const kvs_dscr_params *p, const float *depth, kvs_mix *mix) {
    int32_t n = p->grid_w * p->grid_h, target[KVS_MIX_COLUMNS], n_target = 0;
    double *w = kvs_calloc((uint64_t)n, sizeof *w);
    float *columns = kvs_calloc((uint64_t)n * KVS_MIX_COLUMNS, sizeof *columns);
    bool ok = w && columns && kvs_mix_reset(mix, n);
    for (int32_t j = 0; j < n && ok; j++) {
        if (!is_patch(depth, j) || !fill_column(p, depth, j, w, columns + (int64_t)n_target * n)) continue;
        target[n_target++] = j;
        if (n_target == KVS_MIX_COLUMNS) ok = kvs_mix_add(mix, target, n_target, columns), n_target = 0;
    }
    if (ok && n_target) ok = kvs_mix_add(mix, target, n_target, columns);
    free(columns);
    free(w);
    return ok;
}

int32_t kvs_test_dscr_weights(const kvs_dscr_params *p, const float *depth, float *w) {
    int32_t n = p->grid_w * p->grid_h;
    kvs_mix mix = {0};
    bool ok = make_weights(p, depth, &mix);
    memset(w, 0, (size_t)n * (size_t)n * sizeof *w);
    for (int32_t panel = 0; panel < mix.n_panel && ok; panel++)
        for (int32_t s = mix.start[panel]; s < mix.start[panel + 1]; s++)
            for (int32_t c = 0; c < KVS_MIX_COLUMNS; c++) {
                int32_t j = mix.target[panel * KVS_MIX_COLUMNS + c];
                if (j >= 0) w[(int64_t)mix.source[s] * n + j] = mix.weight[(int64_t)s * KVS_MIX_COLUMNS + c];
            }
    kvs_mix_free(&mix);
    return ok ? KVS_OK : KVS_E_MEMORY;
}

/* ---- a picture ---- */

static bool reserve_rows(dscr *d, int32_t n) {
    if (n <= d->room) return true;
    kvs_row *grown = kvs_realloc(d->rows, (uint64_t)n, sizeof *grown);
    if (!grown) return false;
    d->rows = grown;
    d->room = n;
    return true;
}

/* Makes it the picture at hand. */
static int take_picture(dscr *d, const kvs_picture *picture, kvs_error *err) {
    d->end = 0;
    if (!make_weights(&d->params, picture->depth, &d->mix) || !reserve_rows(d, picture->n))
        return kvs_fail_memory(err, (uint64_t)picture->n * (uint64_t)picture->n * sizeof(float), "the weights of a picture");
    d->begin = picture->first;
    d->end = picture->first + picture->n;
    return KVS_OK;
}

/* newest: the newest row that the ring of exact rows has been given */
static kvs_mix_job job_of(const dscr *d, kvs_cache *cache, int32_t row, int32_t newest) {
    return (kvs_mix_job){.kv = &cache->kv,
                         .mix = &d->mix,
                         .row = row,
                         .index = d->begin,
                         .exact_from = newest + 1 - cache->kv.n_exact,
                         .gamma = d->params.gamma,
                         .target = d->params.target,
                         .rope_pre = d->params.rope_pre};
}

/* All layers of the picture at hand, as a step of its own. */
static int refine(dscr *d, kvs_cache *cache, int32_t newest, const kvs_rope *rope, const int32_t *cancel, kvs_error *err) {
    const kvs_ops *ops = cache->be->ops;
    kvs_span span = {.cache = cache, .index = d->begin, .n = d->end - d->begin};
    kvs_cache_rows(&span, d->rows);
    kvs_step step = {.rows = d->rows, .n = span.n, .cancel = cancel};
    kvs_mix_job job = job_of(d, cache, 0, newest);
    ops->begin(cache->be, &step);
    if (d->params.rope_pre) ops->angles(cache->be, rope);
    for (int32_t layer = 0; layer < d->n_layer; layer++)
        if (d->on[layer]) ops->kv_mix(cache->be, layer, &job, rope);
    return ops->end(cache->be, err);
}

/* ---- hooks ---- */

static bool acts_in(const dscr *d, int32_t phase) { return d->params.gamma > 0 && d->params.phase == phase; }

static int dscr_check_picture(const kvs_policy *policy, int32_t n, const float *depth, kvs_error *err) {
    const kvs_dscr_params *p = &((const dscr *)policy)->params;
    if (n != p->grid_w * p->grid_h) {
        kvs_fail(err, KVS_E_POLICY, "DSCR: %d rows of embeddings are no picture of %d x %d patches; feed them without this policy", n,
                 p->grid_w, p->grid_h);
        return KVS_E_POLICY;
    }
    for (int32_t i = 0; i < n && depth; i++)
        if (isinf(depth[i])) return refuse(err, "depth", "an infinite depth; NaN marks padding");
    return KVS_OK;
}

/* A pass ends with a picture, so that what follows sees it refined; in_layer has all of a picture in one pass. */
static int32_t dscr_pass_rows(const kvs_policy *policy, const kvs_cache *cache, int32_t index, int32_t n) {
    const dscr *d = (const dscr *)policy;
    bool whole = acts_in(d, KVS_DSCR_IN_LAYER);
    for (int32_t i = 0; i < cache->n_pictures && (whole || acts_in(d, KVS_DSCR_BEFORE_QUESTION)); i++) {
        int32_t first = cache->pictures[i].first, end = first + cache->pictures[i].n;
        if (end > index && (end <= index + n || (whole && first < index + n))) return end - index;
    }
    return n;
}

static int dscr_before_pass(kvs_policy *policy, const kvs_span *span, kvs_error *err) {
    dscr *d = (dscr *)policy;
    const kvs_picture *picture = kvs_cache_picture_at(span->cache, span->index + span->n);
    d->end = 0;
    return picture && d->params.gamma > 0 && d->params.phase != KVS_DSCR_AFTER_PREFILL ? take_picture(d, picture, err) : KVS_OK;
}

static void dscr_before_attn(kvs_policy *policy, const kvs_span *span, int32_t layer, const kvs_rope *rope) {
    const dscr *d = (const dscr *)policy;
    kvs_cache *cache = span->cache;
    if (!acts_in(d, KVS_DSCR_IN_LAYER) || !d->on[layer] || d->end != span->index + span->n || d->begin < span->index) return;
    kvs_mix_job job = job_of(d, cache, span->first + d->begin - span->index, d->end - 1);
    cache->be->ops->kv_mix(cache->be, layer, &job, rope);
}

static int dscr_after_image(kvs_policy *policy, kvs_cache *cache, kvs_picture *picture, const kvs_rope *rope, const int32_t *cancel,
                            kvs_error *err) {
    dscr *d = (dscr *)policy;
    if (d->end != picture->first + picture->n) return KVS_OK;
    int status = acts_in(d, KVS_DSCR_BEFORE_QUESTION) ? refine(d, cache, d->end - 1, rope, cancel, err) : KVS_OK;
    if (!status) picture->sealed = d->end;
    d->end = 0;
    return status;
}

static bool waits(const dscr *d, const kvs_picture *picture, int32_t index) { /* for the end of the prompt */
    bool whole = picture->n == d->params.grid_w * d->params.grid_h;           /* a rewind may have cut it */
    return acts_in(d, KVS_DSCR_AFTER_PREFILL) && !picture->sealed && whole && picture->first + picture->n <= index + 1;
}

static int32_t dscr_end_from(const kvs_policy *policy, const kvs_cache *cache, int32_t index) {
    for (int32_t i = 0; i < cache->n_pictures; i++)
        if (waits((const dscr *)policy, &cache->pictures[i], index)) return cache->pictures[i].first;
    return index + 1;
}

static int dscr_end_prefill(kvs_policy *policy, kvs_cache *cache, int32_t index, const kvs_rope *rope, const int32_t *cancel,
                            kvs_error *err) {
    dscr *d = (dscr *)policy;
    int status = KVS_OK;
    for (int32_t i = 0; i < cache->n_pictures && !status; i++) {
        kvs_picture *picture = &cache->pictures[i];
        if (!waits(d, picture, index)) continue;
        status = take_picture(d, picture, err);
        if (!status) status = refine(d, cache, cache->n_past - 1, rope, cancel, err);
        if (!status) picture->sealed = index + 1;
    }
    d->end = 0;
    return status;
}

static void dscr_facts(const kvs_policy *policy, kvs_facts *facts) {
    const kvs_dscr_params *p = &((const dscr *)policy)->params;
    kvs_fact(facts, "sigma_d", p->sigma_d);
    kvs_fact(facts, "sigma_s", p->sigma_s);
    kvs_fact(facts, "alpha", p->alpha);
    kvs_fact(facts, "beta", p->beta);
    kvs_fact(facts, "gamma", p->gamma);
    kvs_fact(facts, "cut", p->cut);
    kvs_fact(facts, "kernel", p->kernel);
    kvs_fact(facts, "phase", p->phase);
    kvs_fact(facts, "target", p->target);
    kvs_fact(facts, "rope_mode", p->rope_pre);
    kvs_fact(facts, "grid width", p->grid_w);
    kvs_fact(facts, "grid height", p->grid_h);
    kvs_fact(facts, "coord_norm (x)", p->step_x);
    kvs_fact(facts, "coord_norm (y)", p->step_y);
    kvs_fact(facts, "layers", kvs_fact_of_list(p->layers, p->n_layers));
}

/* ---- life ---- */

static dscr *make(const kvs_dscr_params *params, int32_t n_layer);

static void dscr_free(kvs_policy *policy) {
    dscr *d = (dscr *)policy;
    if (!d) return;
    kvs_mix_free(&d->mix);
    free((void *)d->params.layers);
    free(d->on);
    free(d->rows);
    free(d);
}

static kvs_policy *dscr_clone(const kvs_policy *policy) {
    const dscr *d = (const dscr *)policy;
    return (kvs_policy *)make(&d->params, d->n_layer);
}

static const kvs_policy_ops dscr_ops = {
    .name = "DSCR",
    .free = dscr_free,
    .clone = dscr_clone,
    .facts = dscr_facts,
    .check_picture = dscr_check_picture,
    .pass_rows = dscr_pass_rows,
    .before_pass = dscr_before_pass,
    .before_attn = dscr_before_attn,
    .after_image = dscr_after_image,
    .end_prefill = dscr_end_prefill,
    .end_from = dscr_end_from,
};

static dscr *make(const kvs_dscr_params *params, int32_t n_layer) {
    dscr *d = kvs_calloc(1, sizeof *d);
    int32_t *layers = kvs_policy_copy_list(params->layers, params->n_layers);
    bool *on = kvs_policy_layers_on(params->layers, params->n_layers, n_layer);
    if (!d || !layers || !on) {
        free(d);
        free(layers);
        free(on);
        return NULL;
    }
    d->base.ops = &dscr_ops;
    d->params = *params;
    d->params.layers = layers;
    d->n_layer = n_layer;
    d->on = on;
    return d;
}

int kvs_policy_dscr(const kvs_dscr_params *params, int32_t n_layer, kvs_policy **out, kvs_error *err) {
    *out = NULL;
    int status = check(params, n_layer, err);
    if (status) return status;
    *out = (kvs_policy *)make(params, n_layer);
    return *out ? KVS_OK : kvs_fail_memory(err, 0, "a policy");
}
