/* sample.cu - logits to one id, as native/sampler.c has it, for one session or several, a block each. It reads its row, which lies in the L2
 * cache, a few times: two passes are the floor (the best one, the sum of exponentials), and each cut and the draw add two or three.
 *
 * Cuts and the draw are one question: going down from the best candidate, where do measures add up to so much? For top-k each counts 1, for
 * top-p its weight, and the draw goes down from the other end of the total. The answer is a candidate, found through histograms of ever
 * narrower stretches. A candidate is a number of 64 bits, greater is better: its score, and its id below it, so there are no ties. Weights
 * are whole numbers: their sums are exact, in whatever order atomics add them, and an id comes out the same in every run. */
#include "cuda.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

enum { THREADS = 1024, BINS = 2 * THREADS, FEW = 256, WEIGHT_BITS = 47, ROWS = 32 };

typedef struct sample_args { /* of one row */
    const float *logits;     /* (n) */
    const uint32_t *seen;    /* a bit for each id that is penalised; NULL: no penalty */
    float *scores;           /* (n) for logits after the penalty, where there is one */
    kvs_drawn *out;
    int32_t n, top_k, n_top; /* top_k: 0 = all */
    int32_t bits;            /* a weight of 1 is 2^bits: the sum of n stays below 2^63 */
    float temperature, penalty;
    uint64_t top_p;   /* in units of 2^-64; 0 with by_mass: the best one alone */
    uint64_t min_p;   /* the least weight that stays */
    uint64_t uniform; /* in units of 2^-64 */
    int32_t by_mass;
} sample_args;

/* Of one launch. They go with it, not by way of memory that is staged: a token without a penalty needs no copy to the device. */
typedef struct sample_batch {
    sample_args rows[ROWS];
    int32_t n;
} sample_batch;
static_assert(sizeof(sample_batch) <= 4096, "the arguments of a kernel");

typedef struct board {              /* shared memory */
    uint32_t low[BINS], high[BINS]; /* sums of measures: 64-bit atomics of shared memory are slow loops */
    uint64_t place[FEW], measure[FEW];
    uint64_t lines[KVS_WARP];
    uint64_t rest, answer;
    double norm;
    unsigned bin, n_few;
} board;

/* ---- candidates ---- */

