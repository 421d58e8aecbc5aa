/* gemm_tile.cu - products on tensor cores, 128 weights' rows by 128 rows of x in a block of threads: prompts.
 *
 * Four warps have 64 x 64 products each: their operands for 16 columns are 4 KiB of shared memory, 32 mma long, so that reads take less time than
 * products. Columns come in steps of 32, a group of each weights' row. While a step is multiplied, the next one is decoded to halves
 * in the other buffer (between the first and the second half of the products, which keeps tensor cores busy meanwhile), rows of x are copied two
 * steps ahead, and weights are in registers three steps ahead as they lie in memory. 40 KiB of shared memory: two blocks on a multiprocessor,
 * except 7.5. */
#include "gemm.cuh"

enum { TILE = 128, THREADS = 128, STAGES = 3, HALVES = TILE * KVS_GROUP };

typedef struct tile_shared {
    uint16_t x[STAGES][HALVES], w[2][HALVES];
} tile_shared;

/* The rows of x that a thread copies 16 bytes of, every 32nd */
typedef struct tile_copy {
    const uint16_t *from[TILE * 4 / THREADS];
    int spot;
} tile_copy;

KVS_DEVICE tile_copy tile_copy_of(const gemm_args &a, int32_t first) {
    tile_copy c;
    const int row = (int)threadIdx.x / 4, chunk = (int)threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < TILE * 4 / THREADS; i++) {
        const int32_t r = first + row + i * (THREADS / 4); /* behind the last row: that one again, for products that nobody stores */
        c.from[i] = a.halves + (int64_t)KVS_MIN(r, a.n - 1) * a.stride + chunk * 8;
    }
    c.spot = gemm_spot(row, chunk);
    return c;
}

KVS_DEVICE void tile_copy_step(const tile_copy *c, int32_t step, uint16_t *xs) {
#pragma unroll
    for (int i = 0; i < TILE * 4 / THREADS; i++)
        kvs_async16(xs + c->spot + i * (THREADS / 4) * KVS_GROUP, c->from[i] + (int64_t)step * KVS_GROUP);
}

template <int TYPE> KVS_DEVICE void tile_store(const gemm_raw<TYPE> *raw, int32_t group, uint16_t *ws) {
    uint4 halves[4];
    gemm_decode<TYPE>(raw, group, halves);
#pragma unroll
    for (int i = 0; i < 4; i++) kvs_store16(ws + gemm_spot((int)threadIdx.x, i), halves[i]);
}

/* Half of a step: 16 columns. acc[i][j] are 16 rows of x by 8 rows of weights. */
KVS_DEVICE void tile_multiply(float acc[4][8][4], const uint16_t *xs, const uint16_t *ws, int half) {
    const int lane = (int)threadIdx.x % KVS_WARP, warp = (int)threadIdx.x / KVS_WARP;
    uint32_t x[4][4], w[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++) kvs_ldmatrix_x4(x[i], xs + gemm_spot(warp % 2 * 64 + i * 16 + lane % 16, 2 * half + lane / 16));
#pragma unroll
    for (int i = 0; i < 4; i++)
        kvs_ldmatrix_x4(w[i], ws + gemm_spot(warp / 2 * 64 + i * 16 + lane / 16 * 8 + lane % 8, 2 * half + lane / 8 % 2));
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) kvs_mma_f16(acc[i][j], x[i], &w[j / 2][j % 2 * 2]);
}

KVS_DEVICE void tile_put(float *y, float a, float b, int32_t left, bool pairs) { /* left: columns of y from here on */
    if (pairs && left > 1) {
        *(float2 *)(void *)y = make_float2(a, b);
    } else {
        y[0] = a;
        if (left > 1) y[1] = b;
    }
}

