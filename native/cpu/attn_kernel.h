/* attn_kernel.h - the part of rows.c that attends: softmax(q K^T) V of a few queries that share one KV head, in one pass.
 *
 * Keys are taken in tiles of TILE, always from key 0 on. Per query there are a running maximum m, l = sum e^(s-m) and
 * u = sum e^(s-m) (s-m), from which the entropy of the row is ln l - u/l (centred, so that large scores cancel nothing).
 * A query's result depends on its own keys alone: every score is one chain of multiply-adds and one fixed tree, every
 * output adds its keys in order, whether it is computed beside another query or not. Strengths are ranks of entropies, so
 * this must stay true to the last bit. Keys that a query does not see are never multiplied by 0: they may be infinite. */
#ifndef KVS_ATTN_KERNEL_H
#define KVS_ATTN_KERNEL_H
#include "cpu.h"
#include "simd.h"

enum { TILE = 32, GROUP = 8, AHEAD = 8192, MAX_LANES = 16 };

typedef struct attn_row { /* state of one query */
    float m, l, u;
    float c;   /* what its outputs of earlier tiles are to be multiplied by */
    float vis; /* the part of l that belongs to spans */
} attn_row;

typedef struct attn_work { /* a task and its scratch, heads padded with zeros to whole vectors */
    const kvs_attn_task *task;
    int32_t width;  /* head_dim, padded */
    int32_t n_keys; /* that anybody sees */
    float *q;       /* (n_q, width), scaled */
    float *o;       /* (n_q, width), sums before the division by l */
    float *s;       /* (n_q, TILE), scores, then e^(s-m) */
    float *rows;    /* (GROUP, width), keys or values as float32 */
    attn_row *state;
} attn_work;

static int64_t padded(int32_t head_dim) { return ((int64_t)head_dim + MAX_LANES - 1) / MAX_LANES * MAX_LANES; }

#if !defined(KVS_ISA_AVX2) && !defined(KVS_ISA_AVX512)
int64_t kvs_attn_scratch(int32_t head_dim, int32_t n_q) {
    int64_t state = (int64_t)(sizeof(attn_row) / sizeof(float));
    return (2 * n_q + GROUP) * padded(head_dim) + n_q * (TILE + state);
}
#endif

/* ---- from a cache row to float32 ---- */

static inline float half_to_float(const uint8_t *p) {
    uint16_t h;
    memcpy(&h, p, 2);
#if defined(KVS_ISA_AVX2) || defined(KVS_ISA_AVX512)
    return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h)));
#else
    return kvs_f16_to_f32(h);
#endif
}

static inline void widen_f16(const uint8_t *src, float *dst, int32_t n) {
    const uint16_t *h = (const uint16_t *)(const void *)src;
    int32_t i = 0;
    for (; i + VW <= n; i += VW) v_store(dst + i, v_load_f16(h + i));
    for (; i < n; i++) dst[i] = half_to_float(src + 2 * i);
}

static inline void widen_q8(const uint8_t *src, float *dst, int32_t width) { /* a part-empty last block holds zeros */
    for (int32_t i = 0; i < width; i += 32, src += 34) {
        const int8_t *quants = (const int8_t *)(src + 2);
        vf d = v_set(half_to_float(src));
        for (int32_t j = 0; j < KVS_MIN(32, width - i); j += VW) v_store(dst + i + j, v_mul(d, v_load_i8(quants + j)));
    }
}

static inline void widen(const attn_work *w, const uint8_t *src, float *dst) {
    int32_t n = w->task->head_dim;
    if (w->task->kv_type == KVS_TYPE_Q8_0) {
        widen_q8(src, dst, w->width);
        return;
    }
    if (w->task->kv_type == KVS_TYPE_F16)
        widen_f16(src, dst, n);
    else
        memcpy(dst, src, (size_t)n * sizeof *dst);
    for (int32_t i = n; i < w->width; i++) dst[i] = 0.0f;
}

/* Rows are short and are read in turns from two places: the processor's own guess of what comes next is too timid. Zen 4 wants them in
 * the second-level cache, because the first one waits for too few lines at a time (twice as fast). Inlined, because gcc 12 drops calls of
 * functions that do nothing else. */
