/* session.c - one timeline over a model: feed, step, sample, fork, rewind, restore. What only looks at it is in session_read.c. */
#include "session.h"

#include "keep.h"

#include <stdlib.h>
#include <string.h>

enum { DEFAULT_EXACT_ROWS = 32, MAX_EXACT_ROWS = 4096, MAX_CTX = 1 << 20, MAX_BATCH = 256 };

int kvs_session_enter(kvs_session *session, kvs_error *err) {
    if (__atomic_exchange_n(&session->busy, 1, __ATOMIC_ACQUIRE))
        return kvs_fail(err, KVS_E_BUSY, "the session is in use by another thread; make one session per thread, they share the model");
    return KVS_OK;
}

void kvs_session_leave(kvs_session *session) { __atomic_store_n(&session->busy, 0, __ATOMIC_RELEASE); }

static int bad_argument(kvs_error *err, const char *what, const char *message) {
    kvs_fail(err, KVS_E_ARGUMENT, "%s: %s", what, message);
    if (err) snprintf(err->what, sizeof err->what, "%s", what);
    return KVS_E_ARGUMENT;
}

/* ---- make and free ---- */

static int check_params(const kvs_session_params *p, kvs_error *err) {
    if (p->struct_size != sizeof *p) return bad_argument(err, "struct_size", "kvs_session_params of another version");
    if (p->n_ctx < 1 || p->n_ctx > MAX_CTX) return bad_argument(err, "n_ctx", "must be in 1..1048576");
    if (p->kv_type != KVS_TYPE_F32 && p->kv_type != KVS_TYPE_F16 && p->kv_type != KVS_TYPE_Q8_0)
        return bad_argument(err, "kv_type", "must be F16, F32 or Q8_0");
    if (p->exact_rows < 0 || p->exact_rows > MAX_EXACT_ROWS) return bad_argument(err, "exact_rows", "must be in 0..4096");
    return KVS_OK;
}

static kvs_cache_shape cache_shape(const kvs_model *model, const kvs_session_params *p) {
    const kvs_text *t = &model->text;
    kvs_cache_shape shape = {p->kv_type, t->n_layer, t->n_head, t->n_head_kv, t->head_dim, p->n_ctx, 0, false, 1, 0, p->prune};
    if (!p->smooth) return shape;
    shape.n_exact = p->exact_rows ? KVS_MAX(p->exact_rows, 2) : DEFAULT_EXACT_ROWS;
    shape.exact_o = p->smooth->target & KVS_TARGET_O;
    shape.n_group = p->smooth->per_kv_head ? t->n_head_kv : 1;
    shape.exclude_self = p->smooth->exclude_self;
    return shape;
}

/* In the order in which they act. */
static int add_policies(kvs_session *s, const kvs_session_params *params, kvs_error *err) {
    kvs_cache *cache = &s->cache;
    int32_t n_layer = s->model->text.n_layer;
    int status = KVS_OK;
    if (params->dscr) {
        status = kvs_policy_dscr(params->dscr, n_layer, &cache->policies[cache->n_policies], err);
        cache->n_policies += !status;
    }
    if (params->smooth && !status) {
        status = kvs_policy_kvsmooth(params->smooth, n_layer, &cache->policies[cache->n_policies], err);
        cache->n_policies += !status;
    }
    if (params->prune && !status) {
        status = kvs_policy_prunehal(params->prune, n_layer, &cache->policies[cache->n_policies], err);
        cache->n_policies += !status;
    }
    return status;
}

static int count(kvs_session *s, kvs_error *err) {
    int status = kvs_model_count_cache(s->model, s->cache.bytes, err);
    if (!status) s->counted = s->cache.bytes;
    return status;
}

/* Without its cache. */
static int new_session(kvs_model *model, kvs_session **out, kvs_error *err) {
    kvs_session *s = kvs_calloc(1, sizeof *s);
    float *told = kvs_calloc(3 * (uint64_t)model->text.n_layer, sizeof *told);
    if (!s || !told) {
        free(told);
        free(s);
        return kvs_fail_memory(err, 0, "a session");
    }
    s->model = model;
    s->told = told;
    s->told_row = -1;
    uint64_t bytes = 2 * kvs_session_logits_bytes(s);
    s->logits = model->be->ops->alloc(model->be, bytes);
    if (!s->logits) {
        free(told);
        free(s);
        return kvs_fail_room(model->be, err, bytes, "the logits of a session");
    }
    s->spare = s->logits + model->text.n_vocab;
    *out = s;
    return KVS_OK;
}

