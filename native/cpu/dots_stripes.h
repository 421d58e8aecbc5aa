/* dots_stripes.h - integer kernels for few activation rows: stripes of 16 weight rows (stripes.h) are read once, in one stream. Lanes are
 * weight rows: nothing is summed across lanes, and a scale is applied once per sub-block. */
#ifndef KVS_DOTS_STRIPES_H
#define KVS_DOTS_STRIPES_H
#include "dots_widen.h"
#include "stripes.h"

/* ---- vectors of VI words: a word of each of VI weight rows ---- */
#ifdef KVS_ISA_AVX512
#define VI 16
typedef __m512i vi;
KVS_INLINE vi vi_zero(void) { return _mm512_setzero_si512(); }
KVS_INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
KVS_INLINE void vi_store(void *p, vi a) { _mm512_storeu_si512(p, a); }
KVS_INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
KVS_INLINE vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
KVS_INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
KVS_INLINE vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
KVS_INLINE vi vi_set(int32_t x) { return _mm512_set1_epi32(x); }
KVS_INLINE vi vi_bytes(int x) { return _mm512_set1_epi8((char)x); }
KVS_INLINE vi vi_left(vi a, int n) { return _mm512_slli_epi32(a, (unsigned)n); }
KVS_INLINE vi vi_left16(vi a, int n) { return _mm512_slli_epi16(a, (unsigned)n); } /* in halves of a word */
KVS_INLINE vi vi_right16(vi a, int n) { return _mm512_srli_epi16(a, (unsigned)n); }
KVS_INLINE vi vi_right16_signed(vi a, int n) { return _mm512_srai_epi16(a, (unsigned)n); }
KVS_INLINE vi vi_madd_to(vi sum, vi a, vi b) { return _mm512_dpwssd_epi32(sum, a, b); } /* + products of the halves of a word */
KVS_INLINE vf vi_float(vi a) { return _mm512_cvtepi32_ps(a); }
#else
#define VI 8
typedef __m256i vi;
KVS_INLINE vi vi_zero(void) { return _mm256_setzero_si256(); }
KVS_INLINE vi vi_load(const void *p) { return load8(p); }
KVS_INLINE void vi_store(void *p, vi a) { _mm256_storeu_si256((v8 *)p, a); }
KVS_INLINE vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
KVS_INLINE vi vi_sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
KVS_INLINE vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
KVS_INLINE vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
KVS_INLINE vi vi_set(int32_t x) { return _mm256_set1_epi32(x); }
KVS_INLINE vi vi_bytes(int x) { return splat8(x); }
KVS_INLINE vi vi_left(vi a, int n) { return _mm256_slli_epi32(a, n); }
KVS_INLINE vi vi_left16(vi a, int n) { return _mm256_slli_epi16(a, n); }
KVS_INLINE vi vi_right16(vi a, int n) { return _mm256_srli_epi16(a, n); }
KVS_INLINE vi vi_right16_signed(vi a, int n) { return _mm256_srai_epi16(a, n); }
KVS_INLINE vi vi_madd_to(vi sum, vi a, vi b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }
KVS_INLINE vf vi_float(vi a) { return _mm256_cvtepi32_ps(a); }
#endif
_Static_assert(VI == VW && KVS_STRIPE % VI == 0, "a vector of floats has as many lanes");

KVS_INLINE vi vi_word(const void *p) { /* four bytes for every lane */
    int32_t x;
    memcpy(&x, p, 4);
    return vi_set(x);
}
KVS_INLINE vi low_nibbles(vi a) { return vi_and(a, vi_bytes(15)); }
KVS_INLINE vi high_nibbles(vi a) { return low_nibbles(vi_right16(a, 4)); }

/* Compilers turn a chain of sums into a tree, all products first, and then have no registers left for them: this holds the chain. */
#ifdef KVS_ISA_AVX512
#define KVS_KEEP(v) __asm__("" : "+v"(v))
#else
#define KVS_KEEP(v) __asm__("" : "+x"(v))
#endif