static inline __attribute__((always_inline)) void prefetch_rows(const attn_work *w, const uint8_t *src, int32_t first) {
    const kvs_attn_task *t = w->task;
    int64_t ahead = t->ahead ? t->ahead : AHEAD, bytes = GROUP * t->row_bytes;
    if (first * t->row_bytes + ahead + bytes > w->n_keys * t->row_bytes) return;
    if (t->ahead)
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(src + ahead + i, 0, 3);
    else
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(src + ahead + i, 0, 2);
}

typedef struct group { /* up to GROUP rows of keys or values that are about to be used */
    int32_t type;      /* F16, read from the cache itself, or F32 */
    const uint8_t *src;
    int64_t stride;      /* bytes */
    const uint8_t *next; /* rows that a lone query will read a tile later; NULL: they are not asked for */
} group;

/* Zen 5 wants a lone query's rows in its first-level cache, a tile ahead: values while their keys are used, the next keys meanwhile, a
 * few lines with each vector rather than all at once (2 to 4 % faster than a page ahead, 7 to 15 where memory is fast). */
static inline const uint8_t *next_values(const attn_work *w, int32_t first) { return w->task->v + first * w->task->row_bytes; }

static inline const uint8_t *next_keys(const attn_work *w, int32_t first) {
    const kvs_attn_task *t = w->task;
    if (first + TILE + GROUP <= w->n_keys) return t->k + (first + TILE) * t->row_bytes;
    return t->next ? t->next + first % TILE * t->row_bytes : NULL;
}

/* The share of GROUP rows, of so many bytes a value, that belongs to step d of a row */
static inline __attribute__((always_inline)) void ask(const group *g, int64_t d, int64_t value) {
    for (int64_t i = 0; g->next && i < GROUP * VW * value; i += 64) __builtin_prefetch(g->next + GROUP * d * value + i, 0, 3);
}

/* n <= GROUP rows from key first on. A lone query takes whole rows from where they are, so that decoding runs at the speed of
 * memory (blocks of Q8_0 are no faster that way); several queries share rows that are widened once, filled up with zeros. */
static inline void take_rows(const attn_work *w, group *g, const uint8_t *base, int32_t first, int32_t n, const uint8_t *next) {
    const kvs_attn_task *t = w->task;
    const uint8_t *src = base + first * t->row_bytes;
    bool lone = n == GROUP && t->n_q == 1 && w->width == t->head_dim && t->kv_type != KVS_TYPE_Q8_0;
    g->next = lone && t->ahead ? next : NULL;
    if (!g->next) prefetch_rows(w, src, first);
    if (lone) {
        g->type = t->kv_type;
        g->src = src;
        g->stride = t->row_bytes;
        return;
    }
    for (int32_t i = 0; i < n; i++) widen(w, src + i * t->row_bytes, w->rows + i * w->width);
    if (n < GROUP) memset(w->rows + n * w->width, 0, (size_t)(GROUP - n) * (size_t)w->width * sizeof(float));
    g->type = KVS_TYPE_F32;
    g->src = (const uint8_t *)w->rows;
    g->stride = (int64_t)sizeof(float) * w->width;
}

/* Elements d.. of row i. Type is a constant wherever this is called. The same float32 values as widen() gives. */
static inline __attribute__((always_inline)) vf row_at(int32_t type, const group *g, int32_t i, int64_t d) {
    const uint8_t *row = g->src + i * g->stride;
    if (type == KVS_TYPE_F32) return v_load((const float *)(const void *)row + d);
    return v_load_f16((const uint16_t *)(const void *)row + d);
}

/* ---- scores ---- */

/* The sums of eight vectors. */
static inline void sum8(const vf a[8], float *out) {
#if VW == 1
    for (int i = 0; i < 8; i++) out[i] = a[i];
#else
    __m256 t[8];
    for (int i = 0; i < 8; i++) {
#if VW == 16
        t[i] = _mm256_add_ps(_mm512_castps512_ps256(a[i]), _mm512_extractf32x8_ps(a[i], 1));
#else
        t[i] = a[i];
#endif
    }
    __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(t[0], t[1]), _mm256_hadd_ps(t[2], t[3]));
    __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(t[4], t[5]), _mm256_hadd_ps(t[6], t[7]));
    __m256 sum = _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
    _mm256_storeu_ps(out, sum);
#endif
}

