/* measure.cu - what a GPU can do at best, for `pykvsmooth bench`: kernels that do nothing but read, copy, multiply and add. */
#include "cuda.h"

extern "C" {
#include "../measure.h"
}
#include <stdlib.h>

enum { LEAST_BYTES = 1 << 20 };
static constexpr int THREADS = 256, BLOCKS = 4 /* of a multiprocessor: every one since 7.5 holds them all */;
static constexpr int AT_ONCE = 4, CACHES = 8; /* loads of a thread that are under way; the buffer in sizes of the L2 cache */
static constexpr int CHAINS = 8, STEPS = 8;   /* STEPS of each chain in a round */
#define PIECE_SECONDS 2e-3 /* of a launch: long against its beginning and end, short against what a display driver allows */

typedef struct cuda_roofs {
    kvs_roofs base;
    kvs_cuda *cu;
    cudaEvent_t from, to;
    uint8_t *buffer; /* (bytes) once it was needed; bytes: a multiple of 32 */
    int64_t bytes;
    uint32_t *sink;
} cuda_roofs;

typedef struct loop_args {
    uint8_t *buffer;
    uint32_t *sink; /* written if a sum has a value that none has: so it is needed */
    int64_t bytes, rounds;
} loop_args;

/* ---- loops ---- */

static KVS_DEVICE void keep(const loop_args &a, uint32_t x) {
    if (x == 0x9e3779b9) *a.sink = x;
}

/* A round is the whole buffer: all of it read, or its first half copied into the second one. */
template <bool COPIES> static __global__ void __launch_bounds__(THREADS) memory_kernel(loop_args a) {
    const int64_t n = a.bytes / (COPIES ? 32 : 16), step = (int64_t)gridDim.x * THREADS;
    uint32_t all = 0;
    for (int64_t round = 0; round < a.rounds; round++)
        for (int64_t first = (int64_t)blockIdx.x * THREADS + threadIdx.x; first < n; first += AT_ONCE * step) {
            uint4 x[AT_ONCE];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++)
                x[i] = first + i * step < n ? kvs_load16_once(a.buffer + 16 * (first + i * step)) : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                if (!COPIES)
                    all += x[i].x ^ x[i].y ^ x[i].z ^ x[i].w;
                else if (first + i * step < n)
                    kvs_store16(a.buffer + 16 * (n + first + i * step), x[i]);
            }
        }
    keep(a, all);
}

static __global__ void __launch_bounds__(THREADS, BLOCKS) f32_kernel(loop_args a) {
    float x[CHAINS];
    const float by = 0.5f + (float)threadIdx.x * 1e-6f;
#pragma unroll
    for (int i = 0; i < CHAINS; i++) x[i] = (float)i;
    for (int64_t round = 0; round < a.rounds; round++)
#pragma unroll
        for (int i = 0; i < STEPS * CHAINS; i++) x[i % CHAINS] = fmaf(x[i % CHAINS], by, 1.0f);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < CHAINS; i++) sum += x[i];
    keep(a, kvs_float_bits(sum));
}

static __global__ void __launch_bounds__(THREADS, BLOCKS) int8_kernel(loop_args a) {
    int32_t x[CHAINS];
    const uint32_t by = threadIdx.x * 0x01010101u;
#pragma unroll
    for (int i = 0; i < CHAINS; i++) x[i] = i + 1;
    for (int64_t round = 0; round < a.rounds; round++)
#pragma unroll
        for (int i = 0; i < STEPS * CHAINS; i++) x[i % CHAINS] = kvs_dp4a((uint32_t)x[i % CHAINS], by, x[i % CHAINS]);
    int32_t sum = 0;
#pragma unroll
    for (int i = 0; i < CHAINS; i++) sum += x[i];
    keep(a, (uint32_t)sum);
}

static __global__ void __launch_bounds__(THREADS, BLOCKS) f16_mma_kernel(loop_args a) {
    float c[CHAINS][4] = {};
    const uint32_t one = kvs_float2_half2(1.0f, (float)threadIdx.x), x[4] = {one, one, one, one}, y[2] = {one, one};
    for (int64_t round = 0; round < a.rounds; round++)
#pragma unroll
        for (int i = 0; i < CHAINS; i++) kvs_mma_f16(c[i], x, y);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < CHAINS; i++) sum += c[i][0] + c[i][1] + c[i][2] + c[i][3];
    keep(a, kvs_float_bits(sum));
}

/* ---- launches ---- */

typedef struct loop {
    const char *name;
    void (*kernel)(loop_args);
    int64_t per_warp; /* operations of a round; 0: bytes of the buffer */
} loop;

static bool find_loop(int32_t kind, loop *out) {
    switch (kind) {
    case KVS_ROOF_READ: *out = {"memory_kernel<read>", memory_kernel<false>, 0}; return true;
    case KVS_ROOF_COPY: *out = {"memory_kernel<copy>", memory_kernel<true>, 0}; return true;
    case KVS_ROOF_F32: *out = {"f32_kernel", f32_kernel, 2 * STEPS * CHAINS * KVS_WARP}; return true;
    case KVS_ROOF_INT8: *out = {"int8_kernel", int8_kernel, 8 * STEPS * CHAINS * KVS_WARP}; return true;
    case KVS_ROOF_F16_MMA: *out = {"f16_mma_kernel", f16_mma_kernel, 2 * 16 * 8 * 16 * CHAINS}; return true;
    default: return false;
    }
}

