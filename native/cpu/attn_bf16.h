/* attn_bf16.h - attention of a picture's rows to all of them, with operands rounded to bf16: dots_bf16.h's products of turned
 * queries and keys, softmax in float32 over tiles of keys with a running maximum, and products of turned weights and values. */
#ifndef KVS_ATTN_BF16_H
#define KVS_ATTN_BF16_H
#include "../backend.h"
#include "dots_bf16.h"

enum {
    ATTN_ROWS = 32, /* of a group at most */
    ATTN_TILE = 256,
    ATTN_PAIRS = ATTN_TILE / 2 + 16 /* apart from a power of two */
};

typedef struct attn_bf16_scratch { /* of one group of rows */
    uint32_t q[KVS_MAX_HEAD_DIM / 2 * ATTN_ROWS];
    float s[ATTN_ROWS][ATTN_TILE];     /* products with keys */
    uint32_t p[ATTN_ROWS][ATTN_PAIRS]; /* e^(scale s - m), pairs of keys */
    float o[ATTN_ROWS][KVS_MAX_HEAD_DIM];
    float m[ATTN_ROWS], l[ATTN_ROWS], c[ATTN_ROWS]; /* maximum, sum, what earlier tiles are to be multiplied by */
} attn_bf16_scratch;
_Static_assert(sizeof(attn_bf16_scratch) <= KVS_DOTS_SCRATCH && ATTN_TILE % BF16_PR == 0, "scratch of a thread, whole panels");
_Static_assert(KVS_MAX_HEAD_DIM % 32 == 0, "rows of q take no more words than this");

/* n keys from number first on, n <= ATTN_TILE: s = products of q with them; o = c o + products of p with their values */
typedef void (*attn_part)(attn_bf16_scratch *s, const kvs_bf16_attn *t, int64_t first, int64_t n);
typedef struct attn_kernels {
    int64_t group;
    attn_part score, add_values;
} attn_kernels;

/* Keys of one head: panels of 32 of them, pairs of dimensions. Values: panels of 32 dimensions, pairs of keys. */
BF16 static void bf16_keys(const float *k, int64_t step, int64_t n, int64_t dim, uint32_t *out) {
    for (int64_t i = 0; i < n; i += BF16_PR, out += kvs_bf16_pairs(dim) * BF16_PR)
        turn_panel(KVS_TYPE_F32, (const uint8_t *)(k + i * step), step * (int64_t)sizeof *k, n - i, dim, (uint32_t(*)[BF16_PR])out);
}