static inline __attribute__((always_inline)) void dot_1x8(int32_t type, const float *q, const group *k, int32_t width, float *s) {
    vf a[8];
    for (int i = 0; i < 8; i++) a[i] = v_zero();
    for (int64_t d = 0; d < width; d += VW) {
        vf x = v_load(q + d);
        ask(k, d, type == KVS_TYPE_F32 ? 4 : 2);
        for (int i = 0; i < 8; i++) a[i] = v_fma(x, row_at(type, k, i, d), a[i]);
    }
    sum8(a, s);
}

static inline void dots_of_one(const float *q, const group *k, int32_t width, float *s) {
    if (k->type == KVS_TYPE_F32)
        dot_1x8(KVS_TYPE_F32, q, k, width, s);
    else
        dot_1x8(KVS_TYPE_F16, q, k, width, s);
}

static inline void dot_2x4(const float *q0, const float *q1, const group *k, int32_t first, int32_t width, float *s0, float *s1) {
    vf a[8];
    float sums[8];
    for (int i = 0; i < 8; i++) a[i] = v_zero();
    for (int64_t d = 0; d < width; d += VW) {
        vf x0 = v_load(q0 + d), x1 = v_load(q1 + d);
        for (int i = 0; i < 4; i++) {
            vf y = row_at(KVS_TYPE_F32, k, first + i, d);
            a[i] = v_fma(x0, y, a[i]);
            a[i + 4] = v_fma(x1, y, a[i + 4]);
        }
    }
    sum8(a, sums);
    memcpy(s0 + first, sums, 4 * sizeof(float));
    memcpy(s1 + first, sums + 4, 4 * sizeof(float));
}

static inline int32_t seen_keys(const attn_work *w, int32_t i, int32_t first, int32_t n) { /* of first..first+n, by query i */
    int32_t seen = w->task->n_visible[i] + 1 - first;
    return seen < 0 ? 0 : KVS_MIN(seen, n);
}

static inline void score_tile(const attn_work *w, int32_t first, int32_t n) {
    int32_t n_q = w->task->n_q, width = w->width;
    for (int32_t g = 0; g < n; g += GROUP) {
        group k;
        take_rows(w, &k, w->task->k, first + g, KVS_MIN((int32_t)GROUP, n - g), next_values(w, first + g));
        for (int32_t i = 0; i < n_q; i += 2) {
            const float *q = w->q + i * width;
            float *s = w->s + i * TILE + g;
            bool pair = i + 1 < n_q;
            if (!seen_keys(w, i, first + g, 1) && !(pair && seen_keys(w, i + 1, first + g, 1))) continue;
            if (pair) {
                dot_2x4(q, q + width, &k, 0, width, s, s + TILE);
                dot_2x4(q, q + width, &k, 4, width, s, s + TILE);
            } else
                dots_of_one(q, &k, width, s);
        }
    }
}

/* ---- softmax ---- */

static inline float exp1(float x) { /* the vector's own exponential: the same bits in every place */
    float y[VW];
    v_store(y, v_exp(v_set(x)));
    return y[0];
}

/* n more scores: they become e^(s-m), and row->c takes the factor for all that was summed before. */
static inline void absorb(attn_row *row, float *s, int32_t n) {
    for (int32_t i = n; i % VW; i++) s[i] = -INFINITY;
    vf top = v_set(-INFINITY);
    for (int32_t i = 0; i < n; i += VW) top = v_max(top, v_load(s + i));
    float m = v_hmax(top);
    if (m > row->m) {
        float shift = KVS_MAX(row->m - m, -1e4f), c = exp1(shift); /* the first tile: -infinity must not meet l = 0 */
        row->u = c * (row->u + shift * row->l);                    /* the l of before */
        row->l *= c;
        row->c *= c;
        row->m = m;
    }
    vf shift = v_set(row->m), bottom = v_set(-1e4f), l = v_zero(), u = v_zero();
    for (int32_t i = 0; i < n; i += VW) {
        vf x = v_max(bottom, v_sub(v_load(s + i), shift)); /* in this order NaN stays NaN */
        vf e = v_exp(x);
        v_store(s + i, e);
        l = v_add(l, e);
        u = v_fma(e, x, u);
    }
    row->l += v_sum(l);
    row->u += v_sum(u);
}

static inline float row_entropy(const attn_row *row) {
    float h = row->l == 0.0f ? 0.0f : logf(row->l) - row->u / row->l;
    return h < 0.0f ? 0.0f : h;
}

