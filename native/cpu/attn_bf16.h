/* attn_bf16.h - attention of a picture's rows to all of them, with operands rounded to bf16: dots_bf16.h's products of turned
 * queries and keys, softmax in float32 over tiles of keys with a running maximum, and products of turned weights and values. */
#ifndef KVS_ATTN_BF16_H
#define KVS_ATTN_BF16_H
#include "../backend.h"
#include "dots_bf16.h"

enum { ATTN_TILE = 256, ATTN_PAIRS = ATTN_TILE / 2 + 16 /* apart from a power of two */ };

typedef struct attn_bf16_scratch { /* of one group of rows */
    uint32_t q[KVS_MAX_HEAD_DIM / 2][KVS_BF16_GROUP];
    float s[KVS_BF16_GROUP][ATTN_TILE];
    uint32_t p[KVS_BF16_GROUP][ATTN_PAIRS]; /* e^(s - m), pairs of keys */
    float o[KVS_BF16_GROUP][KVS_MAX_HEAD_DIM];
    float m[KVS_BF16_GROUP], l[KVS_BF16_GROUP], c[KVS_BF16_GROUP]; /* maximum, sum, what earlier tiles are to be multiplied by */
} attn_bf16_scratch;
_Static_assert(sizeof(attn_bf16_scratch) <= KVS_DOTS_SCRATCH && ATTN_TILE % BF16_PR == 0, "scratch of a thread, whole panels");

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
        for (int64_t i = 0; i < n; i += 2, at += BF16_PR) {
            __m512 even = _mm512_maskz_loadu_ps(mask, v + i * step + d);
            __m512 odd = i + 1 < n ? _mm512_maskz_loadu_ps(mask, v + (i + 1) * step + d) : _mm512_setzero_ps();
            __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even)),
                    high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
            _mm512_storeu_si512(at, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
    }
}

BF16 static void score_keys(attn_bf16_scratch *s, const kvs_bf16_attn *t, int64_t first, int64_t n) {
    int64_t pairs = kvs_bf16_pairs(t->head_dim);
    for (int64_t i = 0; i < n; i += BF16_PR) {
        const uint32_t(*w)[BF16_PR] = (const uint32_t(*)[BF16_PR])(t->k + (first + i) * pairs);
        __m512 sum[KVS_BF16_GROUP][2];
        bf16_times(KVS_BF16_GROUP, w, s->q[0], KVS_BF16_GROUP, 1, pairs, sum);
        KVS_EACH (r, KVS_BF16_GROUP)
            KVS_EACH (v, 2) _mm512_storeu_ps(s->s[r] + i + 16 * v, _mm512_mul_ps(sum[r][v], _mm512_set1_ps(t->scale)));
    }
    int64_t end = (n + BF16_PR - 1) / BF16_PR * BF16_PR; /* keys that are none */
    for (int64_t r = 0; r < KVS_BF16_GROUP && n < end; r++)
        for (int64_t i = n; i < end; i++) s->s[r][i] = -INFINITY;
}

BF16 static void soften(attn_bf16_scratch *s, int64_t r, int64_t n) {
    __m512 top = _mm512_set1_ps(s->m[r]), sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(s->s[r] + i));
    float m = _mm512_reduce_max_ps(top);
    for (int64_t i = 0; i < n; i += 32) {
        __m512 p0 = v_exp(_mm512_sub_ps(_mm512_loadu_ps(s->s[r] + i), _mm512_set1_ps(m)));
        __m512 p1 = v_exp(_mm512_sub_ps(_mm512_loadu_ps(s->s[r] + i + 16), _mm512_set1_ps(m)));
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
        __m512 sum[KVS_BF16_GROUP][2];
        bf16_times(KVS_BF16_GROUP, w, s->p[0], 1, ATTN_PAIRS, kvs_bf16_pairs(n), sum);
        KVS_EACH (r, KVS_BF16_GROUP)
            KVS_EACH (v, 2) {
                float *o = s->o[r] + d + 16 * v;
                _mm512_storeu_ps(o, _mm512_fmadd_ps(_mm512_set1_ps(s->c[r]), _mm512_loadu_ps(o), sum[r][v]));
            }
    }
}

BF16 static void attend_group(const kvs_bf16_attn *t, const float *q, int64_t n, float *out, attn_bf16_scratch *s) {
    bf16_round(q, t->step, n, t->head_dim, s->q[0]);
    memset(s->o, 0, sizeof s->o);
    for (int64_t r = 0; r < KVS_BF16_GROUP; r++) s->m[r] = -INFINITY, s->l[r] = 0;
    for (int64_t first = 0; first < t->n_keys; first += ATTN_TILE) {
        int64_t here = KVS_MIN(ATTN_TILE, t->n_keys - first);
        score_keys(s, t, first, here);
        for (int64_t r = 0; r < KVS_BF16_GROUP; r++) soften(s, r, here);
        add_values_of(s, t, first, here);
    }
    for (int64_t r = 0; r < n; r++)
        for (int64_t d = 0; d < t->head_dim; d++) out[r * t->step + d] = s->o[r][d] / s->l[r];
}

BF16 static void bf16_attend(const kvs_bf16_attn *t, const float *q, int64_t n, float *out, void *scratch) {
    for (int64_t i = 0; i < n; i += KVS_BF16_GROUP)
        attend_group(t, q + i * t->step, KVS_MIN(KVS_BF16_GROUP, n - i), out + i * t->step, scratch);
}
#endif
