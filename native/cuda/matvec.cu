/* matvec.cu - products of few activation rows: bound by how fast weights come from memory, so every weight is read once, and many loads are
 * under way. A warp has one or two weight rows, or a part of them where rows are long; its lanes take groups in turn.
 *
 * Types of blocks: activations are rounded to int8 first, in blocks of 32 with a float32 scale each, and a group's product is
 *     sum += d_x (d isum - m xsum)
 * with integer isum and xsum, which is exact but for these few operations. Other types, and where rounding is not allowed: float32.
 *
 * The result of an activation row does not depend on its neighbours: lanes, order and operations are the same for any number of rows, and
 * every fused operation is spelled out, so that no compiler fuses more in one kernel than in another. */
#include "ops.cuh"

enum { WARPS = 4, THREADS = WARPS * KVS_WARP };

/* ---- activations ---- */

/* One warp per group */
static __global__ void __launch_bounds__(THREADS) quantize_kernel(kvs_matvec_args a) {
    const int64_t groups = a.cols / KVS_GROUP, i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) / KVS_WARP;
    kvs_let_next_begin();
    kvs_await_previous();
    if (i < a.n * groups) kvs_act_put_group(a.tiles, i / groups, i % groups, a.x[i * KVS_GROUP + threadIdx.x % KVS_WARP]);
}

/* One thread per value */
static __global__ void __launch_bounds__(THREADS) pad_kernel(kvs_matvec_args a) {
    const int64_t width = kvs_groups(a.cols) * KVS_GROUP, i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    if (i < a.n * width) a.padded[i] = i % width < a.cols ? a.x[i / width * a.cols + i % width] : 0.0f;
}

/* ---- what all kernels share ---- */

/* The job of this block, and this warp's first row of it; false: it has none. Where warps share rows, all of a block have some, or none. */
template <int ROWS> KVS_DEVICE bool find_rows(const kvs_matvec_args &a, kvs_matvec_job *job, int32_t *row) {
    *job = a.jobs[0];
#pragma unroll
    for (int i = 1; i < KVS_MATVEC_JOBS; i++) /* an index that is not known would put the arguments into local memory */
        if (i < a.n_jobs && (int32_t)blockIdx.x >= a.jobs[i].first) *job = a.jobs[i];
    const int32_t block = (int32_t)blockIdx.x - job->first, warp = (int32_t)(threadIdx.x / KVS_WARP);
    *row = (a.parts == 1 ? block * WARPS + warp : block) * ROWS;
    return *row < job->rows;
}

/* sums (ROWS, N): of this lane */
template <int N, int ROWS>
static KVS_DEVICE void put_sums(const kvs_matvec_args &a, const kvs_matvec_job &job, int32_t row, const float sums[ROWS][N]) {
    __shared__ float shared[WARPS][ROWS * N];
    const int lane = threadIdx.x % KVS_WARP, warp = threadIdx.x / KVS_WARP;
    float mine = 0.0f; /* lane r N + i has that one */
#pragma unroll
    for (int k = 0; k < ROWS * N; k++) {
        const float sum = kvs_warp_sum(sums[k / N][k % N]);
        if (lane == k) mine = sum;
    }
    if (a.parts > 1) {
        if (lane < ROWS * N) shared[warp][lane] = mine;
        __syncthreads();
        if (warp || lane >= ROWS * N) return;
        for (int w = 1; w < WARPS; w++) mine = __fadd_rn(mine, shared[w][lane]);
    }
    const int32_t r = lane / N, i = lane % N;
    if (r < ROWS && row + r < job.rows && i < a.n)
        job.y[(int64_t)i * job.rows + row + r] = job.bias ? __fadd_rn(mine, job.bias[row + r]) : mine;
}

/* What a lane takes at a time: 16 bytes of F32, F16, BF16; else a group. unit: a multiple of KVS_WARP */
template <int TYPE> KVS_SHARED constexpr int unit_values(void) {
    return kvs_type_is_float(TYPE) ? 512 / kvs_order_of(TYPE).low : KVS_GROUP;
}
template <int TYPE> KVS_DEVICE void load_unit(const kvs_planes *planes, int32_t unit, kvs_stored *out) {
    if constexpr (kvs_type_is_float(TYPE))
        out->low = kvs_load16_once(planes->low + 16 * unit);
    else
        kvs_group_load<TYPE, true>(planes, unit, out);
}

