/* dots_stripes.h - integer kernels for few activation rows: stripes of 16 weight rows (stripes.h) are read once, in one stream. Lanes are
 * weight rows: nothing is summed across lanes, and a scale is applied once per sub-block. */
#ifndef KVS_DOTS_STRIPES_H
#define KVS_DOTS_STRIPES_H
#include "dots_types.h"

/* ---- activations to int8 ---- */
typedef __m256i v8;
KVS_INLINE v8 rounded(const float *x, __m256 inverse) {
    v8 i[4];
    for (int j = 0; j < 4; j++) i[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * j), inverse));
    v8 bytes = _mm256_packs_epi16(_mm256_packs_epi32(i[0], i[1]), _mm256_packs_epi32(i[2], i[3]));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

static float magnitude(const float *x, int32_t n) { /* the greatest; as integers, so that NaN and infinity do not get lost */
    v8 top = _mm256_setzero_si256();
    for (int i = 0; i < n; i += 8)
        top = _mm256_max_epu32(top, _mm256_and_si256(_mm256_loadu_si256((const v8 *)(const void *)(x + i)), _mm256_set1_epi32(0x7fffffff)));
    __m128i t = _mm_max_epu32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    t = _mm_max_epu32(t, _mm_shuffle_epi32(t, 0x4e));
    t = _mm_max_epu32(t, _mm_shuffle_epi32(t, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(t));
}

static void quantize(const float *x, int64_t cols, const kvs_acts *a, int64_t row) {
    int32_t n = a->block;
    for (int64_t b = 0; b < cols / n; b++, x += n) {
        int64_t at = b * a->n + row;
        float amax = magnitude(x, n);
        bool finite = amax < INFINITY, some = finite && amax >= 0x1p-100f;
        a->d[at] = some ? amax / 127.0f : finite ? 0.0f : NAN;
        __m256 inverse = _mm256_set1_ps(some ? 127.0f / amax : 0.0f);
        for (int i = 0; i < n; i += 32) {
            v8 q = some ? rounded(x + i, inverse) : _mm256_setzero_si256();
            _mm256_storeu_si256((v8 *)(a->q + at * n + i), q);
            v8 fours = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), q), _mm256_set1_epi16(1));
            v8 twos = _mm256_hadd_epi32(fours, fours), ones = _mm256_hadd_epi32(twos, twos); /* each half: the sum of its 16 */
            int32_t low = _mm256_cvtsi256_si32(ones), high = _mm256_extract_epi32(ones, 4);
            if (n == 256) a->s16[at * 16 + i / 16] = (int16_t)low, a->s16[at * 16 + i / 16 + 1] = (int16_t)high;
            a->s32[(at * n + i) / 32] = (int16_t)(low + high);
        }
    }
}

/* ---- products of VI rows of a stripe's block with the same block of nx activation rows ---- */
typedef struct isums {
    vi i[KVS_FEW], m[KVS_FEW]; /* isum and msum of dots.h */
} isums;

/* s->i += products of u; runs that have one scale are one sum if they fit */
KVS_INLINE void add_products(int32_t type, isums *s, int nx, const void *block, int at, const heads *h, const int8_t *const *x) {
    const kind t = kinds[type];
    const int shared = t.sub / 4 > t.steps && fitting(t) >= t.runs * t.steps ? t.runs : 1;
    const int depth = KVS_MIN(KVS_MIN(t.steps, t.sub / 4), KVS_MAX(fitting(t) / shared, 1));
    KVS_EACH (g, t.block / 4 / (t.runs * t.steps))
        KVS_EACH (begin, t.steps / depth) {
            vi run[4][KVS_FEW];
            KVS_EACH (r, t.runs / shared)
                KVS_EACH (i, nx) run[r][i] = vi_zero();
            KVS_EACH (step, depth) {
                const int k = begin * depth + step;
                vi v[4];
                values(type, block, g, k, at, v);
                KVS_EACH (r, t.runs)
                    KVS_EACH (i, nx) {
                        vi word = vi_word(x[i] + 4 * (k + t.steps * (t.runs * g + r)));
                        run[r / shared][i] = dot_values(t, run[r / shared][i], v[r], word);
                    }
            }
            KVS_EACH (r, t.runs / shared) {
                const int j = 4 * (begin * depth + t.steps * (t.runs * g + r)) / t.sub;
                KVS_EACH (i, nx) s->i[i] = t.block == 32 ? unscaled(s->i[i], run[r][i]) : scaled(s->i[i], run[r][i], scale_of(h->scale, j));
            }
        }
}

