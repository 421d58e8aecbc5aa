/* dots_bf16.h - products of operands that are rounded to bf16, summed in float32, by AVX512-BF16's instruction: twice the speed of
 * float32. Both operands are turned first, so that a lane holds two neighbouring columns of one row: 32 weight rows by BF16_KC columns,
 * once for all activation rows; and activations in groups of twelve rows, once for all weights. Nothing is summed across lanes, and
 * a sum is the same chain of instructions whatever stands beside it. */
#ifndef KVS_DOTS_BF16_H
#define KVS_DOTS_BF16_H
#include "dots.h"
#include "dots_float.h"

#define BF16 __attribute__((target("avx512bf16")))
enum {
    BF16_GROUP = 12, /* activation rows: pairs of all of them side by side */
    BF16_KC = 512,   /* columns of a panel: 32 KiB of pairs */
    BF16_PR = 32     /* its rows: two vectors */
};
_Static_assert(BF16_KC % 256 == 0 && (int)BF16_PR == (int)KVS_UNIT, "panels of whole blocks, as matmul.c hands them out");

typedef struct bf16_scratch {
    uint32_t w[BF16_KC / 2][BF16_PR]; /* pairs of columns */
    float wide[BF16_PR][BF16_KC];
} bf16_scratch;
_Static_assert(sizeof(bf16_scratch) <= KVS_DOTS_SCRATCH, "scratch of a thread");

/* ---- turning ---- */

/* 16 pairs of a row from column k on, zeros beyond n columns */
BF16 KVS_INLINE __m512i row_pairs(int32_t type, const uint8_t *row, int64_t k, int64_t n) {
    uint32_t mask = n >= 32 ? UINT32_MAX : (1u << n) - 1;
    __mmask16 low = (__mmask16)mask, high = (__mmask16)(mask >> 16);
    if (type == KVS_TYPE_F32) {
        const float *x = (const float *)(const void *)row + k;
        return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high, x + 16), _mm512_maskz_loadu_ps(low, x));
    }
    const uint16_t *h = (const uint16_t *)(const void *)row + k;
    __m512i all = _mm512_maskz_loadu_epi16(mask, h);
    if (type == KVS_TYPE_BF16) return all;
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(all, 1)), _mm512_cvtph_ps(_mm512_castsi512_si256(all)));
}

KVS_INLINE void turn16(__m512i r[16]) { /* 16 x 16 words of four bytes */
    __m512i t[16];
    KVS_EACH (i, 8) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    KVS_EACH (i, 4) { /* r[4 i + c]: columns c, c + 4, c + 8, c + 12 of rows 4 i .. 4 i + 3 */
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    KVS_EACH (c, 4) {
        __m512i a = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88), b = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        __m512i d = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd), e = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        t[c] = _mm512_shuffle_i32x4(a, b, 0x88);
        t[8 + c] = _mm512_shuffle_i32x4(a, b, 0xdd);
        t[4 + c] = _mm512_shuffle_i32x4(d, e, 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(d, e, 0xdd);
    }
    KVS_EACH (i, 16) r[i] = t[i];
}

/* Up to 16 rows: out[j * step + lane] = columns 2 j, 2 j + 1 of row lane, for lanes < width; what is beyond the rows, or the columns up to
 * a multiple of 32, is zeros. */
BF16 KVS_INLINE void turn_rows(int32_t type, const uint8_t *from, int64_t row_bytes, int64_t rows, int64_t cols, int width, uint32_t *out,
                               int64_t step) {
    for (int64_t k = 0; k < cols; k += 32) {
        __m512i r[16];
        for (int64_t i = 0; i < 16; i++) r[i] = i < rows ? row_pairs(type, from + i * row_bytes, k, cols - k) : _mm512_setzero_si512();
        turn16(r);
        for (int64_t j = 0; j < 16; j++) _mm512_mask_storeu_epi32(out + (k / 2 + j) * step, (__mmask16)((1u << width) - 1), r[j]);
    }
}

BF16 static void bf16_round(const float *x, int64_t x_step, int64_t rows, int64_t cols, uint32_t *out) {
    int64_t bytes = x_step * (int64_t)sizeof *x;
    for (int64_t i = 0; i < rows; i += BF16_GROUP)
        turn_rows(KVS_TYPE_F32, (const uint8_t *)(x + i * x_step), bytes, KVS_MIN(BF16_GROUP, rows - i), cols, BF16_GROUP,
                  out + i * kvs_bf16_pairs(cols), BF16_GROUP);
}

