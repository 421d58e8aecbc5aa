/* gemm.cu - y = x W^T + bias for many rows of x: which kernel, and rows of x as halves for those on tensor cores. */
#include "gemm.cuh"

enum { HALVES_THREADS = 256 };

typedef struct halves_args {
    const float *x;   /* (n, cols) */
    uint16_t *halves; /* (n, stride) */
    float *scales;    /* (n) */
    int32_t n, cols, stride;
} halves_args;

/* Magnitudes as integers: NaN is above infinity, and neither gets lost. */
KVS_DEVICE uint32_t magnitude(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits & 0x7fffffffu;
}
KVS_DEVICE uint32_t largest(uint32_t a, uint32_t b) { return a > b ? a : b; }

KVS_DEVICE uint32_t block_largest(uint32_t x, uint32_t *lines) {
    for (int d = KVS_WARP / 2; d; d /= 2) x = largest(x, __shfl_xor_sync(KVS_ALL_LANES, x, d));
    if (threadIdx.x % KVS_WARP == 0) lines[threadIdx.x / KVS_WARP] = x;
    __syncthreads();
    for (int i = 0; i < HALVES_THREADS / KVS_WARP; i++) x = largest(x, lines[i]);
    return x;
}

/* A block of threads for a row. The scale is the power of two that takes the largest magnitude between 512 and 1024. Rows that are
 * nothing beside anything else, below 2^-100, are zeros, as on the CPU. */
static __global__ void __launch_bounds__(HALVES_THREADS) gemm_halves_kernel(halves_args a) {
    __shared__ uint32_t lines[HALVES_THREADS / KVS_WARP];
    const float *x = a.x + (int64_t)blockIdx.x * a.cols;
    uint16_t *out = a.halves + (int64_t)blockIdx.x * a.stride;
    const bool aligned = gemm_aligned(a.x, (int64_t)a.cols * 4, 16);
    uint32_t top = 0;
    kvs_let_next_begin();
    kvs_await_previous();
    for (int32_t at = 4 * (int32_t)threadIdx.x; at < a.cols; at += 4 * HALVES_THREADS) {
        const float4 v = gemm_four(x, at, a.cols, aligned);
        top = largest(top, largest(largest(magnitude(v.x), magnitude(v.y)), largest(magnitude(v.z), magnitude(v.w))));
    }
    top = block_largest(top, lines);
    const bool infinite = top >= 0x7f800000u, counts = top >= 0x0d800000u /* 2^-100 */ && !infinite;
    const uint32_t exponent = (top >> 23) - 9; /* of the scale; 18 to 245 where it counts */
    const float inverse = counts ? kvs_bits_float((254 - exponent) << 23) : 0.0f;
    if (threadIdx.x == 0) a.scales[blockIdx.x] = infinite ? kvs_bits_float(0x7fc00000u) : counts ? kvs_bits_float(exponent << 23) : 0.0f;
    for (int32_t at = 8 * (int32_t)threadIdx.x; at < a.stride; at += 8 * HALVES_THREADS) {
        uint4 halves = make_uint4(0, 0, 0, 0);
        if (counts) {
            const float4 v = gemm_four(x, at, a.cols, aligned), w = gemm_four(x, at + 4, a.cols, aligned);
            halves = make_uint4(kvs_float2_half2(v.x * inverse, v.y * inverse), kvs_float2_half2(v.z * inverse, v.w * inverse),
                                kvs_float2_half2(w.x * inverse, w.y * inverse), kvs_float2_half2(w.z * inverse, w.w * inverse));
        }
        kvs_store16(out + at, halves);
    }
}

static void launch_halves(kvs_cuda *cu, const halves_args *a) {
    KVS_LAUNCH_EARLY(cu, gemm_halves_kernel, (unsigned)a->n, HALVES_THREADS, 0, *a);
}

/* Size of tiles, 0: slices. Tiles of 128 decode a weight once for 128 rows of x, and read the least; but where there are too few of them
 * for all multiprocessors, or some of these have one more to do, smaller ones end sooner. Up to 64 rows slices decode a weight once, too,
 * and begin early. What rows cost is from counts in the machine code for 9.0 (decoding, reads of shared memory), and for slices, each warp
 * of which reads x for itself, from the L2 cache's bandwidth. It is a guess that nobody has measured; KVS_CUDA_TILE is there for that. */
