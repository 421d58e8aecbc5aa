/* sampler.h - logits to one id. Order of the cuts: repetition penalty, temperature, top-k, top-p, min-p, draw. */
#ifndef KVS_SAMPLER_H
#define KVS_SAMPLER_H
#include "util.h"

typedef struct kvs_rng {
    uint64_t state[2];
} kvs_rng; /* xoroshiro128++; part of a saved session */

typedef struct kvs_draw {       /* how one id is chosen; host memory */
    const kvs_sampling *params; /* that kvs_sampling_check found sane */
    const int32_t *seen;        /* (n_seen) ids of the timeline for the repetition penalty, repeats allowed; below 0: of no text */
    int64_t n_seen;
    double uniform; /* in [0, 1): the random number. Greedy doesn't look at it */
} kvs_draw;

typedef struct kvs_drawn {
    kvs_sample sample;
    int32_t n_bad, first_bad; /* logits that are not finite, and the first of them: where there are some, the sample is nothing */
} kvs_drawn;

void kvs_rng_seed(kvs_rng *rng, uint64_t seed);
double kvs_rng_uniform(kvs_rng *rng);                                         /* in [0, 1), a multiple of 2^-53 */
int kvs_sampling_check(const kvs_sampling *params, kvs_error *err);           /* KVS_E_ARGUMENT, the parameter named */
int kvs_logits_check(const float *logits, int32_t n, kvs_error *err);         /* KVS_E_NUMERIC where one is not finite */
int kvs_logits_fail(int32_t n_bad, int32_t n, int32_t first, kvs_error *err); /* that error */
/* logits (n_vocab) stay untouched; n_vocab is 1 at least. Greedy takes the first of equal maxima. KVS_OK, or KVS_E_MEMORY. */
int kvs_sampler_draw(const float *logits, int32_t n_vocab, const kvs_draw *draw, kvs_drawn *out, kvs_error *err);
#endif
