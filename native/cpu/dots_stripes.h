/* dots_x86.h - integer kernels for few activation rows, with 256-bit vectors (for AVX-512, too: what counts here is memory).
 * One weight row is read in one stream, four blocks at a time. */
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

KVS_INLINE v8 nibble_values(const uint8_t *p) { /* 16 bytes: the low nibbles, then the high ones */
    v8 q = _mm256_broadcastsi128_si256(load8h(p));
    return nibbles(_mm256_srlv_epi32(q, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4)));
}

KVS_INLINE float f16_at(const void *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return _cvtsh_ss(h);
}

/* Compilers turn a chain of sums into a tree, all products first, and then have no registers left for them: this holds the chain. */
#define KVS_KEEP(v) __asm__("" : "+x"(v))

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

/* ---- four blocks of a weight row times their activations: sum is the p[0..3] of dots.h ---- */
typedef struct quad { /* activations of four blocks */
    const int8_t *q;
    const int16_t *s16, *s32;
    const float *d;
} quad;

KVS_INLINE v8 pair_up(v8 a, v8 b) { return _mm256_add_epi32(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)); }

KVS_INLINE __m128i four_sums(const v8 s[4]) { /* lane i: the sum of all lanes of s[i] */
    v8 ab = pair_up(s[0], s[1]), cd = pair_up(s[2], s[3]);
    v8 t = _mm256_add_epi32(_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd));
    return _mm_add_epi32(_mm256_castsi256_si128(t), _mm256_extracti128_si256(t, 1));
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
    KVS_EACH (i, 4) { /* |-128| = 128 as unsigned, and x is above -128 */
        v8 q = load8(w + 34 * i + 2);
        s[i] = dot4(_mm256_abs_epi8(q), _mm256_sign_epi8(load8(x.q + 32 * i), q));
    }
    return plus(sum, _mm_mul_ps(four_d(w, 34), _mm_loadu_ps(x.d)), four_sums(s));
}

KVS_INLINE __m128 q4_0_quad(const uint8_t *w, quad x, __m128 sum) {
    v8 s[4];
    KVS_EACH (i, 4) s[i] = dot4(nibble_values(w + 18 * i + 2), load8(x.q + 32 * i));
    __m128i eights = _mm_slli_epi32(_mm_cvtepi16_epi32(_mm_loadl_epi64((const __m128i *)x.s32)), 3);
    return plus(sum, _mm_mul_ps(four_d(w, 18), _mm_loadu_ps(x.d)), _mm_sub_epi32(four_sums(s), eights));
}

typedef struct k4_head {  /* headers of four blocks of Q4_K or Q5_K */
    int32_t scales[4][8]; /* each twice, as two words of 16 bits: to be broadcast from memory, which costs no shuffle */
    uint64_t mins[4];     /* eight bytes each */
} k4_head;

/* With plain registers: the vector units have more than enough to do. */
KVS_INLINE void k4_head_of(k4_head *h, int i, const uint8_t *scales) {
    uint32_t a, b, c; /* see kvs_k4_scale */
    memcpy(&a, scales, 4);
    memcpy(&b, scales + 4, 4);
    memcpy(&c, scales + 8, 4);
    uint32_t scale_hi = (c & 0x0f0f0f0f) | (a >> 2 & 0x30303030), min_hi = (c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030);
    h->mins[i] = (b & 0x3f3f3f3f) | (uint64_t)min_hi << 32;
    v8 bytes = _mm256_set1_epi64x((int64_t)((a & 0x3f3f3f3f) | (uint64_t)scale_hi << 32));
    const v8 spread =
        _mm256_setr_epi8(0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3, -1, 4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7, -1);
    _mm256_storeu_si256((v8 *)h->scales[i], _mm256_shuffle_epi8(bytes, spread));
}

KVS_INLINE __m128i k4_min_sums(const k4_head *h, const int16_t *s32) {
    v8 a = _mm256_madd_epi16(_mm256_cvtepu8_epi16(load8h(h->mins)), load8(s32)); /* block 0 in the low half, 1 in the high one */
    v8 b = _mm256_madd_epi16(_mm256_cvtepu8_epi16(load8h(h->mins + 2)), load8(s32 + 16));
    v8 s = pair_up(a, b);
    s = _mm256_add_epi32(s, _mm256_shuffle_epi32(s, 0x4e)); /* 0 2 0 2 | 1 3 1 3 */
    return _mm_unpacklo_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
}

