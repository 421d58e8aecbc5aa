#include "cache.h"
#include "quant.h"

#include <stdlib.h>
#include <string.h>

static void *device_layers(kvs_cache *cache, uint64_t bytes) { /* of one layer */
    void *block = cache->be->ops->alloc_layers(cache->be, cache->kv.n_layer, bytes);
    if (block) cache->bytes += (uint64_t)cache->kv.n_layer * bytes;
    return block;
}

static bool alloc_query(kvs_cache *cache) {
    kvs_kv *kv = &cache->kv;
    uint64_t heads = (uint64_t)kv->n_head * sizeof(float);
    kv->query = device_layers(cache, heads * (uint64_t)kv->head_dim);
    kv->lse = device_layers(cache, heads);
    return kv->query && kv->lse;
}

static bool alloc_exact(kvs_cache *cache, bool outputs) {
    kvs_kv *kv = &cache->kv;
    uint64_t head = (uint64_t)kv->head_dim * sizeof(float), ring = (uint64_t)kv->n_exact * head;
    kv->exact_k = device_layers(cache, ring * (uint64_t)kv->n_kv_head);
    kv->exact_v = device_layers(cache, ring * (uint64_t)kv->n_kv_head);
    if (outputs) kv->exact_o = device_layers(cache, ring * (uint64_t)kv->n_head);
    cache->kept = device_layers(cache, head * (2 * (uint64_t)kv->n_kv_head + (outputs ? (uint64_t)kv->n_head : 0)));
    return cache->kept && kv->exact_k && kv->exact_v && (!outputs || kv->exact_o);
}

/* The sizes can't overflow: n_ctx <= 2^20, n_layer <= 1024, heads and head_dim bounded by the loader. */
static bool alloc_device(kvs_cache *cache, const kvs_cache_shape *shape) {
    kvs_kv *kv = &cache->kv;
    uint64_t rows = (uint64_t)kv->n_kv_head * (uint64_t)kv->n_ctx;
    uint64_t numbers = (uint64_t)kv->n_ctx * sizeof(float), history = numbers * (uint64_t)kv->n_group;
    kv->k = device_layers(cache, rows * (uint64_t)kv->row_bytes);
    kv->v = device_layers(cache, rows * (uint64_t)kv->row_bytes);
    kv->entropy = device_layers(cache, history);
    kv->strength = device_layers(cache, history);
    kv->mass = device_layers(cache, numbers);
    if (!kv->k || !kv->v || !kv->entropy || !kv->strength || !kv->mass) return false;
    if (shape->prune && !alloc_query(cache)) return false;
    return !kv->n_exact || alloc_exact(cache, shape->exact_o);
}

static bool alloc_timeline(kvs_cache *cache) {
    uint64_t n = (uint64_t)cache->kv.n_ctx;
    cache->ids = kvs_calloc(n, sizeof *cache->ids);
    cache->hashes = kvs_calloc(n, sizeof *cache->hashes);
    cache->flags = kvs_calloc(n, sizeof *cache->flags);
    cache->turns = kvs_calloc(n + 1, sizeof *cache->turns);
    return cache->ids && cache->hashes && cache->flags && cache->turns;
}

int kvs_cache_init(kvs_cache *cache, kvs_backend *be, const kvs_cache_shape *shape, kvs_error *err) {
    memset(cache, 0, sizeof *cache);
    cache->be = be;
    kvs_kv *kv = &cache->kv;
    kv->type = shape->type;
    kv->n_layer = shape->n_layer;
    kv->n_head = shape->n_head;
    kv->n_kv_head = shape->n_kv_head;
    kv->head_dim = shape->head_dim;
    kv->n_ctx = shape->n_ctx;
    kv->row_bytes = kvs_kv_row_bytes(shape->type, shape->head_dim);
    kv->n_group = shape->n_group;
    kv->exclude_self = shape->exclude_self;
    kv->n_exact = shape->n_exact;
    kv->n_sets = 1;
    const kvs_prune_params *prune = shape->prune;
    bool lists = !prune || kvs_pruned_init(cache, prune->layers, prune->n_layers, prune->scope == KVS_SCOPE_KV_HEAD, prune->reversible);
    if (lists && alloc_device(cache, shape) && alloc_timeline(cache)) return KVS_OK;
    int32_t n_layer = be->host_layers < kv->n_layer ? kv->n_layer - be->host_layers : kv->n_layer; /* that ask for what is scarce */
    uint64_t needed = 2 * (uint64_t)n_layer * (uint64_t)kv->n_kv_head * (uint64_t)kv->n_ctx * (uint64_t)kv->row_bytes;
    kvs_cache_free(cache);
    return kvs_fail_room(be, err, needed, "the KV cache; a smaller n_ctx or kv_type needs less");
}

