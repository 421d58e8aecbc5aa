/* selftest_sample.c - ids from one row of logits, for tests. */
#include "selftest.h"

static int draw_one(kvs_backend *be, const float *logits, int32_t n_vocab, const kvs_draw *how, kvs_drawn *out) {
    kvs_step step;
    kvs_selftest_begin(be, &step, NULL, 0);
    be->ops->sample(be, logits, n_vocab, how, out);
    int status = be->ops->end(be, NULL);
    return !status && out->n_bad ? kvs_logits_fail(out->n_bad, n_vocab, out->first_bad, NULL) : status;
}

int32_t kvs_test_sample(const char *isa, const float *logits, int32_t n_vocab, const int32_t *seen, int64_t n_seen,
                        const kvs_sampling *params, uint64_t seed, int32_t draws, int32_t *ids, kvs_sample *last) {
    int status = n_vocab < 1 ? KVS_E_ARGUMENT : kvs_sampling_check(params, NULL);
    if (status) return status;
    kvs_rng rng;
    kvs_drawn drawn = {0};
    kvs_lent lent = {.be = kvs_selftest_open(isa, 1, &status)};
    if (!lent.be) return status;
    kvs_rng_seed(&rng, seed);
    logits = kvs_lend(&lent, logits, n_vocab);
    for (int32_t i = 0; i < draws && !status && !lent.status; i++) {
        kvs_draw how = {params, seen, n_seen, params->temperature > 0 ? kvs_rng_uniform(&rng) : 0};
        status = draw_one(lent.be, logits, n_vocab, &how, &drawn);
        *last = drawn.sample;
        if (status == KVS_E_NUMERIC) last->id = drawn.first_bad, last->n_top = drawn.n_bad;
        if (!status) ids[i] = last->id;
    }
    return kvs_selftest_finish(&lent, status);
}