KVS_INLINE __m256 k4_d(const uint8_t *w, int64_t step) { /* d of four blocks, then m */
    int32_t dm[4];
    for (int i = 0; i < 4; i++) memcpy(&dm[i], w + i * step, 4);
    __m128i v = _mm_insert_epi32(_mm_cvtsi32_si128(dm[0]), dm[1], 1);
    v = _mm_insert_epi32(_mm_insert_epi32(v, dm[2], 2), dm[3], 3);
    return _mm256_cvtph_ps(_mm_shuffle_epi8(v, _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)));
}

typedef struct two {
    v8 even, odd;
} two;

/* Sub-blocks 2c and 2c + 1, from 0 to 15 or 31 */
KVS_INLINE two k4_values(bool five, const uint8_t *block, int c) {
    v8 v = load8(block + (five ? 48 : 16) + 32 * c);
    KVS_KEEP(v); /* one load, not two */
    two t = {nibbles(v), nibbles(_mm256_srli_epi16(v, 4))};
    if (!five) return t;
    v8 high = load8(block + 16), bit = splat8(16); /* bits 2c and 2c + 1 of high, to bit 4 */
    v8 even = c < 2 ? _mm256_slli_epi16(high, 4 - 2 * c) : _mm256_srli_epi16(high, 2 * c - 4);
    v8 odd = c < 2 ? _mm256_slli_epi16(high, 3 - 2 * c) : _mm256_srli_epi16(high, 2 * c - 3);
    return (two){_mm256_or_si256(t.even, _mm256_and_si256(even, bit)), _mm256_or_si256(t.odd, _mm256_and_si256(odd, bit))};
}

KVS_INLINE __m128 k4_quad(bool five, const uint8_t *w, quad x, __m128 sum) {
    int64_t step = five ? 176 : 144;
    k4_head h;
    v8 s[4];
    KVS_EACH (i, 4) k4_head_of(&h, i, w + i * step + 4);
    __asm__("" : "+m"(h)); /* or the compiler makes shuffles of the stores and loads */
    KVS_EACH (i, 4) {
        s[i] = _mm256_setzero_si256();
        KVS_EACH (c, 4) {
            const int8_t *q = x.q + 256 * i + 64 * c;
            two v = k4_values(five, w + i * step, c);
            v8 even = _mm256_madd_epi16(_mm256_maddubs_epi16(v.even, load8(q)), _mm256_set1_epi32(h.scales[i][2 * c]));
            v8 odd = _mm256_madd_epi16(_mm256_maddubs_epi16(v.odd, load8(q + 32)), _mm256_set1_epi32(h.scales[i][2 * c + 1]));
            s[i] = _mm256_add_epi32(s[i], _mm256_add_epi32(even, odd));
            KVS_KEEP(s[i]);
        }
    }
    __m256 d = k4_d(w, step);
    __m128 xd = _mm_loadu_ps(x.d);
    sum = plus(sum, _mm_mul_ps(_mm256_castps256_ps128(d), xd), four_sums(s));
    return _mm_sub_ps(sum, _mm_mul_ps(_mm_mul_ps(_mm256_extractf128_ps(d, 1), xd), _mm_cvtepi32_ps(k4_min_sums(&h, x.s32))));
}

KVS_INLINE __m128 q4_k_quad(const uint8_t *w, quad x, __m128 sum) { return k4_quad(false, w, x, sum); }
KVS_INLINE __m128 q5_k_quad(const uint8_t *w, quad x, __m128 sum) { return k4_quad(true, w, x, sum); }

/* 128 values of Q6_K, from 0 to 63 (the 32 is taken off by s16), in four vectors */
KVS_INLINE void q6_k_values(v8 a, v8 b, v8 h, v8 out[4]) {
    const v8 two_bits = splat8(48);
    out[0] = _mm256_or_si256(nibbles(a), _mm256_and_si256(_mm256_slli_epi16(h, 4), two_bits));
    out[1] = _mm256_or_si256(nibbles(b), _mm256_and_si256(_mm256_slli_epi16(h, 2), two_bits));
    out[2] = _mm256_or_si256(nibbles(_mm256_srli_epi16(a, 4)), _mm256_and_si256(h, two_bits));
    out[3] = _mm256_or_si256(nibbles(_mm256_srli_epi16(b, 4)), _mm256_and_si256(_mm256_srli_epi16(h, 2), two_bits));
}

/* Shuffles that spread 16-bit value k of each half over all lanes of that half. */
#define KVS_REP8(...) __VA_ARGS__, __VA_ARGS__, __VA_ARGS__, __VA_ARGS__, __VA_ARGS__, __VA_ARGS__, __VA_ARGS__, __VA_ARGS__
#define KVS_WORD(k)                                                                                                                        \
    { KVS_REP8(2 * k, 2 * k + 1), KVS_REP8(2 * k, 2 * k + 1) }