KVS_INLINE void block_sums(int32_t type, isums *s, int nx, const void *block, int at, const int8_t *const *x, const int16_t *const *sx) {
    const kind t = kinds[type];
    if (t.block == 32) {
        KVS_EACH (i, nx) s->i[i] = vi_set(has_sums(t) ? -t.offset * *sx[i] : 0), s->m[i] = vi_set(-*sx[i]);
        add_products(type, s, nx, block, at, NULL, x);
        return;
    }
    heads h = heads_of(type, block, at);
    KVS_EACH (i, nx) s->i[i] = s->m[i] = vi_zero();
    KVS_EACH (j, pairs(t))
        KVS_EACH (i, nx) s->m[i] = vi_madd_to(s->m[i], sums_pair(t, &h, j), vi_word(sx[i] + 2 * j));
    add_products(type, s, nx, block, at, &h, x);
    if (has_sums(t) && t.offset)
        KVS_EACH (i, nx) s->i[i] = vi_sub(s->i[i], vi_left(s->m[i], __builtin_ctz((unsigned)t.offset)));
}

/* ---- whole rows ---- */
typedef float partial[KVS_FEW][KVS_STRIPE]; /* p[b % 4] of dots.h */

KVS_INLINE void add_block(int32_t type, partial p, int nx, const uint8_t *block, const kvs_acts *a, int64_t place) {
    const kind t = kinds[type];
    const int8_t *x[KVS_FEW];
    const int16_t *sx[KVS_FEW];
    KVS_EACH (i, nx) {
        x[i] = a->q + (place + i) * t.block;
        sx[i] = (t.sub == 16 ? a->s16 : a->s32) + (place + i) * (t.block / t.sub);
    }
    KVS_EACH (part, KVS_STRIPE / VI) {
        const int at = part * VI;
        isums s;
        block_sums(type, &s, nx, block, at, x, sx);
        vf d = halves_of(block, t.d, at), m = t.m ? halves_of(block, t.m, at) : v_zero();
        KVS_EACH (i, nx) {
            vf dx = v_set(a->d[place + i]), y = v_add(v_load(p[i] + at), v_mul(v_mul(d, dx), vi_float(s.i[i])));
            if (t.m) y = v_sub(y, v_mul(v_mul(m, dx), vi_float(s.m[i])));
            v_store(p[i] + at, y);
        }
    }
}

/* Inlined, as its callers must be: gcc 12 drops calls of functions that do nothing else. */
KVS_INLINE void fetch(const uint8_t *p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

KVS_INLINE void few_rows(int32_t type, int nx, const kvs_panel *p, const kvs_acts *a, int64_t row, float *y, int64_t y_step) {
    const int32_t width = kinds[type].block;
    const int64_t bytes = KVS_STRIPE * p->row_bytes / (p->cols / width);
    for (int64_t r = 0; r < p->rows; r += KVS_STRIPE) {
        _Alignas(64) partial sum[4];
        memset(sum, 0, sizeof sum);
        const uint8_t *w = p->w + r * p->row_bytes;
        for (int64_t b = 0; b < p->cols / width; b++) {
            if (p->ahead) fetch(w + b * bytes + p->ahead, bytes);
            add_block(type, sum[b % 4], nx, w + b * bytes, a, b * a->n + row);
        }
        for (int i = 0; i < nx; i++)
            for (int64_t k = 0; k < KVS_MIN(KVS_STRIPE, p->rows - r); k++)
                y[i * y_step + r + k] = (sum[0][i][k] + sum[1][i][k]) + (sum[2][i][k] + sum[3][i][k]);
    }
}

KVS_INLINE void few_by_type(int32_t type, const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n, float *y, int64_t y_step) {
    switch (n) {
    case 1: few_rows(type, 1, p, a, row, y, y_step); break;
    case 2: few_rows(type, 2, p, a, row, y, y_step); break;
    case 3: few_rows(type, 3, p, a, row, y, y_step); break;
    default: few_rows(type, 4, p, a, row, y, y_step);
    }
}

static void few(const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n, float *y, int64_t y_step) {
#define CASE(type)                                                                                                                         \
    case KVS_TYPE_##type: few_by_type(KVS_TYPE_##type, p, a, row, n, y, y_step); break;
    switch (p->type) { EACH_TYPE(CASE) }
#undef CASE
}
#endif