/* Products of unsigned with signed bytes. VNNI adds up four of a word in 32 bits. AVX2 adds pairs in 16 bits: only so many steps as
 * surely fit, then scaled() takes the sum to 32 bits. So a scale is a word with VNNI, and the same half twice with AVX2. */
#ifdef KVS_ISA_AVX512
enum { VNNI = 1 };
KVS_INLINE vi dot(vi sum, vi u, vi x) { return _mm512_dpbusd_epi32(sum, u, x); }
KVS_INLINE vi scaled(vi sum, vi s, vi scale) { return vi_add(sum, _mm512_mullo_epi32(s, scale)); }
KVS_INLINE vi unscaled(vi sum, vi s) { return vi_add(sum, s); }
#else
enum { VNNI = 0 };
KVS_INLINE vi dot(vi sum, vi u, vi x) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(u, x)); }
KVS_INLINE vi scaled(vi sum, vi s, vi scale) { return vi_add(sum, _mm256_madd_epi16(s, scale)); }
KVS_INLINE vi unscaled(vi sum, vi s) { return scaled(sum, s, _mm256_set1_epi16(1)); }
#endif

/* ---- scales: byte j of a word, whose middle bytes have changed places ---- */
KVS_INLINE int place_of(int j) { return j == 1 ? 2 : j == 2 ? 1 : j; }

KVS_INLINE vi unsigned_scale(vi words, int j) {
#ifdef KVS_ISA_AVX512
    return vi_and(_mm512_srli_epi32(words, (unsigned)(8 * place_of(j))), vi_set(255));
#else
    const char p = (char)place_of(j);
    const __m128i at = _mm_setr_epi8(p, -1, p, -1, p + 4, -1, p + 4, -1, p + 8, -1, p + 8, -1, p + 12, -1, p + 12, -1);
    return _mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(at));
#endif
}

KVS_INLINE vi signed_scale(vi words, int j) {
#ifdef KVS_ISA_AVX512
    return _mm512_srai_epi32(vi_left(words, 24 - 8 * place_of(j)), 24);
#else
    const char p = (char)place_of(j);
    const __m128i at = _mm_setr_epi8(-1, p, -1, p, -1, p + 4, -1, p + 4, -1, p + 8, -1, p + 8, -1, p + 12, -1, p + 12);
    return vi_right16_signed(_mm256_shuffle_epi8(words, _mm256_broadcastsi128_si256(at)), 8);
#endif
}

typedef struct k4_head { /* Q4_K, Q5_K: of sub-blocks 0..3 and 4..7, six bits in a byte each */
    vi scale[2], min[2];
} k4_head;

KVS_INLINE k4_head k4_head_of(const void *block, int at) { /* both begin with their scales; see kvs_k4_scale */
    const kvs_words *scales = block;
    vi a = vi_load(scales[0][at]), b = vi_load(scales[1][at]), c = vi_load(scales[2][at]), six = vi_bytes(63), top = vi_bytes(48);
    return (k4_head){{vi_and(a, six), vi_or(low_nibbles(c), vi_and(vi_right16(a, 2), top))},
                     {vi_and(b, six), vi_or(high_nibbles(c), vi_and(vi_right16(b, 2), top))}};
}

/* Pairs of halves: values 0 and 1 of a word of scales, or 2 and 3 */
KVS_INLINE vi unsigned_pair(vi words, int second) { return second ? vi_right16(words, 8) : vi_and(words, vi_set(0x00ff00ff)); }
KVS_INLINE vi signed_pair(vi words, int second) { return vi_right16_signed(second ? words : vi_left16(words, 8), 8); }

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
        int64_t at = b * a->n + row;
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

/* ---- values of VI rows, from row at of a stripe ---- */
typedef struct two {
    vi even, odd;
} two;