/* The sum of s[begin..end), whole vectors at once. */
static inline float sum_range(const float *s, int32_t begin, int32_t end) {
    float ends = 0.0f;
    vf middle = v_zero();
    for (; begin < end && begin % VW; begin++) ends += s[begin];
    for (; begin + VW <= end; begin += VW) middle = v_add(middle, v_load(s + begin));
    for (; begin < end; begin++) ends += s[begin];
    return v_sum(middle) + ends;
}

/* s: e^(s-m) of the seen keys first.. of a tile; row->c is what the sums of before are to be multiplied by. */
static inline void absorb_spans(const kvs_attn_task *t, attn_row *row, const float *s, int32_t first, int32_t seen) {
    row->vis *= row->c;
    for (int32_t i = 0; i < t->n_spans; i++) {
        int32_t begin = KVS_MAX(t->spans[i].first - first, 0), end = KVS_MIN(t->spans[i].first + t->spans[i].n - first, seen);
        if (begin < end) row->vis += sum_range(s, begin, end);
    }
}

/* The statistics end before the newest key, the output does not. */
static inline void absorb_last_apart(attn_row *row, float *s, int32_t n, float *entropy) {
    float last[MAX_LANES] = {s[n - 1]}; /* absorb() pads behind what it takes */
    if (n > 1) absorb(row, s, n - 1);
    if (entropy) *entropy = row_entropy(row);
    float before = row->c;
    row->c = 1.0f;
    absorb(row, last, 1);
    for (int32_t i = 0; i < n - 1; i++) s[i] *= row->c;
    s[n - 1] = last[0];
    row->c *= before;
}

static inline void soften_tile(const attn_work *w, int32_t first, int32_t n) {
    const kvs_attn_task *t = w->task;
    for (int32_t i = 0; i < t->n_q; i++) {
        attn_row *row = &w->state[i];
        float *s = w->s + i * TILE, *o = w->o + i * w->width;
        float *entropy = t->entropy ? t->entropy[i] : NULL;
        int32_t seen = seen_keys(w, i, first, n);
        if (!seen) continue;
        bool newest = t->n_visible[i] == first + seen - 1;
        row->c = 1.0f;
        if (newest && t->exclude_self)
            absorb_last_apart(row, s, seen, entropy);
        else
            absorb(row, s, seen);
        if (newest && !t->exclude_self && entropy) *entropy = row_entropy(row);
        if (t->mass) absorb_spans(t, row, s, first, seen);
        vf c = v_set(row->c);
        if (row->c != 1.0f)
            for (int32_t d = 0; d < w->width; d += VW) v_store(o + d, v_mul(c, v_load(o + d)));
    }
}

/* ---- outputs ---- */

static inline void add_values(float *o, const float *p, const group *v, int32_t n, int32_t width) { /* the first n of a group */
    for (int64_t d = 0; d < width; d += VW) {
        vf a = v_load(o + d);
        for (int32_t i = 0; i < n; i++) a = v_fma(v_set(p[i]), row_at(KVS_TYPE_F32, v, i, d), a);
        v_store(o + d, a);
    }
}

static inline __attribute__((always_inline)) void add_1x8(int32_t type, float *o, const float *p, const group *v, int32_t width) {
    vf e[8];
    for (int i = 0; i < 8; i++) e[i] = v_set(p[i]);
    for (int64_t d = 0; d < width; d += VW) {
        vf a = v_load(o + d);
        ask(v, d, type == KVS_TYPE_F32 ? 4 : 2);
        for (int i = 0; i < 8; i++) a = v_fma(e[i], row_at(type, v, i, d), a);
        v_store(o + d, a);
    }
}

static inline void add_2x4(float *o0, float *o1, const float *p0, const float *p1, const group *v, int32_t first, int32_t width) {
    vf e0[4], e1[4];
    for (int i = 0; i < 4; i++) {
        e0[i] = v_set(p0[first + i]);
        e1[i] = v_set(p1[first + i]);
    }
    for (int64_t d = 0; d < width; d += VW) {
        vf a0 = v_load(o0 + d), a1 = v_load(o1 + d);
        for (int i = 0; i < 4; i++) {
            vf x = row_at(KVS_TYPE_F32, v, first + i, d);
            a0 = v_fma(e0[i], x, a0);
            a1 = v_fma(e1[i], x, a1);
        }
        v_store(o0 + d, a0);
        v_store(o1 + d, a1);
    }
}

