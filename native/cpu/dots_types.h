/* dots_types.h - the integer types as the AVX kernels see them: what a stripe's block (stripes.h) holds, as vectors of unsigned bytes and
 * of scales. All that dots_stripes.h and dots_panel.h know about a type stands here. */
#ifndef KVS_DOTS_TYPES_H
#define KVS_DOTS_TYPES_H
#include "dots.h"
#include "simd.h"
#include "stripes.h"

#include <stddef.h>

/* ---- vectors of VI words: a word of each of VI weight rows ---- */
#ifdef KVS_ISA_AVX512
#define VI 16
typedef __m512i vi;
KVS_INLINE vi vi_zero(void) { return _mm512_setzero_si512(); }
KVS_INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
KVS_INLINE void vi_store(void *p, vi a) { _mm512_storeu_si512(p, a); }
KVS_INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
KVS_INLINE vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
KVS_INLINE vi vi_sub8(vi a, vi b) { return _mm512_sub_epi8(a, b); }
KVS_INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
KVS_INLINE vi vi_andnot(vi a, vi b) { return _mm512_andnot_si512(a, b); }
KVS_INLINE vi vi_or(vi a, vi b) { return _mm512_or_si512(a, b); }
KVS_INLINE vi vi_xor(vi a, vi b) { return _mm512_xor_si512(a, b); }
KVS_INLINE vi vi_lookup(vi table, vi i) { return _mm512_shuffle_epi8(table, i); } /* bytes, in each sixteen of them */
KVS_INLINE vi vi_sixteen(const void *p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p)); }
KVS_INLINE vi vi_load_u16(const void *p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)); }
KVS_INLINE vi vi_set(int32_t x) { return _mm512_set1_epi32(x); }
KVS_INLINE vi vi_bytes(int x) { return _mm512_set1_epi8((char)x); }
KVS_INLINE vi vi_left(vi a, int n) { return _mm512_slli_epi32(a, (unsigned)n); }
KVS_INLINE vi vi_left16(vi a, int n) { return _mm512_slli_epi16(a, (unsigned)n); } /* in halves of a word */
KVS_INLINE vi vi_right16(vi a, int n) { return _mm512_srli_epi16(a, (unsigned)n); }
KVS_INLINE vi vi_right(vi a, int n) { return _mm512_srli_epi32(a, (unsigned)n); }
KVS_INLINE vi vi_right16_signed(vi a, int n) { return _mm512_srai_epi16(a, (unsigned)n); }
KVS_INLINE vi vi_madd_to(vi sum, vi a, vi b) { return _mm512_dpwssd_epi32(sum, a, b); } /* + products of the halves of a word */
KVS_INLINE vf vi_float(vi a) { return _mm512_cvtepi32_ps(a); }
#else
#define VI 8
typedef __m256i vi;
KVS_INLINE vi vi_zero(void) { return _mm256_setzero_si256(); }
KVS_INLINE vi vi_load(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
KVS_INLINE void vi_store(void *p, vi a) { _mm256_storeu_si256((__m256i *)p, a); }
KVS_INLINE vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
KVS_INLINE vi vi_sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
KVS_INLINE vi vi_sub8(vi a, vi b) { return _mm256_sub_epi8(a, b); }
KVS_INLINE vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
KVS_INLINE vi vi_andnot(vi a, vi b) { return _mm256_andnot_si256(a, b); }
KVS_INLINE vi vi_xor(vi a, vi b) { return _mm256_xor_si256(a, b); }
KVS_INLINE vi vi_or(vi a, vi b) { return _mm256_or_si256(a, b); }
KVS_INLINE vi vi_lookup(vi table, vi i) { return _mm256_shuffle_epi8(table, i); }
KVS_INLINE vi vi_sixteen(const void *p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p)); }
KVS_INLINE vi vi_load_u16(const void *p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)); }
KVS_INLINE vi vi_set(int32_t x) { return _mm256_set1_epi32(x); }
KVS_INLINE vi vi_bytes(int x) { return _mm256_set1_epi8((char)x); }
KVS_INLINE vi vi_left(vi a, int n) { return _mm256_slli_epi32(a, n); }
KVS_INLINE vi vi_left16(vi a, int n) { return _mm256_slli_epi16(a, n); }
KVS_INLINE vi vi_right16(vi a, int n) { return _mm256_srli_epi16(a, n); }
KVS_INLINE vi vi_right(vi a, int n) { return _mm256_srli_epi32(a, n); }
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
/* In each byte: the bits of mask, which begin at bit from, to bit to */
KVS_INLINE vi bits_of(vi a, int mask, int from, int to) {
    vi moved = from > to ? vi_right16(a, from - to) : from < to ? vi_left16(a, to - from) : a;
    return vi_and(moved, vi_bytes(mask << to));
}
KVS_INLINE vi low_nibbles(vi a) { return bits_of(a, 15, 0, 0); }
KVS_INLINE vi high_nibbles(vi a) { return bits_of(a, 15, 4, 0); }