/* Word k of sub-blocks 2c and 2c + 1 of Q4_K, from 0 to 15 */
KVS_INLINE two q4_k_values(const kvs_stripe_q4_k *w, int c, int k, int at) {
    vi v = vi_load(w->q[c][k][at]);
    return (two){low_nibbles(v), high_nibbles(v)};
}

/* The same of Q5_K, from 0 to 31 */
KVS_INLINE two q5_k_values(const kvs_stripe_q5_k *w, int c, int k, int at) {
    vi high = vi_load(w->hq[k][0][at]), v = vi_load(c ? w->q[c - 1][k][at] : w->hq[k][1][at]);
    two t = {low_nibbles(v), high_nibbles(v)};
    vi bit = vi_bytes(16); /* bits 2c and 2c + 1 of high, to bit 4 */
    vi even = c < 2 ? vi_left16(high, 4 - 2 * c) : vi_right16(high, 2 * c - 4);
    vi odd = c < 2 ? vi_left16(high, 3 - 2 * c) : vi_right16(high, 2 * c - 3);
    return (two){vi_or(t.even, vi_and(even, bit)), vi_or(t.odd, vi_and(odd, bit))};
}

KVS_INLINE two k4_values(bool five, const void *block, int c, int k, int at) {
    return five ? q5_k_values(block, c, k, at) : q4_k_values(block, c, k, at);
}

/* Word k of four runs of 32 values of half a block of Q6_K, from 0 to 63 (the 32 is taken off by s16) */
KVS_INLINE void q6_k_values(const kvs_stripe_q6_k *w, int half, int k, int at, vi out[4]) {
    const kvs_words *qqh = w->qqh[half][k];
    vi a = vi_load(qqh[0][at]), b = vi_load(qqh[1][at]), h = vi_load(qqh[2][at]), bits = vi_bytes(48);
    out[0] = vi_or(low_nibbles(a), vi_and(vi_left16(h, 4), bits));
    out[1] = vi_or(low_nibbles(b), vi_and(vi_left16(h, 2), bits));
    out[2] = vi_or(high_nibbles(a), vi_and(h, bits));
    out[3] = vi_or(high_nibbles(b), vi_and(vi_right16(h, 2), bits));
}

/* ---- products of VI rows of a stripe's block with the same block of nx activation rows ---- */
typedef struct isums {
    vi i[KVS_FEW], m[KVS_FEW]; /* isum and msum of dots.h */
} isums;

/* depth: steps whose products fit 16 bits: 15, 31, 63 times 127 times 2 times depth */
KVS_INLINE void k4_sums(bool five, isums *s, int nx, const void *block, int at, int depth, const int8_t *const *x,
                        const int16_t *const *s32) {
    k4_head head = k4_head_of(block, at);
    KVS_EACH (i, nx) s->i[i] = s->m[i] = vi_zero();
    KVS_EACH (c, 4)
        KVS_EACH (begin, 8 / depth) {
            vi even[KVS_FEW], odd[KVS_FEW];
            KVS_EACH (i, nx) even[i] = odd[i] = vi_zero();
            KVS_EACH (step, depth) {
                int k = begin * depth + step;
                two v = k4_values(five, block, c, k, at);
                KVS_EACH (i, nx) {
                    even[i] = dot(even[i], v.even, vi_word(x[i] + 64 * c + 4 * k));
                    odd[i] = dot(odd[i], v.odd, vi_word(x[i] + 64 * c + 32 + 4 * k));
                }
            }
            vi se = unsigned_scale(head.scale[c / 2], 2 * c % 4), so = unsigned_scale(head.scale[c / 2], 2 * c % 4 + 1);
            KVS_EACH (i, nx) s->i[i] = scaled(scaled(s->i[i], even[i], se), odd[i], so);
        }
    KVS_EACH (j, 4)
        KVS_EACH (i, nx) s->m[i] = vi_madd_to(s->m[i], unsigned_pair(head.min[j / 2], j % 2), vi_word(s32[i] + 2 * j));
}