/* What a pass that went well has put there belongs to the last row. */
static void take_logits(kvs_session *s) {
    float *old = s->logits;
    s->logits = s->spare;
    s->spare = old;
    s->has_logits = true;
}

int kvs_session_create(kvs_model *model, const kvs_session_params *params, kvs_session **out, kvs_error *err) {
    *out = NULL;
    int status = check_params(params, err);
    if (!status && params->prune) status = kvs_policy_prunehal_check(params->prune, model->text.n_layer, err);
    if (status) return status;
    kvs_session *s;
    if ((status = new_session(model, &s, err))) return status;
    kvs_cache_shape shape = cache_shape(model, params);
    status = kvs_cache_init(&s->cache, model->be, &shape, err);
    if (!status) status = count(s, err);
    if (!status) status = add_policies(s, params, err);
    if (status) {
        kvs_session_free(s);
        return status;
    }
    s->cache.store_is_exact = params->smooth && params->kv_type == KVS_TYPE_F32 && !params->smooth->ema_one_step && !shape.exact_o;
    kvs_rng_seed(&s->rng, params->seed);
    *out = s;
    return KVS_OK;
}

int32_t kvs_session_new(kvs_model *model, const kvs_session_params *params, kvs_session **out, kvs_error *err) {
    return kvs_session_create(model, params, out, err);
}

void kvs_session_free(kvs_session *session) {
    if (!session) return;
    kvs_backend *be = session->model->be;
    kvs_model_uncount_cache(session->model, session->counted);
    kvs_cache_free(&session->cache);
    be->ops->release(be, KVS_MIN(session->logits, session->spare));
    free(session->told);
    free(session);
}

uint64_t kvs_session_bytes(const kvs_session *session) {
    return (uint64_t)((int64_t)session->cache.bytes + kvs_pruned_bytes(&session->cache));
}

/* ---- prompt rows ---- */

typedef struct flat { /* the chunks of a feed, row by row */
    int32_t n;
    int32_t *ids;
    uint64_t *hashes;
    const float **embd;
    kvs_row *rows; /* (n) room for any pass */
} flat;

static void flat_free(flat *f) {
    free(f->ids);
    free(f->hashes);
    free(f->embd);
    free(f->rows);
}

static int check_room(const kvs_session *s, int64_t n, kvs_error *err) {
    int64_t needed = s->cache.n_past + n, n_ctx = s->cache.kv.n_ctx;
    if (needed <= n_ctx) return KVS_OK;
    kvs_fail(err, KVS_E_CONTEXT, "context overflow: %lld rows needed (%d there, %lld new), n_ctx is %lld", (long long)needed,
             s->cache.n_past, (long long)n, (long long)n_ctx);
    if (err) err->needed = (uint64_t)needed, err->available = (uint64_t)n_ctx;
    return KVS_E_CONTEXT;
}

static int check_ids(const kvs_session *s, const int32_t *ids, int32_t n, kvs_error *err) {
    for (int32_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= s->model->text.n_vocab) {
            kvs_fail(err, KVS_E_ARGUMENT, "ids: token id %d is not in 0..%d", ids[i], s->model->text.n_vocab - 1);
            return KVS_E_ARGUMENT;
        }
    return KVS_OK;
}

static int check_picture(const kvs_session *s, const kvs_chunk *chunk, kvs_error *err) {
    int status = KVS_OK;
    for (int32_t i = 0; i < s->cache.n_policies && !status; i++) {
        const kvs_policy *policy = s->cache.policies[i];
        if (policy->ops->check_picture && chunk->n) status = policy->ops->check_picture(policy, chunk->n, chunk->depth, err);
    }
    return status;
}

