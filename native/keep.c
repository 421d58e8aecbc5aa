#include "keep.h"

/* Counts where there is no block yet; then one way or the other. */
static void carry(kvs_keep *keep, void *device, uint64_t n, uint64_t size) {
    uint8_t *kept = keep->block ? keep->block + keep->bytes : NULL;
    kvs_backend *be = keep->cache->be;
    if (kept) be->ops->copy(be, keep->back ? device : kept, keep->back ? kept : device, n * size);
    keep->bytes += n * size;
}

static void carry_ring(kvs_keep *keep, int32_t layer) {
    const kvs_kv *kv = &keep->cache->kv;
    int32_t end = keep->first + keep->n;
    for (int32_t i = KVS_MAX(keep->first, end - kv->n_exact); i < end; i++) {
        int64_t slot = kvs_kv_exact(kv, layer, i, kv->n_kv_head);
        uint64_t width = (uint64_t)kv->n_kv_head * (uint64_t)kv->head_dim;
        carry(keep, kv->exact_k + slot, width, sizeof(float));
        carry(keep, kv->exact_v + slot, width, sizeof(float));
        if (kv->exact_o)
            carry(keep, kv->exact_o + kvs_kv_exact(kv, layer, i, kv->n_head), (uint64_t)kv->n_head * (uint64_t)kv->head_dim, sizeof(float));
    }
}

/* One function for all three ways, so that they can't drift apart. */
static void carry_all(kvs_keep *keep) {
    const kvs_kv *kv = &keep->cache->kv;
    uint64_t n = (uint64_t)keep->n;
    keep->bytes = 0;
    for (int32_t layer = 0; layer < kv->n_layer && (keep->back || !kvs_cancelled(keep->cancel)); layer++) {
        int64_t at = kvs_kv_place(kv, layer, keep->first) * kv->row_bytes;
        for (int32_t head = 0; head < kv->n_kv_head; head++) {
            carry(keep, kvs_kv_rows(kv, kv->k, layer, head) + at, n, (uint64_t)kv->row_bytes);
            carry(keep, kvs_kv_rows(kv, kv->v, layer, head) + at, n, (uint64_t)kv->row_bytes);
        }
        carry(keep, kv->entropy + kvs_kv_history(kv, layer, keep->first), n * (uint64_t)kv->n_group, sizeof(float));
        carry(keep, kv->strength + kvs_kv_history(kv, layer, keep->first), n * (uint64_t)kv->n_group, sizeof(float));
        carry(keep, kv->mass + kvs_kv_mass(kv, layer, keep->first), n, sizeof(float));
        if (kv->n_exact) carry_ring(keep, layer);
    }
}

int kvs_keep_rows(kvs_keep *keep, kvs_cache *cache, int32_t first, int32_t n, const int32_t *cancel, kvs_error *err) {
    *keep = (kvs_keep){.cache = cache, .first = first, .n = n};
    carry_all(keep);
    keep->block = cache->be->ops->alloc(cache->be, keep->bytes);
    if (!keep->block) return kvs_fail_room(cache->be, err, keep->bytes, "rows of the cache as they were");
    keep->cancel = cancel;
    carry_all(keep);
    if (!kvs_cancelled(cancel)) return KVS_OK;
    kvs_keep_end(keep, false);
    return kvs_fail(err, KVS_E_CANCELLED, "cancelled");
}

void kvs_keep_end(kvs_keep *keep, bool put_back) {
    keep->back = put_back;
    if (put_back) carry_all(keep);
    keep->cache->be->ops->release(keep->cache->be, keep->block);
    keep->block = NULL;
}