static inline void add_group(float *o, const float *p, const group *v, int32_t seen, int32_t width) {
    if (seen < GROUP)
        add_values(o, p, v, seen, width);
    else if (v->type == KVS_TYPE_F32)
        add_1x8(KVS_TYPE_F32, o, p, v, width);
    else
        add_1x8(KVS_TYPE_F16, o, p, v, width);
}

static inline void value_tile(const attn_work *w, int32_t first, int32_t n) {
    int32_t n_q = w->task->n_q, width = w->width;
    for (int32_t g = 0; g < n; g += GROUP) {
        group v;
        int32_t here = KVS_MIN((int32_t)GROUP, n - g);
        take_rows(w, &v, w->task->v, first + g, here, next_keys(w, first + g));
        for (int32_t i = 0; i < n_q; i += 2) {
            const float *p = w->s + i * TILE + g;
            float *o = w->o + i * width;
            int32_t seen0 = seen_keys(w, i, first + g, here), seen1 = i + 1 < n_q ? seen_keys(w, i + 1, first + g, here) : 0;
            if (seen0 == GROUP && seen1 == GROUP) {
                add_2x4(o, o + width, p, p + TILE, &v, 0, width);
                add_2x4(o, o + width, p, p + TILE, &v, 4, width);
                continue;
            }
            if (seen0) add_group(o, p, &v, seen0, width);
            if (seen1) add_group(o + width, p + TILE, &v, seen1, width);
        }
    }
}

/* ---- the whole ---- */

static void begin_task(attn_work *w, const kvs_attn_task *t) {
    w->task = t;
    w->width = (int32_t)padded(t->head_dim);
    int64_t size = (int64_t)t->n_q * w->width;
    w->q = t->scratch;
    w->o = w->q + size;
    w->s = w->o + size;
    w->rows = w->s + (int64_t)t->n_q * TILE;
    w->state = (attn_row *)(void *)(w->rows + (int64_t)GROUP * w->width);
    memset(w->q, 0, 2 * (size_t)size * sizeof(float));
    w->n_keys = 0;
    for (int32_t i = 0; i < t->n_q; i++) {
        w->state[i] = (attn_row){.m = -INFINITY};
        for (int32_t d = 0; d < t->head_dim; d++) w->q[i * w->width + d] = t->q[i][d] * t->scale;
        w->n_keys = KVS_MAX(w->n_keys, t->n_visible[i] + 1);
    }
}

static void end_task(const attn_work *w) {
    const kvs_attn_task *t = w->task;
    for (int32_t i = 0; i < t->n_q; i++) {
        float *o = w->o + i * w->width;
        vf l = v_set(w->state[i].l);
        for (int32_t d = 0; d < w->width; d += VW) v_store(o + d, v_div(v_load(o + d), l));
        memcpy(t->out[i], o, (size_t)t->head_dim * sizeof(float));
        if (t->mass) *t->mass[i] = w->state[i].vis / w->state[i].l;
        if (t->lse) *t->lse[i] = w->state[i].m + logf(w->state[i].l);
    }
}

static void attn(const kvs_attn_task *task) {
    attn_work w;
    begin_task(&w, task);
    for (int32_t first = 0; first < w.n_keys; first += TILE) {
        int32_t n = KVS_MIN((int32_t)TILE, w.n_keys - first);
        score_tile(&w, first, n);
        soften_tile(&w, first, n);
        value_tile(&w, first, n);
    }
    end_task(&w);
}

/* ---- single keys ---- */

static void weigh(const kvs_weigh_task *t, const uint8_t *row, float *weights) {
    float key[KVS_MAX_HEAD_DIM];
    attn_work w = {.task = &(kvs_attn_task){.kv_type = t->kv_type, .head_dim = t->head_dim}, .width = t->head_dim};
    if (t->kv_type == KVS_TYPE_Q8_0) w.width = (t->head_dim + 31) / 32 * 32;
    widen(&w, row, key);
    for (int32_t i = 0; i < t->n_q; i++) {
        const float *q = t->q + (int64_t)i * t->head_dim;
        vf sum = v_zero();
        int32_t d = 0;
        for (; d + VW <= t->head_dim; d += VW) sum = v_fma(v_load(q + d), v_load(key + d), sum);
        float score = v_sum(sum);
        for (; d < t->head_dim; d++) score += q[d] * key[d];
        weights[i] = expf(score * t->scale - t->lse[i]);
    }
}
#endif