static int flatten(const kvs_session *s, const kvs_chunk *chunks, int32_t n_chunks, flat *f, kvs_error *err) {
    memset(f, 0, sizeof *f);
    int64_t n = 0;
    for (int32_t c = 0; c < n_chunks; c++) {
        if (chunks[c].n < 0 || (chunks[c].n && !chunks[c].ids && !chunks[c].embd))
            return bad_argument(err, "chunks", "a chunk without rows");
        int status = chunks[c].ids ? check_ids(s, chunks[c].ids, chunks[c].n, err) : check_picture(s, &chunks[c], err);
        if (status) return status;
        n += chunks[c].n;
    }
    int status = check_room(s, n, err);
    if (status || !n) return status;
    f->n = (int32_t)n;
    f->ids = kvs_calloc((uint64_t)n, sizeof *f->ids);
    f->hashes = kvs_calloc((uint64_t)n, sizeof *f->hashes);
    f->embd = kvs_calloc((uint64_t)n, sizeof *f->embd);
    f->rows = kvs_calloc((uint64_t)n, sizeof *f->rows);
    if (!f->ids || !f->hashes || !f->embd || !f->rows) return kvs_fail_memory(err, (uint64_t)n * 56, "a prompt");
    int32_t row = 0;
    for (int32_t c = 0; c < n_chunks; c++)
        for (int32_t i = 0; i < chunks[c].n; i++, row++) {
            f->ids[row] = chunks[c].ids ? chunks[c].ids[i] : -1;
            f->hashes[row] = chunks[c].ids ? 0 : chunks[c].hash;
            f->embd[row] = chunks[c].ids ? NULL : chunks[c].embd + (int64_t)i * s->model->text.n_embd;
        }
    return KVS_OK;
}

static int32_t pass_rows(const kvs_session *s, int32_t index, int32_t left) {
    int32_t n = KVS_MIN(left, KVS_BLOCK_ROWS);
    for (int32_t i = 0; i < s->cache.n_policies; i++) {
        const kvs_policy *policy = s->cache.policies[i];
        if (policy->ops->pass_rows) n = policy->ops->pass_rows(policy, &s->cache, index, n);
    }
    return n;
}

static int before_pass(kvs_session *s, const kvs_span *span, kvs_error *err) {
    int status = KVS_OK;
    for (int32_t i = 0; i < s->cache.n_policies && !status; i++) {
        kvs_policy *policy = s->cache.policies[i];
        if (policy->ops->before_pass) status = policy->ops->before_pass(policy, span, err);
    }
    return status;
}

/* What policies do to the picture that a pass ends with. */
static int after_image(kvs_session *s, int32_t end, const int32_t *cancel, kvs_error *err) {
    kvs_picture *picture = kvs_cache_picture_at(&s->cache, end);
    int status = KVS_OK;
    for (int32_t i = 0; i < s->cache.n_policies && !status && picture; i++) {
        kvs_policy *policy = s->cache.policies[i];
        if (!policy->ops->after_image) continue;
        status = kvs_work_reserve(s->model, picture->n, 0, err); /* room for its angles */
        if (!status) status = policy->ops->after_image(policy, &s->cache, picture, &s->model->text.rope, cancel, err);
    }
    return status;
}

/* The model is taken pass by pass, so that sessions of other threads get their turns between. */
static int feed_pass(kvs_session *s, const flat *f, int32_t at, int32_t n, const int32_t *cancel, kvs_error *err) {
    kvs_span span = {.cache = &s->cache, .index = s->cache.n_past + at, .n = n, .ids = f->ids + at, .hashes = f->hashes + at};
    kvs_cache_rows(&span, f->rows);
    kvs_pass pass = {.spans = &span,
                     .n_spans = 1,
                     .rows = f->rows,
                     .embd = f->embd + at,
                     .n = n,
                     .logits = at + n == f->n,
                     .logits_out = &s->spare,
                     .cancel = cancel};
    int status = kvs_model_lock(s->model, cancel, err);
    if (status) return status;
    status = before_pass(s, &span, err);
    if (!status) status = kvs_llama_pass(s->model, &pass, err);
    if (!status) status = after_image(s, span.index + n, cancel, err);
    kvs_model_unlock(s->model);
    return status;
}

