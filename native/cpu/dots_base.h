/* dots_base.h - the integer kernels in plain C: the specification of dots_x86.h and dots_panel.h. */
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
        int64_t at = row * a->row_step + b * a->block_step;
        int8_t *q = a->q + at * n;
        quantize_block(x + b * n, (size_t)n, q, &a->d[at]);
        if (n == 256) memset(a->s16 + at * 16, 0, 32);
        memset(a->s32 + at * (n / 32), 0, (size_t)n / 32 * 2);
        for (int i = 0; i < n; i++) {
            if (n == 256) a->s16[at * 16 + i / 16] = (int16_t)(a->s16[at * 16 + i / 16] + q[i]);
            a->s32[at * (n / 32) + i / 32] = (int16_t)(a->s32[at * (n / 32) + i / 32] + q[i]);
        }
    }
}

/* One block of one row: isum and msum, exact; d and m come back as float. */
typedef struct block_sum {
    float d, m;
    int32_t isum, msum;
} block_sum;

static block_sum q4_0_block(const void *w, const int8_t *x) {
    const kvs_q4_0 *b = w;
    block_sum s = {.d = kvs_f16_to_f32(b->d)};
    for (int i = 0; i < 16; i++) s.isum += ((b->q[i] & 15) - 8) * x[i] + ((b->q[i] >> 4) - 8) * x[i + 16];
    return s;
}

static block_sum q8_0_block(const void *w, const int8_t *x) {
    const kvs_q8_0 *b = w;
    block_sum s = {.d = kvs_f16_to_f32(b->d)};
    for (int i = 0; i < 32; i++) s.isum += b->q[i] * x[i];
    return s;
}

static block_sum k4_sum(uint16_t d, uint16_t m, const uint8_t scales[12], const uint8_t q[256], const int8_t *x) {
    block_sum s = {.d = kvs_f16_to_f32(d), .m = kvs_f16_to_f32(m)};
    for (int j = 0; j < 8; j++) {
        int32_t dot = 0, sum = 0;
        for (int i = 32 * j; i < 32 * j + 32; i++) {
            dot += q[i] * x[i];
            sum += x[i];
        }
        uint8_t scale, min;
        kvs_k4_scale(scales, j, &scale, &min);
        s.isum += scale * dot;
        s.msum += min * sum;
    }
    return s;
}

static block_sum q4_k_block(const void *w, const int8_t *x) {
    const kvs_q4_k *b = w;
    uint8_t q[256];
    for (int i = 0; i < 256; i++) q[i] = b->q[i / 64 * 32 + i % 32] >> i / 32 % 2 * 4 & 15;
    return k4_sum(b->d, b->m, b->scales, q, x);
}

static block_sum q5_k_block(const void *w, const int8_t *x) {
    const kvs_q5_k *b = w;
    uint8_t q[256];
    for (int i = 0; i < 256; i++) q[i] = (uint8_t)((b->q[i / 64 * 32 + i % 32] >> i / 32 % 2 * 4 & 15) | (b->h[i % 32] >> i / 32 & 1) << 4);
    return k4_sum(b->d, b->m, b->scales, q, x);
}

static block_sum q6_k_block(const void *w, const int8_t *x) {
    const kvs_q6_k *b = w;
    block_sum s = {.d = kvs_f16_to_f32(b->d)};
    for (int i = 0; i < 256; i++) {
        int half = i / 128, run = i % 128 / 32, l = i % 32;
        int low = b->q[64 * half + 32 * (run % 2) + l] >> run / 2 * 4 & 15, high = b->h[32 * half + l] >> 2 * run & 3;
        s.isum += b->scales[i / 16] * ((low | high << 4) - 32) * x[i];
    }
    return s;
}

static void few(const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n, float *y, int64_t y_step) {
    block_sum (*block)(const void *, const int8_t *) = p->type == KVS_TYPE_Q4_0   ? q4_0_block
                                                       : p->type == KVS_TYPE_Q8_0 ? q8_0_block
                                                       : p->type == KVS_TYPE_Q4_K ? q4_k_block
                                                       : p->type == KVS_TYPE_Q5_K ? q5_k_block
                                                                                  : q6_k_block;
    int64_t n_blocks = p->cols / a->block, bytes = kvs_type_get(p->type)->block_bytes;
    bool has_min = p->type == KVS_TYPE_Q4_K || p->type == KVS_TYPE_Q5_K;
    for (int64_t r = 0; r < p->rows; r++) {
        for (int64_t i = 0; i < n; i++) {
            float sum[4] = {0};
            for (int64_t b = 0; b < n_blocks; b++) {
                int64_t at = (row + i) * a->row_step + b * a->block_step;
                block_sum s = block(p->w + r * p->row_bytes + b * bytes, a->q + at * a->block);
                sum[b % 4] += s.d * a->d[at] * (float)s.isum;
                if (has_min) sum[b % 4] -= s.m * a->d[at] * (float)s.msum;
            }
            y[i * y_step + r] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        }
    }
}

static void many(const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n, float *y, int64_t y_step, void *scratch) {
    (void)scratch;
    few(p, a, row, n, y, y_step);
}
#endif
