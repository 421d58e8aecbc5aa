/* check.cu - small kernels whose results are known: `check NAME` is silent and ends with 0, or says what is wrong. tests/test_shim.py runs them
 * over the shim; compiled by nvcc they say the same of a GPU (make test-gpu begins with `check all`), so that what the shim does is what a GPU does. */
#include "../../native/cuda/launch.cuh"
#include "check.h"

/* ---- where threads are ---- */

static __global__ void places_kernel(uint32_t *out) {
    uint32_t thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    uint32_t block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] += block << 16 | thread;
}

static void check_places() {
    device_array<uint32_t> out(4 * 3 * 2 * 5 * 3 * 2);
    LAUNCH(places_kernel, dim3(4, 3, 2), dim3(5, 3, 2), 0, out.p);
    std::vector<uint32_t> got = out.get();
    for (size_t i = 0; i < got.size(); i++) expect(got[i] == (i / 30 << 16 | i % 30), "thread %zu wrote %x", i, got[i]);
}

/* ---- sums over a block; a barrier in a loop ---- */

static __global__ void sum_kernel(float *out, const float *x, int32_t n) {
    __shared__ float lines[KVS_WARP];
    KVS_DYNAMIC_SHARED(float, all);
    for (int32_t round = 0; round < 3; round++) {
        float sum = 0.0f;
        for (int32_t i = (int32_t)threadIdx.x; i < n; i += (int32_t)blockDim.x) sum += x[(int32_t)blockIdx.x * n + i];
        all[threadIdx.x] = kvs_block_sum(sum, lines);
        __syncthreads();
        if (!threadIdx.x) out[blockIdx.x * 3 + (uint32_t)round] = all[(threadIdx.x + 1) % blockDim.x];
    }
}

static void check_sum() {
    for (int32_t threads : {32, 96, 128, 1024}) {
        const int32_t n = 1000, blocks = 7;
        std::vector<float> x = whole_numbers(n * blocks, 9);
        device_array<float> in(x), out(blocks * 3);
        LAUNCH(sum_kernel, blocks, threads, (size_t)threads * sizeof(float), out.p, (const float *)in.p, n);
        std::vector<float> got = out.get();
        for (int32_t b = 0; b < blocks; b++) {
            float want = 0.0f;
            for (int32_t i = 0; i < n; i++) want += x[(size_t)(b * n + i)];
            for (int32_t i = 0; i < 3; i++)
                expect(got[(size_t)(b * 3 + i)] == want, "%d threads, block %d: %g", threads, b, got[(size_t)b * 3]);
        }
    }
}

/* ---- shuffles and votes ---- */

enum { SHUFFLES = 10 };
static __global__ void shuffle_kernel(double *out) { /* (SHUFFLES, 32) */
    int32_t lane = (int32_t)threadIdx.x, at = lane;
    float x = (float)(lane * lane);
    out[at] = __shfl_sync(KVS_ALL_LANES, x, 5);
    out[at += 32] = __shfl_sync(KVS_ALL_LANES, x, lane * 7, 8);
    out[at += 32] = __shfl_xor_sync(KVS_ALL_LANES, x, 17);
    out[at += 32] = __shfl_xor_sync(KVS_ALL_LANES, x, 3, 16);
    out[at += 32] = __shfl_down_sync(KVS_ALL_LANES, x, 5);
    out[at += 32] = __shfl_down_sync(KVS_ALL_LANES, x, 3, 8);
    out[at += 32] = __shfl_up_sync(KVS_ALL_LANES, x, 9);
    out[at += 32] = __shfl_up_sync(KVS_ALL_LANES, x, 1, 4);
    out[at += 32] = (double)__shfl_sync(KVS_ALL_LANES, (long long)lane << 40, 3) + __shfl_sync(KVS_ALL_LANES, lane + 0.25, 9);
    if (lane < 12)
        out[at += 32] = __shfl_down_sync(0xfffu, (uint32_t)lane * 3000000000u, lane < 6 ? 6 : 0);
    else
        out[at += 32] = __shfl_xor_sync(0xfffff000u, -lane, 1);
}

