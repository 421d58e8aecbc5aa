/* policy_prunehal.c - PruneHal (arXiv 2510.19183; docs/methods.md): when attention to the picture sags in most layers, all but the
 * best attended rows of pictures leave the cache. Here is when and which; how they leave is pruned.c and the ops kv_score, kv_gather.
 *
 * A sequence begins with the last row of the prompt that holds the newest picture (m = 1) and goes on with every generated row behind
 * it (m = 2, 3, ...). Counts and references derive from the timeline, the history of masses and the events. */
#include "policy.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct prunehal {
    kvs_policy base;
    kvs_prune_params params; /* its lists are our own copies */
    int32_t n_layer;
    kvs_event plan; /* of the row that is about to be committed */
    int32_t *rows;  /* that go with it, as kvs_event_happen wants them; NULL = no plan */
} prunehal;

static int refuse(kvs_error *err, const char *what, const char *message) { return kvs_policy_refuse(err, "PruneHal", what, message); }

int kvs_policy_prunehal_check(const kvs_prune_params *p, int32_t n_layer, kvs_error *err) {
    if (p->struct_size != sizeof *p) return refuse(err, "struct_size", "kvs_prune_params of another version");
    if (!(p->keep > 0 && p->keep <= 1)) return refuse(err, "keep", "keep must be in (0, 1]"); /* NaN is neither */
    if (!(p->vote_fraction >= 0 && p->vote_fraction <= 1)) return refuse(err, "vote_fraction", "vote_fraction must be in [0, 1]");
    if (p->times < 0) return refuse(err, "times", "times must not be negative");
    if (p->force_step < 0 || p->force_step == 1) return refuse(err, "force_step", "force_step must be 0 (never) or 2 and more");
    if (p->reference < KVS_REFERENCE_RUNNING_MEAN_RESET || p->reference > KVS_REFERENCE_FIRST)
        return refuse(err, "reference", "reference is unknown");
    if (p->scope < KVS_SCOPE_LAYER || p->scope > KVS_SCOPE_KV_HEAD) return refuse(err, "index_scope", "index_scope is unknown");
    if (p->n_top_k < 0 || (p->n_top_k && !p->top_k)) return refuse(err, "top_k", "top_k is not a list");
    for (int32_t i = 0; i < p->n_top_k; i++)
        if (p->top_k[i] < 1) return refuse(err, "top_k", "top_k must be 1 and more");
    return kvs_policy_check_layers("PruneHal", p->layers, p->n_layers, n_layer, err);
}

/* ---- when ---- */

typedef struct sequence {
    int32_t first;  /* m = 1 */
    int32_t m;      /* of the row at hand */
    int32_t done;   /* prunings so far */
    int32_t reset;  /* the row behind which the last of them happened, or first - 1 */
    int32_t n_live; /* rows of pictures that are there, in pruned layers */
    double share;   /* of them that the next pruning keeps */
} sequence;

static int32_t picture_rows(const kvs_cache *cache) {
    int32_t n = 0;
    for (int32_t i = 0; i < cache->n_pictures; i++) n += cache->pictures[i].n;
    return n;
}

static bool is_step(const kvs_cache *cache, const sequence *q, int32_t row) { /* rows of later prompts are none */
    return row == q->first || row == cache->n_past || cache->flags[row] & KVS_ROW_GENERATED;
}