/* Numbers in the order of scores; zeros are equal. */
KVS_DEVICE uint32_t key_of(float x) {
    uint32_t bits = kvs_float_bits(x);
    if (bits == 0x80000000u) bits = 0;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
KVS_DEVICE uint64_t below(int32_t id) { return 0xffffffffu - (uint32_t)id; } /* of equal scores the lower id is better */
KVS_DEVICE uint64_t place_of(float x, int32_t id) { return (uint64_t)key_of(x) << 32 | below(id); }
KVS_DEVICE int32_t id_of(uint64_t place) { return (int32_t)(0xffffffffu - (uint32_t)place); }

KVS_DEVICE float penalised(float logit, float penalty) {
    float score = logit > 0 ? logit / penalty : logit * penalty;
    return score > FLT_MAX ? FLT_MAX : score < -FLT_MAX ? -FLT_MAX : score;
}

/* ---- weights ---- */

typedef struct scale { /* score to weight: e^((score - best) / temperature) */
    float half, best, up, divisor, inverse;
    int32_t bits;
} scale;

/* Large temperatures go with halves of scores, whose difference may be beyond FLT_MAX; below 1 such a difference is as good as infinite. Tiny
 * ones go with large multiples of differences: 1 / divisor is finite. Powers of two, so nothing is rounded. */
KVS_DEVICE scale scale_of(float best, float temperature, int32_t bits) {
    float half = temperature > 1.0f ? 0.5f : 1.0f, up = temperature < 0x1p-64f ? 0x1p64f : 1.0f, divisor = half * up * temperature;
    scale s = {half, half * best, up, divisor, 1.0f / divisor, bits};
    return s;
}

KVS_DEVICE uint64_t fixed(float x, int32_t bits) { /* x 2^bits, cut off; 2^-50 < x <= 1 */
    uint32_t b = kvs_float_bits(x);
    int32_t shift = (int32_t)(b >> 23) - 150 + bits;
    uint64_t mantissa = (b & 0x7fffff) | 0x800000;
    return shift >= 0 ? mantissa << shift : shift > -24 ? mantissa >> -shift : 0;
}

/* In float32, with what the difference and the quotient lost to rounding. */
KVS_DEVICE uint64_t weight_of(const scale &s, float score) {
    float a = s.half * score, d = a - s.best, x = d * s.up * s.inverse;
    if (!(x > -34.0f)) return 0; /* less than 2^-48 */
    float back = d - a, lost = (a - (d - back)) - (s.best + back);
    float rest = (fmaf(-x, s.divisor, d * s.up) + lost * s.up) * s.inverse, w = expf(x);
    return fixed(fminf(fmaf(w, rest, w), 1.0f), s.bits);
}

KVS_DEVICE uint64_t mul_high(uint64_t a, uint64_t b) { /* the high half of the product */
    uint64_t a0 = (uint32_t)a, a1 = a >> 32, b0 = (uint32_t)b, b1 = b >> 32;
    uint64_t middle = a1 * b0 + (a0 * b0 >> 32), other = a0 * b1 + (uint32_t)middle;
    return a1 * b1 + (middle >> 32) + (other >> 32);
}

/* ---- what all threads of the block do together ---- */

template <class F> KVS_DEVICE uint64_t block_join(uint64_t x, board &s, F join) {
    for (int d = KVS_WARP / 2; d; d /= 2) x = join(x, __shfl_xor_sync(KVS_ALL_LANES, x, d));
    __syncthreads(); /* who read lines before has done so */
    if (threadIdx.x % KVS_WARP == 0) s.lines[threadIdx.x / KVS_WARP] = x;
    __syncthreads();
    x = s.lines[threadIdx.x % KVS_WARP]; /* THREADS are KVS_WARP warps */
    for (int d = KVS_WARP / 2; d; d /= 2) x = join(x, __shfl_xor_sync(KVS_ALL_LANES, x, d));
    return x;
}
KVS_DEVICE uint64_t block_max(uint64_t x, board &s) {
    return block_join(x, s, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
}
KVS_DEVICE uint64_t block_total(uint64_t x, board &s) {
    return block_join(x, s, [](uint64_t a, uint64_t b) { return a + b; });
}

/* The sum over the threads before this one; *total over all. */
KVS_DEVICE uint64_t block_before(uint64_t x, board &s, uint64_t *total) {
    uint64_t sum = x;
    unsigned lane = threadIdx.x % KVS_WARP, warp = threadIdx.x / KVS_WARP;
    for (unsigned d = 1; d < KVS_WARP; d *= 2) {
        uint64_t left = __shfl_up_sync(KVS_ALL_LANES, sum, d);
        if (lane >= d) sum += left;
    }
    __syncthreads();
    if (lane == KVS_WARP - 1) s.lines[warp] = sum;
    __syncthreads();
    uint64_t all = s.lines[lane], before = lane < warp ? all : 0;
    for (int d = KVS_WARP / 2; d; d /= 2) {
        all += __shfl_xor_sync(KVS_ALL_LANES, all, d);
        before += __shfl_xor_sync(KVS_ALL_LANES, before, d);
    }
    *total = all;
    return before + sum - x;
}

/* ---- the search ---- */

KVS_DEVICE void add_one(board &s, uint32_t bin, uint64_t measure) {
    uint32_t low = (uint32_t)measure, high = (uint32_t)(measure >> 32), old = atomicAdd(&s.low[bin], low);
    if ((uint32_t)(old + low) < old) high++;
    if (high) atomicAdd(&s.high[bin], high);
}

/* By whole warps. Lanes that all mean the same bin, as neighbouring ids or equal scores do, add up first. */
KVS_DEVICE void add_lanes(board &s, uint32_t bin, uint64_t measure) {
    unsigned active = __ballot_sync(KVS_ALL_LANES, measure != 0);
    if (!active) return;
    uint32_t common = __shfl_sync(KVS_ALL_LANES, bin, __ffs((int)active) - 1);
    if (__all_sync(KVS_ALL_LANES, !measure || bin == common)) {
        for (int d = KVS_WARP / 2; d; d /= 2) measure += __shfl_xor_sync(KVS_ALL_LANES, measure, d);
        if (threadIdx.x % KVS_WARP == 0) add_one(s, common, measure);
    } else if (measure)
        add_one(s, bin, measure);
}

typedef struct stretch { /* of places */
    uint64_t low, high;
} stretch;

template <class Place, class Measure>
KVS_DEVICE void fill_bins(board &s, int32_t n, stretch at, int32_t shift, const Place &place, const Measure &measure) {
    for (uint32_t i = threadIdx.x; i < BINS; i += THREADS) s.low[i] = s.high[i] = 0;
    __syncthreads();
    for (int32_t first = 0; first < n; first += THREADS) { /* whole warps */
        int32_t i = first + (int32_t)threadIdx.x;
        uint64_t p = i < n ? place(i) : 0;
        bool inside = i < n && p >= at.low && p <= at.high;
        add_lanes(s, inside ? (uint32_t)((at.high - p) >> shift) : 0, inside ? measure(i) : 0);
    }
    __syncthreads();
}

/* The bin in which sums, from bin 0 on, reach what is wanted; s.rest: what is wanted of it. Each thread has two of them. */
template <class Want> KVS_DEVICE uint32_t find_bin(board &s, const Want &want) {
    uint32_t mine = 2 * threadIdx.x;
    uint64_t one = (uint64_t)s.high[mine] << 32 | s.low[mine], two = (uint64_t)s.high[mine + 1] << 32 | s.low[mine + 1], total;
    uint64_t before = block_before(one + two, s, &total), wanted = want(total);
    if (before < wanted && wanted <= before + one + two) {
        bool second = wanted > before + one;
        s.bin = mine + second;
        s.rest = wanted - before - (second ? one : 0);
    }
    __syncthreads();
    return s.bin;
}

/* Those that measure something, as far as there is room for them, in no order; how many there are. */
template <class Place, class Measure>
KVS_DEVICE uint32_t gather(board &s, int32_t n, stretch at, const Place &place, const Measure &measure) {
    if (!threadIdx.x) s.n_few = 0;
    __syncthreads();
    for (int32_t i = (int32_t)threadIdx.x; i < n; i += THREADS) {
        uint64_t p = place(i);
        if (p < at.low || p > at.high) continue;
        uint64_t m = measure(i);
        if (!m) continue;
        unsigned slot = atomicAdd(&s.n_few, 1u);
        if (slot >= FEW) continue;
        s.place[slot] = p;
        s.measure[slot] = m;
    }
    __syncthreads();
    return s.n_few;
}

/* Of n gathered ones: where s.rest is reached. */
KVS_DEVICE uint64_t pick(board &s, uint32_t n) {
    if (threadIdx.x < n) {
        uint64_t mine = s.place[threadIdx.x], better = 0;
        for (uint32_t j = 0; j < n; j++) better += s.place[j] > mine ? s.measure[j] : 0;
        if (better < s.rest && s.rest <= better + s.measure[threadIdx.x]) s.answer = mine;
    }
    __syncthreads();
    return s.answer;
}

/* From the best in the stretch downward: the place at which measures have added up to want(their total), which is 1 at least. */
template <class Place, class Measure, class Want>
KVS_DEVICE uint64_t search(board &s, int32_t n, stretch at, const Place &place, const Measure &measure, const Want &want) {
    bool whole = true;
    for (;;) {
        int32_t shift = 0;
        while ((at.high - at.low) >> shift >= BINS) shift++;
        fill_bins(s, n, at, shift, place, measure);
        uint64_t rest = whole ? 0 : s.rest, width = ((uint64_t)1 << shift) - 1;
        at.high -= (uint64_t)find_bin(s, [=](uint64_t total) { return whole ? want(total) : rest; }) << shift;
        if (at.high - at.low > width) at.low = at.high - width;
        whole = false;
        if (at.low == at.high) return at.high;
        uint32_t few = gather(s, n, at, place, measure);
        if (few <= FEW) return pick(s, few);
    }
}

/* ---- an id ---- */

typedef struct looks { /* of the whole row */
    stretch scores;    /* from the worst to the best */
    uint64_t raw;      /* the best logit */
    int32_t n_bad;
} looks;

typedef struct candidate { /* of those that a thread has come to; id -1: none yet */
    float value;
    int32_t id;
} candidate;

KVS_DEVICE uint64_t place_of(candidate x) { return x.id < 0 ? 0 : place_of(x.value, x.id); }

/* Best and worst, and what is not finite; scores are written. Ids rise. */
KVS_DEVICE looks look_at(const sample_args &a, board &s) {
    candidate best = {-INFINITY, -1}, worst = {INFINITY, -1}, raw = best;
    int32_t bad = 0, first_bad = INT32_MAX;
    for (int32_t i = (int32_t)threadIdx.x; i < a.n; i += THREADS) {
        float x = a.logits[i], score = x;
        if (!(fabsf(x) <= FLT_MAX)) {
            bad++;
            first_bad = KVS_MIN(first_bad, i);
        }
        if (a.seen) {
            a.scores[i] = score = a.seen[i / 32] >> i % 32 & 1 ? penalised(x, a.penalty) : x;
            if (x > raw.value) raw = {x, i};
        }
        if (score > best.value) best = {score, i};
        if (score <= worst.value) worst = {score, i};
    }
    uint64_t top = block_max(place_of(best), s), top_raw = a.seen ? block_max(place_of(raw), s) : top;
    uint64_t low = ~block_max(worst.id < 0 ? 0 : ~place_of(worst), s);
    looks l = {{low, top}, top_raw, (int32_t)block_total((uint64_t)bad, s)};
    if (!l.n_bad) return l;
    uint64_t first = block_max(first_bad < a.n ? below(first_bad) : 0, s);
    if (!threadIdx.x) {
        a.out->n_bad = l.n_bad;
        a.out->first_bad = id_of(first);
    }
    return l;
}

KVS_DEVICE uint64_t draw_random(const sample_args &a, board &s, const looks &l) {
    const float *scores = a.seen ? a.scores : a.logits;
    const scale to_weight = scale_of(scores[id_of(l.scores.high)], a.temperature, a.bits);
    const uint64_t top_k = (uint64_t)a.top_k, top_p = a.top_p, min_p = a.min_p, uniform = a.uniform;
    auto place = [=](int32_t i) { return place_of(scores[i], i); };
    auto weight = [=](int32_t i) { return weight_of(to_weight, scores[i]); };
    stretch left = l.scores;
    if (top_k)
        left.low = search(
            s, a.n, left, place, [](int32_t) { return (uint64_t)1; }, [=](uint64_t) { return top_k; });
    if (a.by_mass)
        left.low = search(s, a.n, left, place, weight, [=](uint64_t total) { /* the whole number at or above the share, 1 at least */
                                                                             uint64_t mass = mul_high(top_p, total) + (top_p * total != 0);
                                                                             return mass ? mass : 1;
        });
    auto kept = [=](int32_t i) {
        uint64_t w = weight_of(to_weight, scores[i]);
        return w >= min_p ? w : 0;
    };
    /* Behind a cut by order sampler.c goes from the worst to the best, else by ids. The first one whose sum is beyond the target. */
    if (top_k || a.by_mass) return search(s, a.n, left, place, kept, [=](uint64_t total) { return total - mul_high(uniform, total); });
    stretch ids = {below(a.n - 1), below(0)};
    return search(
        s, a.n, ids, [](int32_t i) { return below(i); }, kept, [=](uint64_t total) { return mul_high(uniform, total) + 1; });
}

/* ---- log-probabilities, of the raw logits ---- */

/* s.norm: ln of the sum of e^(logit - best logit) */
KVS_DEVICE void find_norm(const sample_args &a, board &s, float best) {
    const scale to_weight = scale_of(best, 1.0f, a.bits);
    uint64_t sum = 0;
    for (int32_t i = (int32_t)threadIdx.x; i < a.n; i += THREADS) sum += weight_of(to_weight, a.logits[i]);
    sum = block_total(sum, s);
    if (!threadIdx.x) s.norm = log((double)sum) - a.bits * 0.69314718055994531;
    __syncthreads();
}

KVS_DEVICE float logprob(const sample_args &a, const board &s, int32_t id, float best) {
    return (float)((double)a.logits[id] - (double)best - s.norm);
}

KVS_DEVICE void find_top(const sample_args &a, board &s, const looks &l, float best) {
    const float *logits = a.logits;
    const uint64_t n_top = (uint64_t)a.n_top;
    auto place = [=](int32_t i) { return place_of(logits[i], i); };
    auto one = [](int32_t) { return (uint64_t)1; };
    stretch top = {0, l.raw};
    top.low = search(s, a.n, top, place, one, [=](uint64_t) { return n_top; });
    gather(s, a.n, top, place, one);
    if (threadIdx.x >= n_top) return;
    uint64_t mine = s.place[threadIdx.x];
    int32_t rank = 0;
    for (uint32_t j = 0; j < n_top; j++) rank += s.place[j] > mine;
    a.out->sample.top_ids[rank] = id_of(mine);
    a.out->sample.top_logprobs[rank] = logprob(a, s, id_of(mine), best);
}

static __global__ void __launch_bounds__(THREADS) sample_kernel(const sample_batch batch) {
    __shared__ board s;
    const sample_args a = batch.rows[blockIdx.x];
    for (uint32_t i = threadIdx.x; i < sizeof *a.out / 4; i += THREADS) ((uint32_t *)a.out)[i] = 0;
    __syncthreads();
    const looks l = look_at(a, s);
    if (l.n_bad) return;
    const float best = a.logits[id_of(l.raw)];
    find_norm(a, s, best);
    const int32_t id = id_of(a.temperature == 0.0f ? l.scores.high : draw_random(a, s, l));
    if (!threadIdx.x) {
        a.out->sample.id = id;
        a.out->sample.logprob = logprob(a, s, id, best);
        a.out->sample.n_top = a.n_top;
    }
    if (a.n_top) find_top(a, s, l, best);
}

/* ---- the op ---- */

static void launch_sample(kvs_cuda *cu, const sample_batch *a) {
    KVS_LAUNCH(cu, sample_kernel, dim3((unsigned)a->n), dim3(THREADS), 0, *a);
}

/* A bit for each id of the timeline. NULL: there is no penalty, or the step has failed. */
static const uint32_t *stage_seen(kvs_cuda *cu, int32_t n, const kvs_draw *draw) {
    if (draw->params->repetition_penalty == 1 || draw->n_seen <= 0) return NULL;
    uint64_t words = (uint64_t)kvs_ceil_div(n, 32);
    uint32_t *bits = (uint32_t *)kvs_calloc(words, sizeof *bits);
    if (!bits) {
        cu->status = KVS_E_MEMORY;
        return NULL;
    }
    for (int64_t i = 0; i < draw->n_seen; i++) {
        int32_t id = draw->seen[i];
        if (id >= 0 && id < n) bits[id / 32] |= 1u << id % 32;
    }
    const uint32_t *staged = (const uint32_t *)kvs_cuda_stage(cu, bits, words * sizeof *bits, words * sizeof *bits);
    free(bits);
    return staged;
}

static void set_cuts(sample_args *a, const kvs_draw *draw) {
    const kvs_sampling *p = draw->params;
    int32_t log2 = 0;
    while ((int64_t)1 << log2 < a->n) log2++;
    a->bits = KVS_MIN((int32_t)WEIGHT_BITS, 62 - log2);
    a->top_k = p->top_k < a->n ? p->top_k : 0;
    a->n_top = KVS_MIN(p->n_top, a->n);
    a->by_mass = p->top_p < 1;
    if (a->by_mass) a->top_p = (uint64_t)ldexp((double)p->top_p, 64);
    a->min_p = (uint64_t)ceil(ldexp((double)p->min_p, a->bits));
    a->uniform = (uint64_t)ldexp(draw->uniform, 64);
    a->temperature = p->temperature;
    a->penalty = p->repetition_penalty;
}

/* Room for the scores of those that have a penalty; the launch before this one is through with it. */
static void set_scores(kvs_cuda *cu, sample_batch *batch) {
    int32_t n = 0, n_vocab = batch->rows->n;
    for (int32_t i = 0; i < batch->n; i++) n += batch->rows[i].seen != NULL;
    float *scores = n ? (float *)kvs_cuda_scratch(cu, KVS_SCRATCH_OP, (uint64_t)n * (uint64_t)n_vocab * sizeof(float)) : NULL;
    for (int32_t i = 0; i < batch->n && scores; i++) {
        if (!batch->rows[i].seen) continue;
        batch->rows[i].scores = scores;
        scores += n_vocab;
    }
}

/* Steps that draw have no rows and are not noted down: the arguments may be others each time. */
void kvs_cuda_sample(kvs_backend *be, const float *const *logits, int32_t n_vocab, const kvs_draw *draws, kvs_drawn *out, int32_t n) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (kvs_cuda_stopped(cu)) return;
    const uint64_t bytes = (uint64_t)n * sizeof *out;
    kvs_cuda_report report = kvs_cuda_reserve_report(cu, bytes);
    for (int32_t first = 0; first < n && !cu->status; first += ROWS) {
        KVS_ARGS(sample_batch, batch);
        batch.n = KVS_MIN(n - first, (int32_t)ROWS);
        for (int32_t i = 0; i < batch.n; i++) {
            sample_args *a = &batch.rows[i];
            a->n = n_vocab;
            a->logits = logits[first + i];
            a->seen = stage_seen(cu, n_vocab, &draws[first + i]);
            a->out = (kvs_drawn *)report.device + first + i;
            set_cuts(a, &draws[first + i]);
        }
        set_scores(cu, &batch);
        kvs_cuda_op<launch_sample>(cu, &batch);
    }
    kvs_cuda_deliver(cu, out, report.host, bytes);
}