static const uint8_t spread_word[8][32] = {KVS_WORD(0), KVS_WORD(1), KVS_WORD(2), KVS_WORD(3),
                                           KVS_WORD(4), KVS_WORD(5), KVS_WORD(6), KVS_WORD(7)};

KVS_INLINE v8 q6_k_block(const uint8_t *block, const int8_t *q, const int16_t *s16) {
    __m128i bytes = load8h(block + 192);
    v8 offset = _mm256_slli_epi32(_mm256_madd_epi16(_mm256_cvtepi8_epi16(bytes), load8(s16)), 5);
    /* scales of vector k: in lane k of the low half for its first 16 values, of the high half for the others */
    v8 scales = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)));
    v8 s = _mm256_sub_epi32(_mm256_setzero_si256(), offset);
    KVS_EACH (half, 2) {
        v8 v[4], a = load8(block + 64 * half), b = load8(block + 64 * half + 32), h = load8(block + 128 + 32 * half);
        KVS_KEEP(a);
        KVS_KEEP(b);
        q6_k_values(a, b, h, v);
        KVS_EACH (k, 4) {
            v8 dot = _mm256_maddubs_epi16(v[k], load8(q + 128 * half + 32 * k));
            s = _mm256_add_epi32(s, _mm256_madd_epi16(dot, _mm256_shuffle_epi8(scales, load8(spread_word[4 * half + k]))));
            KVS_KEEP(s);
        }
    }
    return s;
}

KVS_INLINE __m128 q6_k_quad(const uint8_t *w, quad x, __m128 sum) {
    v8 s[4];
    KVS_EACH (i, 4) s[i] = q6_k_block(w + 210 * i, x.q + 256 * i, x.s16 + 16 * i);
    return plus(sum, _mm_mul_ps(four_d(w + 208, 210), _mm_loadu_ps(x.d)), four_sums(s));
}

/* ---- rows ----
 * One row after the other: a single stream of memory is what the hardware's prefetcher follows best. Two rows at a time share
 * loads of x and are 5 % faster from a cache, and a third slower from memory; prefetch instructions only cost time here. */
typedef __m128 quad_kernel(const uint8_t *w, quad x, __m128 sum);

/* The last one to three blocks are copied beside empty ones: nothing may be read beyond a row. Activations do go on, with zeros. */
KVS_INLINE float row_dot(quad_kernel *kernel, int64_t bytes, const uint8_t *w, int64_t n_blocks, int64_t block, quad x) {
    __m128 sum = _mm_setzero_ps();
    int64_t left = n_blocks;
    for (; left >= 4; left -= 4, w += 4 * bytes) {
        sum = kernel(w, x, sum);
        x = (quad){x.q + 4 * block, x.s16 + (block == 256 ? 64 : 0), x.s32 + block / 8, x.d + 4};
    }
    if (left) {
        uint8_t last[4 * 210] = {0};
        memcpy(last, w, (size_t)(left * bytes));
        sum = kernel(last, x, sum);
    }
    sum = _mm_hadd_ps(sum, sum); /* p0 + p1, p2 + p3 */
    return _mm_cvtss_f32(_mm_hadd_ps(sum, sum));
}

KVS_INLINE void rows_dot(quad_kernel *kernel, int64_t bytes, int64_t block, const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n,
                         float *y, int64_t y_step) {
    for (int64_t r = 0; r < p->rows; r++)
        for (int64_t i = 0; i < n; i++) {
            int64_t at = (row + i) * a->row_step;
            quad x = {a->q + at * block, a->s16 + (block == 256 ? at * 16 : 0), a->s32 + at * (block / 32), a->d + at};
            y[i * y_step + r] = row_dot(kernel, bytes, p->w + r * p->row_bytes, p->cols / block, block, x);
        }
}

static void few(const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n, float *y, int64_t y_step) {
    switch (p->type) {
    case KVS_TYPE_Q4_0: rows_dot(q4_0_quad, 18, 32, p, a, row, n, y, y_step); break;
    case KVS_TYPE_Q8_0: rows_dot(q8_0_quad, 34, 32, p, a, row, n, y, y_step); break;
    case KVS_TYPE_Q4_K: rows_dot(q4_k_quad, 144, 256, p, a, row, n, y, y_step); break;
    case KVS_TYPE_Q5_K: rows_dot(q5_k_quad, 176, 256, p, a, row, n, y, y_step); break;
    default: rows_dot(q6_k_quad, 210, 256, p, a, row, n, y, y_step);
    }
}
#endif