template <int TYPE> KVS_DEVICE void advance(kvs_planes *p, int32_t units) { /* a multiple of KVS_WARP */
    constexpr kvs_order o = kvs_order_of(TYPE);
    p->low += units * (kvs_type_is_float(TYPE) ? 16 : o.low);
    p->high += units * o.high;
    p->scales += units * o.scales;
    p->record += units / (o.block / KVS_GROUP) * o.record;
}
/* The planes of this lane's units: its first one is unit 0 of them. */
template <int TYPE> KVS_DEVICE kvs_planes planes_of_lane(const kvs_matvec_args &a, const kvs_matvec_job &job, int32_t row) {
    constexpr kvs_order o = kvs_order_of(TYPE);
    const int lane = threadIdx.x % KVS_WARP;
    const uint8_t *w = job.w + KVS_MIN(row, job.rows - 1) * job.row_bytes;
    return kvs_planes{w + lane * (kvs_type_is_float(TYPE) ? 16 : o.low), w + a.at.high + lane * o.high, w + a.at.scales + lane * o.scales,
                      w + a.at.record + lane / (o.block / KVS_GROUP) * o.record};
}

/* The loop of a warp over its rows. Each step is UNROLL units of a lane; while one is computed with, the next is on its way. */
template <int TYPE, int ROWS, int UNROLL> struct weight_stream {
    enum { STEP = KVS_WARP * UNROLL };
    kvs_planes planes[ROWS];
    int32_t begin, units; /* of a row, this warp's; begin is a multiple of KVS_WARP */

    KVS_DEVICE void open(const kvs_matvec_args &a, const kvs_matvec_job &job, int32_t row) {
        begin = a.parts == 1 ? 0 : (int32_t)(threadIdx.x / KVS_WARP) * a.share;
        units = KVS_MIN(a.share, a.units - begin);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            planes[r] = planes_of_lane<TYPE>(a, job, row + r);
            advance<TYPE>(&planes[r], begin);
        }
    }
    KVS_DEVICE void load(int32_t first, kvs_stored out[UNROLL][ROWS]) { /* first: rises by STEP from call to call */
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            if (first + KVS_WARP * u + (int32_t)(threadIdx.x % KVS_WARP) >= units) continue; /* then out stays what it was */
#pragma unroll
            for (int r = 0; r < ROWS; r++) load_unit<TYPE>(&planes[r], KVS_WARP * u, &out[u][r]);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) advance<TYPE>(&planes[r], STEP);
    }
    /* add(u, stored, inside) for every unit: inside is false for lanes behind the last unit of a row, whose stored is old */
    template <class F> KVS_DEVICE void compute(int32_t first, const kvs_stored stored[UNROLL][ROWS], F add) const {
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int32_t at = first + KVS_WARP * u;
            if (at < units) add(u, stored[u], at + (int32_t)(threadIdx.x % KVS_WARP) < units);
        }
    }
    template <class F, class S> KVS_DEVICE void run(F add, S step) {
        kvs_stored even[UNROLL][ROWS] = {}, odd[UNROLL][ROWS] = {};
        load(0, even); /* weights were there before the step */
        load(STEP, odd);
        kvs_await_previous();
        for (int32_t first = 0;;) {
            compute(first, even, add);
            step();
            if ((first += STEP) >= units) return;
            load(first + STEP, even);
            compute(first, odd, add);
            step();
            if ((first += STEP) >= units) return;
            load(first + STEP, odd);
        }
    }
};

/* ---- integers ---- */

/* d isum - m xsum of a group; q, d, m: of the weights as kvs_group_words and kvs_group_scales give them; sum, sums: of the activations */
template <int TYPE>
KVS_DEVICE float group_product(const uint32_t q[8], const float d[2], const float m[2], const uint4 &low, const uint4 &high, float sum,
                               uint32_t sums) {
    constexpr kvs_order o = kvs_order_of(TYPE);
    const int x0 = (int16_t)(sums & 0xffff), x1 = (int32_t)sums >> 16;
    const int from0 = o.halves ? -o.offset * x0 : 0, from1 = o.halves ? -o.offset * x1 : 0;
    const int s0 = kvs_dp4a(q[3], low.w, kvs_dp4a(q[2], low.z, kvs_dp4a(q[1], low.y, kvs_dp4a(q[0], low.x, from0))));
    const int s1 = kvs_dp4a(q[7], high.w, kvs_dp4a(q[6], high.z, kvs_dp4a(q[5], high.y, kvs_dp4a(q[4], high.x, from1))));
    if constexpr (o.halves) {
        float product = fmaf(d[0], (float)s0, __fmul_rn(d[1], (float)s1));
        if constexpr (o.minimum) product = fmaf(-m[0], (float)x0, fmaf(-m[1], (float)x1, product));
        return product;
    } else if constexpr (o.minimum) {
        return fmaf(d[0], (float)(s0 + s1), -__fmul_rn(m[0], sum));
    } else {
        return __fmul_rn(d[0], fmaf(-(float)o.offset, sum, (float)(s0 + s1))); /* whole numbers: exact */
    }
}

