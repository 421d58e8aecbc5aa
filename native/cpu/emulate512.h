/* emulate512.h - what SIMDe's AVX-512 lacks of that which the kernels use, out of 256-bit halves. Only for tests. */
#ifndef KVS_EMULATE512_H
#define KVS_EMULATE512_H
#include <immintrin.h>

typedef union kvs_zmm {
    __m512 ps;
    __m512i si;
    __m256 half_ps[2];
    __m256i half_si[2];
} kvs_zmm;

static inline __m512 kvs_cvtph_ps(__m256i a) {
    kvs_zmm z;
    z.half_ps[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(a));
    z.half_ps[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1));
    return z.ps;
}
static inline __m256i kvs_cvtps_ph(__m512 a) {
    kvs_zmm z = {.ps = a};
    return _mm256_set_m128i(_mm256_cvtps_ph(z.half_ps[1], 0), _mm256_cvtps_ph(z.half_ps[0], 0));
}
static inline __m512i kvs_cvtps_epi32(__m512 a) {
    kvs_zmm z = {.ps = a};
    z.half_si[0] = _mm256_cvtps_epi32(z.half_ps[0]);
    z.half_si[1] = _mm256_cvtps_epi32(z.half_ps[1]);
    return z.si;
}
static inline __m512 kvs_cvtepi32_ps(__m512i a) {
    kvs_zmm z = {.si = a};
    z.half_ps[0] = _mm256_cvtepi32_ps(z.half_si[0]);
    z.half_ps[1] = _mm256_cvtepi32_ps(z.half_si[1]);
    return z.ps;
}
static inline __m512i kvs_cvtepi8_epi32(__m128i a) {
    kvs_zmm z;
    z.half_si[0] = _mm256_cvtepi8_epi32(a);
    z.half_si[1] = _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8));
    return z.si;
}
static inline __m512i kvs_cvtepu16_epi32(__m256i a) {
    kvs_zmm z;
    z.half_si[0] = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(a));
    z.half_si[1] = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1));
    return z.si;
}
static inline __m512i kvs_srai_epi32(__m512i a, int n) {
    kvs_zmm z = {.si = a};
    z.half_si[0] = _mm256_srai_epi32(z.half_si[0], n);
    z.half_si[1] = _mm256_srai_epi32(z.half_si[1], n);
    return z.si;
}
static inline __m256 kvs_half_ps(__m512 a, int i) {
    kvs_zmm z = {.ps = a};
    return z.half_ps[i];
}
static inline float kvs_reduce_add_ps(__m512 a) {
    __m256 s = _mm256_add_ps(kvs_half_ps(a, 0), kvs_half_ps(a, 1));
    __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_add_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
static inline float kvs_reduce_max_ps(__m512 a) {
    __m256 s = _mm256_max_ps(kvs_half_ps(a, 0), kvs_half_ps(a, 1));
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}

#undef _mm512_cvtps_ph
#undef _mm512_extractf32x8_ps
#define _mm512_cvtph_ps(a)           kvs_cvtph_ps(a)
#define _mm512_cvtps_ph(a, rounding) kvs_cvtps_ph(a) /* to nearest is all that we ask for */
#define _mm512_cvtps_epi32(a)        kvs_cvtps_epi32(a)
#define _mm512_cvtepi32_ps(a)        kvs_cvtepi32_ps(a)
#define _mm512_cvtepi8_epi32(a)      kvs_cvtepi8_epi32(a)
#define _mm512_cvtepu16_epi32(a)     kvs_cvtepu16_epi32(a)
#define _mm512_srai_epi32(a, n)      kvs_srai_epi32(a, n)
#define _mm512_extractf32x8_ps(a, i) kvs_half_ps(a, i)
#define _mm512_reduce_add_ps(a)      kvs_reduce_add_ps(a)
#define _mm512_reduce_max_ps(a)      kvs_reduce_max_ps(a)
#endif