/* Compilers turn a chain of sums into a tree, all products first, and then have no registers left for them; and read memory twice for
 * two uses of a vector: this holds the chain, or the register. */
#ifdef KVS_EMULATE_AVX512 /* its vectors have no registers */
#define KVS_KEEP(v) (void)(v)
#elif defined(KVS_ISA_AVX512)
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

/* ---- types ---- */
/* Values are unsigned bytes u up to top: value = scale (u - offset), or scale u - min; a scale for each sub values, one alone is 1; a min
 * alone is -1. A step unpacks a word of the stripe, for all its rows: as many words of values as there are runs, each steps words after
 * the one before. So step k of group g has words k + steps (runs g + r), r = 0..runs - 1, of the block's. */
typedef struct kind {
    int32_t block, sub, top, offset;
    int32_t scale; /* the greatest magnitude of one */
    int32_t runs, steps;
    size_t d, m; /* where the halves are in a stripe's block; 0: no m */
} kind;
#define AT(type, field) offsetof(kvs_stripe_##type, field)
static const kind kinds[] = {
    [KVS_TYPE_Q4_0] = {32, 32, 15, 8, 1, 2, 4, AT(q4_0, d), 0},
    [KVS_TYPE_Q4_1] = {32, 32, 15, 0, 1, 2, 4, AT(q4_1, d), AT(q4_1, m)},
    [KVS_TYPE_Q5_0] = {32, 32, 31, 16, 1, 2, 4, AT(q5_0, d), 0},
    [KVS_TYPE_Q5_1] = {32, 32, 31, 0, 1, 2, 4, AT(q5_1, d), AT(q5_1, m)},
    [KVS_TYPE_Q8_0] = {32, 32, 255, 128, 1, 1, 8, AT(q8_0, d), 0},
    [KVS_TYPE_Q2_K] = {256, 16, 3, 0, 15, 4, 8, AT(q2_k, d), AT(q2_k, m)},
    [KVS_TYPE_Q3_K] = {256, 16, 7, 4, 32, 4, 8, AT(q3_k, d), 0},
    [KVS_TYPE_Q4_K] = {256, 32, 15, 0, 63, 2, 8, AT(q4_k, d), AT(q4_k, m)},
    [KVS_TYPE_Q5_K] = {256, 32, 31, 0, 63, 2, 8, AT(q5_k, d), AT(q5_k, m)},
    [KVS_TYPE_Q6_K] = {256, 16, 63, 32, 128, 4, 8, AT(q6_k, d), 0},
    [KVS_TYPE_IQ4_NL] = {32, 32, 255, 128, 1, 2, 4, AT(q4_0, d), 0},
    [KVS_TYPE_IQ4_XS] = {256, 32, 255, 128, 32, 2, 4, AT(iq4_xs, d), 0},
};
#undef AT
#define EACH_TYPE(X) X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) X(IQ4_NL) X(IQ4_XS)

/* Types that use all bits of a byte (and offset 128) stay signed with AVX2: 255 times 127 twice does not fit 16 bits. */
KVS_INLINE bool stays_signed(kind t) { return !VNNI && t.top == 255; }
/* How many products surely fit one sum of dot() */
KVS_INLINE int fitting(kind t) { return VNNI ? 64 : t.top == 255 ? 1 : 32767 / (t.top * 127 * 2); }

/* dot() of values as values() gives them: |-128| = 128 as unsigned, and x is above -128 */
#ifdef KVS_ISA_AVX512
KVS_INLINE vi dot_values(kind t, vi sum, vi v, vi x) { return (void)t, dot(sum, v, x); }
#else
KVS_INLINE vi dot_values(kind t, vi sum, vi v, vi x) {
    return stays_signed(t) ? dot(sum, _mm256_abs_epi8(v), _mm256_sign_epi8(x, v)) : dot(sum, v, x);
}
#endif