/* The row at hand is the one behind the timeline. false: there is nothing to decide. */
static bool find_sequence(const prunehal *s, const kvs_cache *cache, sequence *q) {
    if (!cache->n_pictures) return false;
    const kvs_picture *newest = &cache->pictures[cache->n_pictures - 1];
    const kvs_pruned *pruned = &cache->pruned;
    int32_t row = newest->first + newest->n;
    while (row < cache->n_past && !(cache->flags[row] & KVS_ROW_GENERATED)) row++;
    *q = (sequence){.first = row - 1, .reset = row - 2, .m = 2, .n_live = picture_rows(cache) - kvs_pruned_missing(pruned, INT32_MAX)};
    for (; row < cache->n_past; row++) q->m += is_step(cache, q, row);
    for (int32_t i = pruned->n_events - 1; i >= 0 && pruned->events[i].index > q->first; i--) {
        if (!q->done++) q->reset = pruned->events[i].index;
    }
    if (q->first < pruned->quiet || q->done >= s->params.times || pruned->n_events >= KVS_MAX_EVENTS) return false;
    q->share = s->params.keep;
    if (!s->params.n_top_k) return true;
    if (q->done >= s->params.n_top_k) return false;
    q->share = KVS_MIN(1.0, (double)s->params.top_k[q->done] / q->n_live);
    return true;
}

/* What the attention of a layer is held against: a mean over rows from..to of the sequence. */
static void reference_rows(const prunehal *s, const kvs_cache *cache, const sequence *q, int32_t *from, int32_t *to) {
    *from = q->first;
    *to = q->first;
    if (s->params.reference == KVS_REFERENCE_LAST_PRUNE)
        *from = *to = KVS_MAX(q->reset, q->first);
    else if (s->params.reference == KVS_REFERENCE_RUNNING_MEAN)
        *to = cache->n_past - 1;
    else if (s->params.reference == KVS_REFERENCE_RUNNING_MEAN_RESET)
        *from = q->reset + 1, *to = cache->n_past - 1;
}

/* mass: (n_layer, rows) history from row q->first up to the newest. Mean over the rows of pictures that were there when the row ran: the paper's A_l. */
static double attention_of(const kvs_cache *cache, const sequence *q, const float *mass, int32_t row, int32_t layer) {
    double rows = picture_rows(cache) - kvs_pruned_missing(&cache->pruned, row);
    return (double)mass[(int64_t)layer * (cache->n_past + 1 - q->first) + row - q->first] / rows;
}

static bool votes(const prunehal *s, const kvs_cache *cache, const sequence *q, const float *mass, int32_t layer) {
    int32_t from, to, n = 0;
    double sum = 0;
    reference_rows(s, cache, q, &from, &to);
    for (int32_t row = from; row <= to; row++) {
        if (!is_step(cache, q, row)) continue;
        sum += attention_of(cache, q, mass, row, layer);
        n++;
    }
    return n && attention_of(cache, q, mass, cache->n_past, layer) < sqrt(q->share) * (sum / n);
}

static bool majority(const prunehal *s, const kvs_cache *cache, const sequence *q, const float *mass) {
    const kvs_prune_params *p = &s->params;
    int32_t from, to, n = 0;
    reference_rows(s, cache, q, &from, &to);
    while (from <= to && !is_step(cache, q, from)) from++;
    if (from > to) return false; /* the first step behind a pruning makes the new reference */
    for (int32_t i = 0; i < p->n_layers; i++) n += votes(s, cache, q, mass, p->layers[i]);
    double needed = p->vote_fraction * p->n_layers;
    return p->vote_at_least ? n >= needed : n > needed;
}

static int triggered(const prunehal *s, const kvs_cache *cache, const sequence *q, bool *yes, kvs_error *err) {
    *yes = q->m == s->params.force_step;
    if (*yes) return KVS_OK;
    const kvs_kv *kv = &cache->kv;
    uint64_t bytes = (uint64_t)(cache->n_past + 1 - q->first) * sizeof(float); /* of one layer */
    float *mass = kvs_calloc((uint64_t)kv->n_layer, bytes);
    if (!mass) return kvs_fail_memory(err, (uint64_t)kv->n_layer * bytes, "PruneHal's votes");
    cache->be->ops->download_rows(cache->be, mass, kv->mass + q->first, bytes, (uint64_t)kv->n_ctx * sizeof *mass, kv->n_layer);
    *yes = majority(s, cache, q, mass);
    free(mass);
    return kvs_device_check(cache->be, err);
}

/* ---- which ---- */

