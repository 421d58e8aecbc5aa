/* gemm_tile.cu - products on tensor cores, SIZE weights' rows by SIZE rows of x in a block of threads, 128 or 64: prompts.
 *
 * Four warps have a quarter of them each. Where that is 64 x 64, operands for 16 columns are 4 KiB of shared memory, 32 mma long, so that
 * reads take less time than products. Columns come in steps of so many groups of 32 that each thread has one to decode, of a weights' row:
 * one where SIZE is 128, two where it is 64; so buffers have one size. While a step is multiplied, the next one is decoded to halves in the
 * other buffer (between the first and the second half of the products, which keeps tensor cores busy meanwhile), rows of x are copied two
 * steps ahead, and weights are in registers three steps ahead as they lie in memory. 40 KiB of shared memory: two blocks on a
 * multiprocessor, except 7.5; three of 64 x 64 where there is more of it.
 *
 * Sums are added up in the order of columns, whatever SIZE is: not a bit depends on it. */
#include "gemm.cuh"

enum { THREADS = 128, STAGES = 3, HALVES = THREADS * KVS_GROUP };

typedef struct tile_shared {
    uint16_t x[STAGES][HALVES], w[2][HALVES]; /* each (groups of a step, SIZE, KVS_GROUP) */
} tile_shared;

template <int SIZE> struct tile {
    static constexpr int GROUPS = THREADS / SIZE;                         /* of a step */
    static constexpr int WARP = SIZE / 2;                                 /* rows of x, and of weights, that a warp multiplies */
    static constexpr int X16 = WARP / 16, W8 = WARP / 8, W16 = WARP / 16; /* the same by so many */
    static constexpr int COPIES = SIZE * 4 / THREADS;                     /* rows of x that a thread copies 16 bytes of, every 32nd */
    static constexpr int BLOCKS = SIZE == 128 ? 2 : 3;                    /* on a multiprocessor, for which there are registers */
    static_assert(GROUPS * KVS_GROUP <= GEMM_STRIDE, "x has zeros behind the last group");
};

template <int SIZE> struct tile_copy {
    const uint16_t *from[tile<SIZE>::COPIES];
    int spot;
};

template <int SIZE> KVS_DEVICE tile_copy<SIZE> tile_copy_of(const gemm_args &a, int32_t first) {
    tile_copy<SIZE> c;
    const int row = (int)threadIdx.x / 4, chunk = (int)threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < tile<SIZE>::COPIES; i++) {
        const int32_t r = first + row + i * (THREADS / 4); /* behind the last row: that one again, for products that nobody stores */
        c.from[i] = a.halves + (int64_t)KVS_MIN(r, a.n - 1) * a.stride + chunk * 8;
    }
    c.spot = gemm_spot(row, chunk);
    return c;
}

template <int SIZE> KVS_DEVICE void tile_copy_step(const tile_copy<SIZE> *c, int32_t step, uint16_t *xs) {
    constexpr int GROUPS = tile<SIZE>::GROUPS;
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int i = 0; i < tile<SIZE>::COPIES; i++)
            kvs_async16(xs + group * SIZE * KVS_GROUP + c->spot + i * (THREADS / 4) * KVS_GROUP,
                        c->from[i] + ((int64_t)step * GROUPS + group) * KVS_GROUP);
}

/* A thread's group of a step. Behind the last group: that one again, where x has zeros, or it is not used. */
template <int SIZE> KVS_DEVICE int32_t tile_group(int32_t step, int32_t groups) {
    constexpr int GROUPS = tile<SIZE>::GROUPS;
    if (GROUPS == 1 && !step) return 0; /* a constant: registers are few */
    return KVS_MIN(GROUPS == 1 ? step : step * GROUPS + (int32_t)threadIdx.x / SIZE, groups - 1);
}

template <int TYPE> KVS_DEVICE void tile_store(const gemm_raw<TYPE> *raw, int32_t group, uint16_t *ws) {
    uint4 halves[4];
    gemm_decode<TYPE>(raw, group, halves);
#pragma unroll
    for (int i = 0; i < 4; i++) kvs_store16(ws + gemm_spot((int)threadIdx.x, i), halves[i]); /* groups of SIZE rows follow each other */
}