static double shuffled(int32_t which, int32_t lane) {
    auto square = [](int32_t x) { return (double)(x * x); };
    switch (which) {
    case 0: return square(5);
    case 1: return square((lane & 24) + lane * 7 % 8);
    case 2: return square(lane ^ 17);
    case 3: return square(lane ^ 3);
    case 4: return square(lane + 5 < 32 ? lane + 5 : lane);
    case 5: return square(lane % 8 + 3 < 8 ? lane + 3 : lane);
    case 6: return square(lane >= 9 ? lane - 9 : lane);
    case 7: return square(lane % 4 ? lane - 1 : lane);
    case 8: return (double)(3ll << 40) + 9.25;
    default: return lane < 12 ? (double)((uint32_t)(lane < 6 ? lane + 6 : lane) * 3000000000u) : -(lane ^ 1);
    }
}

static void check_shuffle() {
    device_array<double> out(SHUFFLES * 32);
    LAUNCH(shuffle_kernel, 1, 32, 0, out.p);
    std::vector<double> got = out.get();
    for (int32_t i = 0; i < SHUFFLES * 32; i++)
        expect(got[(size_t)i] == shuffled(i / 32, i % 32), "%d, lane %d: %g", i / 32, i % 32, got[(size_t)i]);
}

static __global__ void vote_kernel(uint32_t *out) { /* (6, 64) */
    uint32_t lane = threadIdx.x % 32, *to = out + threadIdx.x;
    to[0] = __ballot_sync(KVS_ALL_LANES, threadIdx.x % 3 == 0);
    to[64] = (uint32_t)__any_sync(KVS_ALL_LANES, threadIdx.x == 40);
    to[128] = (uint32_t)__all_sync(KVS_ALL_LANES, threadIdx.x < 40);
    to[192] = lane < 8 ? __ballot_sync(0xffu, lane & 1) : __ballot_sync(0xffffff00u, lane & 2);
    to[256] = lane < 8 ? (uint32_t)__all_sync(0xffu, lane < 8) : 7;
    __syncwarp();
    if (lane == 4) to[320] = 4;
    __syncwarp();
    if (lane != 4) to[320] = out[320 + threadIdx.x / 32 * 32 + 4] + lane;
}

static void check_vote() {
    device_array<uint32_t> out(6 * 64);
    LAUNCH(vote_kernel, 1, 64, 0, out.p);
    std::vector<uint32_t> got = out.get();
    for (uint32_t i = 0; i < 64; i++) {
        uint32_t thirds = 0, warp = i / 32, lane = i % 32;
        for (uint32_t j = 0; j < 32; j++) thirds |= (uint32_t)((warp * 32 + j) % 3 == 0) << j;
        uint32_t want[6] = {thirds, warp, !warp, lane < 8 ? 0xaau : 0xcccccc00u, lane < 8 ? 1u : 7u, lane == 4 ? 4 : lane + 4};
        for (uint32_t k = 0; k < 6; k++) expect(got[k * 64 + i] == want[k], "%u, thread %u: %x, not %x", k, i, got[k * 64 + i], want[k]);
    }
}

/* ---- products of matrices ---- */

/* Fragments by hand, as the comment in device.cuh has them; c (16, 8), a (16, 16), b (16, 8) */
static __global__ void mma_kernel(float *c, const uint16_t *a, const uint16_t *b) {
    int32_t g = (int32_t)threadIdx.x / 4, t = (int32_t)threadIdx.x % 4;
    auto pair_a = [&](int32_t row, int32_t col) { return a[row * 16 + col] | (uint32_t)a[row * 16 + col + 1] << 16; };
    auto pair_b = [&](int32_t row) { return b[row * 8 + g] | (uint32_t)b[(row + 1) * 8 + g] << 16; };
    uint32_t fa[4] = {pair_a(g, 2 * t), pair_a(g + 8, 2 * t), pair_a(g, 2 * t + 8), pair_a(g + 8, 2 * t + 8)};
    uint32_t fb[2] = {pair_b(2 * t), pair_b(2 * t + 8)};
    float *top = c + g * 8 + 2 * t, *low = top + 64, fc[4] = {top[0], top[1], low[0], low[1]};
    kvs_mma_f16(fc, fa, fb);
    top[0] = fc[0], top[1] = fc[1], low[0] = fc[2], low[1] = fc[3];
}

