/* session.h - what session.c, session_read.c and session_file.c share. */
#ifndef KVS_SESSION_H
#define KVS_SESSION_H
#include "llama.h"
#include "sampler.h"

struct kvs_session {
    kvs_model *model;
    kvs_cache cache;
    /* [dev] (n_vocab) each, halves of one block: of the last row, and where a pass puts those of a new one, which may fail */
    float *logits, *spare;
    bool has_logits;
    float *told;      /* host (3, n_layer): entropies, strengths and masses of the generated row told_row */
    int32_t told_row; /* -1: of none */
    kvs_rng rng;
    int32_t busy;     /* atomic: a thread is inside */
    uint64_t counted; /* bytes of its cache, towards the model's limit */
};

int kvs_session_create(kvs_model *model, const kvs_session_params *params, kvs_session **out, kvs_error *err);
int kvs_session_enter(kvs_session *session, kvs_error *err); /* KVS_E_BUSY if somebody is inside */
void kvs_session_leave(kvs_session *session);

static inline uint64_t kvs_session_logits_bytes(const kvs_session *s) { return (uint64_t)s->model->text.n_vocab * sizeof(float); }
#endif
