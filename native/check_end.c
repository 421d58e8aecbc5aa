/* check_end.c - what a step gives to the host: the device's is there when it has ended, and compared then. */
#include "check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static bool reserve_told(kvs_check *c, uint64_t n, int32_t n_layer) {
    float **told = kvs_realloc(c->told, n, sizeof *told);
    if (told) c->told = told;
    float *here = kvs_realloc(c->told_here, n * 3 * (uint64_t)n_layer, sizeof *here);
    if (here) c->told_here = here;
    if (told && here) return true;
    c->status = KVS_E_MEMORY;
    return false;
}

void kvs_check_kv_tell(kvs_backend *be, kvs_range layers, float *const *told) {
    kvs_check *c = (kvs_check *)be;
    int32_t n = c->step->n, n_layer = n ? c->step->rows->kv->n_layer : 0;
    if (!n || !kvs_check_enter(c) || !reserve_told(c, (uint64_t)n, n_layer)) return;
    float **here = kvs_calloc((uint64_t)n, sizeof *here);
    if (!here) {
        c->status = KVS_E_MEMORY;
        return;
    }
    for (int32_t i = 0; i < n; i++) here[i] = told[i] ? c->told_here + 3 * (int64_t)i * n_layer : NULL;
    memcpy(c->told, told, (size_t)n * sizeof *told);
    c->told_layers = layers;
    c->device->ops->kv_tell(c->device, layers, told);
    c->cpu->ops->kv_tell(c->cpu, layers, here);
    free(here);
}

/* Greedy doesn't look at the random number: its three are the same. */
static void draw_here(kvs_check *c, const float *logits, const kvs_draw *draw, kvs_drawn *out) {
    const double beside[] = {0, -KVS_CHECK_FLOAT, KVS_CHECK_FLOAT};
    for (int i = 0; i < 3; i++) {
        kvs_draw here = *draw;
        here.uniform = KVS_MIN(KVS_MAX(draw->uniform + beside[i], 0), 1 - 0x1p-53);
        c->cpu->ops->sample(c->cpu, &logits, c->n_vocab, &here, &out[i], 1);
    }
}

void kvs_check_sample(kvs_backend *be, const float *const *logits, int32_t n_vocab, const kvs_draw *draws, kvs_drawn *out, int32_t n) {
    kvs_check *c = (kvs_check *)be;
    if (!kvs_check_enter(c)) return;
    kvs_drawn *here = kvs_realloc(c->drawn_here, 3 * (uint64_t)n, sizeof *here);
    if (here) c->drawn_here = here;
    const float **there = here ? kvs_calloc((uint64_t)n, sizeof *there) : NULL;
    if (!there) {
        c->status = KVS_E_MEMORY;
        return;
    }
    for (int32_t i = 0; i < n; i++) there[i] = kvs_check_there(c, logits[i]);
    if (kvs_check_enter(c)) {
        c->drawn = out;
        c->n_drawn = n;
        c->n_vocab = n_vocab;
        c->device->ops->sample(c->device, there, n_vocab, draws, out, n);
        for (int32_t i = 0; i < n; i++) draw_here(c, logits[i], &draws[i], &here[3 * (int64_t)i]);
    }
    free((void *)there);
}

/* Between steps both sides hold the same. */
static void compare_told(kvs_check *c) {
    int32_t n_layer = c->step->rows->kv->n_layer;
    for (int32_t i = 0; i < c->step->n; i++)
        for (int32_t what = 0; what < 3 && c->told[i]; what++) {
            int64_t at = (int64_t)what * n_layer + c->told_layers.first;
            kvs_check_compare(c, "kv_tell", c->told[i] + at, c->told_here + 3 * (int64_t)i * n_layer + at, 1, c->told_layers.n,
                              KVS_CHECK_FLOAT);
        }
}

static bool near(float a, float b) { return fabsf(a - b) <= KVS_CHECK_FLOAT * KVS_MAX(1.0f, fabsf(b)); }

static void compare_drawn(kvs_check *c, const kvs_drawn *drawn, const kvs_drawn *drawn_here) {
    const kvs_sample *there = &drawn->sample, *here = NULL;
    if (drawn->n_bad != drawn_here->n_bad || drawn->first_bad != drawn_here->first_bad)
        kvs_check_fail(c, "sample: %s finds %d logits that are not finite, the first at %d, and the CPU %d, the first at %d",
                       c->device->name, drawn->n_bad, drawn->first_bad, drawn_here->n_bad, drawn_here->first_bad);
    if (drawn->n_bad || c->status) return;
    for (int i = 0; i < 3 && !here; i++)
        if (drawn_here[i].sample.id == there->id) here = &drawn_here[i].sample;
    if (!here || there->n_top != here->n_top) {
        kvs_check_fail(c, "sample: id %d of %d and %d best ones on %s, id %d and %d on the CPU", there->id, c->n_vocab, there->n_top,
                       c->device->name, drawn_here->sample.id, drawn_here->sample.n_top);
        return;
    }
    if (!near(there->logprob, here->logprob))
        kvs_check_fail(c, "sample: the log-probability of id %d is %.9g on %s, and %.9g on the CPU", there->id, (double)there->logprob,
                       c->device->name, (double)here->logprob);
    for (int32_t i = 0; i < here->n_top; i++)
        if (there->top_ids[i] != here->top_ids[i] || !near(there->top_logprobs[i], here->top_logprobs[i]))
            kvs_check_fail(c, "sample: number %d of the best is id %d (%.9g) on %s, and id %d (%.9g) on the CPU", i, there->top_ids[i],
                           (double)there->top_logprobs[i], c->device->name, here->top_ids[i], (double)here->top_logprobs[i]);
}

void kvs_check_ended(kvs_check *c) {
    if (c->told_layers.n) compare_told(c);
    for (int32_t i = 0; i < c->n_drawn; i++) compare_drawn(c, &c->drawn[i], &c->drawn_here[3 * (int64_t)i]);
}
