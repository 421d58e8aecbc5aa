/* sampler.h - logits to one id. Order of the cuts: repetition penalty, temperature, top-k, top-p, min-p, draw. */
#ifndef KVS_SAMPLER_H
#define KVS_SAMPLER_H
#include "util.h"

typedef struct kvs_rng {
    uint64_t state[2];
} kvs_rng; /* xoroshiro128++; part of a saved session */

void kvs_rng_seed(kvs_rng *rng, uint64_t seed);
int kvs_logits_check(const float *logits, int32_t n, kvs_error *err); /* KVS_E_NUMERIC where one is not finite */
/* logits (n_vocab) stay untouched; seen (n_seen): ids of the timeline for the repetition penalty, repeats allowed.
 * Greedy takes the first of equal maxima. Fails with KVS_E_ARGUMENT (parameter named), KVS_E_MEMORY, or KVS_E_NUMERIC when logits
 * are not finite. */
int kvs_sampler_draw(const float *logits, int32_t n_vocab, const int32_t *seen, int64_t n_seen, const kvs_sampling *params, kvs_rng *rng,
                     kvs_sample *out, kvs_error *err);
#endif
