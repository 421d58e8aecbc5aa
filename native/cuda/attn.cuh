/* attn.cuh - attention on CUDA: what its two kernels share. Few rows go to attn_decode.cu, which spreads the keys over blocks, many rows to
 * attn_tile.cu, which spreads the rows.
 *
 * Both take the keys in tiles of 64, always from key 0 on, and give the same bits: strengths are ranks of entropies, and a rank must not
 * depend on how many rows or sessions a step has, nor on which kernel took them. What makes it so:
 * - a score is one chain of multiply-adds over the dimensions, in one thread;
 * - a tile's maximum and sums are kvs_attn_soften: keys lane and lane + 32 in a lane, then one tree over the warp;
 * - a tile's values are added up by themselves, one chain over its keys, and tiles are joined in their order: kvs_attn_join.
 * Whoever changes one of these changes it in both. Products are fmaf or kvs_mul, so that no compiler chooses for one kernel what it did not
 * choose for the other. Keys that a row does not see are never multiplied by 0: they may be infinite. */
#ifndef KVS_ATTN_CUH
#define KVS_ATTN_CUH
#include "cuda.h"
#include "kv.cuh"
#include "tiles.cuh"

#include <math.h>

static constexpr int KVS_ATTN_TILE = 64, KVS_ATTN_THREADS = 128, KVS_ATTN_WARPS = KVS_ATTN_THREADS / KVS_WARP;

typedef struct kvs_attn_args {
    const kvs_row *rows; /* NULL: full attention, every row sees all n of k and v */
    const float *q;      /* (n, n_head, head_dim) */
    float *out;          /* the same */
    kvs_taps taps;
    const float *k, *v; /* full attention: (n, n_head, head_dim) */
    int32_t layer, n, n_head, n_kv_head, head_dim;
    float scale;
    /* decode: where tiles leave what they found, (rows_at_once, n_head, n_tiles) each */
    float *sums; /* head_dim floats: sums of e^(s - m) v */
    struct kvs_attn_left *left;
    int32_t n_tiles;           /* the most that any row sees, rounded up to a power of two */
    int32_t first_row, n_rows; /* of this launch */
    int32_t rows_at_once, piece_bytes;
    kvs_act_tiles tiles; /* decode: out as integers, too; none: not */
    float *late;         /* decode: room for the taps of all layers, (n_layer, 3, n, n_head): fuse.cu. NULL: it fuses nothing here */
} kvs_attn_args;

void kvs_attn_launch_decode(kvs_cuda *cu, const kvs_attn_args *a);
void kvs_attn_launch_tile(kvs_cuda *cu, const kvs_attn_args *a);
uint64_t kvs_attn_left_bytes(int32_t head_dim); /* of one tile of one head: sums and left */
int32_t kvs_attn_piece_bytes(int32_t type, int32_t head_dim);

/* ---- softmax, a tile at a time ---- */

/* Of some keys of a row: the greatest score, l = sum e^(s - m), u = sum e^(s - m) (s - m), and the share of l that lies in spans. None: m =
 * -infinity, the sums 0. */
typedef struct kvs_attn_part {
    float m, l, u, vis;
} kvs_attn_part;

typedef struct kvs_attn_left { /* by one tile */
    kvs_attn_part all;
    kvs_attn_part before; /* of the row's last tile: without the row's own key, where exclude_self asks for that */
} kvs_attn_left;

KVS_DEVICE kvs_attn_part kvs_attn_none(void) { return {-INFINITY, 0.0f, 0.0f, 0.0f}; }

/* Differences of scores: e^-10000 is 0 as e^-infinity is, but times 0 it stays 0. NaN stays NaN: fmaxf would lose it. */
KVS_DEVICE float kvs_attn_clamp(float x) { return x < -1e4f ? -1e4f : x; }

/* One warp: the first "seen" of 64 keys, of which a lane has the scores of keys lane and lane + 32. They become e^(s - m), unseen ones 0.
 * Scores that are infinite count as NaN, which l then is, too. spans: a bit per key. entropy: u is wanted. */
KVS_DEVICE kvs_attn_part kvs_attn_soften(float s[2], int seen, const uint32_t spans[2], bool entropy) {
    int lane = threadIdx.x % KVS_WARP;
    bool sees0 = lane < seen, sees1 = lane + KVS_WARP < seen;
    float s0 = fmaf(s[0], 0.0f, s[0]), s1 = fmaf(s[1], 0.0f, s[1]);
    kvs_attn_part part = kvs_attn_none();
    part.m = kvs_warp_max(fmaxf(sees0 ? s0 : -INFINITY, sees1 ? s1 : -INFINITY));
    float x0 = sees0 ? kvs_attn_clamp(s0 - part.m) : 0.0f, x1 = sees1 ? kvs_attn_clamp(s1 - part.m) : 0.0f;
    float e0 = sees0 ? expf(x0) : 0.0f, e1 = sees1 ? expf(x1) : 0.0f;
    part.l = kvs_warp_sum(e0 + e1);
    if (entropy) part.u = kvs_warp_sum(fmaf(e1, x1, kvs_mul(e0, x0)));
    if (spans[0] | spans[1]) part.vis = kvs_warp_sum((spans[0] >> lane & 1 ? e0 : 0.0f) + (spans[1] >> lane & 1 ? e1 : 0.0f));
    s[0] = e0;
    s[1] = e1;
    return part;
}

/* What two parts, one behind the other, are to be multiplied by, when they come to one maximum. */
typedef struct kvs_attn_shift {
    float d0, d1, c0, c1; /* m of the parts minus the new one; e^d */
} kvs_attn_shift;

