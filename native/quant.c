/* quant.c - plain decoders of every type that loads. Slow and obvious on purpose: the fast kernels are tested against them. */
#include "quant.h"

const int8_t kvs_iq4_values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

static void f32_to_f32(const void *row, float *out, int64_t n) { memcpy(out, row, (size_t)n * sizeof *out); }

static uint16_t load_u16(const void *p, int64_t i) { /* the row may stand at an odd address */
    uint16_t h;
    memcpy(&h, (const uint8_t *)p + 2 * i, 2);
    return h;
}

static void f16_to_f32(const void *row, float *out, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = kvs_f16_to_f32(load_u16(row, i));
}

static void bf16_to_f32(const void *row, float *out, int64_t n) {
    for (int64_t i = 0; i < n; i++) out[i] = kvs_bf16_to_f32(load_u16(row, i));
}

static void q4_0_to_f32(const void *row, float *out, int64_t n) {
    const kvs_q4_0 *b = row;
    for (const float *end = out + n; out < end; out += 32, b++) {
        float d = kvs_f16_to_f32(b->d);
        for (int i = 0; i < 16; i++) {
            out[i] = d * (float)((b->q[i] & 15) - 8);
            out[i + 16] = d * (float)((b->q[i] >> 4) - 8);
        }
    }
}

static void q4_1_to_f32(const void *row, float *out, int64_t n) {
    const kvs_q4_1 *b = row;
    for (const float *end = out + n; out < end; out += 32, b++) {
        float d = kvs_f16_to_f32(b->d), m = kvs_f16_to_f32(b->m);
        for (int i = 0; i < 16; i++) {
            out[i] = d * (float)(b->q[i] & 15) + m;
            out[i + 16] = d * (float)(b->q[i] >> 4) + m;
        }
    }
}

static void q5_0_to_f32(const void *row, float *out, int64_t n) {
    const kvs_q5_0 *b = row;
    for (const float *end = out + n; out < end; out += 32, b++) {
        float d = kvs_f16_to_f32(b->d);
        for (int i = 0; i < 16; i++) {
            int low = b->h[i / 8] >> i % 8 & 1, high = b->h[2 + i / 8] >> i % 8 & 1;
            out[i] = d * (float)(((b->q[i] & 15) | low << 4) - 16);
            out[i + 16] = d * (float)((b->q[i] >> 4 | high << 4) - 16);
        }
    }
}

static void q5_1_to_f32(const void *row, float *out, int64_t n) {
    const kvs_q5_1 *b = row;
    for (const float *end = out + n; out < end; out += 32, b++) {
        float d = kvs_f16_to_f32(b->d), m = kvs_f16_to_f32(b->m);
        for (int i = 0; i < 16; i++) {
            int low = b->h[i / 8] >> i % 8 & 1, high = b->h[2 + i / 8] >> i % 8 & 1;
            out[i] = d * (float)((b->q[i] & 15) | low << 4) + m;
            out[i + 16] = d * (float)(b->q[i] >> 4 | high << 4) + m;
        }
    }
}

static void q8_0_to_f32(const void *row, float *out, int64_t n) {
    const kvs_q8_0 *b = row;
    for (const float *end = out + n; out < end; out += 32, b++) {
        float d = kvs_f16_to_f32(b->d);
        for (int i = 0; i < 32; i++) out[i] = d * (float)b->q[i];
    }
}