KVS_INLINE void q6_k_sums(isums *s, int nx, const kvs_stripe_q6_k *w, int at, int depth, const int8_t *const *x,
                          const int16_t *const *s16) {
    vi words[4], offset[KVS_FEW];
    KVS_EACH (j, 4) words[j] = vi_load(w->scales[j][at]);
    KVS_EACH (i, nx) s->i[i] = offset[i] = vi_zero();
    KVS_EACH (j, 8)
        KVS_EACH (i, nx) offset[i] = vi_madd_to(offset[i], signed_pair(words[j / 2], j % 2), vi_word(s16[i] + 2 * j));
    KVS_EACH (begin, 16 / depth) {
        int half = begin * depth / 8, first = begin * depth % 8;
        vi run[4][KVS_FEW];
        KVS_EACH (r, 4)
            KVS_EACH (i, nx) run[r][i] = vi_zero();
        KVS_EACH (k, depth) {
            vi v[4];
            q6_k_values(w, half, first + k, at, v);
            KVS_EACH (r, 4)
                KVS_EACH (i, nx) run[r][i] = dot(run[r][i], v[r], vi_word(x[i] + 128 * half + 32 * r + 4 * (first + k)));
        }
        KVS_EACH (r, 4) {
            vi scale = signed_scale(words[2 * half + r / 2], 2 * r % 4 + first / 4);
            KVS_EACH (i, nx) s->i[i] = scaled(s->i[i], run[r][i], scale);
        }
    }
    KVS_EACH (i, nx) s->i[i] = vi_sub(s->i[i], vi_left(offset[i], 5));
}

KVS_INLINE void q4_0_sums(isums *s, int nx, const kvs_stripe_q4_0 *w, int at, const int8_t *const *x, const int16_t *const *s32) {
    vi run[KVS_FEW];
    KVS_EACH (i, nx) run[i] = vi_zero();
    KVS_EACH (k, 4) {
        vi v = vi_load(w->q[k][at]);
        KVS_EACH (i, nx) {
            run[i] = dot(run[i], low_nibbles(v), vi_word(x[i] + 4 * k));
            run[i] = dot(run[i], high_nibbles(v), vi_word(x[i] + 16 + 4 * k));
        }
    }
    KVS_EACH (i, nx) s->i[i] = unscaled(vi_set(-8 * *s32[i]), run[i]);
}

KVS_INLINE void q8_0_sums(isums *s, int nx, const kvs_stripe_q8_0 *w, int at, const int8_t *const *x, const int16_t *const *s32) {
#ifdef KVS_ISA_AVX512 /* values + 128 are unsigned */
    KVS_EACH (i, nx) s->i[i] = vi_set(-128 * *s32[i]);
    KVS_EACH (k, 8) {
        vi u = _mm512_xor_si512(vi_load(w->q[k][at]), vi_bytes(-128));
        KVS_EACH (i, nx) s->i[i] = dot(s->i[i], u, vi_word(x[i] + 4 * k));
    }
#else /* |-128| = 128 as unsigned, and x is above -128 */
    (void)s32;
    KVS_EACH (i, nx) s->i[i] = vi_zero();
    KVS_EACH (k, 8) {
        vi q = vi_load(w->q[k][at]), u = _mm256_abs_epi8(q);
        KVS_EACH (i, nx) s->i[i] = unscaled(s->i[i], _mm256_maddubs_epi16(u, _mm256_sign_epi8(vi_word(x[i] + 4 * k), q)));
    }
#endif
}

