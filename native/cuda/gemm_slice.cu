/* gemm_slice.cu - products on tensor cores where there are too few for gemm_tile.cu: short prompts, small matrices.
 *
 * Here time goes by waiting for weights, so that as many loads as possible are under way, and no warp waits for another: a block of threads
 * has 32 rows of weights and up to 64 of x, and each of its eight warps computes all of these products over an eighth of the columns. What they
 * have is added up at the end, always in the same order.
 *
 * A lane decodes a group of one row, and the warp exchanges them through shared memory of its own. The order of columns within
 * an mma is free as long as both operands have the same: so a lane takes eight neighbouring columns, 8 t to 8 t + 7 of 32 with t = lane % 4,
 * which are its operands of two mma. Thus rows of x come from the L2 cache to where they are needed, 16 bytes at a time. */
#include "gemm.cuh"

enum { SLICES = 8, THREADS = SLICES * KVS_WARP, ROWS = 32, SUMS_STRIDE = ROWS + 4 /* lanes of a warp write to 32 banks */ };

/* The groups that a warp multiplies: pairs, every eighth one. Neighbouring groups are neighbouring bytes. The last may be beyond the row, where
 * x has zeros. */
KVS_DEVICE int32_t slice_steps(int32_t groups, int warp) { return ((groups + 1) / 2 - warp + SLICES - 1) / SLICES * 2; }
KVS_DEVICE int32_t slice_group(int32_t step, int warp) { return (step / 2 * SLICES + warp) * 2 + step % 2; }

/* Where a lane's rows of x are: every eighth of them */
template <int N8> struct slice_x {
    const uint16_t *from;
    int32_t at[N8]; /* behind the last row: that one again */
    int32_t last;   /* group of a row */
};

template <int N8> KVS_DEVICE slice_x<N8> slice_x_of(const gemm_args &a, int32_t first) {
    const int lane = (int)threadIdx.x % KVS_WARP;
    slice_x<N8> x;
    x.from = a.halves + (int64_t)first * a.stride + lane % 4 * 8;
    x.last = a.stride / KVS_GROUP - 1;
#pragma unroll
    for (int j = 0; j < N8; j++) x.at[j] = KVS_MIN(j * 8 + lane / 4, a.n - first - 1) * a.stride;
    return x;
}

template <int N8> KVS_DEVICE void slice_load_x(const slice_x<N8> *x, int32_t group, uint4 out[N8]) {
    const uint16_t *from = x->from + KVS_MIN(group, x->last) * KVS_GROUP;
#pragma unroll
    for (int j = 0; j < N8; j++) out[j] = kvs_load16(from + x->at[j]);
}

/* ws: halves of 32 rows of weights and 32 columns. acc[i][j] are 16 rows of weights by 8 of x. */
template <int N8> KVS_DEVICE void slice_multiply(float acc[2][N8][4], const uint16_t *ws, const uint4 x[N8]) {
    const int lane = (int)threadIdx.x % KVS_WARP, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint4 a = kvs_load16(ws + gemm_spot(i * 16 + g, t)), b = kvs_load16(ws + gemm_spot(i * 16 + 8 + g, t));
        const uint32_t w[2][4] = {{a.x, b.x, a.y, b.y}, {a.z, b.z, a.w, b.w}};
#pragma unroll
        for (int j = 0; j < N8; j++) {
            const uint32_t xs[2][2] = {{x[j].x, x[j].y}, {x[j].z, x[j].w}};
            kvs_mma_f16(acc[i][j], w[0], xs[0]);
            kvs_mma_f16(acc[i][j], w[1], xs[1]);
        }
    }
}

/* Sums of so many rows of x are added up at once. */
KVS_SHARED constexpr int slice_sums(int n8) { return n8 < 4 ? n8 * 8 : 32; }
KVS_SHARED constexpr int slice_shared(int n8) { return SLICES * slice_sums(n8) * SUMS_STRIDE * (int)sizeof(float); } /* bytes */
static_assert(slice_shared(2) >= SLICES * ROWS * KVS_GROUP * (int)sizeof(uint16_t), "room for halves of weights, too");

