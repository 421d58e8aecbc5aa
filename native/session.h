/* session.h - what session.c, session_read.c and session_file.c share. */
#ifndef KVS_SESSION_H
#define KVS_SESSION_H
#include "llama.h"
#include "sampler.h"

struct kvs_session {
    kvs_model *model;
    kvs_cache cache;
    float *logits; /* (n_vocab) host, of the last row */
    bool has_logits;
    kvs_rng rng;
    int32_t busy;     /* atomic: a thread is inside */
    uint64_t counted; /* bytes of its cache, towards the model's limit */
};

int kvs_session_create(kvs_model *model, const kvs_session_params *params, kvs_session **out, kvs_error *err);
int kvs_session_enter(kvs_session *session, kvs_error *err); /* KVS_E_BUSY if somebody is inside */
void kvs_session_leave(kvs_session *session);
#endif