KVS_INLINE vf halves_of(const uint8_t *block, size_t where, int at) { /* d or m */
    return v_load_f16((const uint16_t *)(const void *)(block + where) + at);
}

KVS_INLINE vi load_once(const void *p) { /* loads are what limits these loops */
    vi v = vi_load(p);
    KVS_KEEP(v);
    return v;
}

KVS_INLINE void nibbles(vi out[4], const void *q) {
    vi v = load_once(q);
    out[0] = low_nibbles(v), out[1] = high_nibbles(v);
}

/* Bits of h that are the high ones of values: of out[r] those of mask from bit first + r step on, to bit to */
KVS_INLINE void add_bits(vi out[4], int n, const void *h, int mask, int first, int step, int to) {
    vi high = load_once(h);
    KVS_EACH (r, n) out[r] = vi_or(out[r], bits_of(high, mask, first + r * step, to));
}

KVS_INLINE vi as_kept(vi a) { return VNNI ? vi_xor(a, vi_bytes(-128)) : a; } /* signed bytes, + 128 if they do not stay signed */

/* Step k of group g, for VI rows from row at of a stripe */
KVS_INLINE void values(int32_t type, const void *block, int g, int k, int at, vi out[4]) {
    const kvs_stripe_q4_0 *q4_0 = block;
    const kvs_stripe_q5_0 *q5_0 = block;
    const kvs_stripe_q8_0 *q8_0 = block;
    const kvs_stripe_q2_k *q2_k = block;
    const kvs_stripe_q3_k *q3_k = block;
    const kvs_stripe_q4_k *q4_k = block;
    const kvs_stripe_q5_k *q5_k = block;
    const kvs_stripe_q6_k *q6_k = block;
    const kvs_stripe_iq4_xs *iq4_xs = block;
    switch (type) {
    case KVS_TYPE_Q4_0:
    case KVS_TYPE_Q4_1: nibbles(out, q4_0->q[k][at]); break;
    case KVS_TYPE_Q5_0:
    case KVS_TYPE_Q5_1:
        nibbles(out, q5_0->q[k][at]);
        add_bits(out, 2, q5_0->h[at], 1, k, 4, 4);
        break;
    case KVS_TYPE_Q8_0: out[0] = as_kept(vi_load(q8_0->q[k][at])); break;
    case KVS_TYPE_Q4_K: nibbles(out, q4_k->q[g][k][at]); break;
    case KVS_TYPE_Q5_K:
        nibbles(out, g ? q5_k->q[g - 1][k][at] : q5_k->hq[k][1][at]);
        add_bits(out, 2, q5_k->hq[k][0][at], 1, 2 * g, 1, 4);
        break;
    case KVS_TYPE_Q6_K: {
        vi a = load_once(q6_k->qqh[g][k][0][at]), b = load_once(q6_k->qqh[g][k][1][at]);
        out[0] = low_nibbles(a), out[1] = low_nibbles(b), out[2] = high_nibbles(a), out[3] = high_nibbles(b);
        add_bits(out, 4, q6_k->qqh[g][k][2][at], 3, 0, 2, 4);
        break;
    }
    case KVS_TYPE_Q2_K:
    case KVS_TYPE_Q3_K: {
        vi v = load_once(type == KVS_TYPE_Q2_K ? q2_k->q[g][k][at] : g ? q3_k->q[k][at] : q3_k->hq[k][1][at]);
        KVS_EACH (r, 4) out[r] = bits_of(v, 3, 2 * r, 0);
        if (type == KVS_TYPE_Q3_K) add_bits(out, 4, q3_k->hq[k][0][at], 1, 4 * g, 1, 2);
        break;
    }
    default: /* IQ4_NL, IQ4_XS */
        nibbles(out, type == KVS_TYPE_IQ4_NL ? q4_0->q[k][at] : iq4_xs->q[g][k][at]);
        KVS_EACH (r, 2) out[r] = vi_lookup(as_kept(vi_sixteen(kvs_iq4_values)), out[r]);
    }
}

/* ---- scales and minima of 256 values: words of four bytes, signed, whose middle ones have changed places ---- */
typedef struct heads {
    vi scale[4], min[4];
} heads;