typedef struct candidate {
    double score;
    int32_t place; /* among the live rows of pictures */
    int32_t index, picture;
} candidate;

typedef struct chooser { /* memory of a decision */
    int32_t n_live, n_keep;
    int32_t *quota;   /* (n_pictures) rows of each that are sure to stay; the rest up to n_keep compete */
    int32_t *open;    /* (n_pictures) of the quota, while choosing */
    candidate *list;  /* (n_live) */
    bool *stays;      /* (n_live) */
    double *total;    /* (n_live) of a list that several heads share */
    float *scores;    /* (layers, n_kv_head, n_live) */
    float *on_device; /* [dev] the same */
} chooser;

static void free_chooser(kvs_cache *cache, chooser *c) {
    free(c->quota);
    free(c->open);
    free(c->list);
    free(c->stays);
    free(c->total);
    free(c->scores);
    if (c->on_device) cache->be->ops->release(cache->be, c->on_device);
}

static bool alloc_chooser(kvs_cache *cache, int32_t n_layers, chooser *c) {
    uint64_t n = (uint64_t)c->n_live, all = n * (uint64_t)n_layers * (uint64_t)cache->kv.n_kv_head;
    c->quota = kvs_calloc((uint64_t)cache->n_pictures, sizeof *c->quota);
    c->open = kvs_calloc((uint64_t)cache->n_pictures, sizeof *c->open);
    c->list = kvs_calloc(n, sizeof *c->list);
    c->stays = kvs_calloc(n, sizeof *c->stays);
    c->total = kvs_calloc(n, sizeof *c->total);
    c->scores = kvs_calloc(all, sizeof *c->scores);
    c->on_device = cache->be->ops->alloc(cache->be, all * sizeof *c->scores);
    return c->quota && c->open && c->list && c->stays && c->total && c->scores && c->on_device;
}

static int32_t share_of(int32_t n, double share) { return KVS_MIN(n, KVS_MAX(1, (int32_t)floor(share * n))); }

/* Rows of each picture that stay, and of all of them. Spans of one list say how many there are: with a quota it is the same in all. */
static void set_quota(const prunehal *s, const kvs_cache *cache, const sequence *q, chooser *c) {
    const kvs_range *spans = kvs_kv_spans(&cache->kv, s->params.layers[0], 0);
    int32_t sure = 0;
    for (int32_t i = 0; i < cache->n_pictures; i++) sure += c->quota[i] = s->params.per_image_quota ? share_of(spans[i].n, q->share) : 1;
    int32_t all = s->params.n_top_k ? KVS_MIN(q->n_live, s->params.top_k[q->done]) : share_of(q->n_live, q->share);
    c->n_keep = s->params.per_image_quota ? sure : KVS_MAX(sure, all);
}

static int compare(const void *a, const void *b) {
    const candidate *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    return x->index - y->index;
}

/* The live rows of a list, best first. A score that is no number is the worst. */
static void sort_list(const kvs_cache *cache, const uint16_t *gone, const double *scores, chooser *c) {
    int32_t n = 0;
    for (int32_t i = 0; i < cache->n_pictures; i++)
        for (int32_t j = cache->pictures[i].first; j < cache->pictures[i].first + cache->pictures[i].n; j++) {
            if (gone[j]) continue;
            c->list[n] = (candidate){isnan(scores[n]) ? -INFINITY : scores[n], n, j, i};
            n++;
        }
    qsort(c->list, (size_t)n, sizeof *c->list, compare);
}

