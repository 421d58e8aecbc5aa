/* dots_x86.h - integer kernels for few activation rows, with 256-bit vectors (for AVX-512, too: what counts here is memory).
 * One weight row is read in one stream, four blocks at a time; the four lanes of the result are the p[b % 4] of dots.h. */
#ifndef KVS_DOTS_X86_H
#define KVS_DOTS_X86_H
#include "dots.h"
#include "simd.h"

#include <math.h>

typedef __m256i v8;
KVS_INLINE v8 load8(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
KVS_INLINE __m128i load8h(const void *p) { return _mm_loadu_si128((const __m128i *)p); }
KVS_INLINE v8 splat8(int x) { return _mm256_set1_epi8((char)x); }
KVS_INLINE v8 nibbles(v8 a) { return _mm256_and_si256(a, splat8(15)); }
KVS_INLINE v8 both(__m128i low, __m128i high) { return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1); }

/* ---- activations to int8 ---- */
KVS_INLINE v8 rounded(const float *x, __m256 inverse) {
    v8 i[4];
    for (int j = 0; j < 4; j++) i[j] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * j), inverse));
    v8 bytes = _mm256_packs_epi16(_mm256_packs_epi32(i[0], i[1]), _mm256_packs_epi32(i[2], i[3]));
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

static float magnitude(const float *x, int32_t n) { /* the greatest; as integers, so that NaN and infinity do not get lost */
    v8 top = _mm256_setzero_si256();
    for (int i = 0; i < n; i += 8) top = _mm256_max_epu32(top, _mm256_and_si256(load8(x + i), _mm256_set1_epi32(0x7fffffff)));
    __m128i t = _mm_max_epu32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    t = _mm_max_epu32(t, _mm_shuffle_epi32(t, 0x4e));
    t = _mm_max_epu32(t, _mm_shuffle_epi32(t, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(t));
}

static void quantize(const float *x, int64_t cols, const kvs_acts *a, int64_t row) {
    int32_t n = a->block;
    for (int64_t b = 0; b < cols / n; b++, x += n) {
        int64_t at = row * a->row_step + b * a->block_step;
        float amax = magnitude(x, n);
        bool finite = amax < INFINITY, some = finite && amax >= 0x1p-100f;
        a->d[at] = some ? amax / 127.0f : finite ? 0.0f : NAN;
        __m256 inverse = _mm256_set1_ps(some ? 127.0f / amax : 0.0f);
        for (int i = 0; i < n; i += 32) {
            v8 q = some ? rounded(x + i, inverse) : _mm256_setzero_si256();
            _mm256_storeu_si256((v8 *)(a->q + at * n + i), q);
            v8 fours = _mm256_madd_epi16(_mm256_maddubs_epi16(splat8(1), q), _mm256_set1_epi16(1));
            v8 twos = _mm256_hadd_epi32(fours, fours), ones = _mm256_hadd_epi32(twos, twos); /* each half: the sum of its 16 */
            int32_t low = _mm256_cvtsi256_si32(ones), high = _mm256_extract_epi32(ones, 4);
            if (n == 256) a->s16[at * 16 + i / 16] = (int16_t)low, a->s16[at * 16 + i / 16 + 1] = (int16_t)high;
            a->s32[(at * n + i) / 32] = (int16_t)(low + high);
        }
    }
}

/* ---- four blocks times their activations ---- */
typedef struct quad { /* activations of four blocks */
    const int8_t *q;
    const int16_t *s16, *s32;
    const float *d;
} quad;

KVS_INLINE __m128i four_sums(v8 a, v8 b, v8 c, v8 d) {
    v8 ab = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    v8 cd = _mm256_add_epi32(_mm256_unpacklo_epi32(c, d), _mm256_unpackhi_epi32(c, d));
    v8 s = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
    return _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
}

KVS_INLINE __m128 plus(__m128 sum, __m128 d, __m128i isum) { return _mm_add_ps(sum, _mm_mul_ps(d, _mm_cvtepi32_ps(isum))); }

KVS_INLINE __m128 four_d(const uint8_t *w, int64_t step) { /* the F16 scales of four blocks */
    uint16_t h[4];
    for (int i = 0; i < 4; i++) memcpy(&h[i], w + i * step, 2);
    __m128i v = _mm_cvtsi32_si128(h[0]);
    v = _mm_insert_epi16(v, h[1], 1);
    v = _mm_insert_epi16(v, h[2], 2);
    v = _mm_insert_epi16(v, h[3], 3);
    return _mm_cvtph_ps(v);
}

KVS_INLINE v8 dot4(v8 unsigned8, v8 signed8) { /* sums of four neighbours; no pair of products may exceed 16 bits */
#ifdef KVS_ISA_AVX512
    return _mm256_dpbusd_epi32(_mm256_setzero_si256(), unsigned8, signed8);
#else
    return _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned8, signed8), _mm256_set1_epi16(1));