static int32_t tile_size(const gemm_args *a, int32_t n_sm) {
    if (a->n <= 64) return 0;
    const int64_t large = gemm_time(a, n_sm, 128, 128, 16, 32), small = gemm_time(a, n_sm, 64, 64, 16, 32);
    if (gemm_time(a, n_sm, 64, 32, 48, 32) < KVS_MIN(large, small)) return 0;
    return large <= small ? 128 : 64;
}

int32_t kvs_test_tile(int32_t n_sm, int32_t n, const int32_t *rows, int32_t n_jobs) {
    KVS_ARGS(gemm_args, a);
    if (n_sm < 1 || n_jobs > GEMM_JOBS) return -KVS_E_ARGUMENT;
    a.n = n;
    a.n_jobs = n_jobs;
    for (int32_t i = 0; i < n_jobs; i++) a.jobs[i].rows = rows[i];
    return tile_size(&a, n_sm);
}

static void launch_products(kvs_cuda *cu, const gemm_args *a) {
    const int32_t size = cu->tile == KVS_CUDA_ANY_TILE ? tile_size(a, cu->n_sm) : cu->tile;
    if (!a->halves)
        gemm_float(cu, a);
    else if (size)
        gemm_tile(cu, a, size);
    else
        gemm_slice(cu, a);
}

static bool takes_halves(const kvs_matmul *job) { return job->rounding != KVS_ROUND_NONE && job->w->type != KVS_TYPE_F32; }

/* Halves of x for all jobs: in scratch, with their scales in front. NULL: the step has failed. */
static bool make_halves(kvs_cuda *cu, const float *x, int32_t n, int32_t cols, gemm_args *a) {
    KVS_ARGS(halves_args, h);
    const int64_t before = kvs_ceil_div((int64_t)n * (int64_t)sizeof(float), 256) * 256;
    a->stride = (int32_t)kvs_ceil_div(cols, GEMM_STRIDE) * GEMM_STRIDE;
    uint8_t *scratch = kvs_cuda_scratch(cu, KVS_SCRATCH_OP, (uint64_t)(before + (int64_t)n * a->stride * (int64_t)sizeof(uint16_t)));
    if (!scratch) return false;
    h.x = x;
    h.scales = (float *)(void *)scratch;
    h.halves = (uint16_t *)(void *)(scratch + before);
    h.n = n;
    h.cols = cols;
    h.stride = a->stride;
    a->scales = h.scales;
    a->halves = h.halves;
    kvs_cuda_op<launch_halves, KVS_CUDA_GEMM>(cu, &h);
    return true;
}

static bool alike(const kvs_matmul *a, const kvs_matmul *b) { return a->w->type == b->w->type && takes_halves(a) == takes_halves(b); }

void kvs_cuda_gemm(kvs_cuda *cu, const kvs_matmul *jobs, int32_t n_jobs, const float *x, int32_t n) {
    if (n_jobs < 1 || n < 1 || kvs_cuda_stopped(cu)) return;
    const int32_t cols = (int32_t)jobs[0].w->cols;
    KVS_ARGS(gemm_args, shared);
    bool any = false;
    for (int32_t i = 0; i < n_jobs; i++) any |= takes_halves(&jobs[i]);
    if (any && !make_halves(cu, x, n, cols, &shared)) return;
    for (int32_t i = 0; i < n_jobs;) { /* neighbours of one type are one launch */
        KVS_ARGS(gemm_args, a);
        const kvs_matmul *first = &jobs[i];
        a.x = x;
        if (takes_halves(first)) {
            a.halves = shared.halves;
            a.scales = shared.scales;
            a.stride = shared.stride;
        }
        a.n = n;
        a.cols = cols;
        a.type = first->w->type;
        for (; i < n_jobs && a.n_jobs < GEMM_JOBS && alike(first, &jobs[i]); i++) {
            gemm_job *job = &a.jobs[a.n_jobs++];
            job->y = jobs[i].y;
            job->w = (const uint8_t *)jobs[i].w->data;
            job->bias = jobs[i].bias;
            job->row_bytes = jobs[i].w->row_bytes;
            job->rows = (int32_t)jobs[i].w->rows;
        }
        kvs_cuda_op<launch_products, KVS_CUDA_GEMM>(cu, &a);
    }
}