/* Q2_K, Q3_K: 32 bytes of q hold four runs of 32 values, the first in the lowest two bits. */
static void q2_k_to_f32(const void *row, float *out, int64_t n) {
    const kvs_q2_k *b = row;
    for (const float *end = out + n; out < end; out += 256, b++) {
        float d = kvs_f16_to_f32(b->d), m = kvs_f16_to_f32(b->m);
        for (int i = 0; i < 256; i++) {
            uint8_t s = b->scales[i / 16], q = b->q[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3;
            out[i] = d * (float)(s & 15) * (float)q - m * (float)(s >> 4);
        }
    }
}

static void q3_k_to_f32(const void *row, float *out, int64_t n) {
    const kvs_q3_k *b = row;
    for (const float *end = out + n; out < end; out += 256, b++) {
        float d = kvs_f16_to_f32(b->d);
        for (int j = 0; j < 16; j++) {
            int low = b->scales[j % 8] >> j / 8 * 4 & 15, high = b->scales[8 + j % 4] >> j / 4 * 2 & 3;
            float scale = d * (float)((low | high << 4) - 32);
            for (int i = 16 * j; i < 16 * j + 16; i++) {
                int q = b->q[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3, h = b->h[i % 32] >> i / 32 & 1;
                out[i] = scale * (float)(q + 4 * h - 4);
            }
        }
    }
}

/* Q4_K, Q5_K: 32 bytes of q hold two sub-blocks, the first in the low nibbles. */
static void q4_k_to_f32(const void *row, float *out, int64_t n) {
    const kvs_q4_k *b = row;
    for (const float *end = out + n; out < end; out += 256, b++) {
        float d = kvs_f16_to_f32(b->d), m = kvs_f16_to_f32(b->m);
        for (int j = 0; j < 8; j++) {
            uint8_t s, t;
            kvs_k4_scale(b->scales, j, &s, &t);
            float scale = d * (float)s, min = m * (float)t;
            for (int i = 0; i < 32; i++) out[32 * j + i] = scale * (float)(b->q[j / 2 * 32 + i] >> j % 2 * 4 & 15) - min;
        }
    }
}

static void q5_k_to_f32(const void *row, float *out, int64_t n) {
    const kvs_q5_k *b = row;
    for (const float *end = out + n; out < end; out += 256, b++) {
        float d = kvs_f16_to_f32(b->d), m = kvs_f16_to_f32(b->m);
        for (int j = 0; j < 8; j++) {
            uint8_t s, t;
            kvs_k4_scale(b->scales, j, &s, &t);
            float scale = d * (float)s, min = m * (float)t;
            for (int i = 0; i < 32; i++) {
                int q = (b->q[j / 2 * 32 + i] >> j % 2 * 4 & 15) | (b->h[i] >> j & 1) << 4;
                out[32 * j + i] = scale * (float)q - min;
            }
        }
    }
}

/* Q6_K: 64 bytes of q and 32 of h hold 128 values: of run r (32 values) the low bits are in q[32 (r % 2)], low nibbles first,
 * the high ones in bits 2r of h. */
static void q6_k_to_f32(const void *row, float *out, int64_t n) {
    const kvs_q6_k *b = row;
    for (const float *end = out + n; out < end; out += 256, b++) {
        float d = kvs_f16_to_f32(b->d);
        for (int i = 0; i < 256; i++) {
            int half = i / 128, run = i % 128 / 32, l = i % 32;
            int low = b->q[64 * half + 32 * (run % 2) + l] >> run / 2 * 4 & 15, high = b->h[32 * half + l] >> 2 * run & 3;
            out[i] = d * (float)b->scales[i / 16] * (float)((low | high << 4) - 32);
        }
    }
}

static void iq4_nl_to_f32(const void *row, float *out, int64_t n) {
    const kvs_iq4_nl *b = row;
    for (const float *end = out + n; out < end; out += 32, b++) {
        float d = kvs_f16_to_f32(b->d);
        for (int i = 0; i < 16; i++) {
            out[i] = d * (float)kvs_iq4_values[b->q[i] & 15];
            out[i + 16] = d * (float)kvs_iq4_values[b->q[i] >> 4];
        }
    }
}

static void iq4_xs_to_f32(const void *row, float *out, int64_t n) {
    const kvs_iq4_xs *b = row;
    for (const float *end = out + n; out < end; out += 256, b++) {
        float d = kvs_f16_to_f32(b->d);
        for (int j = 0; j < 8; j++) {
            int low = b->scales_l[j / 2] >> j % 2 * 4 & 15, high = b->scales_h >> 2 * j & 3;
            float scale = d * (float)((low | high << 4) - 32);
            for (int i = 0; i < 16; i++) {
                uint8_t q = b->q[16 * j + i];
                out[32 * j + i] = scale * (float)kvs_iq4_values[q & 15];
                out[32 * j + i + 16] = scale * (float)kvs_iq4_values[q >> 4];
            }
        }
    }
}

static const kvs_type_traits traits[] = {
    [KVS_TYPE_F32] = {"F32", 1, 4, f32_to_f32},
    [KVS_TYPE_F16] = {"F16", 1, 2, f16_to_f32},
    [KVS_TYPE_BF16] = {"BF16", 1, 2, bf16_to_f32},
    [KVS_TYPE_Q4_0] = {"Q4_0", 32, sizeof(kvs_q4_0), q4_0_to_f32},
    [KVS_TYPE_Q4_1] = {"Q4_1", 32, sizeof(kvs_q4_1), q4_1_to_f32},
    [KVS_TYPE_Q5_0] = {"Q5_0", 32, sizeof(kvs_q5_0), q5_0_to_f32},
    [KVS_TYPE_Q5_1] = {"Q5_1", 32, sizeof(kvs_q5_1), q5_1_to_f32},
    [KVS_TYPE_Q8_0] = {"Q8_0", 32, sizeof(kvs_q8_0), q8_0_to_f32},
    [KVS_TYPE_Q2_K] = {"Q2_K", 256, sizeof(kvs_q2_k), q2_k_to_f32},
    [KVS_TYPE_Q3_K] = {"Q3_K", 256, sizeof(kvs_q3_k), q3_k_to_f32},
    [KVS_TYPE_Q4_K] = {"Q4_K", 256, sizeof(kvs_q4_k), q4_k_to_f32},
    [KVS_TYPE_Q5_K] = {"Q5_K", 256, sizeof(kvs_q5_k), q5_k_to_f32},
    [KVS_TYPE_Q6_K] = {"Q6_K", 256, sizeof(kvs_q6_k), q6_k_to_f32},
    [KVS_TYPE_IQ4_NL] = {"IQ4_NL", 32, sizeof(kvs_iq4_nl), iq4_nl_to_f32},
    [KVS_TYPE_IQ4_XS] = {"IQ4_XS", 256, sizeof(kvs_iq4_xs), iq4_xs_to_f32},
};
_Static_assert(sizeof(kvs_q4_0) == 18 && sizeof(kvs_q4_1) == 20 && sizeof(kvs_q5_0) == 22 && sizeof(kvs_q5_1) == 24, "GGUF sizes");
_Static_assert(sizeof(kvs_q2_k) == 84 && sizeof(kvs_q3_k) == 110 && sizeof(kvs_q4_k) == 144 && sizeof(kvs_q5_k) == 176, "GGUF sizes");
_Static_assert(sizeof(kvs_q8_0) == 34 && sizeof(kvs_q6_k) == 210 && sizeof(kvs_iq4_nl) == 18 && sizeof(kvs_iq4_xs) == 136, "GGUF sizes");

const kvs_type_traits *kvs_type_get(int32_t type) {
    if (type < 0 || type >= (int32_t)(sizeof traits / sizeof *traits) || !traits[type].name) return NULL;
    return &traits[type];
}

const char *kvs_type_name(int32_t type) {
    const kvs_type_traits *t = kvs_type_get(type);
    return t ? t->name : NULL;
}

int64_t kvs_row_bytes(int32_t type, int64_t n) {
    const kvs_type_traits *t = kvs_type_get(type);
    uint64_t bytes;
    if (!t || n < 0 || n % t->block || !kvs_mul_u64((uint64_t)n / (uint64_t)t->block, (uint64_t)t->block_bytes, &bytes)) return -1;
    return bytes > INT64_MAX ? -1 : (int64_t)bytes;
}

void kvs_kv_row_to_f32(int32_t type, const void *row, float *out, int32_t head_dim) {
    int32_t whole = head_dim / traits[type].block * traits[type].block;
    traits[type].to_f32(row, out, whole);
    if (whole == head_dim) return;
    float last[32]; /* only Q8_0 gets here */
    q8_0_to_f32((const uint8_t *)row + (int64_t)whole / 32 * 34, last, 32);
    memcpy(out + whole, last, (size_t)(head_dim - whole) * sizeof *out);
}