static void drop_pictures(kvs_cache *cache, int32_t n) { /* all but n */
    while (cache->n_pictures > n) free(cache->pictures[--cache->n_pictures].depth);
}

void kvs_cache_free(kvs_cache *cache) {
    if (!cache->be) return;
    void *device[] = {cache->kv.k,       cache->kv.v, cache->kv.entropy, cache->kv.strength, cache->kv.exact_k, cache->kv.exact_v,
                      cache->kv.exact_o, cache->kept, cache->kv.mass,    cache->kv.query,    cache->kv.lse};
    for (size_t i = 0; i < sizeof device / sizeof *device; i++)
        if (device[i]) cache->be->ops->release(cache->be, device[i]);
    free(cache->ids);
    free(cache->hashes);
    free(cache->flags);
    free(cache->turns);
    drop_pictures(cache, 0);
    free(cache->pictures);
    free(cache->kv.spans);
    kvs_pruned_free(&cache->pruned);
    for (int32_t i = 0; i < cache->n_policies; i++) cache->policies[i]->ops->free(cache->policies[i]);
    memset(cache, 0, sizeof *cache);
}

static bool copy_rows(const kvs_cache *from, kvs_cache *to, const int32_t *cancel) {
    const kvs_kv *src = &from->kv;
    for (int32_t layer = 0; layer < src->n_layer; layer++) {
        uint64_t bytes = (uint64_t)kvs_cache_n_rows(from, layer) * (uint64_t)src->row_bytes;
        for (int32_t head = 0; head < src->n_kv_head; head++) {
            if (kvs_cancelled(cancel)) return false;
            from->be->ops->copy(from->be, kvs_kv_rows(&to->kv, to->kv.k, layer, head), kvs_kv_rows(src, src->k, layer, head), bytes);
            from->be->ops->copy(from->be, kvs_kv_rows(&to->kv, to->kv.v, layer, head), kvs_kv_rows(src, src->v, layer, head), bytes);
        }
        uint64_t history = (uint64_t)from->n_past * (uint64_t)src->n_group * sizeof(float);
        int64_t at = kvs_kv_history(src, layer, 0);
        from->be->ops->copy(from->be, to->kv.entropy + at, src->entropy + at, history);
        from->be->ops->copy(from->be, to->kv.strength + at, src->strength + at, history);
        at = kvs_kv_mass(src, layer, 0);
        from->be->ops->copy(from->be, to->kv.mass + at, src->mass + at, (uint64_t)from->n_past * sizeof(float));
    }
    uint64_t ring = (uint64_t)src->n_layer * (uint64_t)src->n_exact * (uint64_t)src->head_dim * sizeof(float);
    if (src->exact_k) from->be->ops->copy(from->be, to->kv.exact_k, src->exact_k, ring * (uint64_t)src->n_kv_head);
    if (src->exact_v) from->be->ops->copy(from->be, to->kv.exact_v, src->exact_v, ring * (uint64_t)src->n_kv_head);
    if (src->exact_o) from->be->ops->copy(from->be, to->kv.exact_o, src->exact_o, ring * (uint64_t)src->n_head);
    return true;
}

