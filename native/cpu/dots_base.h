/* dots_base.h - the integer kernels in plain C: the specification of dots_stripes.h and dots_panel.h. */
#ifndef KVS_DOTS_BASE_H
#define KVS_DOTS_BASE_H
#include "dots.h"

#include <math.h>

static void quantize_block(const float *x, size_t n, int8_t *q, float *d) {
    uint32_t top = 0; /* magnitudes as integers: NaN is above infinity, and neither gets lost */
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, &x[i], 4);
        top = KVS_MAX(top, bits & 0x7fffffff);
    }
    float amax;
    memcpy(&amax, &top, 4);
    if (top >= 0x7f800000 || amax < 0x1p-100f) { /* a product with 2^-100 is lost in float32 beside anything else */
        *d = top >= 0x7f800000 ? NAN : 0.0f;
        memset(q, 0, n);
        return;
    }
    float inverse = 127.0f / amax;
    *d = amax / 127.0f;
    for (size_t i = 0; i < n; i++) q[i] = (int8_t)lrintf(x[i] * inverse);
}

static void quantize(const float *x, int64_t cols, const kvs_acts *a, int64_t row) {
    int32_t n = a->block;
    for (int64_t b = 0; b < cols / n; b++) {
        int64_t at = b * a->n + row;
        quantize_block(x + b * n, (size_t)n, a->q + at * n, &a->d[at]);
    }
}

/* A block of any of these types: d (sum of scale q) - m (sum of min), in runs of 16 values. Types that add m have the min -1. */
typedef struct block {
    float d, m;
    int8_t q[256];
    int16_t scale[16], min[16];
} block;

static void alone(block *out, uint16_t d, uint16_t m) { /* a block of 32 */
    out->d = kvs_f16_to_f32(d);
    out->m = kvs_f16_to_f32(m);
    out->scale[0] = out->scale[1] = 1;
    out->min[0] = out->min[1] = -1;
}

static int nibble(const uint8_t q[16], int i) { return q[i % 16] >> i / 16 * 4 & 15; }
static int with_bit(const uint8_t q[16], const uint8_t h[4], int i) { return nibble(q, i) | (h[i / 8] >> i % 8 & 1) << 4; }

static void q4_0_block(block *out, const void *w) {
    const kvs_q4_0 *b = w;
    alone(out, b->d, 0);
    for (int i = 0; i < 32; i++) out->q[i] = (int8_t)(nibble(b->q, i) - 8);
}

static void q4_1_block(block *out, const void *w) {
    const kvs_q4_1 *b = w;
    alone(out, b->d, b->m);
    for (int i = 0; i < 32; i++) out->q[i] = (int8_t)nibble(b->q, i);
}

static void q5_0_block(block *out, const void *w) {
    const kvs_q5_0 *b = w;
    alone(out, b->d, 0);
    for (int i = 0; i < 32; i++) out->q[i] = (int8_t)(with_bit(b->q, b->h, i) - 16);
}

static void q5_1_block(block *out, const void *w) {
    const kvs_q5_1 *b = w;
    alone(out, b->d, b->m);
    for (int i = 0; i < 32; i++) out->q[i] = (int8_t)with_bit(b->q, b->h, i);
}

static void q8_0_block(block *out, const void *w) {
    const kvs_q8_0 *b = w;
    alone(out, b->d, 0);
    memcpy(out->q, b->q, 32);
}

static void iq4_nl_block(block *out, const void *w) {
    const kvs_iq4_nl *b = w;
    alone(out, b->d, 0);
    for (int i = 0; i < 32; i++) out->q[i] = kvs_iq4_values[nibble(b->q, i)];
}

/* Q2_K, Q3_K: 32 bytes of q hold four runs of 32 values, the first in the lowest two bits */
static int two_bits(const uint8_t q[64], int i) { return q[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3; }

static void q2_k_block(block *out, const void *w) {
    const kvs_q2_k *b = w;
    out->d = kvs_f16_to_f32(b->d);
    out->m = kvs_f16_to_f32(b->m);
    for (int j = 0; j < 16; j++) out->scale[j] = b->scales[j] & 15, out->min[j] = b->scales[j] >> 4;
    for (int i = 0; i < 256; i++) out->q[i] = (int8_t)two_bits(b->q, i);
}

static void q3_k_block(block *out, const void *w) {
    const kvs_q3_k *b = w;
    out->d = kvs_f16_to_f32(b->d);
    for (int j = 0; j < 16; j++) {
        int low = b->scales[j % 8] >> j / 8 * 4 & 15, high = b->scales[8 + j % 4] >> j / 4 * 2 & 3;
        out->scale[j] = (int16_t)((low | high << 4) - 32);
    }
    for (int i = 0; i < 256; i++) out->q[i] = (int8_t)((two_bits(b->q, i) | (b->h[i % 32] >> i / 32 & 1) << 2) - 4);
}

static void k4_scales(block *out, uint16_t d, uint16_t m, const uint8_t scales[12]) {
    out->d = kvs_f16_to_f32(d);
    out->m = kvs_f16_to_f32(m);
    for (int j = 0; j < 8; j++) {
        uint8_t scale, min;
        kvs_k4_scale(scales, j, &scale, &min);
        out->scale[2 * j] = out->scale[2 * j + 1] = scale;
        out->min[2 * j] = out->min[2 * j + 1] = min;
    }
}

static void q4_k_block(block *out, const void *w) {
    const kvs_q4_k *b = w;
    k4_scales(out, b->d, b->m, b->scales);
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 32; i++) out->q[32 * j + i] = b->q[j / 2 * 32 + i] >> j % 2 * 4 & 15;
}