static int feed_blocks(kvs_session *s, const flat *f, const int32_t *cancel, kvs_error *err) {
    int status = KVS_OK;
    for (int32_t at = 0, n = 0; at < f->n && !status; at += n) {
        n = pass_rows(s, s->cache.n_past + at, f->n - at);
        status = feed_pass(s, f, at, n, cancel, err);
    }
    return status;
}

static int add_pictures(kvs_session *s, const kvs_chunk *chunks, int32_t n_chunks, kvs_error *err) {
    int32_t at = 0, status = KVS_OK;
    for (int32_t c = 0; c < n_chunks && !status; at += chunks[c++].n)
        if (!chunks[c].ids && chunks[c].n) status = kvs_cache_add_picture(&s->cache, at, chunks[c].n, chunks[c].depth, err);
    return status;
}

static int feed(kvs_session *s, const kvs_chunk *chunks, int32_t n_chunks, const int32_t *cancel, kvs_error *err) {
    flat f;
    int status = flatten(s, chunks, n_chunks, &f, err);
    if (!status && f.n) {
        s->told_row = -1; /* its place may become another row's */
        bool exact = s->cache.n_past > 0 && kvs_cache_exact(&s->cache, s->cache.n_past - 1);
        if (exact) kvs_cache_keep_exact(&s->cache);
        status = add_pictures(s, chunks, n_chunks, err);
        if (!status) status = feed_blocks(s, &f, cancel, err);
        kvs_cache_touched(&s->cache, f.n);
        if (status) kvs_cache_forget(&s->cache);
        if (status && exact) kvs_cache_restore_exact(&s->cache);
        if (!status) {
            kvs_span span = {.cache = &s->cache, .index = s->cache.n_past, .n = f.n, .ids = f.ids, .hashes = f.hashes};
            kvs_cache_commit(&span);
            take_logits(s);
        }
    }
    flat_free(&f);
    return status;
}

int32_t kvs_session_feed(kvs_session *session, const kvs_chunk *chunks, int32_t n_chunks, int32_t *cancel, kvs_error *err) {
    int status = kvs_session_enter(session, err);
    if (status) return status;
    status = feed(session, chunks, n_chunks, cancel, err);
    kvs_session_leave(session);
    return status;
}

/* ---- rows that run again ---- */

/* For what policies do to whole pictures: angles of the largest. */
static int reserve_angles(kvs_session *s, kvs_error *err) {
    int32_t rows = 0;
    for (int32_t i = 0; i < s->cache.n_policies; i++)
        for (int32_t p = 0; p < s->cache.n_pictures && s->cache.policies[i]->ops->after_image; p++)
            rows = KVS_MAX(rows, s->cache.pictures[p].n);
    return kvs_work_reserve(s->model, rows, 0, err);
}

/* The model's lock is held. */
static int policies_end_prefill(kvs_session *s, int32_t index, const int32_t *cancel, kvs_error *err) {
    int status = reserve_angles(s, err);
    for (int32_t i = 0; i < s->cache.n_policies && !status; i++) {
        kvs_policy *policy = s->cache.policies[i];
        if (policy->ops->end_prefill) status = policy->ops->end_prefill(policy, &s->cache, index, &s->model->text.rope, cancel, err);
    }
    return status;
}

/* A row of the timeline once more, as what it was. It writes what is there already; half of it would leave unsmoothed values. */
static int run_again(kvs_session *s, int32_t index, bool logits, const int32_t *cancel, kvs_error *err) {
    kvs_cache *cache = &s->cache;
    uint8_t flags = cache->flags[index];
    kvs_span span = {.cache = cache, .index = index, .n = 1, .ids = &cache->ids[index], .generated = flags & KVS_ROW_GENERATED};
    kvs_row row;
    kvs_cache_rows(&span, &row);
    kvs_pass pass = {.spans = &span, .n_spans = 1, .rows = &row, .n = 1, .logits = logits, .logits_out = &s->spare, .cancel = cancel};
    kvs_keep keep;
    int status = kvs_keep_rows(&keep, cache, index, 1, cancel, err);
    if (status) return status;
    status = kvs_model_lock(s->model, cancel, err);
    if (!status) {
        status = kvs_llama_pass(s->model, &pass, err);
        if (!status && flags & KVS_ROW_ENDED) status = policies_end_prefill(s, index, cancel, err);
        kvs_model_unlock(s->model);
    }
    kvs_keep_end(&keep, status != KVS_OK);
    if (!status && logits) take_logits(s);
    return status;
}