static bool copy_policies(const kvs_cache *from, kvs_cache *to) {
    for (int32_t i = 0; i < from->n_policies; i++) {
        to->policies[i] = from->policies[i]->ops->clone(from->policies[i]);
        if (!to->policies[i]) return false;
        to->n_policies++;
    }
    return true;
}

static bool reserve_pictures(kvs_cache *cache, int32_t n) {
    if (n <= cache->room_pictures) return true;
    int32_t room = KVS_MAX(n, 2 * cache->room_pictures);
    uint64_t lists = cache->pruned.on ? (uint64_t)cache->kv.n_layer * (uint64_t)cache->kv.n_sets : 1;
    kvs_range *spans = kvs_calloc(lists * (uint64_t)room, sizeof *spans);
    kvs_picture *grown = spans ? kvs_realloc(cache->pictures, (uint64_t)room, sizeof *grown) : NULL;
    if (!grown) {
        free(spans);
        return false;
    }
    cache->pictures = grown;
    cache->room_pictures = cache->kv.room_spans = room;
    free(cache->kv.spans);
    cache->kv.spans = spans;
    kvs_pruned_refresh(cache);
    return true;
}

static bool push_picture(kvs_cache *cache, kvs_picture picture) { /* its depth is copied */
    uint64_t n = picture.depth ? (uint64_t)picture.n : 0;
    float *depth = n ? kvs_calloc(n, sizeof *depth) : NULL;
    if ((n && !depth) || !reserve_pictures(cache, cache->n_pictures + 1)) {
        free(depth);
        return false;
    }
    if (n) memcpy(depth, picture.depth, n * sizeof *depth);
    picture.depth = depth;
    cache->pictures[cache->n_pictures++] = picture;
    return true;
}

static bool copy_pictures(const kvs_cache *from, kvs_cache *to) {
    bool ok = true;
    for (int32_t i = 0; i < from->n_pictures && ok; i++) ok = push_picture(to, from->pictures[i]);
    return ok;
}

int kvs_cache_clone(const kvs_cache *from, kvs_cache *to, const int32_t *cancel, kvs_error *err) {
    const kvs_kv *kv = &from->kv;
    kvs_prune_params prune = {.scope = kv->n_sets > 1 ? KVS_SCOPE_KV_HEAD : KVS_SCOPE_LAYER, .reversible = from->pruned.reversible};
    kvs_cache_shape shape = {.type = kv->type,
                             .n_layer = kv->n_layer,
                             .n_head = kv->n_head,
                             .n_kv_head = kv->n_kv_head,
                             .head_dim = kv->head_dim,
                             .n_ctx = kv->n_ctx,
                             .n_exact = kv->n_exact,
                             .exact_o = kv->exact_o != NULL,
                             .n_group = kv->n_group,
                             .exclude_self = kv->exclude_self,
                             .prune = from->pruned.on ? &prune : NULL};
    int status = kvs_cache_init(to, from->be, &shape, err);
    if (status) return status;
    if (!copy_policies(from, to) || !copy_pictures(from, to) || !kvs_pruned_clone(from, to)) {
        kvs_cache_free(to);
        return kvs_fail_memory(err, 0, "a copy of the policies and of what they keep");
    }
    kvs_pruned_refresh(to);
    if (!copy_rows(from, to, cancel)) {
        kvs_cache_free(to);
        return kvs_fail(err, KVS_E_CANCELLED, "cancelled");
    }
    size_t n = (size_t)from->n_past;
    memcpy(to->ids, from->ids, n * sizeof *to->ids);
    memcpy(to->hashes, from->hashes, n * sizeof *to->hashes);
    memcpy(to->flags, from->flags, n * sizeof *to->flags);
    memcpy(to->turns, from->turns, (size_t)from->n_turns * sizeof *to->turns);
    to->n_past = from->n_past;
    to->n_turns = from->n_turns;
    to->exact_from = from->exact_from;
    to->store_is_exact = from->store_is_exact;
    return KVS_OK;
}