/* c (16, 16) += a (16, 16) b (16, 16), row by row in shared memory: fragments by ldmatrix, those of b turned */
static __global__ void ldmatrix_kernel(float *c, const uint16_t *a, const uint16_t *b) {
    __shared__ __align__(16) uint16_t sa[16][24], sb[16][24]; /* 48 bytes a row */
    int32_t lane = (int32_t)threadIdx.x;
    for (int32_t i = lane; i < 256; i += 32) sa[i / 16][i % 16] = a[i], sb[i / 16][i % 16] = b[i];
    __syncthreads();
    uint32_t fa[4], fb[4];
    kvs_ldmatrix_x4(fa, &sa[lane % 16][lane / 16 * 8]);
    kvs_ldmatrix_x4_turned(fb, &sb[lane % 16][lane / 16 * 8]);
    for (int32_t half = 0; half < 2; half++) {
        float fc[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        kvs_mma_f16(fc, fa, fb + 2 * half);
        for (int32_t i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 16 + half * 8 + 2 * (lane % 4) + i % 2] += fc[i];
    }
}

static void check_product(int32_t cols, void (*kernel)(float *, const uint16_t *, const uint16_t *)) {
    std::vector<float> a = whole_numbers(256, 9), b = whole_numbers(16 * cols, 9), c = whole_numbers(16 * cols, 9);
    device_array<uint16_t> da(halves(a)), db(halves(b));
    device_array<float> dc(c);
    LAUNCH(kernel, 1, 32, 0, dc.p, (const uint16_t *)da.p, (const uint16_t *)db.p);
    std::vector<float> got = dc.get();
    for (int32_t i = 0; i < 16 * cols; i++) {
        float want = c[(size_t)i];
        for (int32_t k = 0; k < 16; k++) want += a[(size_t)(i / cols * 16 + k)] * b[(size_t)(k * cols + i % cols)];
        expect(got[(size_t)i] == want, "row %d, column %d: %g, not %g", i / cols, i % cols, got[(size_t)i], want);
    }
}
static void check_mma() { check_product(8, mma_kernel); }
static void check_ldmatrix() { check_product(16, ldmatrix_kernel); }

/* ---- copies that come later ---- */

enum { STAGES = 3, PIECE = 64 };                                                                    /* 16 bytes of each thread */
template <int LEFT> static __global__ void pipeline_kernel(float *out, const float *x, int32_t n) { /* x (n, PIECE, 4) */
    __shared__ __align__(16) float stage[STAGES][PIECE * 4];
    float sum = 0.0f;
    int32_t t = (int32_t)threadIdx.x;
    for (int32_t i = 0; i < n + STAGES - 1; i++) {
        if (i < n) kvs_async16(&stage[i % STAGES][t * 4], x + ((int64_t)i * PIECE + t) * 4);
        kvs_async_commit();
        if (i < STAGES - 1) continue;
        kvs_async_wait<LEFT>();
        __syncthreads();
        for (int32_t k = 0; k < 4; k++)
            sum += stage[(i - STAGES + 1) % STAGES][(t * 4 + k * 32 + 5) % (PIECE * 4)]; /* what others copied */
        __syncthreads();
    }
    out[t] = sum;
}

static bool pipeline(void (*kernel)(float *, const float *, int32_t)) {
    const int32_t n = 11;
    std::vector<float> x = whole_numbers(n * PIECE * 4, 99);
    device_array<float> in(x), out(PIECE);
    LAUNCH(kernel, 1, PIECE, 0, out.p, (const float *)in.p, n);
    std::vector<float> got = out.get();
    bool right = true;
    for (int32_t t = 0; t < PIECE; t++) {
        float want = 0.0f;
        for (int32_t i = 0; i < n; i++)
            for (int32_t k = 0; k < 4; k++) want += x[(size_t)(i * PIECE * 4 + (t * 4 + k * 32 + 5) % (PIECE * 4))];
        right = right && got[(size_t)t] == want;
    }
    return right;
}
static void check_async() { expect(pipeline(pipeline_kernel<STAGES - 1>), "wrong sums"); }

/* ---- arithmetic ---- */

static __global__ void half_kernel(float *out, uint16_t *back, const float *x, int32_t n) { /* out (65536), back, x (n) */
    int32_t i = (int32_t)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i < 65536) out[i] = kvs_half_float((uint16_t)i);
    if (i < n) back[i] = kvs_float_half(x[i]);
}