/* The same by type; d and m: where the stripe's block has its scales */
KVS_INLINE void block_sums(int32_t type, isums *s, int nx, const void *block, int at, const int8_t *const *x, const int16_t *const *sx,
                           const uint16_t **d, const uint16_t **m) {
    const kvs_stripe_q4_0 *q4_0 = block;
    const kvs_stripe_q8_0 *q8_0 = block;
    const kvs_stripe_q4_k *q4_k = block;
    const kvs_stripe_q5_k *q5_k = block;
    const kvs_stripe_q6_k *q6_k = block;
    switch (type) {
    case KVS_TYPE_Q4_0:
        q4_0_sums(s, nx, q4_0, at, x, sx);
        *d = q4_0->d;
        break;
    case KVS_TYPE_Q8_0:
        q8_0_sums(s, nx, q8_0, at, x, sx);
        *d = q8_0->d;
        break;
    case KVS_TYPE_Q4_K:
        k4_sums(false, s, nx, block, at, 8, x, sx);
        *d = q4_k->d, *m = q4_k->m;
        break;
    case KVS_TYPE_Q5_K:
        k4_sums(true, s, nx, block, at, VNNI ? 8 : 4, x, sx);
        *d = q5_k->d, *m = q5_k->m;
        break;
    default: q6_k_sums(s, nx, q6_k, at, VNNI ? 4 : 2, x, sx); *d = q6_k->d;
    }
}

/* ---- whole rows ---- */
typedef float partial[KVS_FEW][KVS_STRIPE]; /* p[b % 4] of dots.h */

KVS_INLINE void add_block(int32_t type, partial p, int nx, const void *block, const kvs_acts *a, int64_t place) {
    const bool sixteens = type == KVS_TYPE_Q6_K;
    const int32_t width = kvs_acts_block(type), n_sums = sixteens ? 16 : width / 32;
    const int8_t *x[KVS_FEW];
    const int16_t *sx[KVS_FEW];
    KVS_EACH (i, nx) {
        x[i] = a->q + (place + i) * width;
        sx[i] = (sixteens ? a->s16 : a->s32) + (place + i) * n_sums;
    }
    KVS_EACH (part, KVS_STRIPE / VI) {
        const int at = part * VI;
        const uint16_t *d, *m = NULL;
        isums s;
        block_sums(type, &s, nx, block, at, x, sx, &d, &m);
        vf dw = v_load_f16(d + at), mw = m ? v_load_f16(m + at) : v_zero();
        KVS_EACH (i, nx) {
            vf dx = v_set(a->d[place + i]), y = v_add(v_load(p[i] + at), v_mul(v_mul(dw, dx), vi_float(s.i[i])));
            if (m) y = v_sub(y, v_mul(v_mul(mw, dx), vi_float(s.m[i])));
            v_store(p[i] + at, y);
        }
    }
}

KVS_INLINE void few_rows(int32_t type, int nx, const kvs_panel *p, const kvs_acts *a, int64_t row, float *y, int64_t y_step) {
    const int32_t width = kvs_acts_block(type);
    const int64_t bytes = KVS_STRIPE * p->row_bytes / (p->cols / width);
    for (int64_t r = 0; r < p->rows; r += KVS_STRIPE) {
        _Alignas(64) partial sum[4];
        memset(sum, 0, sizeof sum);
        const uint8_t *w = p->w + r * p->row_bytes;
        for (int64_t b = 0; b < p->cols / width; b++) add_block(type, sum[b % 4], nx, w + b * bytes, a, b * a->n + row);
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
    switch (p->type) {
    case KVS_TYPE_Q4_0: few_by_type(KVS_TYPE_Q4_0, p, a, row, n, y, y_step); break;
    case KVS_TYPE_Q8_0: few_by_type(KVS_TYPE_Q8_0, p, a, row, n, y, y_step); break;
    case KVS_TYPE_Q4_K: few_by_type(KVS_TYPE_Q4_K, p, a, row, n, y, y_step); break;
    case KVS_TYPE_Q5_K: few_by_type(KVS_TYPE_Q5_K, p, a, row, n, y, y_step); break;
    default: few_by_type(KVS_TYPE_Q6_K, p, a, row, n, y, y_step);
    }
}
#endif