KVS_DEVICE void tile_finish(const gemm_args &a, const gemm_at &at, float acc[4][8][4], float factor) {
    const int lane = (int)threadIdx.x % KVS_WARP, warp = (int)threadIdx.x / KVS_WARP;
    const int32_t rows = at.job.rows, row = at.row + warp / 2 * 64 + lane % 4 * 2, first = at.first + warp % 2 * 64 + lane / 4;
    const bool pairs = gemm_aligned(at.job.y, (int64_t)rows * 4, 8);
    float scale[8];
#pragma unroll
    for (int i = 0; i < 8; i++) scale[i] = first + i * 8 < a.n ? a.scales[first + i * 8] * (1.0f / factor) : 0.0f;
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const int32_t r = row + j * 8, left = rows - r;
        if (left <= 0) break;
        const float b0 = at.job.bias ? at.job.bias[r] : 0.0f, b1 = at.job.bias && left > 1 ? at.job.bias[r + 1] : 0.0f;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (first + i * 8 >= a.n) break;
            const float *c = &acc[i / 2][j][i % 2 * 2];
            tile_put(at.job.y + (int64_t)(first + i * 8) * rows + r, fmaf(c[0], scale[i], b0), fmaf(c[1], scale[i], b1), left, pairs);
        }
    }
}

template <int TYPE> static __global__ void __launch_bounds__(THREADS, 2) gemm_tile_kernel(gemm_args a) {
    KVS_DYNAMIC_SHARED(tile_shared, shared);
    uint16_t(*xs)[HALVES] = shared->x, (*ws)[HALVES] = shared->w;
    const gemm_at at = gemm_find<TILE, TILE>(a);
    const int32_t row = KVS_MIN(at.row + (int32_t)threadIdx.x, at.job.rows - 1), steps = (a.cols + KVS_GROUP - 1) / KVS_GROUP;
    const kvs_planes planes = kvs_planes_of<TYPE>(at.job.w + row * at.job.row_bytes, a.cols);
    const tile_copy copy = tile_copy_of(a, at.first);
    gemm_raw<TYPE> raw[2]; /* before step s: of s + 1 in one, s + 2 in the other; behind the last group: that one again, and never used */
    float acc[4][8][4] = {};

    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) tile_copy_step(&copy, s, xs[s]);
        kvs_async_commit();
    }
    gemm_load<TYPE>(&planes, 0, &raw[0]);
    gemm_load<TYPE>(&planes, KVS_MIN(1, steps - 1), &raw[1]);
    tile_store<TYPE>(&raw[0], 0, ws[0]);
    gemm_load<TYPE>(&planes, KVS_MIN(2, steps - 1), &raw[0]);

    int stage = 0; /* step % STAGES */
    for (int32_t begin = 0; begin < steps; begin += 2) {
#pragma unroll
        for (int i = 0; i < 2; i++) { /* buffers have constant addresses, raw stays in registers */
            const int32_t step = begin + i;
            if (step == steps) break;
            kvs_async_wait<STAGES - 2>();
            __syncthreads(); /* what this step reads is there, and nobody reads any more what it overwrites */
            if (step + STAGES - 1 < steps) tile_copy_step(&copy, step + STAGES - 1, xs[stage == 0 ? STAGES - 1 : stage - 1]);
            kvs_async_commit();
            tile_multiply(acc, xs[stage], ws[i], 0);
            tile_store<TYPE>(&raw[1 - i], KVS_MIN(step + 1, steps - 1), ws[1 - i]);
            gemm_load<TYPE>(&planes, KVS_MIN(step + 3, steps - 1), &raw[1 - i]);
            tile_multiply(acc, xs[stage], ws[i], 1);
            stage = stage == STAGES - 1 ? 0 : stage + 1;
        }
    }
    tile_finish(a, at, acc, gemm_factor<TYPE>);
}

template <int TYPE> struct tile_launch {
    static void run(kvs_cuda *cu, const gemm_args *a) {
        KVS_LAUNCH(cu, gemm_tile_kernel<TYPE>, (unsigned)gemm_tiles(a, TILE, TILE), THREADS, sizeof(tile_shared), *a);
    }
};
void gemm_tile(kvs_cuda *cu, const gemm_args *a) { gemm_for_halves<tile_launch>(a->type, cu, a); }
