/* gemm.cuh - what the kernels for many rows of x share: their arguments, and weights on the way from memory to halves.
 *
 * Tensor cores multiply halves and add up in float32. A row of x becomes halves times a power of two, so that its largest magnitude
 * is between 512 and 1024: what is 2^24 times smaller is still not subnormal, and sums stay far from the end of float32.
 *
 * A weight of blocks becomes the half nearest to half(64 d) q - half(64 m): q is exact, so there are two roundings to 11 bits (of d and of
 * the product) and a third where there is a minimum. Why 64: the weights of a 7B model are around 1e-2 and their steps d between
 * 1e-5 and 1e-3, but halves lose bits below 6e-5; times 64 that is 1e-6. The other end is then 1023: a weight, d or m beyond it
 * becomes infinity, and what is multiplied by it infinity or NaN, so that the step fails as one that is not finite; no model has such
 * weights. 64 goes for BF16, too (exact from 1.2e-7 to 1023). F16 is taken as it is. */
#ifndef KVS_GEMM_CUH
#define KVS_GEMM_CUH
#include "cuda.h"
#include "types.cuh"

enum { GEMM_JOBS = 4 };

typedef struct gemm_job {
    float *y;          /* (n, rows) */
    const uint8_t *w;  /* rows of planes */
    const float *bias; /* (rows), or NULL */
    int64_t row_bytes;
    int32_t rows;
} gemm_job;

typedef struct gemm_args {  /* jobs of one type */
    const float *x;         /* (n, cols): for float kernels */
    const uint16_t *halves; /* (n, stride): of x, zeros beyond cols */
    const float *scales;    /* (n): x = scale * half; NaN where the row has a value that is not finite, and zeros for halves */
    int32_t n, cols, stride, type, n_jobs;
    gemm_job jobs[GEMM_JOBS];
} gemm_args;

enum { GEMM_STRIDE = 64 }; /* stride is a multiple of it */

/* By kernel: gemm_tile.cu for many products (size: 128 or 64, rows of x and of weights in a block), gemm_slice.cu for few, gemm_float.cu for
 * float32. They launch. */
void gemm_tile(kvs_cuda *cu, const gemm_args *a, int32_t size);
void gemm_slice(kvs_cuda *cu, const gemm_args *a);
void gemm_float(kvs_cuda *cu, const gemm_args *a);

/* Blocks of threads that it takes when one of them computes (tile_n, tile_rows) of y */
static inline int64_t gemm_tiles(const gemm_args *a, int32_t tile_n, int32_t tile_rows) {
    int64_t tiles = 0;
    for (int32_t i = 0; i < a->n_jobs; i++) tiles += kvs_ceil_div(a->jobs[i].rows, tile_rows);
    return tiles * kvs_ceil_div(a->n, tile_n);
}

/* How long that takes, to compare: on the multiprocessor with the most blocks, products of a column, and what rows of x and of weights cost
 * beside them, as so many. */
static inline int64_t gemm_time(const gemm_args *a, int32_t n_sm, int32_t tile_n, int32_t tile_rows, int32_t per_x, int32_t per_row) {
    return kvs_ceil_div(gemm_tiles(a, tile_n, tile_rows), n_sm) * (tile_n * tile_rows + per_x * tile_n + per_row * tile_rows);
}

/* CALL<TYPE>::run(arguments...) for a type that tensor cores multiply */
template <template <int> class CALL, class... A> static inline void gemm_for_halves(int type, A... args) {
    switch (type) {
    case KVS_TYPE_F16: CALL<KVS_TYPE_F16>::run(args...); break;
    case KVS_TYPE_BF16: CALL<KVS_TYPE_BF16>::run(args...); break;
    default: kvs_for_blocks<CALL>(type, args...);
    }
}

/* ---- kernels ---- */

typedef struct gemm_at { /* where the tile of a block of threads begins */
    gemm_job job;
    int32_t row, first; /* of the weights, of x */
} gemm_at;

/* Tiles of the same weights are neighbours, so that these are read from memory once and then from the L2 cache. */
template <int TILE_N, int TILE_ROWS> KVS_DEVICE gemm_at gemm_find(const gemm_args &a) {
    const int32_t across = (a.n + TILE_N - 1) / TILE_N;
    int32_t tile = (int32_t)blockIdx.x / across;
    gemm_at at;
    at.first = (int32_t)blockIdx.x % across * TILE_N;
    at.job = a.jobs[0];
#pragma unroll
    for (int j = 1; j < GEMM_JOBS; j++) { /* the index is a constant: arguments of a kernel are no array in memory */
        int32_t tiles = (at.job.rows + TILE_ROWS - 1) / TILE_ROWS;
        if (j >= a.n_jobs || tile < tiles) continue;
        tile -= tiles;
        at.job = a.jobs[j];
    }
    at.row = tile * TILE_ROWS;
    return at;
}

/* 32 values of a row as they lie in memory. Who loads several before the first is decoded has that many more bytes under way. */
template <int TYPE, bool IS_FLOAT = kvs_type_is_float(TYPE)> struct gemm_raw { kvs_stored stored; };
template <int TYPE> struct gemm_raw<TYPE, true> { uint4 words[kvs_order_of(TYPE).low / 16]; };