/* Adds up what the warps have. sums: (SLICES, SUMS, SUMS_STRIDE) */
template <int TYPE, int N8> KVS_DEVICE void slice_finish(const gemm_args &a, const gemm_at &at, float acc[2][N8][4], float *sums) {
    constexpr int SUMS = slice_sums(N8);
    const int lane = (int)threadIdx.x % KVS_WARP, warp = (int)threadIdx.x / KVS_WARP;
#pragma unroll
    for (int begin = 0; begin < N8 * 8; begin += SUMS) {
        __syncthreads(); /* nobody needs any more what stands in sums */
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < SUMS / 8; j++)
#pragma unroll
                for (int k = 0; k < 4; k++)
                    sums[(warp * SUMS + j * 8 + lane % 4 * 2 + k % 2) * SUMS_STRIDE + i * 16 + k / 2 * 8 + lane / 4] =
                        acc[i][begin / 8 + j][k];
        __syncthreads();
        for (int i = (int)threadIdx.x; i < SUMS * ROWS; i += THREADS) {
            const int32_t n = at.first + begin + i / ROWS, row = at.row + i % ROWS;
            if (n >= a.n || row >= at.job.rows) continue;
            float sum = 0.0f;
#pragma unroll
            for (int s = 0; s < SLICES; s++) sum += sums[(s * SUMS + i / ROWS) * SUMS_STRIDE + i % ROWS];
            at.job.y[(int64_t)n * at.job.rows + row] =
                fmaf(sum, a.scales[n] * (1.0f / gemm_factor<TYPE>), at.job.bias ? at.job.bias[row] : 0.0f);
        }
    }
}

/* N8: rows of x by eight. 16 of them take so few registers that two blocks fit a multiprocessor. */
template <int TYPE, int N8> static __global__ void __launch_bounds__(THREADS, N8 == 2 ? 2 : 1) gemm_slice_kernel(gemm_args a) {
    constexpr int AHEAD = kvs_type_is_float(TYPE) ? 2 : 4;
    KVS_DYNAMIC_SHARED(float, sums); /* and before, halves of weights */
    const int lane = (int)threadIdx.x % KVS_WARP, warp = (int)threadIdx.x / KVS_WARP;
    uint16_t *ws = (uint16_t *)(void *)sums + warp * ROWS * KVS_GROUP;
    const gemm_at at = gemm_find<N8 * 8, ROWS>(a);
    const int32_t row = KVS_MIN(at.row + lane, at.job.rows - 1), groups = (a.cols + KVS_GROUP - 1) / KVS_GROUP;
    const kvs_planes planes = kvs_planes_of<TYPE>(at.job.w + row * at.job.row_bytes, a.cols);
    const slice_x<N8> rows_x = slice_x_of<N8>(a, at.first);
    gemm_raw<TYPE> raw[AHEAD]; /* behind the last group: that one again */
    uint4 x[2][N8];
    float acc[2][N8][4] = {};

    kvs_let_next_begin();
#pragma unroll
    for (int i = 0; i < AHEAD; i++) gemm_load<TYPE>(&planes, KVS_MIN(slice_group(i, warp), groups - 1), &raw[i]);
    kvs_await_previous();
    slice_load_x<N8>(&rows_x, slice_group(0, warp), x[0]);
    const int32_t steps = slice_steps(groups, warp);
    for (int32_t begin = 0; begin < steps; begin += AHEAD) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++) { /* raw and x stay in registers */
            const int32_t step = begin + i;
            if (step >= steps) break; /* all lanes of the warp */
            slice_load_x<N8>(&rows_x, slice_group(step + 1, warp), x[1 - i % 2]);
            uint4 halves[4];
            gemm_decode<TYPE>(&raw[i], KVS_MIN(slice_group(step, warp), groups - 1), halves);
            __syncwarp(); /* the step before has been read */
#pragma unroll
            for (int k = 0; k < 4; k++) kvs_store16(ws + gemm_spot(lane, k), halves[k]);
            __syncwarp();
            gemm_load<TYPE>(&planes, KVS_MIN(slice_group(step + AHEAD, warp), groups - 1), &raw[i]);
            slice_multiply<N8>(acc, ws, x[i % 2]);
        }
    }
    slice_finish<TYPE, N8>(a, at, acc, sums);
}

template <int TYPE, int N8> static void launch_slices(kvs_cuda *cu, const gemm_args *a) {
    KVS_LAUNCH_EARLY(cu, (gemm_slice_kernel<TYPE, N8>), (unsigned)gemm_tiles(a, N8 * 8, ROWS), THREADS, slice_shared(N8), *a);
}
template <int TYPE> struct slice_launch {
    static void run(kvs_cuda *cu, const gemm_args *a) {
        if (a->n <= 16)
            launch_slices<TYPE, 2>(cu, a);
        else if (a->n <= 32)
            launch_slices<TYPE, 4>(cu, a);
        else
            launch_slices<TYPE, 8>(cu, a);
    }
};
void gemm_slice(kvs_cuda *cu, const gemm_args *a) { gemm_for_halves<slice_launch>(a->type, cu, a); }
