/* backend.cu - a GPU as a backend: found, opened, its memory, the table of ops. */
#include "cuda.h"

#include <stdlib.h>
#include <string.h>

static thread_local const kvs_cuda *stepping; /* whose step this thread has begun: its copies wait their turn in the step */

/* ---- memory ---- */

static bool use(kvs_cuda *cu) { return !kvs_cuda_failed(cu) && kvs_cuda_check(cu, cudaSetDevice(cu->device), "cudaSetDevice"); }

/* Sessions may ask for memory, and read it, while another thread has a step open: what happens outside of a step leaves its status alone.
 * Copies give nothing back: where one is lost, for whatever reason, nobody may go on with what stands there. */
static bool copied(kvs_cuda *cu, cudaError_t error, const char *what) {
    if (error == cudaSuccess) return true;
    cudaGetLastError();
    kvs_cuda_fail(cu, error, what);
    return false;
}

/* The same of a call that may find no memory: its caller is told. */
static bool outside(kvs_cuda *cu, cudaError_t error, const char *what) {
    if (error != cudaErrorMemoryAllocation) return copied(cu, error, what);
    cudaGetLastError();
    return false;
}

static void *cuda_alloc(kvs_backend *be, uint64_t bytes) {
    kvs_cuda *cu = (kvs_cuda *)be;
    uint8_t *block = NULL;
    if (kvs_cuda_failed(cu) || !outside(cu, cudaSetDevice(cu->device), "cudaSetDevice")) return NULL;
    if (!outside(cu, kvs_cuda_malloc(&block, KVS_MAX(bytes, (uint64_t)1)), "cudaMalloc")) return NULL;
    bool ok = outside(cu, cudaMemsetAsync(block, 0, bytes, 0), "cudaMemset") && outside(cu, cudaStreamSynchronize(0), "cudaMemset");
    if (ok) return block;
    cudaFree(block);
    return NULL;
}

static void *cuda_alloc_layers(kvs_backend *be, int32_t n_layer, uint64_t bytes_per_layer) {
    uint64_t bytes;
    return kvs_mul_u64((uint64_t)n_layer, bytes_per_layer, &bytes) ? cuda_alloc(be, bytes) : NULL;
}

static void *cuda_alloc_weights(kvs_backend *be, uint64_t bytes, bool) { return cuda_alloc(be, bytes); }

static void cuda_end_place(kvs_backend *be) {
    kvs_cuda *cu = (kvs_cuda *)be;
    cudaSetDevice(cu->device);
    kvs_cuda_free_pieces(cu);
}

static void cuda_release(kvs_backend *be, void *block) {
    kvs_cuda *cu = (kvs_cuda *)be;
    cudaSetDevice(cu->device);
    outside(cu, cudaFree(block), "cudaFree");
}

/* Copies are synchronous for the caller. In a step they come after what was launched before them. false: there is nothing to be copied. */
static bool ready_to_copy(kvs_cuda *cu, uint64_t bytes, cudaStream_t *stream) {
    *stream = 0;
    if (!bytes || kvs_cuda_failed(cu)) return false;
    if (stepping == cu) {
        if (kvs_cuda_stopped(cu)) return false;
        kvs_cuda_flush(cu);
        *stream = cu->stream;
    }
    return copied(cu, cudaSetDevice(cu->device), "cudaSetDevice");
}

static void move(kvs_backend *be, void *dst, const void *src, uint64_t bytes, cudaMemcpyKind kind, const char *what) {
    kvs_cuda *cu = (kvs_cuda *)be;
    cudaStream_t stream;
    if (!ready_to_copy(cu, bytes, &stream)) return;
    if (copied(cu, cudaMemcpyAsync(dst, src, bytes, kind, stream), what)) copied(cu, cudaStreamSynchronize(stream), what);
}

static void cuda_download(kvs_backend *be, void *dst, const void *src, uint64_t bytes) {
    move(be, dst, src, bytes, cudaMemcpyDeviceToHost, "a copy from the device");
}