template <int TYPE> KVS_DEVICE void gemm_load(const kvs_planes *planes, int32_t group, gemm_raw<TYPE> *out) {
    if constexpr (kvs_type_is_float(TYPE)) {
        constexpr int bytes = kvs_order_of(TYPE).low;
#pragma unroll
        for (int i = 0; i < bytes / 16; i++) out->words[i] = kvs_load16(planes->low + (int64_t)group * bytes + 16 * i);
    } else {
        kvs_group_load<TYPE>(planes, group, &out->stored);
    }
}

template <int TYPE> constexpr float gemm_factor = TYPE == KVS_TYPE_F16 ? 1.0f : 64.0f; /* of weights as halves */

KVS_DEVICE uint32_t gemm_twice(float x) { return kvs_float2_half2(x, x); }
KVS_DEVICE uint32_t gemm_bf16_halves(uint32_t x, float factor) {
    return kvs_float2_half2(kvs_bits_float(x << 16) * factor, kvs_bits_float(x & 0xffff0000u) * factor);
}

/* Four bytes of values to halves times d, less m. A byte b behind 0x64 is the half 1024 + b, from which 1024 and the offset go again. */
template <int TYPE> KVS_DEVICE uint2 gemm_scaled(uint32_t q, uint32_t d, uint32_t minus_m) {
    constexpr kvs_order o = kvs_order_of(TYPE);
    constexpr uint32_t back = (0xe400u + (o.sign ? 128 : o.offset)) * 0x10001u, one = 0x3c003c00u;
    if constexpr (o.sign) q ^= 0x80808080u;
    const uint32_t low = kvs_half2_fma(kvs_byte_perm(q, 0x64646464u, 0x4140), one, back);
    const uint32_t high = kvs_half2_fma(kvs_byte_perm(q, 0x64646464u, 0x4342), one, back);
    return make_uint2(kvs_half2_fma(low, d, minus_m), kvs_half2_fma(high, d, minus_m));
}

/* The halves of a group times gemm_factor, eight in each of out */
template <int TYPE> KVS_DEVICE void gemm_decode(const gemm_raw<TYPE> *raw, int32_t group, uint4 out[4]) {
    constexpr float factor = gemm_factor<TYPE>;
    if constexpr (TYPE == KVS_TYPE_F16) {
#pragma unroll
        for (int i = 0; i < 4; i++) out[i] = raw->words[i];
    } else if constexpr (TYPE == KVS_TYPE_BF16) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4 w = raw->words[i];
            out[i] = make_uint4(gemm_bf16_halves(w.x, factor), gemm_bf16_halves(w.y, factor), gemm_bf16_halves(w.z, factor),
                                gemm_bf16_halves(w.w, factor));
        }
    } else {
        uint32_t q[8];
        float d[2], m[2];
        kvs_group_words<TYPE>(&raw->stored, q);
        kvs_group_scales<TYPE>(&raw->stored, group, d, m);
        const uint32_t d2[2] = {gemm_twice(d[0] * factor), gemm_twice(d[1] * factor)};
        const uint32_t m2[2] = {gemm_twice(-m[0] * factor), gemm_twice(-m[1] * factor)};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint2 a = gemm_scaled<TYPE>(q[2 * i], d2[i / 2], m2[i / 2]), b = gemm_scaled<TYPE>(q[2 * i + 1], d2[i / 2], m2[i / 2]);
            out[i] = make_uint4(a.x, a.y, b.x, b.y);
        }
    }
}

/* The same as floats, as quant.c decodes them */
template <int TYPE> KVS_DEVICE void gemm_decode_floats(const gemm_raw<TYPE> *raw, int32_t group, float out[KVS_GROUP]) {
    if constexpr (kvs_type_is_float(TYPE)) {
        constexpr int n = kvs_order_of(TYPE).low / 16;
#pragma unroll
        for (int i = 0; i < n; i++) kvs_floats_of<TYPE>(raw->words[i], out + i * (KVS_GROUP / n));
    } else {
        kvs_group_decode_floats<TYPE>(&raw->stored, group, out);
    }
}

/* Rows of 32 halves in shared memory, 64 bytes each: where eight of them begin (chunk 0..3). Turned so that eight lanes that read or write
 * a chunk of eight rows, or all of two rows, meet eight different groups of banks. */
KVS_DEVICE int gemm_spot(int row, int chunk) { return (row * 4 + (chunk ^ (row >> 1 & 3))) * 8; }

/* Four values of a row, zeros beyond cols; aligned: the row begins at a multiple of 16 bytes */
KVS_DEVICE float4 gemm_four(const float *row, int32_t at, int32_t cols, bool aligned) {
    if (aligned && at + 4 <= cols) return kvs_load_float4(row + at);
    return make_float4(at < cols ? row[at] : 0.0f, at + 1 < cols ? row[at + 1] : 0.0f, at + 2 < cols ? row[at + 2] : 0.0f,
                       at + 3 < cols ? row[at + 3] : 0.0f);
}
KVS_DEVICE bool gemm_aligned(const void *p, int64_t stride, int bytes) {
    return ((uintptr_t)p | (uintptr_t)stride) % (uintptr_t)bytes == 0;
}
#endif