static void check_half() {
    std::vector<float> x;
    for (uint32_t h = 0; h < 0x7c00; h++) /* each finite half, what stands between it and the next, and a little to both sides */
        for (float f : {kvs_f16_to_f32((uint16_t)h), (kvs_f16_to_f32((uint16_t)h) + kvs_f16_to_f32((uint16_t)(h + 1))) / 2})
            for (float near : {f, nextafterf(f, -1.0f), nextafterf(f, INFINITY)}) x.push_back(h % 2 ? near : -near);
    device_array<float> out(65536), in(x);
    device_array<uint16_t> back(x.size());
    LAUNCH(half_kernel, (uint32_t)(x.size() + 255) / 256, 256, 0, out.p, back.p, (const float *)in.p, (int32_t)x.size());
    std::vector<float> floats = out.get();
    std::vector<uint16_t> got = back.get();
    for (uint32_t h = 0; h < 65536; h++) {
        float want = kvs_f16_to_f32((uint16_t)h);
        expect(floats[h] == want || (floats[h] != floats[h] && want != want), "half %04x: %g", h, floats[h]);
    }
    for (size_t i = 0; i < x.size(); i++) expect(got[i] == kvs_f32_to_f16(x[i]), "%a: half %04x", x[i], got[i]);
}

static __global__ void dot_kernel(int32_t *out, const uint32_t *a, const uint32_t *b) {
    out[threadIdx.x] = kvs_dp4a(a[threadIdx.x], b[threadIdx.x], (int32_t)threadIdx.x);
}

static void check_dot() {
    std::vector<uint32_t> a(64), b(64);
    for (size_t i = 0; i < 64; i++) a[i] = next_number(), b[i] = i ? next_number() : 0x80808080u;
    a[0] = 0x80808080u;
    device_array<uint32_t> da(a), db(b);
    device_array<int32_t> out(64);
    LAUNCH(dot_kernel, 1, 64, 0, out.p, (const uint32_t *)da.p, (const uint32_t *)db.p);
    std::vector<int32_t> got = out.get();
    for (size_t i = 0; i < 64; i++) {
        int32_t want = (int32_t)i;
        for (int32_t k = 0; k < 32; k += 8) want += (int8_t)(a[i] >> k) * (int8_t)(b[i] >> k);
        expect(got[i] == want, "%zu: %d, not %d", i, got[i], want);
    }
}

static __global__ void atomic_kernel(unsigned long long *least, int32_t *greatest, uint32_t *count, uint32_t *first, float *sum,
                                     uint32_t *owner) {
    uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
    atomicMin(least, (unsigned long long)(1000 - i) << 32);
    atomicMax(greatest, (int32_t)i - 500);
    atomicAdd(count, 1u);
    atomicCAS(first, 0u, i + 1);
    atomicAdd(sum, 0.5f);
    atomicExch(owner, i);
    __threadfence();
}

static void check_atomic() {
    device_array<unsigned long long> least(std::vector<unsigned long long>{~0ull});
    device_array<int32_t> greatest(1);
    device_array<uint32_t> count(1), first(1), owner(1);
    device_array<float> sum(1);
    LAUNCH(atomic_kernel, 5, 100, 0, least.p, greatest.p, count.p, first.p, sum.p, owner.p);
    expect(least.get()[0] == 501ull << 32 && greatest.get()[0] == 0 && count.get()[0] == 500, "min, max, add");
    expect(first.get()[0] >= 1 && first.get()[0] <= 500 && owner.get()[0] < 500 && sum.get()[0] == 250.0f, "cas, exch, add of floats");
}

/* ---- a captured graph ---- */

static __global__ void scale_kernel(float *x, const float *by) { x[threadIdx.x] *= *by; }

