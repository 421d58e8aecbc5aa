/* selftest.h - what the tests of single ops share: a backend by the name of its kernels, arguments where it can read them, a cache. */
#ifndef KVS_SELFTEST_H
#define KVS_SELFTEST_H
#include "backend.h"

/* isa: of the CPU's kernels, or "cuda" for the first GPU, "check" for it with the CPU beside it (check.h), "offload:0" and "offload:1" where they
 * share a model whose first layer is the GPU's or the CPU's; NULL with the reason in status where there are none such. */
kvs_backend *kvs_selftest_open(const char *isa, int32_t threads, int *status);

/* A step of these rows, (n) or NULL; it stays valid until end. */
void kvs_selftest_begin(kvs_backend *be, kvs_step *step, const kvs_row *rows, int32_t n);

/* ---- arguments of one test: selftest.c ---- */

enum { KVS_LENT = 64 };
typedef struct kvs_lent { /* zeroed, but for be */
    kvs_backend *be;
    int32_t n, status; /* KVS_E_MEMORY once there was no room */
    struct {
        void *device, *host; /* host: where it goes back to, or NULL */
        uint64_t bytes;
    } blocks[KVS_LENT];
} kvs_lent;

/* [dev] what host, an array of n floats, holds; NULL for NULL. A backend that reads host memory gets the array as it is, so that
 * nothing hides what is written beside it; for others it is copied. */
const float *kvs_lend(kvs_lent *lent, const float *host, int64_t n);
float *kvs_lend_back(kvs_lent *lent, float *host, int64_t n); /* for an array that the op writes to */
void *kvs_lend_new(kvs_lent *lent, uint64_t bytes);           /* [dev] zeros */
void *kvs_lend_layer(kvs_lent *lent, uint64_t bytes);         /* the same of an array of a cache */
/* Results are copied back if all went well, and everything is released. Gives the status of the whole. */
int kvs_take_back(kvs_lent *lent, int status);
/* The same, and the backend is closed. */
int kvs_selftest_finish(kvs_lent *lent, int status);

/* ---- a cache of one layer: selftest_kv.c ---- */

bool kvs_selftest_shape(int32_t kv_type, int32_t n_head, int32_t n_kv_head, int32_t head_dim); /* can be had */
/* Without its memory; n_exact, n_group and what else is not 0 there are set before that is lent. */
kvs_kv kvs_selftest_kv(int32_t kv_type, int32_t n_head, int32_t n_kv_head, int32_t head_dim, int32_t n_ctx);
bool kvs_selftest_kv_memory(kvs_lent *lent, kvs_kv *kv);
kvs_row *kvs_selftest_rows(kvs_kv *kv, int32_t n); /* 0..n, NULL: no memory; free with free() */
/* kv->k or kv->v as it is in host memory, or NULL: no memory; free with free(). */
uint8_t *kvs_selftest_store(kvs_backend *be, const kvs_kv *kv, const uint8_t *base);
/* Rows of such a copy as floats: those of one place, (n_kv_head, head_dim), or the first n of one head, (n, head_dim) */
void kvs_selftest_row(const kvs_kv *kv, const uint8_t *store, int32_t place, float *out);
void kvs_selftest_head(const kvs_kv *kv, const uint8_t *store, int32_t head, int32_t n, float *out);
#endif