void kvs_cache_rows(const kvs_span *span, kvs_row *rows) {
    kvs_cache *cache = span->cache;
    for (int32_t i = 0; i < span->n; i++) {
        int32_t index = span->index + i;
        rows[i] = (kvs_row){.kv = &cache->kv, .index = index, .pos = index};
    }
}

int kvs_cache_add_picture(kvs_cache *cache, int32_t at, int32_t n, const float *depth, kvs_error *err) {
    kvs_picture picture = {.first = cache->n_past + at, .n = n, .depth = (float *)depth};
    if (!push_picture(cache, picture)) return kvs_fail_memory(err, 0, "a picture's place");
    kvs_pruned_refresh(cache);
    return KVS_OK;
}

kvs_picture *kvs_cache_picture_at(const kvs_cache *cache, int32_t end) {
    for (int32_t i = cache->n_pictures - 1; i >= 0; i--)
        if (cache->pictures[i].first + cache->pictures[i].n == end) return &cache->pictures[i];
    return NULL;
}

void kvs_cache_forget(kvs_cache *cache) {
    int32_t n = cache->n_pictures;
    while (n > 0 && cache->pictures[n - 1].first >= cache->n_past) n--;
    drop_pictures(cache, n);
    if (n) {
        kvs_picture *last = &cache->pictures[n - 1]; /* a rewind may end inside it */
        last->n = KVS_MIN(last->n, cache->n_past - last->first);
    }
    kvs_pruned_refresh(cache);
}

void kvs_cache_touched(kvs_cache *cache, int32_t n) {
    cache->exact_from = KVS_MAX(cache->exact_from, KVS_MIN(cache->n_past, cache->n_past + n - cache->kv.n_exact));
}

static void move_newest_exact(const kvs_cache *cache, bool back) {
    const kvs_kv *kv = &cache->kv;
    float *rings[] = {kv->exact_k, kv->exact_v, kv->exact_o}, *kept = cache->kept;
    for (int32_t layer = 0; layer < kv->n_layer; layer++)
        for (int i = 0; i < 3 && rings[i]; i++) {
            int32_t heads = i < 2 ? kv->n_kv_head : kv->n_head;
            float *row = rings[i] + kvs_kv_exact(kv, layer, cache->n_past - 1, heads);
            cache->be->ops->copy(cache->be, back ? row : kept, back ? kept : row, (uint64_t)heads * (uint64_t)kv->head_dim * sizeof *row);
            kept += (int64_t)heads * kv->head_dim;
        }
}

void kvs_cache_keep_exact(kvs_cache *cache) {
    if (cache->kept && cache->n_past > 0) move_newest_exact(cache, false);
}

void kvs_cache_restore_exact(kvs_cache *cache) {
    if (!cache->kept || cache->n_past == 0 || cache->exact_from < cache->n_past) return;
    move_newest_exact(cache, true);
    cache->exact_from = cache->n_past - 1;
}

void kvs_cache_commit(const kvs_span *span) {
    kvs_cache *cache = span->cache;
    for (int32_t i = 0; i < span->n; i++) {
        int32_t index = cache->n_past + i;
        cache->ids[index] = span->ids[i];
        cache->hashes[index] = span->hashes ? span->hashes[i] : 0;
        cache->flags[index] = span->generated ? KVS_ROW_GENERATED : 0;
    }
    cache->n_past += span->n;
}

bool kvs_cache_exact(const kvs_cache *cache, int32_t index) {
    return index >= KVS_MAX(cache->exact_from, cache->n_past - cache->kv.n_exact);
}

bool kvs_cache_mixes(const kvs_cache *cache, uint8_t flags) {
    for (int32_t i = 0; i < cache->n_policies; i++) {
        const kvs_policy *policy = cache->policies[i];
        if (policy->ops->mixes && policy->ops->mixes(policy, flags)) return true;
    }
    return false;
}

/* Is there a picture with first <= index and end < sealed? */
static bool under_seal(const kvs_cache *cache, int32_t index, int32_t end) {
    for (int32_t i = 0; i < cache->n_pictures; i++)
        if (cache->pictures[i].first <= index && end < cache->pictures[i].sealed) return true;
    return false;
}