/* Indices of the rows of a list that go, rising. */
static void choose(const kvs_cache *cache, const uint16_t *gone, const double *scores, chooser *c, int32_t *rows) {
    int32_t kept = 0;
    sort_list(cache, gone, scores, c);
    memset(c->stays, 0, (size_t)c->n_live * sizeof *c->stays);
    memcpy(c->open, c->quota, (size_t)cache->n_pictures * sizeof *c->open);
    for (int32_t i = 0; i < c->n_live; i++)
        if (c->open[c->list[i].picture]-- > 0) c->stays[c->list[i].place] = true, kept++;
    for (int32_t i = 0; i < c->n_live && kept < c->n_keep; i++)
        if (!c->stays[c->list[i].place]) c->stays[c->list[i].place] = true, kept++;
    int32_t place = 0;
    for (int32_t i = 0; i < cache->n_pictures; i++)
        for (int32_t j = cache->pictures[i].first; j < cache->pictures[i].first + cache->pictures[i].n; j++)
            if (!gone[j] && !c->stays[place++]) *rows++ = j;
}

/* Scores of heads first..first+n of the scores, together: their mean or maximum, added to total with that weight. */
static void add_heads(const prunehal *s, const chooser *c, int64_t first, int32_t n, double weight) {
    for (int32_t i = 0; i < c->n_live; i++) {
        double sum = 0, top = -INFINITY;
        for (int64_t h = first; h < first + n; h++) {
            double score = (double)c->scores[h * c->n_live + i];
            sum += score;
            top = !(top >= score) ? score : top;
        }
        c->total[i] += weight * (s->params.reduction_max ? top : sum / n);
    }
}

static void choose_all(const prunehal *s, const kvs_cache *cache, chooser *c, int32_t *rows) {
    const kvs_kv *kv = &cache->kv;
    bool global = s->params.scope == KVS_SCOPE_GLOBAL;
    int32_t n_dropped = c->n_live - c->n_keep, heads = kv->n_kv_head / kv->n_sets; /* of a list */
    for (int32_t i = 0; i < s->params.n_layers && global; i++)
        add_heads(s, c, (int64_t)i * kv->n_kv_head, kv->n_kv_head, 1.0 / s->params.n_layers);
    for (int32_t i = 0; i < s->params.n_layers; i++)
        for (int32_t set = 0; set < kv->n_sets; set++, rows += n_dropped) {
            if (!global) {
                memset(c->total, 0, (size_t)c->n_live * sizeof *c->total);
                add_heads(s, c, (int64_t)i * kv->n_kv_head + (int64_t)set * heads, heads, 1.0);
            }
            choose(cache, kvs_pruned_list(&cache->pruned, kv, s->params.layers[i], set), c->total, c, rows);
        }
}

static int score_all(const prunehal *s, kvs_cache *cache, chooser *c, kvs_error *err) {
    const kvs_ops *ops = cache->be->ops;
    kvs_step step = {0};
    int64_t width = (int64_t)cache->kv.n_kv_head * c->n_live;
    ops->begin(cache->be, &step);
    for (int32_t i = 0; i < s->params.n_layers; i++)
        ops->kv_score(cache->be, &cache->kv, s->params.layers[i], s->params.reduction_max, c->on_device + i * width);
    int status = ops->end(cache->be, err);
    if (!status) ops->download(cache->be, c->scores, c->on_device, (uint64_t)(s->params.n_layers * width) * sizeof *c->scores);
    return status ? status : kvs_device_check(cache->be, err);
}

static void drop_plan(prunehal *s) {
    kvs_event_free(&s->plan);
    free(s->rows);
    s->rows = NULL;
}

static int make_plan(prunehal *s, kvs_cache *cache, const sequence *q, kvs_error *err) {
    const kvs_kv *kv = &cache->kv;
    chooser c = {.n_live = q->n_live};
    int status = KVS_OK;
    bool memory = alloc_chooser(cache, s->params.n_layers, &c);
    if (memory) {
        set_quota(s, cache, q, &c);
        int32_t n_dropped = q->n_live - c.n_keep;
        s->rows = kvs_calloc((uint64_t)s->params.n_layers * (uint64_t)kv->n_sets * (uint64_t)n_dropped + 1, sizeof *s->rows);
        memory = s->rows && kvs_event_make(cache, cache->n_past, q->n_live, n_dropped, &s->plan);
        s->plan.forced = q->m == s->params.force_step;
    }
    if (!memory) status = kvs_fail_memory(err, 0, "PruneHal's choice of rows; with reversible=True those that leave are kept");
    if (!status && s->plan.n_dropped) status = score_all(s, cache, &c, err);
    if (!status && s->plan.n_dropped) choose_all(s, cache, &c, s->rows);
    free_chooser(cache, &c);
    if (status) drop_plan(s);
    return status;
}