#endif
}

KVS_INLINE __m128 q8_0_quad(const uint8_t *w, quad x, __m128 sum) {
    v8 s[4];
    for (int i = 0; i < 4; i++) {
        v8 q = load8(w + 34 * i + 2);
        s[i] = dot4(_mm256_abs_epi8(q), _mm256_sign_epi8(load8(x.q + 32 * i), q)); /* |-128| = 128 as unsigned, and x is above -128 */
    }
    return plus(sum, _mm_mul_ps(four_d(w, 34), _mm_loadu_ps(x.d)), four_sums(s[0], s[1], s[2], s[3]));
}

KVS_INLINE __m128 q4_0_quad(const uint8_t *w, quad x, __m128 sum) {
    v8 s[4];
    for (int i = 0; i < 4; i++) {
        __m128i q = load8h(w + 18 * i + 2);
        s[i] = dot4(nibbles(both(q, _mm_srli_epi16(q, 4))), load8(x.q + 32 * i));
    }
    __m128i eights = _mm_slli_epi32(_mm_cvtepi16_epi32(_mm_loadl_epi64((const __m128i *)x.s32)), 3);
    return plus(sum, _mm_mul_ps(four_d(w, 18), _mm_loadu_ps(x.d)), _mm_sub_epi32(four_sums(s[0], s[1], s[2], s[3]), eights));
}

/* Shuffles that spread byte k, or 16-bit value k, of each half over all 16-bit lanes of that half. */
#define KVS_REP8(...) __VA_ARGS__, __VA_ARGS__, __VA_ARGS__, __VA_ARGS__, __VA_ARGS__, __VA_ARGS__, __VA_ARGS__, __VA_ARGS__
#define KVS_SPREAD(a, b)                                                                                                                   \
    { KVS_REP8(a, b), KVS_REP8(a, b) }
#define KVS_BYTE(k) KVS_SPREAD(k, 128)
#define KVS_WORD(k) KVS_SPREAD(2 * k, 2 * k + 1)
static const uint8_t spread_byte[16][32] = {KVS_BYTE(0),  KVS_BYTE(1),  KVS_BYTE(2),  KVS_BYTE(3), KVS_BYTE(4),  KVS_BYTE(5),
                                            KVS_BYTE(6),  KVS_BYTE(7),  KVS_BYTE(8),  KVS_BYTE(9), KVS_BYTE(10), KVS_BYTE(11),
                                            KVS_BYTE(12), KVS_BYTE(13), KVS_BYTE(14), KVS_BYTE(15)};
static const uint8_t spread_word[8][32] = {KVS_WORD(0), KVS_WORD(1), KVS_WORD(2), KVS_WORD(3),
                                           KVS_WORD(4), KVS_WORD(5), KVS_WORD(6), KVS_WORD(7)};

typedef struct k4_head { /* headers of four blocks of Q4_K or Q5_K */
    __m128 d, m;         /* times the activations' scales */
    v8 scales[2];        /* 16 bytes in both halves: of blocks 0 and 1, of blocks 2 and 3 */
    __m128i mins[2];
} k4_head;

KVS_INLINE k4_head k4_heads(const uint8_t *w, int64_t step, const float *xd) {
    __m128i h[4];
    for (int i = 0; i < 4; i++) h[i] = load8h(w + i * step); /* d and m, then three words of scales: transposed */
    __m128i lo01 = _mm_unpacklo_epi32(h[0], h[1]), lo23 = _mm_unpacklo_epi32(h[2], h[3]);
    __m128i hi01 = _mm_unpackhi_epi32(h[0], h[1]), hi23 = _mm_unpackhi_epi32(h[2], h[3]);
    __m128i dm = _mm_unpacklo_epi64(lo01, lo23), a = _mm_unpackhi_epi64(lo01, lo23);
    __m128i b = _mm_unpacklo_epi64(hi01, hi23), c = _mm_unpackhi_epi64(hi01, hi23);
    const __m128i six = _mm_set1_epi8(63), four = _mm_set1_epi8(15), two = _mm_set1_epi8(48);
    __m128i scale_lo = _mm_and_si128(a, six), min_lo = _mm_and_si128(b, six);
    __m128i scale_hi = _mm_or_si128(_mm_and_si128(c, four), _mm_and_si128(_mm_srli_epi16(a, 2), two));
    __m128i min_hi = _mm_or_si128(_mm_and_si128(_mm_srli_epi16(c, 4), four), _mm_and_si128(_mm_srli_epi16(b, 2), two));
    __m128 x = _mm_loadu_ps(xd);
    __m256 both_d = _mm256_cvtph_ps(_mm_shuffle_epi8(dm, _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)));
    return (k4_head){.d = _mm_mul_ps(_mm256_castps256_ps128(both_d), x),
                     .m = _mm_mul_ps(_mm256_extractf128_ps(both_d, 1), x),
                     .scales = {_mm256_broadcastsi128_si256(_mm_unpacklo_epi32(scale_lo, scale_hi)),
                                _mm256_broadcastsi128_si256(_mm_unpackhi_epi32(scale_lo, scale_hi))},
                     .mins = {_mm_unpacklo_epi32(min_lo, min_hi), _mm_unpackhi_epi32(min_lo, min_hi)}};
}

