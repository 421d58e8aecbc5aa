/* selftest_kv.c - a cache of one layer for the tests of single ops. */
#include "selftest.h"

#include "quant.h"

bool kvs_selftest_shape(int32_t kv_type, int32_t n_head, int32_t n_kv_head, int32_t head_dim) {
    return (kv_type == KVS_TYPE_F32 || kv_type == KVS_TYPE_F16 || kv_type == KVS_TYPE_Q8_0) && n_kv_head > 0 && n_head > 0 &&
           n_head % n_kv_head == 0 && head_dim > 0 && head_dim <= KVS_MAX_HEAD_DIM;
}

kvs_kv kvs_selftest_kv(int32_t kv_type, int32_t n_head, int32_t n_kv_head, int32_t head_dim, int32_t n_ctx) {
    return (kvs_kv){.type = kv_type,
                    .n_layer = 1,
                    .n_head = n_head,
                    .n_kv_head = n_kv_head,
                    .head_dim = head_dim,
                    .n_ctx = n_ctx,
                    .n_group = 1,
                    .row_bytes = kvs_kv_row_bytes(kv_type, head_dim)};
}

bool kvs_selftest_kv_memory(kvs_lent *lent, kvs_kv *kv) {
    uint64_t store = (uint64_t)kv->n_kv_head * (uint64_t)kv->n_ctx * (uint64_t)kv->row_bytes;
    uint64_t history = (uint64_t)kv->n_ctx * (uint64_t)kv->n_group * sizeof(float);
    uint64_t ring = (uint64_t)kv->n_exact * (uint64_t)kv->head_dim * sizeof(float);
    kv->k = kvs_lend_layer(lent, store);
    kv->v = kvs_lend_layer(lent, store);
    kv->entropy = kvs_lend_layer(lent, history);
    kv->strength = kvs_lend_layer(lent, history);
    kv->mass = kvs_lend_layer(lent, (uint64_t)kv->n_ctx * sizeof(float));
    if (kv->n_exact) {
        kv->exact_k = kvs_lend_layer(lent, ring * (uint64_t)kv->n_kv_head);
        kv->exact_v = kvs_lend_layer(lent, ring * (uint64_t)kv->n_kv_head);
        kv->exact_o = kvs_lend_layer(lent, ring * (uint64_t)kv->n_head);
    }
    return lent->status == KVS_OK;
}

kvs_row *kvs_selftest_rows(kvs_kv *kv, int32_t n) {
    kvs_row *rows = kvs_calloc((uint64_t)n, sizeof *rows);
    for (int32_t i = 0; rows && i < n; i++) rows[i] = (kvs_row){.kv = kv, .index = i, .pos = i};
    return rows;
}

uint8_t *kvs_selftest_store(kvs_backend *be, const kvs_kv *kv, const uint8_t *base) {
    uint64_t rows = (uint64_t)kv->n_kv_head * (uint64_t)kv->n_ctx;
    uint8_t *store = kvs_calloc(rows, (uint64_t)kv->row_bytes);
    if (store) be->ops->download(be, store, base, rows * (uint64_t)kv->row_bytes);
    return store;
}

void kvs_selftest_row(const kvs_kv *kv, const uint8_t *store, int32_t place, float *out) {
    for (int32_t h = 0; h < kv->n_kv_head; h++)
        kvs_kv_row_to_f32(kv->type, kvs_kv_rows(kv, (uint8_t *)(void *)store, 0, h) + place * kv->row_bytes, out + h * kv->head_dim,
                          kv->head_dim);
}

void kvs_selftest_head(const kvs_kv *kv, const uint8_t *store, int32_t head, int32_t n, float *out) {
    for (int32_t i = 0; i < n; i++)
        kvs_kv_row_to_f32(kv->type, kvs_kv_rows(kv, (uint8_t *)(void *)store, 0, head) + i * kv->row_bytes, out + i * kv->head_dim,
                          kv->head_dim);
}
