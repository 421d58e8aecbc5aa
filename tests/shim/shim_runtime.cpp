/* shim_runtime.cpp - see shim_runtime.h. */
#include "shim.h"
#include "shim_fiber.h" /* KVS_SHIM_ASAN */

#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <string>
#include <vector>
#ifdef KVS_SHIM_ASAN
#include <sanitizer/asan_interface.h>
#endif

#undef free /* builds with KVS_INJECT count blocks of kvs_calloc alone */

typedef std::vector<std::function<void()>> work_list;
struct kvs_shim_graph {
    work_list work;
};
struct kvs_shim_exec {
    work_list work;
};
struct kvs_shim_stream {
    kvs_shim_graph *capture; /* what is being captured, or NULL */
    bool spoilt;             /* by a call that may not be captured */
};
struct kvs_shim_event {
    std::chrono::steady_clock::time_point time;
};

static std::mutex lock; /* of all that is static here */
static thread_local cudaError_t last;
static thread_local int device;
static thread_local kvs_shim_stream *capturing; /* by this host thread, in a mode that forbids what is not safe */

/* ---- counting ---- */

enum count { WAITS, TO_HOST, TO_DEVICE, GRAPHS, CAPTURES, ASKED, BLOCKS, PINNED, OBJECTS, COUNTS };
static std::atomic<long long> counts[COUNTS];

long long kvs_shim_counted(const char *what) {
    static const char *const names[COUNTS] = {"waits", "to_host", "to_device", "graphs", "captures",
                                              "asked", "blocks",  "pinned",    "objects"};
    for (int i = 0; i < COUNTS; i++)
        if (!strcmp(what, names[i])) return counts[i];
    return -1;
}

static void count_copy(cudaMemcpyKind kind) {
    if (kind == cudaMemcpyDeviceToHost) counts[TO_HOST]++;
    if (kind == cudaMemcpyHostToDevice) counts[TO_DEVICE]++;
}

/* ---- errors, and failures that tests ask for ---- */