static void cuda_download_rows(kvs_backend *be, void *dst, const void *src, uint64_t bytes, uint64_t stride, int32_t n) {
    kvs_cuda *cu = (kvs_cuda *)be;
    cudaStream_t stream;
    const char *what = "a copy of rows from the device";
    if (n < 1 || !ready_to_copy(cu, bytes, &stream)) return;
    if (copied(cu, cudaMemcpy2DAsync(dst, bytes, src, stride, bytes, (size_t)n, cudaMemcpyDeviceToHost, stream), what))
        copied(cu, cudaStreamSynchronize(stream), what);
}

typedef struct copy_args {
    void *dst;
    const void *src;
    uint64_t bytes;
} copy_args;

static void launch_copy(kvs_cuda *cu, const copy_args *a) {
    kvs_cuda_check(cu, cudaMemcpyAsync(a->dst, a->src, a->bytes, cudaMemcpyDeviceToDevice, cu->stream), "a copy on the device");
    cu->behind_kernel = false;
}

static void note_copy(kvs_cuda *cu, void *dst, const void *src, uint64_t bytes) {
    KVS_ARGS(copy_args, a);
    a.dst = dst;
    a.src = src;
    a.bytes = bytes;
    kvs_cuda_op<launch_copy>(cu, &a);
}

/* In a step that is only noted down, what is small goes with all that is staged for it: it stays a graph. */
static void cuda_upload(kvs_backend *be, void *dst, const void *src, uint64_t bytes) {
    enum { SMALL = 1 << 20 };
    kvs_cuda *cu = (kvs_cuda *)be;
    if (stepping != cu || !cu->noting || bytes > SMALL) {
        move(be, dst, src, bytes, cudaMemcpyHostToDevice, "a copy to the device");
        return;
    }
    if (!bytes || kvs_cuda_stopped(cu)) return;
    const void *staged = kvs_cuda_stage(cu, src, bytes, bytes);
    if (staged) note_copy(cu, dst, staged, bytes);
}

static void cuda_copy(kvs_backend *be, void *dst, const void *src, uint64_t bytes) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (stepping != cu) {
        move(be, dst, src, bytes, cudaMemcpyDeviceToDevice, "a copy on the device");
        return;
    }
    if (bytes && !kvs_cuda_stopped(cu)) note_copy(cu, dst, src, bytes);
}

static uint64_t cuda_free_memory(kvs_backend *be) {
    kvs_cuda *cu = (kvs_cuda *)be;
    size_t free_bytes = 0, total = 0;
    bool ok = !kvs_cuda_failed(cu) && outside(cu, cudaSetDevice(cu->device), "cudaSetDevice") &&
              outside(cu, cudaMemGetInfo(&free_bytes, &total), "cudaMemGetInfo");
    return ok ? KVS_MAX((uint64_t)free_bytes, (uint64_t)1) : 0;
}

static void cuda_begin(kvs_backend *be, const kvs_step *step) {
    stepping = (kvs_cuda *)be;
    kvs_cuda_begin(be, step);
}

static int cuda_status(kvs_backend *be) { return ((kvs_cuda *)be)->status; }

static int cuda_end(kvs_backend *be, kvs_error *err) {
    int status = kvs_cuda_end(be, err);
    stepping = NULL;
    return status;
}

/* ---- finding a device ---- */

/* The architectures that are inside, "75 80 86": CMake says it. */
#ifndef KVS_CUDA_ARCHS
#define KVS_CUDA_ARCHS "shim"
#endif

#define GONE "CUDA can't be used until this process is restarted: "

/* NULL: devices are there, *n of them. Else why not. */
static const char *count_devices(int *n) {
    int driver = 0, runtime = 0;
    static thread_local char reason[192];
    *n = 0;
    cudaError_t error = cudaGetDeviceCount(n);
    cudaGetLastError();
    if (error == cudaSuccess && *n > 0) return NULL;
    if (error == cudaSuccess || error == cudaErrorNoDevice) return "no GPU was found";
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (error == cudaErrorInsufficientDriver && !driver) return "no NVIDIA driver is installed";
    if (error == cudaErrorInsufficientDriver)
        snprintf(reason, sizeof reason, "the NVIDIA driver knows CUDA %d.%d, and this build needs %d.0", driver / 1000, driver % 1000 / 10,
                 runtime / 1000);
    else
        snprintf(reason, sizeof reason, "%s%s (%s)", kvs_cuda_lasts(error) ? GONE : "", cudaGetErrorString(error), cudaGetErrorName(error));
    return reason;
}