/* Where a lane reads tiles: pointers of its own, else their sums would be computed anew for every load */
typedef struct lane_tiles {
    const uint8_t *low, *scale, *sums;
} lane_tiles;

KVS_DEVICE lane_tiles tiles_of_lane(const kvs_act_tile *tile) {
    const int lane = threadIdx.x % KVS_WARP;
    return lane_tiles{tile->low[lane], (const uint8_t *)tile->scale[lane], (const uint8_t *)tile->sums[lane]};
}

/* A group of each of ROWS weight rows times N activation rows, tile tiles after where x stands; inside: else the sums stay as they are */
template <int TYPE, int N, int ROWS>
KVS_DEVICE void add_group(const kvs_stored stored[ROWS], const lane_tiles &x, int tile, bool inside, float sums[ROWS][N]) {
    const int lane = threadIdx.x % KVS_WARP;
    uint32_t q[ROWS][8];
    float d[ROWS][2], m[ROWS][2];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        kvs_group_words<TYPE>(&stored[r], q[r]);
        kvs_group_scales<TYPE>(&stored[r], lane, d[r], m[r]); /* of lane's group: they are KVS_WARP apart, a multiple of 8 */
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int at = (tile + i) * (int)sizeof(kvs_act_tile);
        const uint4 low = kvs_load16(x.low + at), high = kvs_load16(x.low + at + sizeof(kvs_act_tile::low));
        const uint2 scale = kvs_load8(x.scale + at);
        uint32_t halves = 0;
        if constexpr (kvs_order_of(TYPE).halves) halves = kvs_load4(x.sums + at);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float product = group_product<TYPE>(q[r], d[r], m[r], low, high, kvs_bits_float(scale.y), halves);
            const float sum = fmaf(kvs_bits_float(scale.x), product, sums[r][i]);
            if (inside) sums[r][i] = sum;
        }
    }
}

/* Blocks of a multiprocessor that registers must do for: warps enough to wait for memory. More planes want more of them. */
constexpr int blocks_for(int type, int n) { return n > 2 ? 4 : (n == 1 ? 8 : 5) - (kvs_order_of(type).high != 0); }

template <int TYPE, int N, int ROWS, int UNROLL>
static __global__ void __launch_bounds__(THREADS, blocks_for(TYPE, N)) matvec_int8_kernel(kvs_matvec_args a) {
    kvs_matvec_job job;
    int32_t row;
    kvs_let_next_begin();
    if (!find_rows<ROWS>(a, &job, &row)) return;
    weight_stream<TYPE, ROWS, UNROLL> weights;
    weights.open(a, job, row);
    lane_tiles x = tiles_of_lane(a.tiles.p + weights.begin / KVS_WARP * N);
    float sums[ROWS][N] = {};
    weights.run([&](int u, const kvs_stored *stored, bool inside) { add_group<TYPE, N, ROWS>(stored, x, u * N, inside, sums); },
                [&]() {
                    constexpr int step = UNROLL * N * (int)sizeof(kvs_act_tile);
                    x.low += step;
                    x.scale += step;
                    x.sums += step;
                });
    put_sums<N, ROWS>(a, job, row, sums);
}

/* ---- float32 ---- */

/* x: the first activation row where this unit begins; the others are stride values apart */
template <int TYPE, int N, int ROWS>
KVS_DEVICE void add_unit(const kvs_stored stored[ROWS], const float *x, int64_t stride, int32_t n, float sums[ROWS][N]) {
    constexpr int values = unit_values<TYPE>();
    const int lane = threadIdx.x % KVS_WARP;
    float w[ROWS][values];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        if constexpr (kvs_type_is_float(TYPE))
            kvs_floats_of<TYPE>(stored[r].low, w[r]);
        else
            kvs_group_decode_floats<TYPE>(&stored[r], lane, w[r]);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        const float *from = x + KVS_MIN(i, n - 1) * stride;
#pragma unroll
        for (int k = 0; k < values; k += 4) {
            const uint4 four = kvs_load16(from + k);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                float sum = fmaf(w[r][k], kvs_bits_float(four.x), sums[r][i]);
                sum = fmaf(w[r][k + 1], kvs_bits_float(four.y), sum);
                sum = fmaf(w[r][k + 2], kvs_bits_float(four.z), sum);
                sums[r][i] = fmaf(w[r][k + 3], kvs_bits_float(four.w), sum);
            }
        }
    }
}