KVS_DEVICE kvs_attn_shift kvs_attn_shift_of(float m0, float m1) {
    float m = fmaxf(m0, m1);
    kvs_attn_shift shift;
    shift.d0 = kvs_attn_clamp(m0 - m);
    shift.d1 = kvs_attn_clamp(m1 - m);
    shift.c0 = expf(shift.d0);
    shift.c1 = expf(shift.d1);
    return shift;
}

KVS_DEVICE float kvs_attn_add(float x0, float x1, const kvs_attn_shift &shift) { return fmaf(shift.c1, x1, kvs_mul(shift.c0, x0)); }

KVS_DEVICE void kvs_attn_join(kvs_attn_part &sum, const kvs_attn_part &part, const kvs_attn_shift &shift) {
    sum.m = fmaxf(sum.m, part.m);
    sum.u = kvs_attn_add(fmaf(shift.d0, sum.l, sum.u), fmaf(shift.d1, part.l, part.u), shift); /* the l of before */
    sum.l = kvs_attn_add(sum.l, part.l, shift);
    sum.vis = kvs_attn_add(sum.vis, part.vis, shift);
}

KVS_DEVICE float kvs_attn_entropy(const kvs_attn_part &all) {
    float h = all.l == 0.0f ? 0.0f : logf(all.l) - all.u / all.l;
    return h < 0.0f ? 0.0f : h;
}

/* One warp: which of the keys first .. first + 64 lie in spans. */
KVS_DEVICE void kvs_attn_span_bits(const kvs_range *spans, int32_t n_spans, int32_t first, uint32_t bits[2]) {
    int32_t key = first + (int32_t)(threadIdx.x % KVS_WARP);
    bool in0 = false, in1 = false;
    for (int32_t i = 0; i < n_spans && spans[i].first < first + KVS_ATTN_TILE; i++) {
        int32_t begin = spans[i].first, end = begin + spans[i].n;
        in0 = in0 || (key >= begin && key < end);
        in1 = in1 || (key + KVS_WARP >= begin && key + KVS_WARP < end);
    }
    bits[0] = __ballot_sync(KVS_ALL_LANES, in0);
    bits[1] = __ballot_sync(KVS_ALL_LANES, in1);
}

/* ---- rows of keys and values as float32 ---- */

typedef struct kvs_attn_rows { /* of one KV head */
    const uint8_t *base;
    int64_t stride; /* bytes */
    int32_t type, head_dim;
} kvs_attn_rows;

typedef struct kvs_attn_eight { /* eight values as they were read: what is read early must not be waited for before it is used */
    uint32_t word[8];
} kvs_attn_eight;

/* Values d .. d + 8 of a row for which kvs_kv_in_eights is true, d % 8 == 0; zeros behind the row. */
KVS_DEVICE kvs_attn_eight kvs_attn_read(const kvs_attn_rows &rows, int32_t i, int32_t d) {
    kvs_attn_eight x = {};
    if (d >= rows.head_dim) return x;
    const uint8_t *row = rows.base + i * rows.stride;
    if (rows.type == KVS_TYPE_Q8_0) {
        const uint8_t *block = row + d / 32 * 34, *quants = block + 2 + d % 32;
        x.word[0] = kvs_load2(block);
        x.word[1] = kvs_load2(quants) | (uint32_t)kvs_load2(quants + 2) << 16;
        x.word[2] = kvs_load2(quants + 4) | (uint32_t)kvs_load2(quants + 6) << 16;
        return x;
    }
    int size = rows.type == KVS_TYPE_F32 ? 4 : 2;
    uint4 a = kvs_load16(row + size * d);
    x.word[0] = a.x, x.word[1] = a.y, x.word[2] = a.z, x.word[3] = a.w;
    if (size == 2) return x;
    uint4 b = kvs_load16(row + 4 * d + 16);
    x.word[4] = b.x, x.word[5] = b.y, x.word[6] = b.z, x.word[7] = b.w;
    return x;
}

KVS_DEVICE void kvs_attn_halves(const uint32_t word[4], float out[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 pair = kvs_half2_float2(word[i]);
        out[2 * i] = pair.x;
        out[2 * i + 1] = pair.y;
    }
}

/* The same values as kvs_kv_get gives. to: a multiple of 16 bytes. */
KVS_DEVICE void kvs_attn_store(const kvs_attn_rows &rows, const kvs_attn_eight &x, float *to) {
    float y[8];
    if (rows.type == KVS_TYPE_F32) {
#pragma unroll
        for (int i = 0; i < 8; i++) y[i] = kvs_bits_float(x.word[i]);
    } else if (rows.type == KVS_TYPE_F16)
        kvs_attn_halves(x.word, y);
    else {
        float d = kvs_half_float((uint16_t)x.word[0]);
#pragma unroll
        for (int i = 0; i < 8; i++) y[i] = d * (float)(int8_t)(x.word[1 + i / 4] >> 8 * (i % 4) & 0xff);
    }
    kvs_store_float4(to, make_float4(y[0], y[1], y[2], y[3]));
    kvs_store_float4(to + 4, make_float4(y[4], y[5], y[6], y[7]));
}

/* One value of any row, 0 behind it. */
KVS_DEVICE float kvs_attn_value(const kvs_attn_rows &rows, int32_t i, int32_t d) {
    return d < rows.head_dim ? kvs_kv_get(rows.type, rows.base + i * rows.stride, d) : 0.0f;
}
#endif