KVS_INLINE heads k4_heads(const kvs_words *w, int at) { /* six bits each; see kvs_k4_scale */
    vi a = vi_load(w[0][at]), b = vi_load(w[1][at]), c = vi_load(w[2][at]), six = vi_bytes(63);
    heads h;
    h.scale[0] = vi_and(a, six), h.scale[1] = vi_or(low_nibbles(c), bits_of(a, 3, 6, 4));
    h.min[0] = vi_and(b, six), h.min[1] = vi_or(high_nibbles(c), bits_of(b, 3, 6, 4));
    return h;
}

KVS_INLINE heads q3_k_heads(const kvs_words *w, int at) {
    vi a = vi_load(w[0][at]), b = vi_load(w[1][at]), c = vi_load(w[2][at]);
    heads h;
    h.scale[0] = low_nibbles(a), h.scale[1] = low_nibbles(b), h.scale[2] = high_nibbles(a), h.scale[3] = high_nibbles(b);
    KVS_EACH (j, 4) h.scale[j] = vi_sub8(vi_or(h.scale[j], bits_of(c, 3, 2 * j, 4)), vi_bytes(32));
    return h;
}

KVS_INLINE heads iq4_xs_heads(const kvs_stripe_iq4_xs *w, int at) {
    vi l = vi_load(w->scales_l[at]), h = vi_load_u16(w->scales_h + at);
    h = vi_or(h, vi_left(h, 8)); /* nibble i to byte i, for scales 2i and 2i + 1 */
    h = vi_or(vi_and(h, vi_set(0x000f000f)), vi_and(vi_left(h, 4), vi_set(0x0f000f00)));
    vi even = vi_sub8(vi_or(low_nibbles(l), bits_of(h, 3, 0, 4)), vi_bytes(32));
    vi odd = vi_sub8(vi_or(high_nibbles(l), bits_of(h, 3, 2, 4)), vi_bytes(32));
    heads r;
    r.scale[0] = vi_or(vi_and(even, vi_set(0xffff)), vi_left(odd, 16));
    r.scale[1] = vi_or(vi_right(even, 16), vi_andnot(vi_set(0xffff), odd));
    return r;
}

KVS_INLINE heads heads_of(int32_t type, const void *block, int at) {
    const kvs_words *words = block; /* all but IQ4_XS begin with them */
    heads h;
    switch (type) {
    case KVS_TYPE_Q4_K:
    case KVS_TYPE_Q5_K: return k4_heads(words, at);
    case KVS_TYPE_Q3_K: return q3_k_heads(words, at);
    case KVS_TYPE_IQ4_XS: return iq4_xs_heads(block, at);
    default: /* Q2_K, Q6_K */
        KVS_EACH (j, 4) {
            vi v = vi_load(words[j][at]);
            h.scale[j] = type == KVS_TYPE_Q2_K ? low_nibbles(v) : v, h.min[j] = high_nibbles(v);
        }
        return h;
    }
}

/* Scale j of such words, as scaled() wants it */
KVS_INLINE vi scale_of(const vi *words, int j) {
    const int place = j % 4 == 1 ? 2 : j % 4 == 2 ? 1 : j % 4;
#ifdef KVS_ISA_AVX512
    return _mm512_srai_epi32(vi_left(words[j / 4], 24 - 8 * place), 24);
#else
    const char p = (char)place;
    const __m128i at = _mm_setr_epi8(-1, p, -1, p, -1, p + 4, -1, p + 4, -1, p + 8, -1, p + 8, -1, p + 12, -1, p + 12);
    return vi_right16_signed(_mm256_shuffle_epi8(words[j / 4], _mm256_broadcastsi128_si256(at)), 8);
#endif
}

/* Scales (or minima) 2j and 2j + 1, as halves */
KVS_INLINE vi pair_of(const vi *words, int j) { return vi_right16_signed(j % 2 ? words[j / 2] : vi_left16(words[j / 2], 8), 8); }

/* What meets the sums of x, as pairs: minima, or the scales of what has an offset */
KVS_INLINE vi sums_pair(kind t, const heads *h, int j) { return pair_of(t.m ? h->min : h->scale, j); }
KVS_INLINE bool has_sums(kind t) { return t.m || (t.offset && !stays_signed(t)); }
KVS_INLINE int pairs(kind t) { return has_sums(t) ? t.block / t.sub / 2 : 0; }
#endif
