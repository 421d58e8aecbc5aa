/* policy_kvsmooth.c - KVSmooth (arXiv 2602.04268): row entropy -> rank among the last M -> strength -> EMA of the newest K, V.
 * Here is the bookkeeping: which rows are in the queue, which row is mixed with which. The arithmetic is the op kv_smooth. */
#include "policy.h"

#include <math.h>
#include <stdlib.h>

typedef struct smooth {
    kvs_policy base;
    kvs_smooth_params params; /* its lists are our own copies */
    int32_t n_layer;
    bool *on;         /* (n_layer) */
    int32_t *queue;   /* (window) of the row at hand, itself last */
    int32_t *missing; /* (window) rows that pruned layers lacked when those ran */
    kvs_smooth_job job;
} smooth;

static int refuse(kvs_error *err, const char *what, const char *message) { return kvs_policy_refuse(err, "KVSmooth", what, message); }

static bool outside(float x, float low, float high) { return !(x >= low && x <= high); } /* NaN is outside */

static int check(const kvs_smooth_params *p, int32_t n_layer, kvs_error *err) {
    if (p->struct_size != sizeof *p) return refuse(err, "struct_size", "kvs_smooth_params of another version");
    if (p->n_skip_ids < 0 || (p->n_skip_ids && !p->skip_ids)) return refuse(err, "skip_token_ids", "skip_ids is not a list");
    if (outside(p->lambda_ref, 0, 1)) return refuse(err, "lambda_ref", "lambda_ref must be in [0, 1]");
    if (outside(p->half_width, 0, 1)) return refuse(err, "half_width", "half_width must be in [0, 1]");
    if (outside(p->lambda_max, 0, 1)) return refuse(err, "lambda_max", "lambda_max must be in [0, 1]");
    if (!isnan(p->lambda_fixed) && outside(p->lambda_fixed, 0, 1)) return refuse(err, "lambda_fixed", "lambda_fixed must be in [0, 1]");
    if (p->window < 1 || p->window > 1024) return refuse(err, "window", "window must be in 1..1024");
    if (p->warm_start < 0 || p->warm_start > p->window) return refuse(err, "warm_start", "warm_start must be in 0..window");
    if (!p->target || (p->target & ~(KVS_TARGET_K | KVS_TARGET_V | KVS_TARGET_O))) return refuse(err, "target", "target is unknown");
    if (p->smooth_last_prompt && (p->target & KVS_TARGET_O))
        return refuse(err, "smooth_prompt",
                      "smooth_prompt and target \"o\" exclude each other: the last prompt row's output is used before "
                      "it is known to be the last");
    if (p->per_kv_head && (p->target & KVS_TARGET_O))
        return refuse(err, "entropy_heads", "entropy_heads \"per_kv_group\" is for targets k and v, not o");
    return kvs_policy_check_layers("KVSmooth", p->layers, p->n_layers, n_layer, err);
}

static void smooth_free(kvs_policy *policy) {
    smooth *s = (smooth *)policy;
    if (!s) return;
    free((void *)s->params.layers);
    free((void *)s->params.skip_ids);
    free(s->on);
    free(s->queue);
    free(s->missing);
    free(s);
}

static smooth *make(const kvs_smooth_params *params, int32_t n_layer);

static kvs_policy *smooth_clone(const kvs_policy *policy) {
    const smooth *s = (const smooth *)policy;
    return (kvs_policy *)make(&s->params, s->n_layer);
}

static bool skipped(const smooth *s, int32_t id) {
    for (int32_t i = 0; i < s->params.n_skip_ids; i++)
        if (s->params.skip_ids[i] == id) return true;
    return false;
}

/* Did this row's entropy enter the queue? Generated rows; and rows that ended a prompt, as warm_start and smooth_prompt ask. */
static bool queued(const smooth *s, const kvs_cache *cache, int32_t index) {
    if (cache->flags[index] & KVS_ROW_GENERATED) return true;
    int32_t reach = KVS_MAX(s->params.warm_start, s->params.smooth_last_prompt ? 1 : 0);
    for (int32_t end = index; end < cache->n_past && end < index + reach; end++) {
        if (cache->flags[end] & KVS_ROW_GENERATED) return false;
        if (cache->flags[end] & KVS_ROW_ENDED) return true;
    }
    return false;
}

/* Queue of the row index, which may not be committed yet: the newest window entries up to it, oldest first. */
static int32_t fill_queue(const smooth *s, const kvs_cache *cache, int32_t index) {
    int32_t first = s->params.scope_session ? 0 : kvs_cache_turn_start(cache, index);
    int32_t n = 0;
    s->queue[n++] = index;
    for (int32_t i = index - 1; i >= first && n < s->params.window; i--)
        if (queued(s, cache, i)) s->queue[n++] = i;
    for (int32_t i = 0; i < n / 2; i++) {
        int32_t swap = s->queue[i];
        s->queue[i] = s->queue[n - 1 - i];
        s->queue[n - 1 - i] = swap;
    }
    return n;
}

static void set_job(smooth *s, kvs_cache *cache, int32_t row, int32_t index, bool mix) {
    int32_t n_queue = fill_queue(s, cache, index);
    for (int32_t i = 0; i < n_queue; i++) s->missing[i] = kvs_pruned_missing(&cache->pruned, s->queue[i]);
    s->job = (kvs_smooth_job){.params = &s->params,
                              .kv = &cache->kv,
                              .row = row,
                              .index = index,
                              .prev = mix ? index - 1 : -1,
                              .pos_delta = 1,
                              .queue = s->queue,
                              .n_queue = n_queue,
                              .missing = s->missing};
}