/* ---- the policy ---- */

static int prune_after_step(kvs_policy *policy, const kvs_span *span, kvs_error *err) {
    prunehal *s = (prunehal *)policy;
    sequence q;
    bool yes = false;
    drop_plan(s);
    if (!find_sequence(s, span->cache, &q)) return KVS_OK;
    int status = triggered(s, span->cache, &q, &yes, err);
    return status || !yes ? status : make_plan(s, span->cache, &q, err);
}

static void prune_committed(kvs_policy *policy, kvs_cache *cache) {
    prunehal *s = (prunehal *)policy;
    if (s->rows) kvs_event_happen(cache, &s->plan, s->rows);
    drop_plan(s);
}

static void prune_free(kvs_policy *policy) {
    prunehal *s = (prunehal *)policy;
    if (!s) return;
    drop_plan(s);
    free((void *)s->params.layers);
    free((void *)s->params.top_k);
    free(s);
}

static kvs_policy *prune_clone(const kvs_policy *policy) {
    const prunehal *s = (const prunehal *)policy;
    kvs_policy *twin;
    return kvs_policy_prunehal(&s->params, s->n_layer, &twin, NULL) ? NULL : twin;
}

static void prune_facts(const kvs_policy *policy, kvs_facts *facts) {
    const kvs_prune_params *p = &((const prunehal *)policy)->params;
    kvs_fact(facts, "keep", p->keep);
    kvs_fact(facts, "times", p->times);
    kvs_fact(facts, "force_step", p->force_step);
    kvs_fact(facts, "reference", p->reference);
    kvs_fact(facts, "vote_fraction", p->vote_fraction);
    kvs_fact(facts, "vote_strict", !p->vote_at_least);
    kvs_fact(facts, "index_scope", p->scope);
    kvs_fact(facts, "reduction", p->reduction_max);
    kvs_fact(facts, "per_image_quota", p->per_image_quota);
    kvs_fact(facts, "layers", kvs_fact_of_list(p->layers, p->n_layers));
    kvs_fact(facts, "top_k", kvs_fact_of_list(p->top_k, p->n_top_k));
    kvs_fact(facts, "reversible", p->reversible);
}

static const kvs_policy_ops prune_ops = {
    .name = "PruneHal",
    .free = prune_free,
    .clone = prune_clone,
    .facts = prune_facts,
    .after_step = prune_after_step,
    .committed = prune_committed,
};

static int rising(const void *a, const void *b) { return *(const int32_t *)a - *(const int32_t *)b; }

int kvs_policy_prunehal(const kvs_prune_params *params, int32_t n_layer, kvs_policy **out, kvs_error *err) {
    *out = NULL;
    int status = kvs_policy_prunehal_check(params, n_layer, err);
    if (status) return status;
    prunehal *s = kvs_calloc(1, sizeof *s);
    if (!s) return kvs_fail_memory(err, 0, "a policy");
    int32_t *layers = kvs_policy_copy_list(params->layers, params->n_layers);
    s->base.ops = &prune_ops;
    s->params = *params;
    s->n_layer = n_layer;
    s->params.layers = layers;
    s->params.top_k = kvs_policy_copy_list(params->top_k, params->n_top_k);
    if (!layers || !s->params.top_k) {
        prune_free(&s->base);
        return kvs_fail_memory(err, 0, "a policy");
    }
    qsort(layers, (size_t)params->n_layers, sizeof *layers, rising); /* lists of rows come in the order of layers */
    *out = &s->base;
    return KVS_OK;
}
