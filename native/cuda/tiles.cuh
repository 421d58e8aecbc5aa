/* tiles.cuh - activations as int8, in blocks of 32 with a float32 scale each: what the kernels of matvec.cu multiply with. */
#ifndef KVS_TILES_CUH
#define KVS_TILES_CUH
#include "device.cuh"
#include "types.cuh"

/* The groups of a warp. Rows stand side by side, so that what a lane loads for all rows is at fixed distances. */
typedef struct kvs_act_tile {
    uint8_t low[KVS_WARP][16], high[KVS_WARP][16]; /* values 0..15 and 16..31 of each group */
    float scale[KVS_WARP][2];                      /* d, NaN where a value was not finite: then the products are; sum of all 32 integers */
    int16_t sums[KVS_WARP][2];                     /* of 0..15 and 16..31 */
} kvs_act_tile;

typedef struct kvs_act_tiles { /* of rows */
    kvs_act_tile *p;           /* (tiles, room), or NULL */
    int64_t room;              /* for rows in a tile: their number rounded up to 1, 2, 4, 8 */
} kvs_act_tiles;

/* Scale of a group, by the greatest of its magnitudes as bits: NaN is above infinity, and neither gets lost. */
typedef struct kvs_act_scale {
    float most;
    bool finite, zero; /* zero: a product with 2^-100 is lost in float32 beside anything else */
} kvs_act_scale;

KVS_DEVICE kvs_act_scale kvs_act_scale_of(uint32_t top) {
    kvs_act_scale s = {kvs_bits_float(top), top < 0x7f800000, false};
    s.zero = !s.finite || s.most < 0x1p-100f;
    return s;
}
KVS_DEVICE int kvs_act_integer(const kvs_act_scale &s, float x) { return s.zero ? 0 : __float2int_rn(x * (127.0f / s.most)); }

KVS_DEVICE void kvs_act_put_scale(kvs_act_tile *tile, int at, const kvs_act_scale &s, int first, int second) {
    tile->scale[at][0] = s.finite ? s.zero ? 0.0f : s.most / 127.0f : kvs_bits_float(0x7fc00000);
    tile->scale[at][1] = (float)(first + second);
    tile->sums[at][0] = (int16_t)first;
    tile->sums[at][1] = (int16_t)second;
}

/* A group by a warp, a value in each lane */
KVS_DEVICE void kvs_act_put_group(const kvs_act_tiles &tiles, int64_t row, int64_t group, float x) {
    const int lane = threadIdx.x % KVS_WARP, at = (int)(group % KVS_WARP);
    kvs_act_tile *tile = tiles.p + group / KVS_WARP * tiles.room + row;
    uint32_t top = kvs_float_bits(x) & 0x7fffffff;
    for (int d = KVS_WARP / 2; d; d /= 2) {
        const uint32_t other = __shfl_xor_sync(KVS_ALL_LANES, top, d);
        top = KVS_MAX(top, other);
    }
    const kvs_act_scale s = kvs_act_scale_of(top);
    const int q = kvs_act_integer(s, x);
    int sum = q;
    for (int d = 8; d; d /= 2) sum += __shfl_xor_sync(KVS_ALL_LANES, sum, d);
    const int last = __shfl_sync(KVS_ALL_LANES, sum, 16);
    (lane < 16 ? tile->low : tile->high)[at][lane % 16] = (uint8_t)q;
    if (!lane) kvs_act_put_scale(tile, at, s, sum, last);
}

/* Four groups by a warp: a lane has values first .. first + 3 of a row, eight lanes a group. inside: the row has them; all lanes call it. */
KVS_DEVICE void kvs_act_put_four(const kvs_act_tiles &tiles, int64_t row, int64_t first, const float4 &x, bool inside) {
    const int lane = threadIdx.x % KVS_WARP, part = lane % 8;
    const int64_t group = first / KVS_GROUP;
    const float values[4] = {x.x, x.y, x.z, x.w};
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const uint32_t bits = kvs_float_bits(values[i]) & 0x7fffffff;
        top = KVS_MAX(top, bits);
    }
    for (int d = 4; d; d /= 2) {
        const uint32_t other = __shfl_xor_sync(KVS_ALL_LANES, top, d);
        top = KVS_MAX(top, other);
    }
    const kvs_act_scale s = kvs_act_scale_of(top);
    uint32_t word = 0;
    int sum = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int q = kvs_act_integer(s, values[i]);
        word |= (uint32_t)(uint8_t)q << 8 * i;
        sum += q;
    }
    for (int d = 2; d; d /= 2) sum += __shfl_xor_sync(KVS_ALL_LANES, sum, d); /* of a half */
    const int second = __shfl_sync(KVS_ALL_LANES, sum, lane - part + 4);
    if (!inside) return;
    kvs_act_tile *tile = tiles.p + group / KVS_WARP * tiles.room + row;
    const int at = (int)(group % KVS_WARP);
    uint8_t *half = (part < 4 ? tile->low : tile->high)[at];
    *(uint32_t *)(void *)(half + part % 4 * 4) = word;
    if (!part) kvs_act_put_scale(tile, at, s, sum, second);
}
#endif
