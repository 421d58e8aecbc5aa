/* dots_widen.h - types without kernels of their own to float32, with 256-bit vectors: the bits of quant.c's decoders. */
#ifndef KVS_DOTS_WIDEN_H
#define KVS_DOTS_WIDEN_H
#include "dots.h"
#include "simd.h"

typedef __m256i v8;
KVS_INLINE v8 load8(const void *p) { return _mm256_loadu_si256((const __m256i *)p); }
KVS_INLINE __m128i load8h(const void *p) { return _mm_loadu_si128((const __m128i *)p); }
KVS_INLINE v8 splat8(int x) { return _mm256_set1_epi8((char)x); }

KVS_INLINE v8 nibble_values(const uint8_t *p) { /* 16 bytes: the low nibbles, then the high ones */
    v8 q = _mm256_broadcastsi128_si256(load8h(p));
    return _mm256_and_si256(_mm256_srlv_epi32(q, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4)), splat8(15));
}

KVS_INLINE float f16_at(const void *p) {
    uint16_t h;
    memcpy(&h, p, 2);
    return _cvtsh_ss(h);
}

/* 16 values: scale q - min */
KVS_INLINE void widen16(float *out, __m128i q, float scale, float min) {
    KVS_EACH (i, 2) {
        __m256 f = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(i ? _mm_srli_si128(q, 8) : q));
        _mm256_storeu_ps(out + 8 * i, _mm256_sub_ps(_mm256_mul_ps(f, _mm256_set1_ps(scale)), _mm256_set1_ps(min)));
    }
}

KVS_INLINE void widen32(float *out, v8 q, float scale, float min) {
    widen16(out, _mm256_castsi256_si128(q), scale, min);
    widen16(out + 16, _mm256_extracti128_si256(q, 1), scale, min);
}

KVS_INLINE v8 sixteens(const uint8_t *bits) { /* 32 bits: 16 in byte i where bit i is set */
    int32_t h;
    memcpy(&h, bits, 4);
    const v8 from = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const v8 bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    v8 set = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(h), from), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(set, bit), splat8(16));
}

KVS_INLINE v8 iq4(v8 nibble) { return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load8h(kvs_iq4_values)), nibble); }

static void widen_block32(int32_t type, const uint8_t *b, float *out) {
    float d = f16_at(b);
    switch (type) {
    case KVS_TYPE_Q4_1: widen32(out, nibble_values(b + 4), d, -f16_at(b + 2)); break;
    case KVS_TYPE_Q5_0: widen32(out, _mm256_sub_epi8(_mm256_or_si256(nibble_values(b + 6), sixteens(b + 2)), splat8(16)), d, 0); break;
    case KVS_TYPE_Q5_1: widen32(out, _mm256_or_si256(nibble_values(b + 8), sixteens(b + 4)), d, -f16_at(b + 2)); break;
    default: widen32(out, iq4(nibble_values(b + 2)), d, 0); /* IQ4_NL */
    }
}

static void widen_iq4_xs(const kvs_iq4_xs *b, float *out) {
    float d = kvs_f16_to_f32(b->d);
    for (int j = 0; j < 8; j++) {
        int low = b->scales_l[j / 2] >> j % 2 * 4 & 15, high = b->scales_h >> 2 * j & 3;
        widen32(out + 32 * j, iq4(nibble_values(b->q + 16 * j)), d * (float)((low | high << 4) - 32), 0);
    }
}

KVS_INLINE v8 two_bits(const uint8_t *q, int run) { /* run: 0..7 */
    return _mm256_and_si256(_mm256_srl_epi16(load8(q + run / 4 * 32), _mm_cvtsi32_si128(2 * (run % 4))), splat8(3));
}

static void widen_q2_k(const kvs_q2_k *b, float *out) {
    float d = kvs_f16_to_f32(b->d), m = kvs_f16_to_f32(b->m);
    for (int run = 0; run < 8; run++) {
        v8 q = two_bits(b->q, run);
        const uint8_t *s = b->scales + 2 * run;
        widen16(out + 32 * run, _mm256_castsi256_si128(q), d * (float)(s[0] & 15), m * (float)(s[0] >> 4));
        widen16(out + 32 * run + 16, _mm256_extracti128_si256(q, 1), d * (float)(s[1] & 15), m * (float)(s[1] >> 4));
    }
}

static float q3_k_scale(const kvs_q3_k *b, float d, int j) {
    int low = b->scales[j % 8] >> j / 8 * 4 & 15, high = b->scales[8 + j % 4] >> j / 4 * 2 & 3;
    return d * (float)((low | high << 4) - 32);
}

static void widen_q3_k(const kvs_q3_k *b, float *out) {
    float d = kvs_f16_to_f32(b->d);
    for (int run = 0; run < 8; run++) {
        v8 high = _mm256_and_si256(_mm256_srl_epi16(load8(b->h), _mm_cvtsi32_si128(run)), splat8(1));
        v8 q = _mm256_sub_epi8(_mm256_or_si256(two_bits(b->q, run), _mm256_slli_epi16(high, 2)), splat8(4));
        widen16(out + 32 * run, _mm256_castsi256_si128(q), q3_k_scale(b, d, 2 * run), 0);
        widen16(out + 32 * run + 16, _mm256_extracti128_si256(q, 1), q3_k_scale(b, d, 2 * run + 1), 0);
    }
}

static bool widen_fast(int32_t type, const uint8_t *from, float *out, int64_t n) {
    const kvs_type_traits *t = kvs_type_get(type);
    for (const float *end = out + n; out < end; out += t->block, from += t->block_bytes) {
        switch (type) {
        case KVS_TYPE_Q4_1:
        case KVS_TYPE_Q5_0:
        case KVS_TYPE_Q5_1:
        case KVS_TYPE_IQ4_NL: widen_block32(type, from, out); break;
        case KVS_TYPE_IQ4_XS: widen_iq4_xs((const kvs_iq4_xs *)from, out); break;
        case KVS_TYPE_Q2_K: widen_q2_k((const kvs_q2_k *)from, out); break;
        case KVS_TYPE_Q3_K: widen_q3_k((const kvs_q3_k *)from, out); break;
        default: return false;
        }
    }
    return true;
}
#endif
