/* llama.h - one pass over the text model, for prefill and decode, for one session or several. */
#ifndef KVS_LLAMA_H
#define KVS_LLAMA_H
#include "cache.h"
#include "model.h"

typedef struct kvs_pass {
    const kvs_span *spans; /* rows of the step, session by session */
    int32_t n_spans;
    const kvs_row *rows;      /* (n) of all spans */
    const float *const *embd; /* (n) host rows of E floats where the id is -1; NULL = text only */
    int32_t n;
    bool logits;              /* of the last row of each span */
    float *const *logits_out; /* (n_spans) [dev] (V) each; undefined if the pass fails */
    float *const *told;       /* (n) as kv_tell() has it, or NULL; undefined if the pass fails */
    const int32_t *cancel;
} kvs_pass;

/* The model's lock is held. Nothing is committed; on failure the cache rows beyond n_past are undefined. */
int kvs_llama_pass(kvs_model *model, const kvs_pass *pass, kvs_error *err);

/* A residual stream beyond this is as good as not finite: the squares of a norm's run of 256 values would overflow, and its row be 0. */
#define KVS_MAX_RESIDUAL 5e17f
#define KVS_BAD_WEIGHTS  "weights there are not finite, or so large that float32 overflows; the file is damaged"

/* vision.c: pixels (3, S, S) -> embeddings (n_image, n_embd), host memory; the lock is held */
uint64_t kvs_vision_work_bytes(const kvs_model *model); /* memory of the device that it takes */
int kvs_vision_encode(kvs_model *model, const float *pixels, float *embeddings, const int32_t *cancel, kvs_error *err);
#endif