static const struct {
    cudaError_t error;
    const char *name, *text;
} errors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver", "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorNoKernelImageForDevice, "cudaErrorNoKernelImageForDevice", "no kernel image is available for execution on the device"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress", "an illegal memory access was encountered"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported", "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated", "operation failed due to a previous error during capture"},
    {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"}};

const char *cudaGetErrorName(cudaError_t error) {
    for (const auto &e : errors)
        if (e.error == error) return e.name;
    return "unrecognized error code";
}
const char *cudaGetErrorString(cudaError_t error) {
    for (const auto &e : errors)
        if (e.error == error) return e.text;
    return "unrecognized error code";
}

static cudaError_t fail(cudaError_t error) {
    if (error) last = error;
    return error;
}
cudaError_t cudaPeekAtLastError(void) { return last; }
cudaError_t cudaGetLastError(void) {
    cudaError_t error = last;
    last = cudaSuccess;
    return error;
}

/* KVS_SHIM_FAIL=name:n:error; n: 1, error: by the function, unless they are given. */
struct failure {
    std::string name;
    long n;
    cudaError_t error;
};

static failure parse_failure(const std::string &text) {
    size_t first = text.find(':'), second = first == text.npos ? first : text.find(':', first + 1);
    failure asked = {text.substr(0, first), first == text.npos ? 1 : atol(text.c_str() + first + 1), cudaErrorUnknown};
    if (second != text.npos)
        asked.error = (cudaError_t)atol(text.c_str() + second + 1);
    else if (asked.name == "cudaStreamSynchronize")
        asked.error = cudaErrorIllegalAddress;
    else if (asked.name == "cudaMalloc" || asked.name == "cudaMallocHost")
        asked.error = cudaErrorMemoryAllocation;
    return asked;
}

/* What KVS_SHIM_FAIL says of this call. */
static cudaError_t asked_failure(const char *name) {
    static std::string said;
    static failure asked;
    static bool broken;
    const char *text = getenv("KVS_SHIM_FAIL");
    std::lock_guard<std::mutex> hold(lock);
    if (said != (text ? text : "")) {
        said = text ? text : "";
        asked = parse_failure(said);
        counts[ASKED] = 0;
        broken = false;
    }
    if (broken) return cudaErrorIllegalAddress;
    if (said.empty() || asked.name != name || ++counts[ASKED] != asked.n) return cudaSuccess;
    broken = asked.error == cudaErrorIllegalAddress;
    return asked.error;
}

/* Every call that can fail begins with it. safe: it may be called while this thread captures. */
static cudaError_t enter(const char *name, bool safe) {
    if (cudaError_t error = asked_failure(name)) return fail(error);
    if (safe || !capturing) return cudaSuccess;
    capturing->spoilt = true;
    return fail(cudaErrorStreamCaptureUnsupported);
}
#define ENTER(safe)                                                                                                                        \
    if (cudaError_t error = enter(__func__, safe)) return error

/* ---- devices ---- */

static int64_t number(const char *variable, int64_t otherwise) {
    const char *text = getenv(variable);
    return text && *text ? strtoll(text, nullptr, 10) : otherwise;
}
static int n_devices(void) { return (int)number("KVS_SHIM_DEVICES", 1); }
static int capability(void) { return (int)number("KVS_SHIM_SM", 80); }
size_t kvs_shim_max_shared(void) { return (capability() < 80 ? 64 : 99) * 1024; }
static uint64_t device_memory(void) { return (uint64_t)number("KVS_SHIM_MEMORY", (int64_t)4 << 30); }

cudaError_t cudaDriverGetVersion(int *version) {
    ENTER(true);
    *version = 13000;
    return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) {
    ENTER(true);
    *version = 13000;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int *n) {
    *n = 0;
    ENTER(true);
    *n = n_devices();
    return *n ? cudaSuccess : fail(cudaErrorNoDevice);
}
cudaError_t cudaSetDevice(int which) {
    ENTER(true);
    if (which < 0 || which >= n_devices()) return fail(cudaErrorInvalidDevice);
    device = which;
    return cudaSuccess;
}
cudaError_t cudaGetDevice(int *which) {
    ENTER(true);
    *which = device;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int which) {
    ENTER(true);
    if (which < 0 || which >= n_devices()) return fail(cudaErrorInvalidDevice);
    const int sm = capability();
    *p = {"shim on the CPU", device_memory(), 48 * 1024, kvs_shim_max_shared(), sm / 10, sm % 10, 4, 32, 1024, 0, 1 << 20};
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int which) {
    cudaDeviceProp p;
    ENTER(true);
    if (cudaError_t error = cudaGetDeviceProperties(&p, which)) return error;
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrIntegrated: *value = p.integrated; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 164 * 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
    default: return fail(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) {
    ENTER(false);
    counts[WAITS]++;
    return cudaSuccess;
}

/* ---- memory ---- */

enum { ZONE = 256, ZONE_BYTE = 0xa5 };
static std::map<const uint8_t *, size_t> blocks; /* of devices: address, bytes; zones around each */
static uint64_t allocated;

static size_t whole(size_t bytes) { return (bytes + ZONE - 1) / ZONE * ZONE; }
static uint64_t total_allocated(void) {
    std::lock_guard<std::mutex> hold(lock);
    return allocated;
}

cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    ENTER(true);
    uint64_t used = total_allocated();
    *total = device_memory();
    *available = *total - KVS_MIN(used, *total);
    return cudaSuccess;
}

/* Broken devices give back what they have, too, if with an error: the process goes on with a device that is well again. */
static bool gives_back(cudaError_t error) { return !error || error == cudaErrorIllegalAddress; }

cudaError_t cudaMalloc(void **p, size_t bytes) {
    *p = nullptr;
    ENTER(false);
    if (!bytes) return cudaSuccess;
    if (bytes > device_memory()) return fail(cudaErrorMemoryAllocation);
    std::lock_guard<std::mutex> hold(lock);
    if (allocated + whole(bytes) > device_memory()) return fail(cudaErrorMemoryAllocation);
    uint8_t *block = (uint8_t *)aligned_alloc(ZONE, whole(bytes) + 2 * ZONE);
    if (!block) return fail(cudaErrorMemoryAllocation);
    memset(block, ZONE_BYTE, ZONE);
    memset(block + ZONE, 0xff, bytes);
    memset(block + ZONE + bytes, ZONE_BYTE, whole(bytes) - bytes + ZONE);
#ifdef KVS_SHIM_ASAN
    __asan_poison_memory_region(block, ZONE);
    __asan_poison_memory_region(block + ZONE + bytes, whole(bytes) - bytes + ZONE);
#endif
    allocated += whole(bytes);
    counts[BLOCKS]++;
    blocks[block + ZONE] = bytes;
    *p = block + ZONE;
    return cudaSuccess;
}

cudaError_t cudaFree(void *p) {
    cudaError_t error = enter(__func__, false);
    if (!p || !gives_back(error)) return error;
    std::lock_guard<std::mutex> hold(lock);
    auto found = blocks.find((const uint8_t *)p);
    if (found == blocks.end()) kvs_shim_fatal("cudaFree of %p, which is not there", p);
    uint8_t *block = (uint8_t *)p - ZONE;
    size_t bytes = found->second, all = whole(bytes) + 2 * ZONE;
#ifdef KVS_SHIM_ASAN
    __asan_unpoison_memory_region(block, all);
#endif
    for (size_t i = 0; i < all; i++) {
        if (i == ZONE) i += bytes;
        if (block[i] != ZONE_BYTE)
            kvs_shim_fatal("somebody wrote to byte %lld of %zu on the device; the last kernel was %s", (long long)i - ZONE, bytes,
                           kvs_shim_last());
    }
    allocated -= whole(bytes);
    counts[BLOCKS]--;
    blocks.erase(found);
    free(block);
    return error;
}

cudaError_t cudaMallocHost(void **p, size_t bytes) {
    *p = nullptr;
    ENTER(false);
    *p = malloc(KVS_MAX(bytes, (size_t)1));
    if (!*p) return fail(cudaErrorMemoryAllocation);
    counts[PINNED]++;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void *p) {
    cudaError_t error = enter(__func__, false);
    if (!p || !gives_back(error)) return error;
    counts[PINNED]--;
    free(p);
    return error;
}
cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned) {
    ENTER(true);
    return p && bytes ? cudaSuccess : fail(cudaErrorInvalidValue);
}
cudaError_t cudaHostUnregister(void *p) {
    ENTER(true);
    return p ? cudaSuccess : fail(cudaErrorInvalidValue);
}