static void q5_k_block(block *out, const void *w) {
    const kvs_q5_k *b = w;
    k4_scales(out, b->d, b->m, b->scales);
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 32; i++) out->q[32 * j + i] = (int8_t)((b->q[j / 2 * 32 + i] >> j % 2 * 4 & 15) | (b->h[i] >> j & 1) << 4);
}

static void q6_k_block(block *out, const void *w) {
    const kvs_q6_k *b = w;
    out->d = kvs_f16_to_f32(b->d);
    for (int j = 0; j < 16; j++) out->scale[j] = b->scales[j];
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 32; i++) {
            int low = b->q[64 * (j / 4) + 32 * (j % 2) + i] >> j % 4 / 2 * 4 & 15, high = b->h[32 * (j / 4) + i] >> j % 4 * 2 & 3;
            out->q[32 * j + i] = (int8_t)((low | high << 4) - 32);
        }
}

static void iq4_xs_block(block *out, const void *w) {
    const kvs_iq4_xs *b = w;
    out->d = kvs_f16_to_f32(b->d);
    for (int j = 0; j < 8; j++) {
        int low = b->scales_l[j / 2] >> j % 2 * 4 & 15, high = b->scales_h >> 2 * j & 3;
        out->scale[2 * j] = out->scale[2 * j + 1] = (int16_t)((low | high << 4) - 32);
        for (int i = 0; i < 32; i++) out->q[32 * j + i] = kvs_iq4_values[nibble(b->q + 16 * j, i)];
    }
}

static const struct {
    void (*unpack)(block *, const void *);
    bool has_m;
} blocks[] = {
    [KVS_TYPE_Q4_0] = {q4_0_block, false}, [KVS_TYPE_Q4_1] = {q4_1_block, true},      [KVS_TYPE_Q5_0] = {q5_0_block, false},
    [KVS_TYPE_Q5_1] = {q5_1_block, true},  [KVS_TYPE_Q8_0] = {q8_0_block, false},     [KVS_TYPE_Q2_K] = {q2_k_block, true},
    [KVS_TYPE_Q3_K] = {q3_k_block, false}, [KVS_TYPE_Q4_K] = {q4_k_block, true},      [KVS_TYPE_Q5_K] = {q5_k_block, true},
    [KVS_TYPE_Q6_K] = {q6_k_block, false}, [KVS_TYPE_IQ4_NL] = {iq4_nl_block, false}, [KVS_TYPE_IQ4_XS] = {iq4_xs_block, false},
};

static int32_t isum_of(const block *w, const int8_t *x, int32_t n) {
    int32_t sum = 0;
    for (int j = 0; j < n / 16; j++) {
        int32_t dot = 0;
        for (int i = 16 * j; i < 16 * j + 16; i++) dot += w->q[i] * x[i];
        sum += w->scale[j] * dot;
    }
    return sum;
}

static int32_t msum_of(const block *w, const int8_t *x, int32_t n) {
    int32_t sum = 0;
    for (int i = 0; i < n; i++) sum += w->min[i / 16] * x[i];
    return sum;
}

static void few(const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n, float *y, int64_t y_step) {
    int64_t n_blocks = p->cols / a->block, bytes = kvs_type_get(p->type)->block_bytes;
    for (int64_t r = 0; r < p->rows; r++) {
        float sums[KVS_XT][4] = {{0}};
        for (int64_t b = 0; b < n_blocks; b++) {
            block w;
            blocks[p->type].unpack(&w, p->w + r * p->row_bytes + b * bytes);
            for (int64_t i = 0; i < n; i++) {
                int64_t at = b * a->n + row + i;
                const int8_t *x = a->q + at * a->block;
                float *sum = &sums[i][b % 4];
                *sum += w.d * a->d[at] * (float)isum_of(&w, x, a->block);
                if (blocks[p->type].has_m) *sum -= w.m * a->d[at] * (float)msum_of(&w, x, a->block);
            }
        }
        for (int64_t i = 0; i < n; i++) y[i * y_step + r] = (sums[i][0] + sums[i][1]) + (sums[i][2] + sums[i][3]);
    }
}

static void many(const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n, float *y, int64_t y_step, void *scratch) {
    (void)scratch;
    few(p, a, row, n, y, y_step);
}
#endif
