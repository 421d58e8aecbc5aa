/* kv.cuh - rows of the cache as kernels read and write them. Their bytes are those of the CPU (native/cpu/rows.c): sessions are saved on one
 * device and loaded on another, so a store here rounds as a store there, to the last bit.
 *
 * Where a row may stand: the store itself is aligned, rows follow each other without gaps. So values of F32 are 4-aligned always, F16
 * rows of an odd head_dim are 2-aligned, and a block of Q8_0 (34 bytes: a half, then 32 signed bytes) is 2-aligned and no more. */
#ifndef KVS_KV_CUH
#define KVS_KV_CUH
#include "device.cuh"

extern "C" {
#include "../backend.h"
}

/* ---- reading ---- */

/* Value i of a row. type: KVS_TYPE_F32, _F16 or _Q8_0; a constant where it is one, then the other two are not compiled. */
KVS_DEVICE float kvs_kv_get(int type, const uint8_t *row, int i) {
    if (type == KVS_TYPE_F32) return ((const float *)row)[i];
    if (type == KVS_TYPE_F16) return kvs_half_float(kvs_load2(row + 2 * i));
    const uint8_t *block = row + i / 32 * 34;
    return kvs_half_float(kvs_load2(block)) * (float)(int8_t)block[2 + i % 32];
}

/* May kvs_kv_get8 read rows of so many values? It takes whole eights, and they stand at multiples of 16 bytes then. */
KVS_SHARED bool kvs_kv_in_eights(int32_t head_dim) { return head_dim % 8 == 0; }

KVS_DEVICE void kvs_kv_quants4(const uint8_t *quants, float d, float *out) { /* 2-aligned */
    uint32_t q = kvs_load2(quants) | (uint32_t)kvs_load2(quants + 2) << 16;
    for (int i = 0; i < 4; i++) out[i] = d * (float)(int8_t)(q >> 8 * i & 0xff);
}

/* Values i .. i + 8, i % 8 == 0, of a row for which kvs_kv_in_eights is true. */
KVS_DEVICE void kvs_kv_get8(int type, const uint8_t *row, int i, float out[8]) {
    if (type == KVS_TYPE_F32) {
        float4 a = kvs_load_float4((const float *)row + i), b = kvs_load_float4((const float *)row + i + 4);
        out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
        out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
    } else if (type == KVS_TYPE_F16) {
        uint4 h = kvs_load16(row + 2 * i);
        float2 a = kvs_half2_float2(h.x), b = kvs_half2_float2(h.y), c = kvs_half2_float2(h.z), d = kvs_half2_float2(h.w);
        out[0] = a.x, out[1] = a.y, out[2] = b.x, out[3] = b.y;
        out[4] = c.x, out[5] = c.y, out[6] = d.x, out[7] = d.y;
    } else {
        const uint8_t *block = row + i / 32 * 34;
        float d = kvs_half_float(kvs_load2(block));
        kvs_kv_quants4(block + 2 + i % 32, d, out);
        kvs_kv_quants4(block + 6 + i % 32, d, out + 4);
    }
}

/* ---- writing ---- */

/* One block by one warp, lane i its value i. As the CPU's store_q8_block: the quants are taken against the scale as it is stored, a true
 * division, ties to even; lanes beyond the row give 0. An infinity saturates, NaN is 0. */
KVS_DEVICE void kvs_kv_put_q8(uint8_t *block, float x, bool inside) {
    int lane = threadIdx.x % KVS_WARP;
    float top = kvs_warp_max(inside ? fabsf(x) : 0.0f);
    uint16_t scale = kvs_float_half(fminf(top / 127.0f, 65504.0f));
    float d = kvs_half_float(scale), q = inside && d > 0.0f ? rintf(x / d) : 0.0f;
    q = q > 127.0f ? 127.0f : q < -127.0f ? -127.0f : q == q ? q : 0.0f;
    __syncwarp(); /* x may come from the block itself */
    if (!lane) *(uint16_t *)(void *)block = scale;
    block[2 + lane] = (uint8_t)(int8_t)q;
}

/* Values first .. first + 32 of a row, first % 32 == 0, lane i of a warp gives the i-th of them; those beyond head_dim count for nothing.
 * All lanes of the warp call it together; threads of a block are numbered along x. */
KVS_DEVICE void kvs_kv_put32(int type, uint8_t *row, int32_t head_dim, int32_t first, float x) {
    int32_t i = first + (int32_t)(threadIdx.x % KVS_WARP);
    if (type == KVS_TYPE_Q8_0)
        kvs_kv_put_q8(row + first / 32 * 34, x, i < head_dim);
    else if (i >= head_dim)
        return;
    else if (type == KVS_TYPE_F32)
        ((float *)row)[i] = x;
    else
        ((uint16_t *)(void *)row)[i] = kvs_float_half(x);
}

/* Value i of a row in float32 whose leading n_rot values are turned in pairs by angles (n_rot / 2, 2): cos and sin; back: by -angles. A lane
 * gives its value x and has i % 32 for its number; all lanes of the warp call it together. As the CPU, each product rounded. */
KVS_DEVICE float kvs_turned(float x, int32_t i, const float *angles, int32_t n_rot, bool back) {
    float other = __shfl_xor_sync(KVS_ALL_LANES, x, 1);
    if (i >= n_rot) return x;
    float c = angles[i / 2 * 2], s = angles[i / 2 * 2 + 1];
    if (back) s = -s;
    return i % 2 ? kvs_mul(other, s) + kvs_mul(x, c) : kvs_mul(x, c) - kvs_mul(other, s);
}
#endif