BF16 static void bf16_values(const float *v, int64_t step, int64_t n, int64_t dim, uint32_t *out) {
    for (int64_t d = 0; d < (dim + BF16_PR - 1) / BF16_PR * BF16_PR; d += 16) {
        int64_t left = KVS_MAX(0, dim - d);
        __mmask16 mask = (__mmask16)(left >= 16 ? 0xffff : (1u << left) - 1);
        uint32_t *at = out + d / BF16_PR * kvs_bf16_pairs(n) * BF16_PR + d % BF16_PR;
        for (int64_t i = 0; i < 2 * kvs_bf16_pairs(n); i += 2, at += BF16_PR) {
            __m512 even = i < n ? _mm512_maskz_loadu_ps(mask, v + i * step + d) : _mm512_setzero_ps();
            __m512 odd = i + 1 < n ? _mm512_maskz_loadu_ps(mask, v + (i + 1) * step + d) : _mm512_setzero_ps();
            __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even)),
                    high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
            _mm512_storeu_si512(at, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

BF16 static void score_keys(attn_bf16_scratch *s, const kvs_bf16_attn *t, int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; i += BF16_PR) {
        const uint32_t(*w)[BF16_PR] = (const uint32_t(*)[BF16_PR])(t->k + (first + i) * kvs_bf16_pairs(t->head_dim));
        __m512 sum[BF16_GROUP][2];
        bf16_times(BF16_GROUP, w, s->q, BF16_GROUP, 1, (t->head_dim + 1) / 2, sum);
        KVS_EACH (r, BF16_GROUP)
            KVS_EACH (v, 2) _mm512_storeu_ps(s->s[r] + i + 16 * v, sum[r][v]);
    }
}

BF16 static void soften(attn_bf16_scratch *s, int64_t r, int64_t n, float scale) {
    __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps(), by = _mm512_set1_ps(scale);
    for (int64_t i = n; i % 32; i++) s->s[r][i] = -INFINITY; /* keys that are none */
    for (int64_t i = 0; i < n; i += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(s->s[r] + i));
    float m = fmaxf(s->m[r], _mm512_reduce_max_ps(top) * scale);
    for (int64_t i = 0; i < n; i += 32) {
        __m512 p0 = v_exp(_mm512_sub_ps(_mm512_mul_ps(_mm512_loadu_ps(s->s[r] + i), by), _mm512_set1_ps(m)));
        __m512 p1 = v_exp(_mm512_sub_ps(_mm512_mul_ps(_mm512_loadu_ps(s->s[r] + i + 16), by), _mm512_set1_ps(m)));
        sum = _mm512_add_ps(sum, _mm512_add_ps(p0, p1));
        _mm512_storeu_si512(s->p[r] + i / 2, (__m512i)_mm512_cvtne2ps_pbh(p1, p0));
    }
    s->c[r] = expf(s->m[r] - m);
    s->l[r] = s->l[r] * s->c[r] + _mm512_reduce_add_ps(sum);
    s->m[r] = m;
}

BF16 static void add_values_of(attn_bf16_scratch *s, const kvs_bf16_attn *t, int64_t first, int64_t n) {
    for (int64_t d = 0; d < t->head_dim; d += BF16_PR) {
        const uint32_t(*w)[BF16_PR] = (const uint32_t(*)[BF16_PR])(t->v + d * kvs_bf16_pairs(t->n_keys)) + first / 2;
        __m512 sum[BF16_GROUP][2];
        bf16_times(BF16_GROUP, w, s->p[0], 1, ATTN_PAIRS, (n + 1) / 2, sum);
        KVS_EACH (r, BF16_GROUP)
            KVS_EACH (v, 2) {
                float *o = s->o[r] + d + 16 * v;
                _mm512_storeu_ps(o, _mm512_fmadd_ps(_mm512_set1_ps(s->c[r]), _mm512_loadu_ps(o), sum[r][v]));
            }
    }
}

/* n rows, whose queries are in s->q */
BF16 static void attend_group(const attn_kernels *k, const kvs_bf16_attn *t, int64_t n, float *out, attn_bf16_scratch *s) {
    memset(s->o, 0, (size_t)k->group * sizeof s->o[0]);
    for (int64_t r = 0; r < k->group; r++) s->m[r] = -INFINITY, s->l[r] = 0;
    for (int64_t first = 0; first < t->n_keys; first += ATTN_TILE) {
        int64_t here = KVS_MIN(ATTN_TILE, t->n_keys - first);
        k->score(s, t, first, here);
        for (int64_t r = 0; r < n; r++) soften(s, r, here, t->scale);
        k->add_values(s, t, first, here);
    }
    for (int64_t r = 0; r < n; r++)
        for (int64_t d = 0; d < t->head_dim; d++) out[r * t->step + d] = s->o[r][d] / s->l[r];
}

BF16 static void bf16_attend(const kvs_bf16_attn *t, const float *q, int64_t n, float *out, void *scratch) {
    static const attn_kernels kernels = {BF16_GROUP, score_keys, add_values_of};
    attn_bf16_scratch *s = scratch;
    for (int64_t i = 0; i < n; i += BF16_GROUP) {
        int64_t here = KVS_MIN(BF16_GROUP, n - i);
        bf16_round(q + i * t->step, t->step, here, t->head_dim, s->q);
        attend_group(&kernels, t, here, out + i * t->step, s);
    }
}
#endif