BF16 static void turn_panel(int32_t type, const uint8_t *w, int64_t row_bytes, int64_t rows, int64_t cols, uint32_t (*out)[BF16_PR]) {
    for (int64_t r = 0; r < BF16_PR; r += 16) {
        int64_t here = KVS_MAX(0, KVS_MIN(16, rows - r));
        if (type == KVS_TYPE_F32)
            turn_rows(KVS_TYPE_F32, w + r * row_bytes, row_bytes, here, cols, 16, out[0] + r, BF16_PR);
        else if (type == KVS_TYPE_F16)
            turn_rows(KVS_TYPE_F16, w + r * row_bytes, row_bytes, here, cols, 16, out[0] + r, BF16_PR);
        else
            turn_rows(KVS_TYPE_BF16, w + r * row_bytes, row_bytes, here, cols, 16, out[0] + r, BF16_PR);
    }
}

/* n columns of all rows of p, from column k on */
BF16 static void load_panel(const kvs_panel *p, int64_t k, int64_t n, bf16_scratch *s) {
    if (p->type == KVS_TYPE_F32 || p->type == KVS_TYPE_F16 || p->type == KVS_TYPE_BF16) {
        turn_panel(p->type, p->w + k * (p->type == KVS_TYPE_F32 ? 4 : 2), p->row_bytes, p->rows, n, s->w);
        return;
    }
    for (int64_t r = 0; r < p->rows; r++) widen(p, r, k, n, s->wide[r]);
    turn_panel(KVS_TYPE_F32, (const uint8_t *)s->wide, sizeof s->wide[0], p->rows, n, s->w);
}

/* ---- products ---- */

/* sum[i] = two vectors of products of a panel with row i, whose pair k stands at x[k * k_step + i * row_step] */
BF16 KVS_INLINE void bf16_times(int nx, const uint32_t (*w)[BF16_PR], const uint32_t *x, int64_t k_step, int64_t row_step, int64_t pairs,
                                __m512 sum[][2]) {
    KVS_EACH (i, nx) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++, x += k_step) {
        __m512bh w0 = (__m512bh)_mm512_loadu_si512(w[k]), w1 = (__m512bh)_mm512_loadu_si512(w[k] + 16);
        KVS_EACH (i, nx) {
            __m512bh xi = (__m512bh)_mm512_set1_epi32((int32_t)x[i * row_step]);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], w0, xi);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], w1, xi);
        }
    }
}

typedef struct bf16_out { /* what the products of a panel are added to: y itself, or at first the bias, or nothing */
    float *y;
    const float *from;
    int64_t y_step, from_step;
    __mmask16 mask[2]; /* of the panel's rows */
} bf16_out;

BF16 KVS_INLINE void group_times(int nx, const bf16_scratch *s, const uint32_t *x, int64_t pairs, int64_t n, bf16_out o) {
    __m512 sum[BF16_GROUP][2];
    bf16_times(nx, s->w, x, BF16_GROUP, 1, pairs, sum);
    KVS_EACH (i, nx) {
        if (i < n)
            KVS_EACH (v, 2) {
                __m512 before = o.from ? _mm512_maskz_loadu_ps(o.mask[v], o.from + i * o.from_step + 16 * v) : _mm512_setzero_ps();
                _mm512_mask_storeu_ps(o.y + i * o.y_step + 16 * v, o.mask[v], _mm512_add_ps(before, sum[i][v]));
            }
    }
}

BF16 static void bf16_many(const kvs_panel *p, const uint32_t *x, int64_t n, const float *bias, float *y, int64_t y_step, void *scratch) {
    bf16_scratch *s = scratch;
    uint32_t mask = p->rows >= 32 ? UINT32_MAX : (1u << p->rows) - 1;
    for (int64_t k = 0; k < p->cols; k += BF16_KC) {
        int64_t kn = KVS_MIN(BF16_KC, p->cols - k), pairs = (kn + 1) / 2;
        load_panel(p, k, kn, s);
        for (int64_t i = 0; i < n; i += BF16_GROUP) {
            const uint32_t *xi = x + i * kvs_bf16_pairs(p->cols) + k / 2 * BF16_GROUP;
            float *yi = y + i * y_step;
            bf16_out o = {yi, k ? yi : bias, y_step, k ? y_step : 0, {(__mmask16)mask, (__mmask16)(mask >> 16)}};
            switch ((n - i + 3) / 4) {
            case 1: group_times(4, s, xi, pairs, n - i, o); break;
            case 2: group_times(8, s, xi, pairs, n - i, o); break;
            default: group_times(BF16_GROUP, s, xi, pairs, n - i, o);
            }
        }
    }
}
#endif