KVS_INLINE __m128i k4_min_sums(const k4_head *h, const int16_t *s32) {
    v8 a = _mm256_madd_epi16(_mm256_cvtepu8_epi16(h->mins[0]), load8(s32)); /* block 0 in the low half, 1 in the high one */
    v8 b = _mm256_madd_epi16(_mm256_cvtepu8_epi16(h->mins[1]), load8(s32 + 16));
    v8 s = _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    s = _mm256_add_epi32(s, _mm256_shuffle_epi32(s, 0x4e)); /* 0 2 0 2 | 1 3 1 3 */
    return _mm_unpacklo_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
}

KVS_INLINE __m128 k4_quad(bool five, const uint8_t *w, quad x, __m128 sum) {
    int64_t step = five ? 176 : 144;
    k4_head h = k4_heads(w, step, x.d);
    v8 s[4];
    for (int i = 0; i < 4; i++) {
        const uint8_t *q = w + i * step + (five ? 48 : 16);
        v8 high = five ? load8(w + i * step + 16) : _mm256_setzero_si256();
        const int8_t *xq = x.q + 256 * i;
        s[i] = _mm256_setzero_si256();
        for (int c = 0; c < 4; c++) {
            v8 v = load8(q + 32 * c), even = nibbles(v), odd = nibbles(_mm256_srli_epi16(v, 4));
            if (five) { /* bit 2c and 2c + 1 of high, to bit 4 */
                v8 bit = splat8(16), e = c < 2 ? _mm256_slli_epi16(high, 4 - 2 * c) : _mm256_srli_epi16(high, 2 * c - 4);
                v8 o = c < 2 ? _mm256_slli_epi16(high, 3 - 2 * c) : _mm256_srli_epi16(high, 2 * c - 3);
                even = _mm256_or_si256(even, _mm256_and_si256(e, bit));
                odd = _mm256_or_si256(odd, _mm256_and_si256(o, bit));
            }
            const uint8_t(*spread)[32] = spread_byte + 8 * (i % 2) + 2 * c;
            v8 scale_e = _mm256_shuffle_epi8(h.scales[i / 2], load8(spread[0])),
               scale_o = _mm256_shuffle_epi8(h.scales[i / 2], load8(spread[1]));
            v8 dot_e = _mm256_maddubs_epi16(even, load8(xq + 64 * c)), dot_o = _mm256_maddubs_epi16(odd, load8(xq + 64 * c + 32));
            s[i] = _mm256_add_epi32(s[i], _mm256_add_epi32(_mm256_madd_epi16(dot_e, scale_e), _mm256_madd_epi16(dot_o, scale_o)));
        }
    }
    sum = plus(sum, h.d, four_sums(s[0], s[1], s[2], s[3]));
    return _mm_sub_ps(sum, _mm_mul_ps(h.m, _mm_cvtepi32_ps(k4_min_sums(&h, x.s32))));
}

KVS_INLINE __m128 q4_k_quad(const uint8_t *w, quad x, __m128 sum) { return k4_quad(false, w, x, sum); }
KVS_INLINE __m128 q5_k_quad(const uint8_t *w, quad x, __m128 sum) { return k4_quad(true, w, x, sum); }

/* 128 values of Q6_K, from 0 to 63 (the 32 is taken off by s16), in four vectors */
KVS_INLINE void q6_k_values(const uint8_t *low, const uint8_t *high, v8 out[4]) {
    const v8 two = splat8(48);
    v8 a = load8(low), b = load8(low + 32), h = load8(high);
    out[0] = _mm256_or_si256(nibbles(a), _mm256_and_si256(_mm256_slli_epi16(h, 4), two));
    out[1] = _mm256_or_si256(nibbles(b), _mm256_and_si256(_mm256_slli_epi16(h, 2), two));
    out[2] = _mm256_or_si256(nibbles(_mm256_srli_epi16(a, 4)), _mm256_and_si256(h, two));
    out[3] = _mm256_or_si256(nibbles(_mm256_srli_epi16(b, 4)), _mm256_and_si256(_mm256_srli_epi16(h, 2), two));
}