int32_t kvs_cuda_info(char *text, int32_t size) {
    int n;
    const char *reason = count_devices(&n);
    cudaDeviceProp prop;
    if (!reason && cudaGetDeviceProperties(&prop, 0) != cudaSuccess) reason = "its properties can't be read";
    cudaGetLastError();
    if (reason) return snprintf(text, (size_t)size, "archs %s; unavailable: %s", KVS_CUDA_ARCHS, reason);
    return snprintf(text, (size_t)size, "archs %s; available: %d device%s, cuda:0 is %.64s, compute capability %d.%d, %.1f GiB",
                    KVS_CUDA_ARCHS, n, n == 1 ? "" : "s", prop.name, prop.major, prop.minor, (double)prop.totalGlobalMem / (1 << 30));
}

/* ---- open and close ---- */

static void cuda_close(kvs_backend *be) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (!cu) return;
    cudaSetDevice(cu->device);
    kvs_cuda_free_steps(cu);
    kvs_cuda_free_pieces(cu);
    for (int i = 0; i < 2; i++)
        if (cu->marks[i]) cudaEventDestroy(cu->marks[i]);
    if (cu->stream) cudaStreamDestroy(cu->stream);
    cudaGetLastError();
    free(cu);
}

static const kvs_ops cuda_ops = {
    .close = cuda_close,
    .alloc = cuda_alloc,
    .alloc_layers = cuda_alloc_layers,
    .free_memory = cuda_free_memory,
    .release = cuda_release,
    .upload = cuda_upload,
    .download = cuda_download,
    .download_rows = cuda_download_rows,
    .copy = cuda_copy,
    .weight_room = kvs_cuda_weight_room,
    .alloc_weights = cuda_alloc_weights,
    .place = kvs_cuda_place,
    .end_place = cuda_end_place,
    .begin = cuda_begin,
    .status = cuda_status,
    .end = cuda_end,
    .rows = kvs_cuda_rows,
    .matmul = kvs_cuda_matmul,
    .norm = kvs_cuda_norm,
    .angles = kvs_cuda_angles,
    .rope = kvs_cuda_rope,
    .add = kvs_cuda_add,
    .gate = kvs_cuda_gate,
    .unary = kvs_cuda_unary,
    .scatter = kvs_cuda_scatter,
    .finite = kvs_cuda_finite,
    .attn = kvs_cuda_attn,
    .attn_full = kvs_cuda_attn_full,
    .kv_put = kvs_cuda_kv_put,
    .kv_record = kvs_cuda_kv_record,
    .kv_smooth = kvs_cuda_kv_smooth,
    .kv_mix = kvs_cuda_kv_mix,
    .kv_scale = kvs_cuda_kv_scale,
    .kv_put_out = kvs_cuda_kv_put_out,
    .kv_tell = kvs_cuda_kv_tell,
    .sample = kvs_cuda_sample,
    .kv_score = kvs_cuda_kv_score,
    .kv_gather = kvs_cuda_kv_gather,
    .kv_scatter = kvs_cuda_kv_scatter,
    .kv_trim = kvs_cuda_kv_trim,
};

static __global__ void probe_kernel(void) {}

/* Kernels must wait where they say so (kvs_await_previous), and graphs know of it. */
static bool can_overlap(void) {
    enum { GRAPHS_KNOW = 12030 };
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    const bool can = kvs_compiled_for(probe_kernel) >= KVS_KERNELS_AWAIT && driver >= GRAPHS_KNOW && runtime >= GRAPHS_KNOW;
    cudaGetLastError();
    return can;
}