/* 16 columns: half of a group. acc[i][j] are 16 rows of x by 8 rows of weights. */
template <int SIZE>
KVS_DEVICE void tile_multiply(float acc[tile<SIZE>::X16][tile<SIZE>::W8][4], const uint16_t *xs, const uint16_t *ws, int half) {
    typedef tile<SIZE> is;
    const int lane = (int)threadIdx.x % KVS_WARP, warp = (int)threadIdx.x / KVS_WARP, at = half / 2 * SIZE, chunk = half % 2 * 2;
    uint32_t x[is::X16][4], w[is::W16][4];
#pragma unroll
    for (int i = 0; i < is::X16; i++)
        kvs_ldmatrix_x4(x[i], xs + gemm_spot(at + warp % 2 * is::WARP + i * 16 + lane % 16, chunk + lane / 16));
#pragma unroll
    for (int i = 0; i < is::W16; i++)
        kvs_ldmatrix_x4(w[i], ws + gemm_spot(at + warp / 2 * is::WARP + i * 16 + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
#pragma unroll
    for (int i = 0; i < is::X16; i++)
#pragma unroll
        for (int j = 0; j < is::W8; j++) kvs_mma_f16(acc[i][j], x[i], &w[j / 2][j % 2 * 2]);
}

KVS_DEVICE void tile_put(float *y, float a, float b, int32_t left, bool pairs) { /* left: columns of y from here on */
    if (pairs && left > 1) {
        *(float2 *)(void *)y = make_float2(a, b);
    } else {
        y[0] = a;
        if (left > 1) y[1] = b;
    }
}

template <int SIZE>
KVS_DEVICE void tile_finish(const gemm_args &a, const gemm_at &at, float acc[tile<SIZE>::X16][tile<SIZE>::W8][4], float factor) {
    typedef tile<SIZE> is;
    const int lane = (int)threadIdx.x % KVS_WARP, warp = (int)threadIdx.x / KVS_WARP;
    const int32_t rows = at.job.rows, row = at.row + warp / 2 * is::WARP + lane % 4 * 2, first = at.first + warp % 2 * is::WARP + lane / 4;
    const bool pairs = gemm_aligned(at.job.y, (int64_t)rows * 4, 8);
    float scale[2 * is::X16];
#pragma unroll
    for (int i = 0; i < 2 * is::X16; i++) scale[i] = first + i * 8 < a.n ? a.scales[first + i * 8] * (1.0f / factor) : 0.0f;
#pragma unroll
    for (int j = 0; j < is::W8; j++) {
        const int32_t r = row + j * 8, left = rows - r;
        if (left <= 0) break;
        const float b0 = at.job.bias ? at.job.bias[r] : 0.0f, b1 = at.job.bias && left > 1 ? at.job.bias[r + 1] : 0.0f;
#pragma unroll
        for (int i = 0; i < 2 * is::X16; i++) {
            if (first + i * 8 >= a.n) break;
            const float *c = &acc[i / 2][j][i % 2 * 2];
            tile_put(at.job.y + (int64_t)(first + i * 8) * rows + r, fmaf(c[0], scale[i], b0), fmaf(c[1], scale[i], b1), left, pairs);
        }
    }
}

template <int TYPE, int SIZE> static __global__ void __launch_bounds__(THREADS, tile<SIZE>::BLOCKS) gemm_tile_kernel(gemm_args a) {
    typedef tile<SIZE> is;
    KVS_DYNAMIC_SHARED(tile_shared, shared);
    uint16_t(*xs)[HALVES] = shared->x, (*ws)[HALVES] = shared->w;
    const gemm_at at = gemm_find<SIZE, SIZE>(a);
    const int32_t row = KVS_MIN(at.row + (int32_t)threadIdx.x % SIZE, at.job.rows - 1), groups = (a.cols + KVS_GROUP - 1) / KVS_GROUP;
    const int32_t steps = (groups + is::GROUPS - 1) / is::GROUPS;
    const kvs_planes planes = kvs_planes_of<TYPE>(at.job.w + row * at.job.row_bytes, a.cols);
    const tile_copy<SIZE> copy = tile_copy_of<SIZE>(a, at.first);
    gemm_raw<TYPE> raw[2]; /* before step s: of s + 1 in one, s + 2 in the other */
    float acc[is::X16][is::W8][4] = {};

    for (int s = 0; s < STAGES - 1; s++) {
        if (s < steps) tile_copy_step<SIZE>(&copy, s, xs[s]);
        kvs_async_commit();
    }
    gemm_load<TYPE>(&planes, tile_group<SIZE>(0, groups), &raw[0]);
    gemm_load<TYPE>(&planes, tile_group<SIZE>(1, groups), &raw[1]);
    tile_store<TYPE>(&raw[0], tile_group<SIZE>(0, groups), ws[0]);
    gemm_load<TYPE>(&planes, tile_group<SIZE>(2, groups), &raw[0]);

    int stage = 0; /* step % STAGES */
    for (int32_t begin = 0; begin < steps; begin += 2) {
#pragma unroll
        for (int i = 0; i < 2; i++) { /* buffers have constant addresses, raw stays in registers */
            const int32_t step = begin + i;
            if (step == steps) break;
            kvs_async_wait<STAGES - 2>();
            __syncthreads(); /* what this step reads is there, and nobody reads any more what it overwrites */
            if (step + STAGES - 1 < steps) tile_copy_step<SIZE>(&copy, step + STAGES - 1, xs[stage == 0 ? STAGES - 1 : stage - 1]);
            kvs_async_commit();
#pragma unroll
            for (int half = 0; half < is::GROUPS; half++) tile_multiply<SIZE>(acc, xs[stage], ws[i], half);
            tile_store<TYPE>(&raw[1 - i], tile_group<SIZE>(step + 1, groups), ws[1 - i]);
            gemm_load<TYPE>(&planes, tile_group<SIZE>(step + 3, groups), &raw[1 - i]);
#pragma unroll
            for (int half = is::GROUPS; half < 2 * is::GROUPS; half++) tile_multiply<SIZE>(acc, xs[stage], ws[i], half);
            stage = stage == STAGES - 1 ? 0 : stage + 1;
        }
    }
    tile_finish<SIZE>(a, at, acc, gemm_factor<TYPE>);
}

template <int TYPE> struct tile_launch {
    template <int SIZE> static void start(kvs_cuda *cu, const gemm_args *a) {
        KVS_LAUNCH(cu, (gemm_tile_kernel<TYPE, SIZE>), (unsigned)gemm_tiles(a, SIZE, SIZE), THREADS, sizeof(tile_shared), *a);
    }
    static void run(kvs_cuda *cu, const gemm_args *a, int32_t size) { size == 128 ? start<128>(cu, a) : start<64>(cu, a); }
};
void gemm_tile(kvs_cuda *cu, const gemm_args *a, int32_t size) { gemm_for_halves<tile_launch>(a->type, cu, a, size); }
