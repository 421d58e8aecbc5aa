/* load.h - what the loaders of the two files share (the code is in load.c): a weight by name with its type and shape asserted,
 * one line per weight. A loader remembers its first failure and does nothing after it, so callers look at status once. */
#ifndef KVS_LOAD_H
#define KVS_LOAD_H
#include "model.h"

typedef struct kvs_loader {
    kvs_model *model;
    kvs_gguf *const *files; /* (n_files) a split model is looked up in all its parts */
    int32_t n_files;
    const char *block;     /* "blk": layer 3 of "attn_q.weight" is "blk.3.attn_q.weight" */
    bool tower;            /* of the two files */
    const int32_t *cancel; /* or NULL */
    int status;
    kvs_error *err;
} kvs_loader;

typedef struct kvs_found { /* a tensor of one of the files */
    kvs_gguf *file;        /* NULL = absent */
    int64_t index;
    kvs_gguf_tensor info;
} kvs_found;

enum { KVS_NO_LAYER = -1 };

/* KVS_E_MEMORY, KVS_E_FORMAT (absent, other shape), KVS_E_UNSUPPORTED (type) or KVS_E_CANCELLED in loader->status. */
void kvs_load_matrix(kvs_loader *loader, kvs_weight *w, int32_t layer, const char *name, kvs_shape shape);
/* (1, cols), F32 whatever the file has: host memory of the model's where it has another type. */
void kvs_load_vector(kvs_loader *loader, kvs_weight *w, int32_t layer, const char *name, int64_t cols, bool optional);
/* The same as host memory, from malloc; NULL where it is absent and optional, or after a failure. */
float *kvs_load_floats(kvs_loader *loader, int32_t layer, const char *name, int64_t cols, bool optional);

void kvs_load_name(const kvs_loader *loader, int32_t layer, const char *name, char full[KVS_NAME]);
kvs_found kvs_load_find(const kvs_loader *loader, const char *full_name);
/* Any dims as (rows, cols), once the caller has compared them. */
void kvs_load_bind(kvs_loader *loader, kvs_weight *w, int32_t layer, const kvs_found *t, int64_t rows, int64_t cols);
void kvs_load_fail(kvs_loader *loader, const kvs_found *t, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* After all weights: a tensor that nobody has taken, but for those that change nothing, would change the result of whoever knows it. */
void kvs_load_refuse_rest(kvs_loader *loader, bool (*changes_nothing)(const kvs_model *model, const char *name));
/* Continues seed with names, types, dims and a sample of the bytes of all tensors. */
uint64_t kvs_load_identity(const kvs_loader *loader, uint64_t seed);
#endif