template <int TYPE, int N, int ROWS, int UNROLL> static __global__ void __launch_bounds__(THREADS) matvec_float_kernel(kvs_matvec_args a) {
    kvs_matvec_job job;
    int32_t row;
    kvs_let_next_begin();
    if (!find_rows<ROWS>(a, &job, &row)) return;
    constexpr int width = KVS_WARP * unit_values<TYPE>(); /* columns of a warp */
    weight_stream<TYPE, ROWS, UNROLL> weights;
    weights.open(a, job, row);
    const int64_t stride = a.padded ? kvs_groups(a.cols) * KVS_GROUP : a.cols;
    const float *x = (a.padded ? a.padded : a.x) + (weights.begin + threadIdx.x % KVS_WARP) * (int64_t)unit_values<TYPE>();
    float sums[ROWS][N] = {};
    weights.run(
        [&](int u, const kvs_stored *stored, bool inside) { /* outside there are no activations to load */
                                                            if (inside) add_unit<TYPE, N, ROWS>(stored, x + u * width, stride, a.n, sums);
        },
        [&]() { x += UNROLL * width; });
    put_sums<N, ROWS>(a, job, row, sums);
}

/* ---- launches: one for all jobs of the same kind ---- */

/* Rows of many units are shared by the warps of a block: short work for each, so that the last blocks of a launch are not waited for long. */
template <int TYPE> static unsigned plan(kvs_matvec_args *a, int rows_of_warp) {
    enum { LONG = 8 };
    a->at = kvs_planes_at(TYPE, a->cols);
    a->units = (int32_t)kvs_ceil_div(a->cols, unit_values<TYPE>());
    const int32_t tiles = (int32_t)kvs_ceil_div(a->units, KVS_WARP);
    a->parts = tiles >= LONG ? WARPS : 1;
    a->share = (int32_t)kvs_ceil_div(tiles, a->parts) * KVS_WARP;
    int32_t blocks = 0;
    for (int i = 0; i < a->n_jobs; i++) {
        a->jobs[i].first = blocks;
        blocks += (int32_t)kvs_ceil_div(a->jobs[i].rows, rows_of_warp * (WARPS / a->parts));
    }
    return (unsigned)blocks;
}

/* Several activation rows: two weight rows of a warp share each load of them. */
template <int TYPE, int N> static void launch_int8(kvs_cuda *cu, kvs_matvec_args *a) {
    constexpr int rows = N == 1 ? 1 : 2, unroll = N == 1 ? 2 : 1;
    const unsigned grid = plan<TYPE>(a, rows);
    KVS_LAUNCH_EARLY(cu, (matvec_int8_kernel<TYPE, N, rows, unroll>), grid, THREADS, 0, *a);
}
template <int TYPE, int N> static void launch_float(kvs_cuda *cu, kvs_matvec_args *a) {
    constexpr int rows = N == 1 || !kvs_type_is_float(TYPE) ? 1 : 2;
    constexpr int unroll = N == 1 && kvs_type_is_float(TYPE) ? 2 : 1;
    const unsigned grid = plan<TYPE>(a, rows);
    KVS_LAUNCH_EARLY(cu, (matvec_float_kernel<TYPE, N, rows, unroll>), grid, THREADS, 0, *a);
}

template <int TYPE> struct int8_call {
    static void run(kvs_cuda *cu, kvs_matvec_args *a) {
        if (a->n == 1)
            launch_int8<TYPE, 1>(cu, a);
        else if (a->n == 2)
            launch_int8<TYPE, 2>(cu, a);
        else if (a->n <= 4)
            launch_int8<TYPE, 4>(cu, a);
        else
            launch_int8<TYPE, 8>(cu, a);
    }
};
template <int TYPE> struct float_call {
    static void run(kvs_cuda *cu, kvs_matvec_args *a) {
        if (a->n == 1) {
            launch_float<TYPE, 1>(cu, a);
        } else if constexpr (kvs_type_is_float(TYPE)) {
            if (a->n == 2)
                launch_float<TYPE, 2>(cu, a);
            else if (a->n <= 4)
                launch_float<TYPE, 4>(cu, a);
            else
                launch_float<TYPE, 8>(cu, a);
        } else {
            launch_float<TYPE, 8>(cu, a);
        }
    }
};