/* A prompt row of text can be computed again; one that was smoothed at the end of its prompt needs the row before it, too. Rows up to
 * pruned saw rows that are gone. */
static int32_t again_from(const kvs_cache *cache, int32_t index, int32_t pruned) {
    for (; index >= 0 && !kvs_cache_exact(cache, index); index--) {
        if (cache->flags[index] & KVS_ROW_GENERATED || cache->ids[index] < 0 || index <= pruned || under_seal(cache, index, index))
            return -1;
        if (!kvs_cache_mixes(cache, cache->flags[index])) return index;
    }
    return index + 1;
}

static int32_t last_pruned(const kvs_cache *cache, int32_t before) { /* the newest row before that one behind which rows were dropped */
    const kvs_pruned *p = &cache->pruned;
    int32_t n = p->n_applied;
    while (n > 0 && (p->events[n - 1].index >= before || !p->events[n - 1].n_dropped)) n--;
    return n > 0 ? p->events[n - 1].index : -1;
}

int32_t kvs_cache_again_from(const kvs_cache *cache, int32_t index) { return again_from(cache, index, last_pruned(cache, INT32_MAX)); }

/* May the timeline end here? Its logits (if wanted) need the last row run once more, and that may need the row before it. */
static bool can_end_at(const kvs_cache *cache, int32_t n_past, bool logits) {
    if (n_past == 0 || n_past == cache->n_past) return true;
    if (!kvs_pruned_can_end(cache, n_past, logits) || under_seal(cache, n_past - 1, n_past)) return false;
    if (logits && cache->ids[n_past - 1] >= 0 && under_seal(cache, n_past - 1, n_past - 1)) return false;
    if (cache->store_is_exact) return true;
    uint8_t flags = cache->flags[n_past - 1];
    if (!kvs_cache_mixes(cache, flags)) return true;                   /* text can follow a picture */
    int32_t pruned = last_pruned(cache, logits ? n_past - 1 : n_past); /* a row behind which rows went runs again with them */
    bool here = flags & KVS_ROW_GENERATED ? kvs_cache_exact(cache, n_past - 1) : again_from(cache, n_past - 1, pruned) >= 0;
    return here && (!logits || again_from(cache, n_past - 2, pruned) >= 0);
}

/* A float32 store holds what the ring of exact rows held. The newest two rows are all that a mix may ask for; the last row of a picture
 * may have left the store. */
void kvs_cache_refill_exact(kvs_cache *cache) {
    kvs_kv *kv = &cache->kv;
    uint64_t bytes = (uint64_t)kv->row_bytes;
    int32_t first = KVS_MAX(cache->n_past - 2, 0);
    if (!cache->store_is_exact || kvs_cache_exact(cache, first)) return;
    while (first < cache->n_past && cache->ids[first] < 0 && first <= last_pruned(cache, INT32_MAX)) first++;
    cache->exact_from = first;
    for (int32_t index = cache->exact_from; index < cache->n_past; index++) {
        for (int32_t layer = 0; layer < kv->n_layer; layer++) {
            int64_t row = kvs_kv_place(kv, layer, index) * kv->row_bytes;
            int64_t slot = kvs_kv_exact(kv, layer, index, kv->n_kv_head);
            for (int32_t head = 0; head < kv->n_kv_head; head++, slot += kv->head_dim) {
                cache->be->ops->copy(cache->be, kv->exact_k + slot, kvs_kv_rows(kv, kv->k, layer, head) + row, bytes);
                cache->be->ops->copy(cache->be, kv->exact_v + slot, kvs_kv_rows(kv, kv->v, layer, head) + row, bytes);
            }
        }
    }
}

int32_t kvs_cache_rewindable(const kvs_cache *cache) {
    int32_t n = cache->n_past;
    while (n > 0 && can_end_at(cache, n - 1, true)) n--;
    return cache->n_past - n;
}

