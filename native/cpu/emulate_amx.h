/* emulate_amx.h - the instructions of amx.h in plain C, on tiles of the thread: what the processor would refuse ends the process. Only
 * for tests. */
#ifndef KVS_EMULATE_AMX_H
#define KVS_EMULATE_AMX_H
#include "amx.h"

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

static _Thread_local struct {
    kvs_tile_config config; /* palette 0: none */
    uint8_t tile[8][16][64];
} kvs_amx;

static inline void kvs_amx_must(bool so) {
    if (!so) abort();
}

static inline void kvs_amx_configure(const kvs_tile_config *c) {
    kvs_amx_must(c->palette == 1 && c->start_row == 0);
    for (int i = 0; i < 14; i++) kvs_amx_must(!c->reserved[i]);
    for (int i = 0; i < 16; i++) {
        kvs_amx_must(c->rows[i] <= 16 && c->row_bytes[i] <= 64 && !c->rows[i] == !c->row_bytes[i]);
        kvs_amx_must(i < 8 || !c->rows[i]);
    }
    memset(&kvs_amx, 0, sizeof kvs_amx);
    kvs_amx.config = *c;
}

static inline void kvs_amx_zero(int t) {
    kvs_amx_must(kvs_amx.config.palette == 1 && kvs_amx.config.rows[t]);
    memset(kvs_amx.tile[t], 0, sizeof kvs_amx.tile[t]);
}

static inline void kvs_amx_load(int t, const void *p, int64_t step) {
    kvs_amx_zero(t);
    for (int i = 0; i < kvs_amx.config.rows[t]; i++) memcpy(kvs_amx.tile[t][i], (const uint8_t *)p + i * step, kvs_amx.config.row_bytes[t]);
}

static inline void kvs_amx_store(int t, void *p, int64_t step) {
    kvs_amx_must(kvs_amx.config.palette == 1 && kvs_amx.config.rows[t]);
    for (int i = 0; i < kvs_amx.config.rows[t]; i++) memcpy((uint8_t *)p + i * step, kvs_amx.tile[t][i], kvs_amx.config.row_bytes[t]);
}

static inline void kvs_amx_can_dot(int c, int a, int b) {
    const kvs_tile_config *f = &kvs_amx.config;
    kvs_amx_must(f->palette == 1 && c != a && a != b && b != c && f->rows[c] && f->rows[a] && f->rows[b]);
    kvs_amx_must(f->row_bytes[c] % 4 == 0 && f->row_bytes[a] % 4 == 0 && f->row_bytes[b] % 4 == 0);
    kvs_amx_must(f->rows[c] == f->rows[a] && f->row_bytes[a] / 4 == f->rows[b] && f->row_bytes[c] == f->row_bytes[b]);
}

static inline void kvs_amx_dot_bytes(int c, int a, int b, bool is_signed) {
    kvs_amx_can_dot(c, a, b);
    for (int m = 0; m < kvs_amx.config.rows[c]; m++) {
        uint32_t sum[16];
        memcpy(sum, kvs_amx.tile[c][m], 64);
        for (int k = 0; k < kvs_amx.config.rows[b]; k++)
            for (int n = 0; n < kvs_amx.config.row_bytes[c] / 4; n++)
                for (int i = 0; i < 4; i++) {
                    int32_t x = (int8_t)kvs_amx.tile[a][m][4 * k + i], w = kvs_amx.tile[b][k][4 * n + i];
                    sum[n] += (uint32_t)(x * (is_signed ? (int8_t)w : w));
                }
        memcpy(kvs_amx.tile[c][m], sum, 64);
    }
}

static inline float kvs_amx_flushed(float x) { return fabsf(x) < FLT_MIN ? 0.0f : x; } /* no denormals, whatever MXCSR says */

static inline float kvs_amx_half(const uint8_t *row, int i) {
    uint32_t bits = (uint32_t)(row[2 * i] | row[2 * i + 1] << 8) << 16;
    float x;
    memcpy(&x, &bits, 4);
    return kvs_amx_flushed(x);
}

/* Even and odd columns are a chain of fused operations each; their sum is added to c. */
static inline void kvs_amx_dot_bf16(int c, int a, int b) {
    kvs_amx_can_dot(c, a, b);
    const int n_k = kvs_amx.config.rows[b], n_sums = kvs_amx.config.row_bytes[c] / 4;
    float w[16][2][16], sum[2][16], to[16];
    for (int k = 0; k < n_k; k++)
        for (int i = 0; i < 2 * n_sums; i++) w[k][i % 2][i / 2] = kvs_amx_half(kvs_amx.tile[b][k], i);
    for (int m = 0; m < kvs_amx.config.rows[c]; m++) {
        memset(sum, 0, sizeof sum);
        for (int k = 0; k < 2 * n_k; k++) {
            const float x = kvs_amx_half(kvs_amx.tile[a][m], k);
            for (int n = 0; n < n_sums; n++) sum[k % 2][n] = kvs_amx_flushed(fmaf(x, w[k / 2][k % 2][n], sum[k % 2][n]));
        }
        memcpy(to, kvs_amx.tile[c][m], 64);
        for (int n = 0; n < n_sums; n++) to[n] = kvs_amx_flushed(kvs_amx_flushed(to[n]) + kvs_amx_flushed(sum[0][n] + sum[1][n]));
        memcpy(kvs_amx.tile[c][m], to, 64);
    }
}

#define KVS_TILES_BEGIN(config)        kvs_amx_configure(config)
#define KVS_TILES_END()                kvs_amx.config.palette = 0
#define KVS_TILE_ZERO(t)               kvs_amx_zero(t)
#define KVS_TILE_LOAD(t, p, step)      kvs_amx_load(t, p, step)
#define KVS_TILE_STORE(t, p, step)     kvs_amx_store(t, p, step)
#define KVS_TILE_DOT_SIGNED(c, a, b)   kvs_amx_dot_bytes(c, a, b, true)
#define KVS_TILE_DOT_UNSIGNED(c, a, b) kvs_amx_dot_bytes(c, a, b, false)
#define KVS_TILE_DOT_BF16(c, a, b)     kvs_amx_dot_bf16(c, a, b)
#endif