/* Seconds on the device; the failure is in cu->status. */
static double run(const cuda_roofs *r, const loop *l, int64_t rounds) {
    kvs_cuda *cu = r->cu;
    const loop_args a = {r->buffer, r->sink, r->bytes, rounds};
    float ms = 0.0f;
    if (!kvs_cuda_check(cu, cudaEventRecord(r->from, cu->stream), "cudaEventRecord")) return 0;
    kvs_cuda_start(cu, l->name, false, l->kernel, (unsigned)(cu->n_sm * BLOCKS), THREADS, 0, a);
    if (!cu->status && kvs_cuda_check(cu, cudaEventRecord(r->to, cu->stream), "cudaEventRecord") &&
        kvs_cuda_check(cu, cudaEventSynchronize(r->to), "cudaEventSynchronize"))
        kvs_cuda_check(cu, cudaEventElapsedTime(&ms, r->from, r->to), "cudaEventElapsedTime");
    return (double)ms * 1e-3;
}

/* Rounds of a launch double until it is long enough; what it was until then does not count. */
static double per_second(const cuda_roofs *r, const loop *l, double seconds) {
    int64_t rounds = 1, done = 0;
    double took = run(r, l, rounds), sum = 0;
    while (took < KVS_MIN(PIECE_SECONDS, seconds) && rounds < (int64_t)1 << 40 && !r->cu->status) took = run(r, l, rounds *= 2);
    for (; !r->cu->status && (sum < seconds || !done); done += rounds) sum += run(r, l, rounds);
    const int64_t warps = (int64_t)r->cu->n_sm * BLOCKS * (THREADS / KVS_WARP);
    return sum > 0 ? (double)done * (double)(l->per_warp ? l->per_warp * warps : r->bytes) / sum : 0;
}

/* ---- the handle ---- */

static void close_roofs(kvs_roofs *roofs) {
    cuda_roofs *r = (cuda_roofs *)roofs;
    kvs_backend *be = &r->cu->base;
    cudaSetDevice(r->cu->device);
    if (r->from) cudaEventDestroy(r->from);
    if (r->to) cudaEventDestroy(r->to);
    if (r->buffer) be->ops->release(be, r->buffer);
    if (r->sink) be->ops->release(be, r->sink);
    be->ops->close(be);
    free(r);
}

static int reserve_buffer(cuda_roofs *r, kvs_error *err) {
    if (r->buffer) return KVS_OK;
    kvs_backend *be = &r->cu->base;
    const int64_t most = (int64_t)(be->ops->free_memory(be) / 8);
    int cache = 0;
    if (cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, r->cu->device) != cudaSuccess) cudaGetLastError();
    r->bytes = KVS_MAX(KVS_MIN(KVS_MAX(r->bytes, CACHES * (int64_t)cache), most), (int64_t)LEAST_BYTES) / 32 * 32;
    r->buffer = (uint8_t *)be->ops->alloc(be, (uint64_t)r->bytes);
    if (r->buffer) return KVS_OK;
    int status = kvs_device_check(be, err);
    return status ? status : kvs_fail_memory(err, (uint64_t)r->bytes, "a buffer to read");
}

static int measure(kvs_roofs *roofs, int32_t kind, double seconds, double *out, kvs_error *err) {
    cuda_roofs *r = (cuda_roofs *)roofs;
    kvs_cuda *cu = r->cu;
    loop l;
    if (!find_loop(kind, &l)) return kvs_fail(err, KVS_E_DEVICE, "a GPU has no unit of this kind");
    int status = l.per_warp ? KVS_OK : reserve_buffer(r, err);
    if (status) return status;
    cu->status = kvs_cuda_failed(cu) ? KVS_E_DEVICE : KVS_OK;
    if (!cu->status && kvs_cuda_check(cu, cudaSetDevice(cu->device), "cudaSetDevice")) *out = per_second(r, &l, seconds);
    if (!cu->status) return KVS_OK;
    *out = 0;
    return cu->status == KVS_E_MEMORY ? kvs_fail_memory(err, 0, "a measurement") : kvs_device_check(&cu->base, err);
}

int kvs_cuda_roofs_open(int32_t index, int64_t bytes, kvs_roofs **out, kvs_error *err) {
    static const kvs_roofs_ops ops = {close_roofs, measure};
    kvs_backend *be;
    *out = NULL;
    int status = kvs_cuda_open(index, &be, err);
    if (status) return status;
    cuda_roofs *r = (cuda_roofs *)kvs_calloc(1, sizeof *r);
    if (!r) {
        be->ops->close(be);
        return kvs_fail_memory(err, sizeof *r, "a measurement");
    }
    r->base.ops = &ops;
    r->cu = (kvs_cuda *)be;
    r->bytes = bytes;
    r->sink = (uint32_t *)be->ops->alloc(be, sizeof *r->sink);
    bool ok = r->sink && kvs_cuda_check(r->cu, cudaEventCreateWithFlags(&r->from, cudaEventDefault), "cudaEventCreateWithFlags") &&
              kvs_cuda_check(r->cu, cudaEventCreateWithFlags(&r->to, cudaEventDefault), "cudaEventCreateWithFlags");
    if (ok) {
        *out = &r->base;
        return KVS_OK;
    }
    status = kvs_device_check(be, err);
    close_roofs(&r->base);
    return status ? status : kvs_fail_memory(err, sizeof *r->sink, "a measurement");
}
