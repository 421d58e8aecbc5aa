/* gemm_float.cu - products in float32, with weights of any type as quant.c decodes them: for F32, and where nothing may be rounded.
 *
 * SIZE x SIZE products in a block of threads, by columns in steps of 32. Both operands lie in shared memory column by column, so that a thread
 * reads four rows at once: 8 x 8 products (8 x 4 where SIZE is 64) of a thread take 4 reads of 16 bytes (3). While a step is multiplied, the next
 * is in registers. */
#include "gemm.cuh"

enum { QUADS = 4 }; /* of a step's values that a thread loads: SIZE rows x 8, by 2 SIZE threads */

/* Where a row's value of a column is: rows turned by the column, so that lanes that store columns meet different banks. Four rows stay
 * neighbours. */
template <int SIZE> KVS_DEVICE int float_spot(int column, int row) { return column * SIZE + (row ^ (column / 4 * 4)); }

/* Rows of floats: lane by lane 16 bytes, eight lanes for a row's 32 columns */
typedef struct float_rows {
    const float *row[QUADS];
    int32_t cols;
    bool aligned;
} float_rows;

template <int SIZE> KVS_DEVICE float_rows float_rows_of(const float *base, int64_t stride, int32_t first, int32_t n, int32_t cols) {
    float_rows r;
    r.cols = cols;
    r.aligned = gemm_aligned(base, stride * 4, 16);
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        const int32_t row = first + (int32_t)threadIdx.x / 8 + i * (SIZE / 4);
        r.row[i] = base + KVS_MIN(row, n - 1) * stride; /* behind the last: that one again, for products that nobody stores */
    }
    return r;
}

KVS_DEVICE void float_load(const float_rows *r, int32_t step, float4 out[QUADS]) {
#pragma unroll
    for (int i = 0; i < QUADS; i++) out[i] = gemm_four(r->row[i], step * KVS_GROUP + (int32_t)threadIdx.x % 8 * 4, r->cols, r->aligned);
}

template <int SIZE> KVS_DEVICE void float_store(const float4 from[QUADS], float *to) {
    const int column = (int)threadIdx.x % 8 * 4;
#pragma unroll
    for (int i = 0; i < QUADS; i++) {
        const int row = (int)threadIdx.x / 8 + i * (SIZE / 4);
        to[float_spot<SIZE>(column, row)] = from[i].x;
        to[float_spot<SIZE>(column + 1, row)] = from[i].y;
        to[float_spot<SIZE>(column + 2, row)] = from[i].z;
        to[float_spot<SIZE>(column + 3, row)] = from[i].w;
    }
}

/* The weights of a step. F32: as rows of x. Else the first SIZE threads decode a row's group each. */
template <int TYPE, int SIZE> struct float_weights {
    kvs_planes planes;
    gemm_raw<TYPE> raw = {};
    KVS_DEVICE void begin(const gemm_args &a, const gemm_at &at) {
        const int32_t row = KVS_MIN(at.row + (int32_t)threadIdx.x, at.job.rows - 1);
        planes = kvs_planes_of<TYPE>(at.job.w + row * at.job.row_bytes, a.cols);
    }
    KVS_DEVICE void load(int32_t step) {
        if (threadIdx.x < SIZE) gemm_load<TYPE>(&planes, step, &raw);
    }
    KVS_DEVICE void store(int32_t step, float *ws) const {
        if (threadIdx.x >= SIZE) return;
        float values[KVS_GROUP];
        gemm_decode_floats<TYPE>(&raw, step, values);
#pragma unroll
        for (int i = 0; i < KVS_GROUP; i++) ws[float_spot<SIZE>(i, (int)threadIdx.x)] = values[i];
    }
};
template <int SIZE> struct float_weights<KVS_TYPE_F32, SIZE> {
    float_rows rows;
    float4 values[QUADS];
    KVS_DEVICE void begin(const gemm_args &a, const gemm_at &at) {
        rows = float_rows_of<SIZE>((const float *)(const void *)at.job.w, at.job.row_bytes / 4, at.row, at.job.rows, a.cols);
    }
    KVS_DEVICE void load(int32_t step) { float_load(&rows, step, values); }
    KVS_DEVICE void store(int32_t, float *ws) const { float_store<SIZE>(values, ws); }
};

/* Where a thread's products are: rows of weights at w and w + SIZE / 2, of x at n and, where SIZE is 128, n + SIZE / 2, four each */
typedef struct float_place {
    int w, n;
} float_place;

template <int SIZE> KVS_DEVICE float_place float_place_of(void) { /* a warp: 8 x 4 threads, so that it reads 128 and 64 bytes at once */
    const int lane = (int)threadIdx.x % KVS_WARP, warp = (int)threadIdx.x / KVS_WARP;
    return float_place{(warp % (SIZE / 64) * 8 + lane % 8) * 4, (warp / (SIZE / 64) * 4 + lane / 8) * 4};
}