/* After a rewind the rows to mix with may be gone from the ring of exact rows: prompt rows of text are computed once more. */
static int ensure_exact(kvs_session *s, int32_t from, const int32_t *cancel, kvs_error *err) {
    kvs_cache *cache = &s->cache;
    if (kvs_cache_exact(cache, KVS_MAX(from, 0))) return KVS_OK; /* and so are those behind it */
    int32_t first = cache->n_past;
    for (int32_t i = cache->n_past - 1; i >= KVS_MAX(from, 0); i--) {
        first = KVS_MIN(first, kvs_cache_again_from(cache, i));
        if (first < 0)
            return kvs_fail(err, KVS_E_POLICY,
                            "the exact values of row %d, which the next one would be mixed with, are gone; feed text first", i);
    }
    if (first < cache->n_past - cache->kv.n_exact) cache->exact_from = cache->n_past; /* they share slots of the ring with newer rows */
    int status = KVS_OK;
    for (int32_t i = first; i < cache->n_past && !status; i++) status = run_again(s, i, false, cancel, err);
    if (!status) cache->exact_from = KVS_MIN(cache->exact_from, first);
    return status;
}

/* All or nothing. The model's lock is held. */
static int end_prompt(kvs_session *s, int32_t index, const int32_t *cancel, kvs_error *err) {
    kvs_cache *cache = &s->cache;
    int32_t first = index + 1;
    for (int32_t i = 0; i < cache->n_policies; i++) {
        const kvs_policy *policy = cache->policies[i];
        if (policy->ops->end_from) first = KVS_MIN(first, policy->ops->end_from(policy, cache, index));
    }
    if (first > index) return KVS_OK;
    kvs_keep keep;
    int status = kvs_keep_rows(&keep, cache, first, index + 1 - first, cancel, err);
    if (status) return status;
    status = policies_end_prefill(s, index, cancel, err);
    kvs_keep_end(&keep, status != KVS_OK);
    for (int32_t i = 0; i < cache->n_pictures && status; i++)
        if (cache->pictures[i].sealed == index + 1) cache->pictures[i].sealed = 0;
    return status;
}

static int end_prefill(kvs_session *s, const int32_t *cancel, kvs_error *err) {
    kvs_cache *cache = &s->cache;
    int32_t last = cache->n_past - 1;
    if (last < 0 || cache->flags[last] & (KVS_ROW_GENERATED | KVS_ROW_ENDED)) return KVS_OK;
    int status = kvs_cache_mixes(cache, KVS_ROW_ENDED) ? ensure_exact(s, last - 1, cancel, err) : KVS_OK;
    if (status) return status;
    cache->flags[last] |= KVS_ROW_ENDED; /* before policies look: they derive a queue from the flags */
    if (!cache->n_policies) return KVS_OK;
    status = kvs_model_lock(s->model, cancel, err);
    if (!status) {
        status = end_prompt(s, last, cancel, err);
        kvs_model_unlock(s->model);
    }
    if (status) cache->flags[last] &= (uint8_t)~KVS_ROW_ENDED;
    return status;
}

int32_t kvs_session_end_prefill(kvs_session *session, int32_t *cancel, kvs_error *err) {
    int status = kvs_session_enter(session, err);
    if (status) return status;
    status = end_prefill(session, cancel, err);
    kvs_session_leave(session);
    return status;
}

/* ---- generated rows ---- */

static int prepare_step(kvs_session *s, int32_t id, const int32_t *cancel, kvs_error *err) {
    int status = check_ids(s, &id, 1, err);
    if (!status) status = check_room(s, 1, err);
    if (!status && s->cache.n_past && kvs_cache_mixes(&s->cache, KVS_ROW_GENERATED))
        status = ensure_exact(s, s->cache.n_past - 1, cancel, err);
    return status ? status : end_prefill(s, cancel, err);
}