static int refuse_rewind(const kvs_cache *cache, int32_t n_past, bool logits, kvs_error *err) {
    int32_t n = cache->n_past - n_past;
    if (!kvs_pruned_can_end(cache, n_past, logits))
        kvs_fail(err, KVS_E_POLICY,
                 "rewind by %d rows: PruneHal has dropped rows of pictures since, and they are not kept; rewind less, to row %d or before "
                 "it, or make the session with PruneHal(reversible=True)",
                 n, kvs_pruned_whole(cache));
    else if (under_seal(cache, n_past - 1, n_past - 1))
        kvs_fail(err, KVS_E_POLICY,
                 "rewind by %d rows: it would end in a picture that was refined, or in a prompt that has seen it as it was before; "
                 "rewind less, or to the row in front of the picture",
                 n);
    else
        kvs_fail(err, KVS_E_POLICY,
                 "rewind by %d rows: the row that the next smoothing would mix with is kept exactly for the newest %d rows only; "
                 "rewind less, or make the session with more exact_rows",
                 n, cache->n_past - KVS_MAX(cache->exact_from, cache->n_past - cache->kv.n_exact));
    if (err) {
        err->needed = (uint64_t)n;
        err->available = (uint64_t)kvs_cache_rewindable(cache);
    }
    return KVS_E_POLICY;
}

int kvs_cache_rewind(kvs_cache *cache, int32_t n_past, bool logits, const int32_t *cancel, kvs_error *err) {
    if (!can_end_at(cache, n_past, logits)) return refuse_rewind(cache, n_past, logits, err);
    int32_t exact_from = KVS_MAX(cache->exact_from, cache->n_past - cache->kv.n_exact);
    if (!kvs_pruned_undo(cache, n_past, cancel)) return kvs_fail(err, KVS_E_CANCELLED, "cancelled");
    cache->pruned.quiet = KVS_MIN(cache->pruned.quiet, n_past);
    while (cache->n_turns > 0 && cache->turns[cache->n_turns - 1] > n_past) cache->n_turns--;
    cache->n_past = n_past;
    kvs_cache_forget(cache);
    cache->exact_from = KVS_MIN(exact_from, n_past);
    kvs_cache_refill_exact(cache);
    return KVS_OK;
}

int32_t kvs_cache_turn_start(const kvs_cache *cache, int32_t index) {
    int32_t n = cache->n_turns;
    while (n > 0 && cache->turns[n - 1] > index) n--;
    return n > 0 ? cache->turns[n - 1] : 0;
}

void kvs_cache_positions(const kvs_cache *cache, int32_t layer, int32_t *positions) {
    const kvs_kv *kv = &cache->kv;
    int32_t n = 0;
    for (int32_t set = 0; set < kv->n_sets; set++) {
        const uint16_t *gone = cache->pruned.on ? kvs_pruned_list(&cache->pruned, kv, layer, set) : NULL;
        for (int32_t i = 0; i < cache->n_past; i++)
            if (!gone || !gone[i]) positions[n++] = i;
    }
}

int kvs_cache_read(const kvs_cache *cache, int32_t layer, float *k, float *v, kvs_error *err) {
    const kvs_kv *kv = &cache->kv;
    int32_t n_rows = kvs_cache_n_rows(cache, layer);
    uint64_t bytes = (uint64_t)n_rows * (uint64_t)kv->row_bytes;
    uint8_t *raw = kvs_calloc(1, bytes);
    if (!raw) return kvs_fail_memory(err, bytes, "a copy of cache rows");
    for (int32_t side = 0; side < 2; side++) {
        float *out = side ? v : k;
        for (int32_t head = 0; head < kv->n_kv_head; head++) {
            cache->be->ops->download(cache->be, raw, kvs_kv_rows(kv, side ? kv->v : kv->k, layer, head), bytes);
            for (int32_t i = 0; i < n_rows; i++)
                kvs_kv_row_to_f32(kv->type, raw + i * kv->row_bytes, out + ((int64_t)head * n_rows + i) * kv->head_dim, kv->head_dim);
        }
    }
    free(raw);
    return kvs_device_check(cache->be, err);
}