static void smooth_before_step(kvs_policy *policy, const kvs_span *span) {
    smooth *s = (smooth *)policy;
    kvs_cache *cache = span->cache;
    int32_t index = span->index;
    bool after_prompt = index > 0 && !(cache->flags[index - 1] & KVS_ROW_GENERATED);
    bool mix = index > 0 && !skipped(s, span->ids[0]) && !(s->params.skip_first && after_prompt);
    set_job(s, cache, span->first, index, mix);
}

static void smooth_after_attn(kvs_policy *policy, const kvs_span *span, int32_t layer, const kvs_rope *rope, float *out) {
    smooth *s = (smooth *)policy;
    if (s->on[layer]) span->cache->be->ops->kv_smooth(span->cache->be, layer, &s->job, 1, rope, out);
}

/* smooth_prompt = last_token: nothing has looked at the last prompt row yet, so that it can be smoothed now. */
static int32_t smooth_end_from(const kvs_policy *policy, const kvs_cache *cache, int32_t index) {
    (void)cache;
    return ((const smooth *)policy)->params.smooth_last_prompt && index > 0 ? index : index + 1;
}

static int smooth_end_prefill(kvs_policy *policy, kvs_cache *cache, int32_t index, const kvs_rope *rope, const int32_t *cancel,
                              kvs_error *err) {
    smooth *s = (smooth *)policy;
    if (smooth_end_from(policy, cache, index) > index) return KVS_OK;
    const kvs_ops *ops = cache->be->ops;
    kvs_span span = {.cache = cache, .index = index, .n = 1};
    kvs_row row;
    kvs_cache_rows(&span, &row);
    kvs_step step = {.rows = &row, .n = 1, .cancel = cancel};
    set_job(s, cache, 0, index, !skipped(s, cache->ids[index]));
    ops->begin(cache->be, &step);
    for (int32_t layer = 0; layer < s->n_layer; layer++)
        if (s->on[layer]) ops->kv_smooth(cache->be, layer, &s->job, 1, rope, NULL);
    return ops->end(cache->be, err);
}

static bool smooth_mixes(const kvs_policy *policy, uint8_t flags) {
    const smooth *s = (const smooth *)policy;
    return flags & KVS_ROW_GENERATED || (s->params.smooth_last_prompt && flags & KVS_ROW_ENDED);
}

static void smooth_facts(const kvs_policy *policy, kvs_facts *facts) {
    const kvs_smooth_params *p = &((const smooth *)policy)->params;
    kvs_fact(facts, "lambda_ref", p->lambda_ref);
    kvs_fact(facts, "half_width", p->half_width);
    kvs_fact(facts, "lambda_max", p->lambda_max);
    kvs_fact(facts, "lambda_fixed", p->lambda_fixed);
    kvs_fact(facts, "window", p->window);
    kvs_fact(facts, "target", p->target);
    kvs_fact(facts, "lambda_den", p->den_capacity);
    kvs_fact(facts, "rope_mode", p->rope_relative);
    kvs_fact(facts, "first_token", p->skip_first);
    kvs_fact(facts, "warm_start", p->warm_start);
    kvs_fact(facts, "smooth_prompt", p->smooth_last_prompt);
    kvs_fact(facts, "entropy_norm", p->norm_log_len);
    kvs_fact(facts, "entropy_heads", p->per_kv_head);
    kvs_fact(facts, "entropy_include_self", p->exclude_self);
    kvs_fact(facts, "rank_ties", p->midrank);
    kvs_fact(facts, "queue_scope", p->scope_session);
    kvs_fact(facts, "ema", p->ema_one_step);
    kvs_fact(facts, "mix", p->damp);
    kvs_fact(facts, "layers", kvs_fact_of_list(p->layers, p->n_layers));
    kvs_fact(facts, "skip_token_ids", kvs_fact_of_list(p->skip_ids, p->n_skip_ids));
}

static const kvs_policy_ops smooth_ops = {
    .name = "KVSmooth",
    .free = smooth_free,
    .clone = smooth_clone,
    .facts = smooth_facts,
    .before_step = smooth_before_step,
    .after_attn = smooth_after_attn,
    .end_prefill = smooth_end_prefill,
    .end_from = smooth_end_from,
    .mixes = smooth_mixes,
};

static smooth *make(const kvs_smooth_params *params, int32_t n_layer) {
    smooth *s = kvs_calloc(1, sizeof *s);
    if (!s) return NULL;
    s->base.ops = &smooth_ops;
    s->params = *params;
    s->n_layer = n_layer;
    s->params.layers = kvs_policy_copy_list(params->layers, params->n_layers);
    s->params.skip_ids = kvs_policy_copy_list(params->skip_ids, params->n_skip_ids);
    s->on = kvs_policy_layers_on(params->layers, params->n_layers, n_layer);
    s->queue = kvs_calloc((uint64_t)params->window, sizeof *s->queue);
    s->missing = kvs_calloc((uint64_t)params->window, sizeof *s->missing);
    if (!s->params.layers || !s->params.skip_ids || !s->on || !s->queue || !s->missing) {
        smooth_free(&s->base);
        return NULL;
    }
    return s;
}

int kvs_policy_kvsmooth(const kvs_smooth_params *params, int32_t n_layer, kvs_policy **out, kvs_error *err) {
    *out = NULL;
    int status = check(params, n_layer, err);
    if (status) return status;
    *out = (kvs_policy *)make(params, n_layer);
    return *out ? KVS_OK : kvs_fail_memory(err, 0, "a policy");
}