KVS_INLINE __m128 q6_k_quad(const uint8_t *w, quad x, __m128 sum) {
    v8 s[4];
    const __m128i even_odd = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    for (int i = 0; i < 4; i++) {
        const uint8_t *b = w + 210 * i;
        __m128i bytes = load8h(b + 192);
        v8 scales = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, even_odd)); /* of run r: lane r of the low half, of the high half */
        v8 offset = _mm256_madd_epi16(_mm256_cvtepi8_epi16(bytes), load8(x.s16 + 16 * i));
        s[i] = _mm256_sub_epi32(_mm256_setzero_si256(), _mm256_slli_epi32(offset, 5));
        for (int half = 0; half < 2; half++) {
            v8 v[4];
            q6_k_values(b + 64 * half, b + 128 + 32 * half, v);
            for (int r = 0; r < 4; r++) {
                v8 dot = _mm256_maddubs_epi16(v[r], load8(x.q + 256 * i + 128 * half + 32 * r));
                s[i] = _mm256_add_epi32(s[i], _mm256_madd_epi16(dot, _mm256_shuffle_epi8(scales, load8(spread_word[4 * half + r]))));
            }
        }
    }
    return plus(sum, _mm_mul_ps(four_d(w + 208, 210), _mm_loadu_ps(x.d)), four_sums(s[0], s[1], s[2], s[3]));
}

/* ---- rows ---- */
#ifndef KVS_PREFETCH
#define KVS_PREFETCH 1024 /* bytes ahead: carries the stream over the ends of pages, where the hardware's prefetcher stops */
#endif

/* The last one to three blocks are copied beside empty ones: nothing may be read beyond a row. Activations do go on, with zeros. */
KVS_INLINE float row_dot(__m128 (*quad_dot)(const uint8_t *, quad, __m128), int64_t bytes, const uint8_t *w, int64_t n_blocks,
                         const kvs_acts *a, int64_t at) {
    __m128 sum = _mm_setzero_ps();
    for (int64_t b = 0; b < n_blocks; b += 4, at += 4, w += 4 * bytes) {
        quad x = {a->q + at * a->block, a->block == 256 ? a->s16 + at * 16 : NULL, a->s32 + at * (a->block / 32), a->d + at};
        if (n_blocks - b >= 4) {
            for (int64_t ahead = 0; ahead < 4 * bytes; ahead += 64)
                _mm_prefetch((const char *)((uintptr_t)w + KVS_PREFETCH + (uintptr_t)ahead), _MM_HINT_T0);
            sum = quad_dot(w, x, sum);
        } else {
            uint8_t last[3 * 210 + 210] = {0};
            memcpy(last, w, (size_t)((n_blocks - b) * bytes));
            sum = quad_dot(last, x, sum);
        }
    }
    sum = _mm_hadd_ps(sum, sum); /* p0 + p1, p2 + p3 */
    return _mm_cvtss_f32(_mm_hadd_ps(sum, sum));
}

#define KVS_ROWS(name, bytes)                                                                                                              \
    static void name##_rows(const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n, float *y, int64_t y_step) {                     \
        int64_t n_blocks = p->cols / a->block;                                                                                             \
        for (int64_t r = 0; r < p->rows; r++)                                                                                              \
            for (int64_t i = 0; i < n; i++)                                                                                                \
                y[i * y_step + r] = row_dot(name##_quad, bytes, p->w + r * p->row_bytes, n_blocks, a, (row + i) * a->row_step);            \
    }
KVS_ROWS(q4_0, 18)
KVS_ROWS(q8_0, 34)
KVS_ROWS(q4_k, 144)
KVS_ROWS(q5_k, 176)
KVS_ROWS(q6_k, 210)

static void few(const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n, float *y, int64_t y_step) {
    switch (p->type) {
    case KVS_TYPE_Q4_0: q4_0_rows(p, a, row, n, y, y_step); break;
    case KVS_TYPE_Q8_0: q8_0_rows(p, a, row, n, y, y_step); break;
    case KVS_TYPE_Q4_K: q4_k_rows(p, a, row, n, y, y_step); break;
    case KVS_TYPE_Q5_K: q5_k_rows(p, a, row, n, y, y_step); break;
    default: q6_k_rows(p, a, row, n, y, y_step);
    }
}
#endif
