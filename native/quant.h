/* quant.h - the block layouts of GGUF (see gguf.md 4f) and their plain decoders: the specification that every fast kernel
 * is tested against. Packed structs, little-endian, no padding. */
#ifndef KVS_QUANT_H
#define KVS_QUANT_H
#include "util.h"

#include <string.h>

KVS_SHARED float kvs_f16_to_f32(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = (h >> 10) & 31, man = h & 1023, bits;
    if (exp == 31)
        bits = sign | 0x7f800000u | man << 13;
    else if (exp)
        bits = sign | (exp + 112) << 23 | man << 13;
    else { /* zero or subnormal: man * 2^-24 is exact */
        float f = (float)man * 0x1p-24f;
        memcpy(&bits, &f, 4);
        bits |= sign;
    }
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

KVS_SHARED uint16_t kvs_f32_to_f16(float x) { /* round to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t sign = (bits >> 16) & 0x8000, mag = bits & 0x7fffffff;
    if (mag > 0x7f800000) return (uint16_t)(sign | 0x7e00 | ((mag >> 13) & 0x3ff));
    if (mag >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and above round to infinity */
    if (mag < 0x38800000) {                                  /* subnormal in half: scale, and let the adder round */
        float f;
        memcpy(&f, &mag, 4);
        f += 0.5f; /* ulp of 0.5 is 2^-24, the step of half subnormals */
        uint32_t r;
        memcpy(&r, &f, 4);
        return (uint16_t)(sign | (r - 0x3f000000));
    }
    uint32_t odd = (mag >> 13) & 1;
    return (uint16_t)(sign | ((mag - 0x38000000 + 0xfff + odd) >> 13));
}

KVS_SHARED float kvs_bf16_to_f32(uint16_t h) {
    uint32_t bits = (uint32_t)h << 16;
    float y;
    memcpy(&y, &bits, 4);
    return y;
}

/* Block layouts. Packed: a block may stand at any address, so take no pointer to a d or an m. Fields named d and m are F16
 * bits; qN holds the low bits of the values, h their high bits. Q*_0, Q*_1: low nibbles are the first 16 values, high nibbles the
 * last 16. K types have 256 values in sub-blocks of 16 or 32, each with a scale of its own (see quant.c for the bit order). */
#define KVS_PACKED __attribute__((packed))
typedef struct KVS_PACKED kvs_q4_0 {
    uint16_t d;
    uint8_t q[16];
} kvs_q4_0; /* d (q - 8) */
typedef struct KVS_PACKED kvs_q4_1 {
    uint16_t d, m;
    uint8_t q[16];
} kvs_q4_1; /* d q + m */
typedef struct KVS_PACKED kvs_q5_0 {
    uint16_t d;
    uint8_t h[4], q[16];
} kvs_q5_0; /* d (q - 16) */
typedef struct KVS_PACKED kvs_q5_1 {
    uint16_t d, m;
    uint8_t h[4], q[16];
} kvs_q5_1; /* d q + m */
typedef struct KVS_PACKED kvs_q8_0 {
    uint16_t d;
    int8_t q[32];
} kvs_q8_0; /* d q */
typedef struct KVS_PACKED kvs_q2_k {
    uint8_t scales[16], q[64];
    uint16_t d, m;
} kvs_q2_k; /* 16 x 16: d s q - m t */
typedef struct KVS_PACKED kvs_q3_k {
    uint8_t h[32], q[64], scales[12];
    uint16_t d;
} kvs_q3_k; /* 16 x 16: d (s - 32) (q - 4) */
typedef struct KVS_PACKED kvs_q4_k {
    uint16_t d, m;
    uint8_t scales[12], q[128];
} kvs_q4_k; /* 8 x 32: d s q - m t */
typedef struct KVS_PACKED kvs_q5_k {
    uint16_t d, m;
    uint8_t scales[12], h[32], q[128];
} kvs_q5_k;
typedef struct KVS_PACKED kvs_q6_k {
    uint8_t q[128], h[64];
    int8_t scales[16];
    uint16_t d;
} kvs_q6_k; /* 16 x 16: d s (q - 32) */
typedef struct KVS_PACKED kvs_iq4_nl {
    uint16_t d;
    uint8_t q[16];
} kvs_iq4_nl; /* d table[q] */
typedef struct KVS_PACKED kvs_iq4_xs {
    uint16_t d, scales_h;
    uint8_t scales_l[4], q[128];
} kvs_iq4_xs; /* 8 x 32: d (s - 32) table[q] */

extern const int8_t kvs_iq4_values[16];

/* Q4_K and Q5_K: scale and minimum of sub-block j, six bits each, in 12 bytes. */
KVS_SHARED void kvs_k4_scale(const uint8_t s[12], int j, uint8_t *scale, uint8_t *min) {
    if (j < 4) {
        *scale = s[j] & 63;
        *min = s[j + 4] & 63;
    } else {
        *scale = (uint8_t)((s[j + 4] & 15) | (s[j - 4] >> 6) << 4);
        *min = (uint8_t)(s[j + 4] >> 4 | (s[j] >> 6) << 4);
    }
}

typedef struct kvs_type_traits {
    const char *name; /* "Q4_K" */
    int32_t block;    /* elements of a block */
    int32_t block_bytes;
    void (*to_f32)(const void *row, float *out, int64_t n); /* n: whole blocks */
} kvs_type_traits;

const kvs_type_traits *kvs_type_get(int32_t type); /* NULL for a type that does not load */

/* One cache row of one head (head_dim elements, F32, F16 or Q8_0), the last block of Q8_0 part empty where head_dim is odd. */
void kvs_kv_row_to_f32(int32_t type, const void *row, float *out, int32_t head_dim);
#endif
