/* selftest_sample.c - ids from one row of logits, for tests. */
#include "selftest.h"

enum { AT_ONCE = 64 };

static int draw_some(kvs_backend *be, const float *logits, int32_t n_vocab, const kvs_draw *how, kvs_drawn *out, int32_t n) {
    const float *rows[AT_ONCE];
    kvs_step step;
    for (int32_t i = 0; i < n; i++) rows[i] = logits;
    kvs_selftest_begin(be, &step, NULL, 0);
    be->ops->sample(be, rows, n_vocab, how, out, n);
    int status = be->ops->end(be, NULL);
    for (int32_t i = 0; i < n && !status; i++)
        if (out[i].n_bad) status = kvs_logits_fail(out[i].n_bad, n_vocab, out[i].first_bad, NULL);
    return status;
}

int32_t kvs_test_sample(const char *isa, const float *logits, int32_t n_vocab, const int32_t *seen, int64_t n_seen,
                        const kvs_sampling *params, uint64_t seed, int32_t draws, int32_t *ids, kvs_sample *last) {
    int status = n_vocab < 1 ? KVS_E_ARGUMENT : kvs_sampling_check(params, NULL);
    if (status) return status;
    kvs_rng rng;
    kvs_draw how[AT_ONCE];
    kvs_drawn drawn[AT_ONCE] = {0};
    kvs_lent lent = {.be = kvs_selftest_open(isa, 1, &status)};
    if (!lent.be) return status;
    kvs_rng_seed(&rng, seed);
    logits = kvs_lend(&lent, logits, n_vocab);
    for (int32_t i = 0, n = 1; i < draws && !status && !lent.status; i += n, n = KVS_MIN(draws - i, (int32_t)AT_ONCE)) {
        for (int32_t j = 0; j < n; j++) how[j] = (kvs_draw){params, seen, n_seen, params->temperature > 0 ? kvs_rng_uniform(&rng) : 0};
        status = draw_some(lent.be, logits, n_vocab, how, drawn, n);
        *last = drawn[n - 1].sample;
        if (status == KVS_E_NUMERIC) last->id = drawn->first_bad, last->n_top = drawn->n_bad;
        for (int32_t j = 0; j < n && !status; j++) ids[i + j] = drawn[j].sample.id;
    }
    return kvs_selftest_finish(&lent, status);
}