KVS_DEVICE void float_read(const float *from, float out[4]) {
    const float4 four = kvs_load_float4(from);
    out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
}

/* A step's products are added up by themselves first: no chain of sums is longer than 32 and the number of steps. */
template <int SIZE> KVS_DEVICE void float_multiply(float acc[SIZE / 16][8], const float *xs, const float *ws, float_place at) {
    constexpr int N = SIZE / 16;
    float sums[N][8] = {};
    for (int four = 0; four < KVS_GROUP; four += 4) {
#pragma unroll
        for (int k = four; k < four + 4; k++) {
            float x[N], w[8];
            float_read(ws + float_spot<SIZE>(k, at.w), w);
            float_read(ws + float_spot<SIZE>(k, at.w + SIZE / 2), w + 4);
#pragma unroll
            for (int i = 0; i < N; i += 4) float_read(xs + float_spot<SIZE>(k, at.n + i / 4 * (SIZE / 2)), x + i);
#pragma unroll
            for (int i = 0; i < N; i++)
#pragma unroll
                for (int j = 0; j < 8; j++) sums[i][j] = fmaf(x[i], w[j], sums[i][j]);
        }
    }
#pragma unroll
    for (int i = 0; i < N; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) acc[i][j] += sums[i][j];
}

KVS_DEVICE void float_put(float *y, const float acc[4], const float *bias, int32_t left, bool fours) { /* left: columns of y from here on */
    float sums[4];
#pragma unroll
    for (int i = 0; i < 4; i++) sums[i] = acc[i] + (bias && i < left ? bias[i] : 0.0f);
    if (fours && left >= 4) {
        kvs_store_float4(y, make_float4(sums[0], sums[1], sums[2], sums[3]));
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i < left) y[i] = sums[i];
    }
}

template <int TYPE, int SIZE> static __global__ void __launch_bounds__(SIZE * 2) gemm_float_kernel(gemm_args a) {
    KVS_DYNAMIC_SHARED(float, xs);
    float *ws = xs + KVS_GROUP * SIZE;
    constexpr int N = SIZE / 16;
    const gemm_at at = gemm_find<SIZE, SIZE>(a);
    const float_rows rows_x = float_rows_of<SIZE>(a.x, a.cols, at.first, a.n, a.cols);
    const float_place place = float_place_of<SIZE>();
    const int32_t steps = (a.cols + KVS_GROUP - 1) / KVS_GROUP;
    float_weights<TYPE, SIZE> weights;
    float4 x[QUADS];
    float acc[N][8] = {};
    weights.begin(a, at);
    weights.load(0);
    float_load(&rows_x, 0, x);
    for (int32_t step = 0; step < steps; step++) {
        __syncthreads(); /* the step before has been multiplied */
        weights.store(step, ws);
        float_store<SIZE>(x, xs);
        __syncthreads();
        if (step + 1 < steps) {
            weights.load(step + 1);
            float_load(&rows_x, step + 1, x);
        }
        float_multiply<SIZE>(acc, xs, ws, place);
    }
    const bool fours = gemm_aligned(at.job.y, (int64_t)at.job.rows * 4, 16);
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int32_t n = at.first + place.n + i / 4 * (SIZE / 2) + i % 4;
        if (n >= a.n) continue;
#pragma unroll
        for (int j = 0; j < 8; j += 4) {
            const int32_t row = at.row + place.w + j / 4 * (SIZE / 2), left = at.job.rows - row;
            if (left > 0)
                float_put(at.job.y + (int64_t)n * at.job.rows + row, acc[i] + j, at.job.bias ? at.job.bias + row : NULL, left, fours);
        }
    }
}

template <int TYPE, int SIZE> static void launch_float(kvs_cuda *cu, const gemm_args *a) {
    const size_t shared = 2 * KVS_GROUP * SIZE * sizeof(float);
    KVS_LAUNCH(cu, (gemm_float_kernel<TYPE, SIZE>), (unsigned)gemm_tiles(a, SIZE, SIZE), SIZE * 2, shared, *a);
}

template <int TYPE> struct float_launch {
    static void run(kvs_cuda *cu, const gemm_args *a) {
        if constexpr (TYPE == KVS_TYPE_F32) { /* the rest is rare */
            const bool large = gemm_time(a, cu->n_sm, 128, 128, 16, 16) <= gemm_time(a, cu->n_sm, 64, 64, 16, 16);
            if (cu->tile == 128 || (cu->tile == KVS_CUDA_ANY_TILE && large)) {
                launch_float<TYPE, 128>(cu, a);
                return;
            }
        }
        launch_float<TYPE, 64>(cu, a);
    }
};
void gemm_float(kvs_cuda *cu, const gemm_args *a) { kvs_for_types<float_launch>(a->type, cu, a); }
