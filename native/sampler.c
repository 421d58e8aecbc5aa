/* sampler.c - logits to one id.
 *
 * Numbers are transformers' numbers: the penalty is taken in float32 on the raw logits, then temperature, then the cuts, each on
 * what the one before has left. Without a cut that needs an order (top_k, top_p) nothing is sorted; with one, candidates come from
 * a heap, best first, as long as they are wanted: n + k log n for the k that survive. Order everywhere: higher first, of equal ones
 * the lower id, so top_k keeps exactly k and top_k = 1 is greedy (transformers keeps all that tie with the k-th).
 */
#include "sampler.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_TOP = 20 };

typedef struct candidate {
    double weight; /* exp((score - best score) / temperature), so the best one has 1 */
    float score;
    int32_t id;
} candidate;

/* ---- random numbers: xoroshiro128++, seeded through splitmix64 (Blackman and Vigna) ---- */

static uint64_t rotate(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }

static uint64_t splitmix(uint64_t *state) {
    uint64_t z = *state += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

void kvs_rng_seed(kvs_rng *rng, uint64_t seed) {
    rng->state[0] = splitmix(&seed);
    rng->state[1] = splitmix(&seed); /* never both 0: splitmix gives different values for different states */
}

static uint64_t next_u64(kvs_rng *rng) {
    uint64_t a = rng->state[0], b = rng->state[1], result = rotate(a + b, 17) + a;
    b ^= a;
    rng->state[0] = rotate(a, 49) ^ b ^ (b << 21);
    rng->state[1] = rotate(b, 28);
    return result;
}

double kvs_rng_uniform(kvs_rng *rng) { return (double)(next_u64(rng) >> 11) * 0x1p-53; }

/* ---- arguments ---- */

static int fail_argument(kvs_error *err, const char *name, double value, const char *allowed) {
    kvs_fail(err, KVS_E_ARGUMENT, "%s is %g, but must be %s", name, value, allowed);
    if (err) snprintf(err->what, sizeof err->what, "%s", name);
    return KVS_E_ARGUMENT;
}

/* Comparisons are written so that NaN fails them. */
int kvs_sampling_check(const kvs_sampling *p, kvs_error *err) {
    if (!(p->temperature >= 0 && p->temperature <= FLT_MAX)) return fail_argument(err, "temperature", p->temperature, "finite and >= 0");
    if (p->top_k < 0) return fail_argument(err, "top_k", p->top_k, ">= 0");
    if (!(p->top_p >= 0 && p->top_p <= 1)) return fail_argument(err, "top_p", p->top_p, "in [0, 1]");
    if (!(p->min_p >= 0 && p->min_p <= 1)) return fail_argument(err, "min_p", p->min_p, "in [0, 1]");
    if (!(p->repetition_penalty > 0 && p->repetition_penalty <= FLT_MAX))
        return fail_argument(err, "repetition_penalty", p->repetition_penalty, "finite and > 0");
    if (p->n_top < 0 || p->n_top > MAX_TOP) return fail_argument(err, "n_top", p->n_top, "in [0, 20]");
    return KVS_OK;
}

/* ---- logits that are not finite ---- */

static int32_t count_bad(const float *logits, int32_t n, int32_t *first) {
    int32_t bad = 0;
    *first = 0;
    for (int32_t i = 0; i < n; i++) bad += !isfinite(logits[i]);
    while (bad && isfinite(logits[*first])) ++*first;
    return bad;
}

int kvs_logits_fail(int32_t n_bad, int32_t n, int32_t first, kvs_error *err) {
    return kvs_fail(err, KVS_E_NUMERIC, "%d of %d logits are not finite, the first at id %d", n_bad, n, first);
}

int kvs_logits_check(const float *logits, int32_t n, kvs_error *err) {
    int32_t first, bad = count_bad(logits, n, &first);
    return bad ? kvs_logits_fail(bad, n, first, err) : KVS_OK;
}

/* ---- raw logits: the best ones and the log-probabilities ---- */

static int32_t first_maximum(const float *x, int32_t n) {
    int32_t best = 0;
    for (int32_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

static double log_sum_exp(const float *x, int32_t n) {
    double max = x[first_maximum(x, n)], sum = 0;
    for (int32_t i = 0; i < n; i++) sum += exp((double)x[i] - max);
    return max + log(sum);
}

/* The n_top best in order. A later id must beat an earlier one to pass it. */
static void find_top(const float *logits, int32_t n, double norm, int32_t n_top, kvs_sample *out) {
    int32_t *ids = out->top_ids, have = 0;
    n_top = KVS_MIN(n_top, n);
    for (int32_t i = 0; i < n && n_top; i++) {
        if (have == n_top && !(logits[i] > logits[ids[have - 1]])) continue;
        int32_t at = have < n_top ? have++ : have - 1;
        for (; at > 0 && logits[i] > logits[ids[at - 1]]; at--) ids[at] = ids[at - 1];
        ids[at] = i;
    }
    out->n_top = have;
    for (int32_t i = 0; i < have; i++) out->top_logprobs[i] = (float)((double)logits[ids[i]] - norm);
}

/* ---- scores: logits after the repetition penalty ---- */

static float penalise(float logit, float penalty) {
    float score = logit > 0 ? logit / penalty : logit * penalty;
    return score > FLT_MAX ? FLT_MAX : score < -FLT_MAX ? -FLT_MAX : score; /* an extreme penalty must not make infinities */
}

/* Each id once, however often it was seen. Rows of a picture have ids below 0: they count for nothing. */
static bool apply_penalty(float *scores, const float *logits, int32_t n, const int32_t *seen, int64_t n_seen, float penalty) {
    if (penalty == 1) return true;
    uint8_t *done = kvs_calloc((uint64_t)n, 1);
    if (!done) return false;
    for (int64_t i = 0; i < n_seen; i++) {
        int32_t id = seen[i];
        if (id < 0 || id >= n || done[id]) continue;
        done[id] = 1;
        scores[id] = penalise(logits[id], penalty);
    }
    free(done);
    return true;
}

/* ---- candidates ---- */

static bool before(const candidate *a, const candidate *b) { return a->score > b->score || (a->score == b->score && a->id < b->id); }

static void sift_down(candidate *heap, int32_t n, int32_t i) {
    candidate item = heap[i];
    for (int64_t child = 2 * (int64_t)i + 1; child < n; child = 2 * (int64_t)i + 1) {
        if (child + 1 < n && before(&heap[child + 1], &heap[child])) child++;
        if (!before(&heap[child], &item)) break;
        heap[i] = heap[child];
        i = (int32_t)child;
    }
    heap[i] = item;
}

/* Puts the best k to the end of the array, the best one last, and stops early once their weights reach the mass; at least one.
 * How many there are. */
static int32_t take_best(candidate *c, int32_t n, int32_t k, double mass) {
    for (int32_t i = n / 2 - 1; i >= 0; i--) sift_down(c, n, i);
    double sum = 0;
    int32_t taken = 0;
    while (taken < k && (taken == 0 || sum < mass)) {
        int32_t last = n - 1 - taken;
        candidate best = c[0];
        c[0] = c[last];
        c[last] = best;
        sift_down(c, last, 0);
        sum += best.weight;
        taken++;
    }
    return taken;
}

static double total_weight(const candidate *c, int32_t n) {
    double sum = 0;
    for (int32_t i = 0; i < n; i++) sum += c[i].weight;
    return sum;
}

/* top-k and top-p: at least one stays. Of what top-k has left, the fewest whose share is top_p: best first until it is reached. */
static candidate *cut_best(candidate *c, int32_t *n, const kvs_sampling *p) {
    int32_t k = p->top_k > 0 ? KVS_MIN(p->top_k, *n) : *n;
    bool by_mass = p->top_p < 1;
    if (k == *n && !by_mass) return c;
    if (k < *n) {
        take_best(c, *n, k, HUGE_VAL);
        c += *n - k;
        *n = k;
    }
    if (!by_mass) return c;
    int32_t taken = take_best(c, *n, *n, p->top_p * total_weight(c, *n));
    c += *n - taken;
    *n = taken;
    return c;
}

static int32_t cut_small(candidate *c, int32_t n, float min_p) {
    int32_t kept = 0;
    for (int32_t i = 0; i < n; i++) /* the best one has weight 1, and is among them */
        if (c[i].weight >= min_p) c[kept++] = c[i];
    return kept;
}

static int32_t draw(const candidate *c, int32_t n, double uniform) {
    double target = uniform * total_weight(c, n), sum = 0;
    int32_t last = 0;
    for (int32_t i = 0; i < n; i++) {
        sum += c[i].weight;
        if (sum > target) return c[i].id;
        if (c[i].weight > 0) last = i; /* should rounding leave target at the very end: never one of weight 0 */
    }
    return c[last].id;
}

static int32_t draw_random(candidate *c, const float *scores, int32_t n, const kvs_sampling *p, double uniform) {
    double best = scores[first_maximum(scores, n)];
    for (int32_t i = 0; i < n; i++) c[i] = (candidate){exp((scores[i] - best) / p->temperature), scores[i], i};
    c = cut_best(c, &n, p);
    n = cut_small(c, n, p->min_p);
    return draw(c, n, uniform);
}

static int choose(const float *scores, int32_t n, const kvs_draw *how, int32_t *id, kvs_error *err) {
    if (how->params->temperature == 0) {
        *id = first_maximum(scores, n);
        return KVS_OK;
    }
    candidate *c = kvs_calloc((uint64_t)n, sizeof *c);
    if (!c) return kvs_fail_memory(err, (uint64_t)n * sizeof *c, "sampling");
    *id = draw_random(c, scores, n, how->params, how->uniform);
    free(c);
    return KVS_OK;
}

static int choose_penalised(const float *logits, int32_t n, const kvs_draw *how, int32_t *id, kvs_error *err) {
    float penalty = how->params->repetition_penalty;
    if (penalty == 1 || how->n_seen <= 0) return choose(logits, n, how, id, err);
    float *scores = kvs_calloc((uint64_t)n, sizeof *scores);
    if (scores) memcpy(scores, logits, (size_t)n * sizeof *scores);
    int rc = scores && apply_penalty(scores, logits, n, how->seen, how->n_seen, penalty)
                 ? choose(scores, n, how, id, err)
                 : kvs_fail_memory(err, (uint64_t)n * sizeof *scores, "the repetition penalty");
    free(scores);
    return rc;
}

int kvs_sampler_draw(const float *logits, int32_t n_vocab, const kvs_draw *how, kvs_drawn *out, kvs_error *err) {
    memset(out, 0, sizeof *out);
    out->n_bad = count_bad(logits, n_vocab, &out->first_bad);
    if (out->n_bad) return KVS_OK;
    int32_t id = -1, rc = choose_penalised(logits, n_vocab, how, &id, err);
    if (rc) return rc;
    double norm = log_sum_exp(logits, n_vocab);
    out->sample.id = id;
    out->sample.logprob = (float)((double)logits[id] - norm);
    find_top(logits, n_vocab, norm, how->params->n_top, &out->sample);
    return KVS_OK;
}