static void commit_step(const kvs_span *span) {
    kvs_cache *cache = span->cache;
    kvs_cache_commit(span);
    for (int32_t i = 0; i < cache->n_policies; i++)
        if (cache->policies[i]->ops->committed) cache->policies[i]->ops->committed(cache->policies[i], cache);
}

static int step(kvs_session *const *sessions, const int32_t *ids, int32_t n, const int32_t *cancel, kvs_error *err) {
    kvs_span spans[MAX_BATCH];
    kvs_row rows[MAX_BATCH];
    float *logits[MAX_BATCH], *told[MAX_BATCH];
    for (int32_t i = 0; i < n; i++) {
        int status = prepare_step(sessions[i], ids[i], cancel, err);
        if (status) return status;
        kvs_cache *cache = &sessions[i]->cache;
        spans[i] = (kvs_span){.cache = cache, .index = cache->n_past, .first = i, .n = 1, .ids = &ids[i], .generated = true};
        kvs_cache_rows(&spans[i], &rows[i]);
        logits[i] = sessions[i]->spare;
        told[i] = sessions[i]->told;
        sessions[i]->told_row = -1;
    }
    kvs_model *model = sessions[0]->model;
    kvs_pass pass = {
        .spans = spans, .n_spans = n, .rows = rows, .n = n, .logits = true, .logits_out = logits, .told = told, .cancel = cancel};
    int status = kvs_model_lock(model, cancel, err);
    if (status) return status;
    status = kvs_llama_pass(model, &pass, err);
    for (int32_t i = 0; i < n; i++) {
        kvs_cache_touched(&sessions[i]->cache, 1);
        if (status) continue;
        commit_step(&spans[i]);
        take_logits(sessions[i]);
        sessions[i]->told_row = spans[i].index;
    }
    kvs_model_unlock(model);
    return status;
}

static void leave_all(kvs_session *const *sessions, int32_t n) {
    while (n > 0) kvs_session_leave(sessions[--n]);
}

/* All of them, or none. Nobody waits for a session, so two threads may name the same ones in any order. */
static int enter_all(kvs_session *const *sessions, int32_t n, kvs_error *err) {
    if (n < 1 || n > MAX_BATCH) return bad_argument(err, "n", "must be in 1..256");
    int32_t entered = 0;
    int status = KVS_OK;
    for (; entered < n && !status; entered += !status) {
        if (sessions[entered]->model != sessions[0]->model)
            status = kvs_fail(err, KVS_E_MISMATCH, "sessions of different models can't step together");
        else
            status = kvs_session_enter(sessions[entered], err); /* the same session twice is busy, too */
    }
    if (status) leave_all(sessions, entered);
    return status;
}

int32_t kvs_sessions_step(kvs_session *const *sessions, const int32_t *ids, int32_t n, int32_t *cancel, kvs_error *err) {
    int status = enter_all(sessions, n, err);
    if (status) return status;
    status = step(sessions, ids, n, cancel, err);
    leave_all(sessions, n);
    return status;
}

/* ---- reading ---- */

static int run_last_again(kvs_session *s, const int32_t *cancel, kvs_error *err) {
    int32_t last = s->cache.n_past - 1;
    int status = last > 0 && kvs_cache_mixes(&s->cache, s->cache.flags[last]) ? ensure_exact(s, last - 1, cancel, err) : KVS_OK;
    return status ? status : run_again(s, last, true, cancel, err);
}

/* Rows that left right behind the last row were still there when it ran. */
static int run_last_unpruned(kvs_session *s, const int32_t *cancel, kvs_error *err) {
    int status = kvs_model_lock(s->model, cancel, err);
    if (status) return status;
    bool lifted = kvs_pruned_lift(&s->cache, cancel);
    if (lifted) kvs_cache_refill_exact(&s->cache);
    kvs_model_unlock(s->model);
    if (!lifted) return kvs_fail(err, KVS_E_CANCELLED, "cancelled");
    status = run_last_again(s, cancel, err);
    kvs_model_lock(s->model, NULL, NULL); /* without a flag it can't fail */
    kvs_pruned_lower(&s->cache);
    kvs_model_unlock(s->model);
    return status;
}