static bool is_set(const char *name, const char *to) {
    const char *value = getenv(name);
    return value && !strcmp(value, to);
}

static int32_t wanted_tile(void) {
    const char *value = getenv("KVS_CUDA_TILE");
    if (!value) return KVS_CUDA_ANY_TILE;
    return !strcmp(value, "128") ? 128 : !strcmp(value, "64") ? 64 : !strcmp(value, "0") ? 0 : KVS_CUDA_ANY_TILE;
}

static bool prepare(kvs_cuda *cu) {
    int major = 0, minor = 0;
    const int device = cu->device;
    bool ok = use(cu) &&
              kvs_cuda_check(cu, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute") &&
              kvs_cuda_check(cu, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute") &&
              kvs_cuda_check(cu, cudaDeviceGetAttribute(&cu->n_sm, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute") &&
              kvs_cuda_check(cu, cudaDeviceGetAttribute(&cu->max_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
                             "cudaDeviceGetAttribute") &&
              kvs_cuda_check(cu, cudaStreamCreateWithFlags(&cu->stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    for (int i = 0; i < 2 && ok; i++)
        ok = kvs_cuda_check(cu, cudaEventCreateWithFlags(&cu->marks[i], cudaEventDisableTiming), "cudaEventCreateWithFlags");
    ok = ok && kvs_cuda_reserve_report(cu, sizeof(kvs_cuda_fault)).host; /* the first chunk of them is there before any step */
    cu->sm = 10 * major + minor;
    cu->fuses = !is_set("KVS_CUDA_FUSE", "0");
    cu->tile = wanted_tile();
    cu->overlaps = ok && !is_set("KVS_CUDA_OVERLAP", "0") && can_overlap();
    cu->waits = is_set("KVS_CUDA_SYNC", "1");
    return ok;
}

static void describe(kvs_cuda *cu) {
    cudaDeviceProp prop;
    snprintf(cu->base.name, sizeof cu->base.name, "cuda:%d", (int)cu->device);
    if (cudaGetDeviceProperties(&prop, cu->device) != cudaSuccess) snprintf(prop.name, sizeof prop.name, "a GPU");
    cudaGetLastError();
    snprintf(cu->base.reason, sizeof cu->base.reason, "%.100s, compute capability %d.%d", prop.name, (int)cu->sm / 10, (int)cu->sm % 10);
}

int kvs_cuda_open(int32_t index, kvs_backend **out, kvs_error *err) {
    *out = NULL;
    int n;
    const char *reason = count_devices(&n);
    if (reason) return kvs_fail(err, KVS_E_DEVICE, "%s", reason);
    if (index < 0 || index >= n)
        return kvs_fail(err, KVS_E_DEVICE, "there is no cuda:%d: this machine has %d device%s, from cuda:0 on", (int)index, n,
                        n == 1 ? "" : "s");
    kvs_cuda *cu = (kvs_cuda *)kvs_calloc(1, sizeof *cu);
    if (!cu) return kvs_fail_memory(err, sizeof *cu, "the CUDA backend");
    cu->device = index;
    cu->base.ops = &cuda_ops;
    cu->base.has_bf16 = cu->base.has_f16 = true;
    bool ok = prepare(cu);
    describe(cu);
    int status = KVS_OK;
    if (!ok && kvs_cuda_failed(cu))
        status = kvs_fail(err, KVS_E_DEVICE, "%s%s", cu->base.failed == KVS_FAILED_FOR_GOOD ? GONE : "", cu->base.failure);
    else if (!ok)
        status = kvs_fail(err, KVS_E_MEMORY, "out of memory on cuda:%d", (int)index);
    else if (cu->sm < 75)
        status = kvs_fail(err, KVS_E_DEVICE, "cuda:%d has compute capability %d.%d, and at least 7.5 is needed", (int)index,
                          (int)cu->sm / 10, (int)cu->sm % 10);
    if (status)
        cuda_close(&cu->base);
    else
        *out = &cu->base;
    return status;
}