/* ---- copies ---- */

enum where { HOST, DEVICE, ACROSS };
static where where_is(const void *p, size_t bytes) {
    std::lock_guard<std::mutex> hold(lock);
    const uint8_t *first = (const uint8_t *)p;
    auto next = blocks.upper_bound(first);
    if (next == blocks.begin()) return HOST;
    --next;
    const uint8_t *end = next->first + next->second;
    if (first >= end + ZONE) return HOST;
    return first <= end && bytes <= (size_t)(end - first) ? DEVICE : ACROSS;
}

static bool may_copy(void *to, size_t to_bytes, const void *from, size_t from_bytes, cudaMemcpyKind kind) {
    where left = where_is(to, to_bytes), right = where_is(from, from_bytes);
    if (left == ACROSS || right == ACROSS) return false;
    return kind == cudaMemcpyDefault || (left == (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice ? DEVICE : HOST) &&
                                         right == (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice ? DEVICE : HOST));
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    ENTER(false);
    if (!bytes) return cudaSuccess;
    if (!may_copy(to, bytes, from, bytes, kind)) return fail(cudaErrorInvalidValue);
    counts[WAITS]++;
    count_copy(kind);
    memmove(to, from, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    ENTER(stream && stream->capture);
    if (!bytes) return cudaSuccess;
    if (!may_copy(to, bytes, from, bytes, kind)) return fail(cudaErrorInvalidValue);
    kvs_shim_do(stream, [=]() {
        count_copy(kind);
        memmove(to, from, bytes);
    });
    return cudaSuccess;
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              cudaMemcpyKind kind, cudaStream_t stream) {
    ENTER(stream && stream->capture);
    if (!width || !height) return cudaSuccess;
    size_t to_bytes = (height - 1) * to_pitch + width, from_bytes = (height - 1) * from_pitch + width;
    if (to_pitch < width || from_pitch < width || !may_copy(to, to_bytes, from, from_bytes, kind)) return fail(cudaErrorInvalidValue);
    kvs_shim_do(stream, [=]() {
        count_copy(kind);
        for (size_t i = 0; i < height; i++) memmove((uint8_t *)to + i * to_pitch, (const uint8_t *)from + i * from_pitch, width);
    });
    return cudaSuccess;
}
cudaError_t cudaMemset(void *to, int value, size_t bytes) {
    ENTER(false);
    if (bytes && where_is(to, bytes) != DEVICE) return fail(cudaErrorInvalidValue);
    memset(to, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    ENTER(stream && stream->capture);
    if (bytes && where_is(to, bytes) != DEVICE) return fail(cudaErrorInvalidValue);
    kvs_shim_do(stream, [=]() { memset(to, value, bytes); });
    return cudaSuccess;
}

/* ---- streams and events ---- */

template <class T> static T *made(T *object) {
    counts[OBJECTS]++;
    return object;
}
template <class T> static cudaError_t destroy(T *object, cudaError_t error) {
    if (!object || !gives_back(error)) return error;
    counts[OBJECTS]--;
    delete object;
    return error;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned) {
    *stream = nullptr;
    ENTER(true);
    *stream = made(new kvs_shim_stream());
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    cudaError_t error = enter(__func__, true);
    if (!stream) return fail(cudaErrorInvalidResourceHandle);
    if (!gives_back(error)) return error;
    if (capturing == stream) capturing = nullptr;
    delete stream->capture;
    return destroy(stream, error);
}
static cudaError_t look_at(cudaStream_t stream) { /* which no stream allows that is being captured */
    if (!stream || !stream->capture) return cudaSuccess;
    stream->spoilt = true;
    return fail(cudaErrorStreamCaptureUnsupported);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    ENTER(stream != nullptr);
    counts[WAITS]++;
    return look_at(stream);
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
    ENTER(stream != nullptr);
    return look_at(stream);
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t event, unsigned) {
    ENTER(true);
    return event ? cudaSuccess : fail(cudaErrorInvalidResourceHandle);
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    *event = nullptr;
    ENTER(true);
    *event = made(new kvs_shim_event());
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { return destroy(event, enter(__func__, true)); }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    ENTER(true);
    if (!event) return fail(cudaErrorInvalidResourceHandle);
    if (!stream || !stream->capture) event->time = std::chrono::steady_clock::now();
    return cudaSuccess;
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
    ENTER(false);
    return event ? cudaSuccess : fail(cudaErrorInvalidResourceHandle);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    ENTER(false);
    counts[WAITS]++;
    return event ? cudaSuccess : fail(cudaErrorInvalidResourceHandle);
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    ENTER(true);
    if (!from || !to) return fail(cudaErrorInvalidResourceHandle);
    *milliseconds = std::chrono::duration<float, std::milli>(to->time - from->time).count();
    return cudaSuccess;
}

/* ---- graphs: lists of what was to be done ---- */

void kvs_shim_do(cudaStream_t stream, std::function<void()> work) {
    if (stream && stream->capture)
        stream->capture->work.push_back(std::move(work));
    else
        work();
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
    ENTER(true);
    if (!stream || stream->capture || capturing) return fail(cudaErrorStreamCaptureUnsupported);
    stream->capture = new kvs_shim_graph();
    stream->spoilt = false;
    counts[CAPTURES]++;
    if (mode != cudaStreamCaptureModeRelaxed) capturing = stream;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    *graph = nullptr;
    cudaError_t asked = asked_failure(__func__);
    if (!stream || !stream->capture) return fail(cudaErrorInvalidValue);
    kvs_shim_graph *captured = stream->capture;
    stream->capture = nullptr;
    if (capturing == stream) capturing = nullptr;
    if (!asked && !stream->spoilt)
        *graph = made(captured);
    else
        delete captured;
    return fail(asked ? asked : stream->spoilt ? cudaErrorStreamCaptureInvalidated : cudaSuccess);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
    *exec = nullptr;
    ENTER(true);
    if (!graph) return fail(cudaErrorInvalidValue);
    *exec = made(new kvs_shim_exec{graph->work});
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    ENTER(true);
    if (!exec || (stream && stream->capture)) return fail(cudaErrorInvalidValue);
    counts[GRAPHS]++;
    for (const auto &work : exec->work) work();
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return destroy(exec, enter(__func__, true)); }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return destroy(graph, enter(__func__, true)); }
