/* session_read.c - what a timeline holds: its rows, their keys and values, entropies and strengths. Nothing here changes a session. */
#include "session.h"

#include <stdlib.h>
#include <string.h>

int32_t kvs_session_n_ctx(const kvs_session *session) { return session->cache.kv.n_ctx; }

int32_t kvs_session_kv_type(const kvs_session *session) { return session->cache.kv.type; }

int32_t kvs_session_n_past(const kvs_session *session) { return session->cache.n_past; }

int32_t kvs_session_n_rows(const kvs_session *session, int32_t layer) {
    return layer < 0 || layer >= session->cache.kv.n_layer ? -1 : kvs_cache_n_rows(&session->cache, layer);
}

int32_t kvs_session_n_sets(const kvs_session *session) { return session->cache.kv.n_sets; }

int32_t kvs_session_n_pictures(const kvs_session *session) { return session->cache.n_pictures; }

int32_t kvs_session_n_generated(const kvs_session *session) {
    int32_t n = 0;
    for (int32_t i = 0; i < session->cache.n_past; i++) n += session->cache.flags[i] & KVS_ROW_GENERATED ? 1 : 0;
    return n;
}

int32_t kvs_session_n_exact(const kvs_session *session) { return kvs_cache_rewindable(&session->cache); }

/* Another thread may have fed since the caller asked how many rows there are. */
static int check_rows(int32_t n, int32_t rows, kvs_error *err) {
    if (n == rows) return KVS_OK;
    kvs_fail(err, KVS_E_ARGUMENT, "n: there are %d rows, not %d", rows, n);
    return KVS_E_ARGUMENT;
}

int32_t kvs_session_timeline(kvs_session *session, int32_t n, int32_t *ids, uint64_t *hashes, int32_t *generated, kvs_error *err) {
    int status = kvs_session_enter(session, err);
    if (status) return status;
    const kvs_cache *cache = &session->cache;
    status = check_rows(n, cache->n_past, err);
    for (int32_t i = 0; i < n && !status; i++) {
        ids[i] = cache->ids[i];
        hashes[i] = cache->hashes[i];
        generated[i] = cache->flags[i] & KVS_ROW_GENERATED ? 1 : 0;
    }
    kvs_session_leave(session);
    return status;
}

static int check_layer(const kvs_session *s, int32_t layer, kvs_error *err) {
    if (layer >= 0 && layer < s->cache.kv.n_layer) return KVS_OK;
    kvs_fail(err, KVS_E_ARGUMENT, "layer: %d is not in 0..%d", layer, s->cache.kv.n_layer - 1);
    return KVS_E_ARGUMENT;
}

int32_t kvs_session_positions(kvs_session *session, int32_t layer, int32_t n, int32_t *positions, kvs_error *err) {
    int status = kvs_session_enter(session, err);
    if (status) return status;
    status = check_layer(session, layer, err);
    if (!status) status = check_rows(n, kvs_cache_n_rows(&session->cache, layer), err);
    if (!status) kvs_cache_positions(&session->cache, layer, positions);
    kvs_session_leave(session);
    return status;
}

int32_t kvs_session_kv(kvs_session *session, int32_t layer, int32_t n, float *k, float *v, kvs_error *err) {
    int status = kvs_session_enter(session, err);
    if (status) return status;
    status = check_layer(session, layer, err);
    if (!status) status = check_rows(n, kvs_cache_n_rows(&session->cache, layer), err);
    if (!status) status = kvs_cache_read(&session->cache, layer, k, v, err);
    kvs_session_leave(session);
    return status;
}

static float group_mean(const kvs_cache *cache, const float *history, int32_t layer, int32_t index, float *groups) {
    int32_t n = cache->kv.n_group;
    cache->be->ops->download(cache->be, groups, history + kvs_kv_history(&cache->kv, layer, index), (uint64_t)n * sizeof *groups);
    double sum = 0;
    for (int32_t g = 0; g < n; g++) sum += groups[g];
    return (float)(sum / n);
}

/* The newest row has told it with its step; others are looked for where they are. */
static int telemetry(const kvs_session *s, int32_t n, float *entropies, float *strengths, float *masses, kvs_error *err) {
    const kvs_cache *cache = &s->cache;
    float *groups = kvs_calloc((uint64_t)cache->kv.n_group, sizeof *groups);
    if (!groups) return kvs_fail_memory(err, 0, "telemetry");
    int32_t n_layer = cache->kv.n_layer, row = n - 1;
    for (int32_t i = cache->n_past - 1; i >= 0 && row >= 0; i--) {
        if (!(cache->flags[i] & KVS_ROW_GENERATED)) continue;
        if (i == s->told_row) {
            float *const to[] = {entropies, strengths, masses};
            for (int32_t what = 0; what < 3; what++)
                memcpy(to[what] + (int64_t)row * n_layer, s->told + what * n_layer, (size_t)n_layer * sizeof *s->told);
            row--;
            continue;
        }
        for (int32_t layer = 0; layer < n_layer; layer++) {
            entropies[(int64_t)row * n_layer + layer] = group_mean(cache, cache->kv.entropy, layer, i, groups);
            strengths[(int64_t)row * n_layer + layer] = group_mean(cache, cache->kv.strength, layer, i, groups);
        }
        cache->be->ops->download_rows(cache->be, masses + (int64_t)row * n_layer, cache->kv.mass + i, sizeof *masses,
                                      (uint64_t)cache->kv.n_ctx * sizeof *masses, n_layer);
        row--;
    }
    free(groups);
    if (row >= 0) return kvs_fail(err, KVS_E_ARGUMENT, "n: more rows than were generated");
    return kvs_device_check(cache->be, err);
}

int32_t kvs_session_telemetry(kvs_session *session, int32_t n, float *entropies, float *strengths, float *masses, kvs_error *err) {
    int status = kvs_session_enter(session, err);
    if (status) return status;
    status = telemetry(session, n, entropies, strengths, masses, err);
    kvs_session_leave(session);
    return status;
}

int32_t kvs_session_n_prunings(const kvs_session *session) { return session->cache.pruned.n_events; }

int32_t kvs_session_prunings(kvs_session *session, int32_t n, kvs_pruning *prunings, kvs_error *err) {
    int status = kvs_session_enter(session, err);
    if (status) return status;
    const kvs_pruned *p = &session->cache.pruned;
    if (n < 0 || n > p->n_events) status = kvs_fail(err, KVS_E_ARGUMENT, "n: more prunings than there were");
    for (int32_t i = 0; i < n && !status; i++) {
        const kvs_event *e = &p->events[i];
        prunings[i] = (kvs_pruning){e->index, e->forced, e->n_before, e->n_before - e->n_dropped};
    }
    kvs_session_leave(session);
    return status;
}

int32_t kvs_session_n_whole(const kvs_session *session) { return kvs_pruned_whole(&session->cache); }