/* After a rewind the last row has no logits: it runs again. */
static int ensure_logits(kvs_session *s, const int32_t *cancel, kvs_error *err) {
    kvs_cache *cache = &s->cache;
    if (s->has_logits) return KVS_OK;
    int32_t last = cache->n_past - 1;
    if (last < 0) return bad_argument(err, "logits", "nothing has been fed yet");
    if (cache->ids[last] < 0) return bad_argument(err, "logits", "rewind left an image row as the last; feed text first");
    bool pruned = cache->pruned.n_events && cache->pruned.events[cache->pruned.n_events - 1].index == last;
    int status = pruned ? run_last_unpruned(s, cancel, err) : run_last_again(s, cancel, err);
    return status;
}

int32_t kvs_session_logits(kvs_session *session, float *logits, int32_t *cancel, kvs_error *err) {
    int status = kvs_session_enter(session, err);
    if (status) return status;
    status = ensure_logits(session, cancel, err);
    kvs_backend *be = session->model->be;
    if (!status) be->ops->download(be, logits, session->logits, kvs_session_logits_bytes(session));
    if (!status) status = kvs_device_check(be, err);
    if (!status) status = kvs_logits_check(logits, session->model->text.n_vocab, err);
    kvs_session_leave(session);
    return status;
}

/* Where logits are in memory of the host one of them needs no threads, and other sessions' passes go on. */
static int draw(kvs_session *const *sessions, const kvs_draw *how, int32_t n, kvs_drawn *out, const int32_t *cancel, kvs_error *err) {
    const float *logits[MAX_BATCH];
    kvs_model *model = sessions[0]->model;
    kvs_backend *be = model->be;
    for (int32_t i = 0; i < n; i++) logits[i] = sessions[i]->logits;
    if (be->host_memory && n == 1) return kvs_sampler_draw(logits[0], model->text.n_vocab, how, out, err);
    int status = kvs_model_lock(model, cancel, err);
    if (status) return status;
    kvs_step step = {.cancel = cancel};
    be->ops->begin(be, &step);
    be->ops->sample(be, logits, model->text.n_vocab, how, out, n);
    status = be->ops->end(be, err);
    kvs_model_unlock(model);
    return status;
}

/* Random numbers are used up if all goes well. */
static int sample(kvs_session *const *sessions, const kvs_sampling *const *params, int32_t n, kvs_sample *const *out, const int32_t *cancel,
                  kvs_error *err) {
    kvs_rng rngs[MAX_BATCH];
    kvs_draw how[MAX_BATCH];
    kvs_drawn drawn[MAX_BATCH];
    for (int32_t i = 0; i < n; i++) {
        kvs_session *s = sessions[i];
        int status = ensure_logits(s, cancel, err);
        if (!status) status = kvs_sampling_check(params[i], err);
        if (status) return status;
        rngs[i] = s->rng;
        how[i] = (kvs_draw){params[i], s->cache.ids, s->cache.n_past, params[i]->temperature > 0 ? kvs_rng_uniform(&rngs[i]) : 0};
    }
    int status = draw(sessions, how, n, drawn, cancel, err);
    for (int32_t i = 0; i < n && !status; i++)
        if (drawn[i].n_bad) status = kvs_logits_fail(drawn[i].n_bad, sessions[i]->model->text.n_vocab, drawn[i].first_bad, err);
    for (int32_t i = 0; i < n && !status; i++) {
        sessions[i]->rng = rngs[i];
        *out[i] = drawn[i].sample;
    }
    return status;
}

int32_t kvs_sessions_sample(kvs_session *const *sessions, const kvs_sampling *const *params, int32_t n, kvs_sample *const *out,
                            int32_t *cancel, kvs_error *err) {
    int status = enter_all(sessions, n, err);
    if (status) return status;
    for (int32_t i = 0; i < n && !status; i++)
        if (params[i]->struct_size != sizeof **params) status = bad_argument(err, "struct_size", "kvs_sampling of another version");
    if (!status) status = sample(sessions, params, n, out, cancel, err);
    leave_all(sessions, n);
    return status;
}