static void check_graph() {
    float *pinned;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    call(cudaMallocHost(&pinned, sizeof *pinned), "cudaMallocHost");
    device_array<float> x(std::vector<float>(40, 3.0f)), by(1);
    cudaStream_t stream = the_stream();
    call(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    call(cudaMemcpyAsync(by.p, pinned, sizeof *pinned, cudaMemcpyHostToDevice, stream), "cudaMemcpyAsync");
    LAUNCH(scale_kernel, 1, 32, 0, x.p, (const float *)by.p);
    call(cudaMemsetAsync(x.p + 39, 0, sizeof(float), stream), "cudaMemsetAsync");
    call(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    call(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
    call(cudaGraphDestroy(graph), "cudaGraphDestroy");
    expect(x.get()[0] == 3.0f && x.get()[39] == 3.0f, "ran while it was captured");
    float want = 3.0f;
    for (float factor : {2.0f, 5.0f}) {
        *pinned = factor;
        want *= factor;
        call(cudaGraphLaunch(exec, stream), "cudaGraphLaunch");
        call(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
        expect(x.get()[31] == want && x.get()[32] == 3.0f && x.get()[39] == 0.0f, "%g, not %g", x.get()[31], want);
    }
    call(cudaGraphExecDestroy(exec), "cudaGraphExecDestroy");
    call(cudaFreeHost(pinned), "cudaFreeHost");
}

/* ---- kernels that begin early, in a graph ---- */

/* y = x + by, late: each thread works for some microseconds first. shift: other blocks have an element in another kernel, so that what one
 * multiprocessor has cached another one writes. */
static __global__ void slow_kernel(float *y, const float *x, const float *by, int32_t rounds, uint32_t shift) {
    const uint32_t i = (blockIdx.x * blockDim.x + threadIdx.x + shift) % (gridDim.x * blockDim.x);
    kvs_let_next_begin();
    float early = by[i], none = 1.0f; /* nobody writes it */
    kvs_await_previous();
    for (int32_t k = 0; k < rounds; k++) none = fmaf(none, 0.5f, 0.5f); /* stays 1 */
    y[i] = x[i] + early * none;
}

/* to and fro: each kernel reads what the one in front writes, and writes what that reads */
static void add_to_and_fro(int32_t blocks, int32_t threads, int32_t n_kernels, int32_t times) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    std::vector<float> x = whole_numbers(blocks * threads, 99), by = whole_numbers(blocks * threads, 9);
    device_array<float> a(x), b(x.size()), add(by);
    call(cudaStreamBeginCapture(the_stream(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    LAUNCH(slow_kernel, (uint32_t)blocks, (uint32_t)threads, 0, b.p, (const float *)a.p, (const float *)add.p, 1000, 0);
    for (int32_t i = 1; i < n_kernels; i++) {
        float *to = i % 2 ? a.p : b.p, *from = i % 2 ? b.p : a.p;
        LAUNCH_EARLY(slow_kernel, (uint32_t)blocks, (uint32_t)threads, to, (const float *)from, (const float *)add.p, i % 3 * 1000,
                     i * 5 * threads);
    }
    call(cudaStreamEndCapture(the_stream(), &graph), "cudaStreamEndCapture");
    call(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
    for (int32_t i = 0; i < times; i++) call(cudaGraphLaunch(exec, the_stream()), "cudaGraphLaunch");
    std::vector<float> got = a.get();
    const float sums = (float)(n_kernels * times);
    for (size_t i = 0; i < x.size(); i++)
        expect(got[i] == x[i] + sums * by[i], "%d blocks, %zu: %g, not %g", blocks, i, got[i], x[i] + sums * by[i]);
    call(cudaGraphExecDestroy(exec), "cudaGraphExecDestroy");
    call(cudaGraphDestroy(graph), "cudaGraphDestroy");
}

static void check_early() {
#ifdef KVS_SHIM
    add_to_and_fro(3, 64, 6, 2);
#else
    add_to_and_fro(3000, 256, 20, 10);                                      /* more than a device runs at once */
    for (int32_t blocks : {1, 8, 64}) add_to_and_fro(blocks, 256, 100, 10); /* many kernels of a chain are there at once */
#endif
}

static const named_check checks[] = {{"places", check_places},     {"sum", check_sum},     {"shuffle", check_shuffle},
                                     {"vote", check_vote},         {"mma", check_mma},     {"async", check_async},
                                     {"ldmatrix", check_ldmatrix}, {"half", check_half},   {"dot", check_dot},
                                     {"atomic", check_atomic},     {"graph", check_graph}, {"early", check_early}};

#ifdef KVS_SHIM
#include "faults.h"
#endif

int main(int argc, char **argv) {
    for (const named_check &check : checks)
        if (argc == 2 && !strcmp(argv[1], check.name)) return check.run(), 0;
    if (argc == 2 && !strcmp(argv[1], "all")) {
        for (const named_check &check : checks) {
            check.run();
            printf("%s: as it should be\n", check.name);
        }
        return 0;
    }
#ifdef KVS_SHIM
    for (const named_check &fault : faults)
        if (argc == 2 && !strcmp(argv[1], fault.name)) return fault.run(), cudaDeviceSynchronize(), 0;
#endif
    fprintf(stderr, "check: all, or one of");
    for (const named_check &check : checks) fprintf(stderr, " %s", check.name);
    fprintf(stderr, "\n");
    return 2;
}