static void prepare_activations(kvs_cuda *cu, const kvs_matvec_args *a) {
    const int64_t groups = a->n * kvs_groups(a->cols);
    if (a->tiles.p) KVS_LAUNCH_EARLY(cu, quantize_kernel, (unsigned)kvs_ceil_div(groups, WARPS), THREADS, 0, *a);
    if (a->padded) KVS_LAUNCH(cu, pad_kernel, (unsigned)kvs_ceil_div(groups * KVS_GROUP, THREADS), THREADS, 0, *a);
}

void kvs_matvec_launch_products(kvs_cuda *cu, const kvs_matvec_args *all) {
    bool done[KVS_MATVEC_JOBS] = {false};
    for (int i = 0; i < all->n_jobs; i++) {
        if (done[i]) continue;
        const kvs_matvec_job *job = &all->jobs[i];
        kvs_matvec_args same = *all;
        same.n_jobs = 0;
        for (int j = i; j < all->n_jobs; j++)
            if (all->jobs[j].type == job->type && all->jobs[j].integers == job->integers) {
                same.jobs[same.n_jobs++] = all->jobs[j];
                done[j] = true;
            }
        if (job->integers)
            kvs_for_blocks<int8_call>(job->type, cu, &same);
        else
            kvs_for_types<float_call>(job->type, cu, &same);
    }
}

static void launch_matvec(kvs_cuda *cu, const kvs_matvec_args *a) {
    prepare_activations(cu, a);
    kvs_matvec_launch_products(cu, a);
}

/* Scratch for what the jobs want of x; false: the step has failed */
static bool reserve_activations(kvs_cuda *cu, kvs_matvec_args *a) {
    bool integers = false, floats = false;
    for (int i = 0; i < a->n_jobs; i++) *(a->jobs[i].integers ? &integers : &floats) = true;
    const bool aligned = (uintptr_t)a->x % 16 == 0 && a->cols % KVS_GROUP == 0;
    a->tiles.room = a->n <= 2 ? a->n : a->n <= 4 ? 4 : 8;
    const int64_t tiles = integers ? kvs_ceil_div(a->cols, KVS_GROUP * KVS_WARP) * a->tiles.room * (int64_t)sizeof(kvs_act_tile) : 0;
    const int64_t padded = floats && !aligned ? a->n * kvs_groups(a->cols) * KVS_GROUP * (int64_t)sizeof(float) : 0;
    if (!tiles && !padded) return true;
    uint8_t *scratch = kvs_cuda_scratch(cu, KVS_SCRATCH_TILES, (uint64_t)(tiles + padded));
    if (!scratch) return false;
    if (tiles) a->tiles.p = (kvs_act_tile *)(void *)scratch;
    if (padded) a->padded = (float *)(void *)(scratch + tiles);
    return true;
}

static void multiply(kvs_cuda *cu, const kvs_matmul *jobs, int32_t n_jobs, const float *x, int32_t n) {
    KVS_ARGS(kvs_matvec_args, a);
    a.n_jobs = n_jobs;
    a.n = n;
    a.cols = jobs[0].w->cols;
    a.x = x;
    for (int i = 0; i < n_jobs; i++) {
        const kvs_weight *w = jobs[i].w;
        kvs_matvec_job *job = &a.jobs[i];
        job->w = (const uint8_t *)w->data;
        job->row_bytes = w->row_bytes;
        job->y = jobs[i].y;
        job->bias = jobs[i].bias;
        job->rows = (int32_t)w->rows;
        job->type = w->type;
        job->integers = jobs[i].rounding == KVS_ROUND_INT8 && !kvs_type_is_float(w->type);
    }
    if (reserve_activations(cu, &a)) kvs_cuda_op<launch_matvec, KVS_CUDA_MATVEC>(cu, &a);
}

/* n: up to 8 */
void kvs_cuda_matvec(kvs_cuda *cu, const kvs_matmul *jobs, int32_t n_jobs, const float *x, int32_t n) {
    for (int32_t i = 0; i < n_jobs; i += KVS_MATVEC_JOBS) multiply(cu, jobs + i, KVS_MIN((int32_t)KVS_MATVEC_JOBS, n_jobs - i), x, n);
}