int32_t kvs_session_sample(kvs_session *session, const kvs_sampling *params, kvs_sample *out, int32_t *cancel, kvs_error *err) {
    return kvs_sessions_sample(&session, &params, 1, &out, cancel, err);
}

int32_t kvs_session_reseed(kvs_session *session, uint64_t seed, kvs_error *err) {
    int status = kvs_session_enter(session, err);
    if (status) return status;
    kvs_rng_seed(&session->rng, seed);
    kvs_session_leave(session);
    return KVS_OK;
}

/* ---- the timeline ---- */

int32_t kvs_session_new_turn(kvs_session *session, kvs_error *err) {
    int status = kvs_session_enter(session, err);
    if (status) return status;
    kvs_cache *cache = &session->cache;
    if (cache->n_past && kvs_cache_turn_start(cache, cache->n_past) != cache->n_past) cache->turns[cache->n_turns++] = cache->n_past;
    kvs_session_leave(session);
    return KVS_OK;
}

static int fork_session(const kvs_session *from, kvs_session **out, const int32_t *cancel, kvs_error *err) {
    kvs_session *s;
    kvs_backend *be = from->model->be;
    int status = new_session(from->model, &s, err);
    if (status) return status;
    status = kvs_cache_clone(&from->cache, &s->cache, cancel, err);
    if (!status) status = count(s, err);
    if (!status && from->has_logits) be->ops->copy(be, s->logits, from->logits, kvs_session_logits_bytes(s));
    if (!status) status = kvs_device_check(be, err);
    if (status) {
        kvs_session_free(s);
        return status;
    }
    s->has_logits = from->has_logits;
    s->rng = from->rng;
    *out = s;
    return KVS_OK;
}

int32_t kvs_session_fork(kvs_session *session, kvs_session **out, int32_t *cancel, kvs_error *err) {
    *out = NULL;
    int status = kvs_session_enter(session, err);
    if (status) return status;
    status = fork_session(session, out, cancel, err);
    kvs_session_leave(session);
    return status;
}

/* Rows that come back do so through ops. */
static int rewind_session(kvs_session *s, int32_t n_past, const int32_t *cancel, kvs_error *err) {
    bool locked = s->cache.pruned.n_events > 0;
    int status = locked ? kvs_model_lock(s->model, cancel, err) : KVS_OK;
    if (status) return status;
    status = kvs_cache_rewind(&s->cache, n_past, true, cancel, err);
    if (locked) kvs_model_unlock(s->model);
    return status;
}

int32_t kvs_session_rewind(kvs_session *session, int32_t n, int32_t *cancel, kvs_error *err) {
    int status = kvs_session_enter(session, err);
    if (status) return status;
    if (n < 0 || n > session->cache.n_past) {
        kvs_fail(err, KVS_E_ARGUMENT, "n: can't drop %d of %d rows", n, session->cache.n_past);
        status = KVS_E_ARGUMENT;
    } else if (n > 0) {
        status = rewind_session(session, session->cache.n_past - n, cancel, err);
        if (!status) session->has_logits = false;
    }
    kvs_session_leave(session);
    return status;
}

/* ---- rows that pruning took ---- */

static int restore(kvs_session *s, const int32_t *cancel, kvs_error *err) {
    kvs_cache *cache = &s->cache;
    if (cache->pruned.on && !cache->pruned.reversible)
        return kvs_fail(err, KVS_E_POLICY, "restore: dropped rows were not kept; make the session with PruneHal(reversible=True)");
    if (!cache->pruned.n_events) return KVS_OK;
    int status = kvs_model_lock(s->model, cancel, err);
    if (status) return status;
    bool done = kvs_pruned_undo(cache, 0, cancel);
    kvs_model_unlock(s->model);
    if (!done) return kvs_fail(err, KVS_E_CANCELLED, "cancelled");
    cache->pruned.quiet = cache->n_past;
    return kvs_device_check(cache->be, err);
}

int32_t kvs_session_restore(kvs_session *session, int32_t *cancel, kvs_error *err) {
    int status = kvs_session_enter(session, err);
    if (status) return status;
    status = restore(session, cancel, err);
    kvs_session_leave(session);
    return status;
}
