/* shim_runtime.cpp - see shim_runtime.h: errors, devices, memory, copies. Streams and graphs are in shim_stream.cpp. */
#include "shim_inside.h"
#include "shim_races.h"

#include <map>
#include <mutex>
#include <string>
#include <vector>
#ifdef KVS_SHIM_ASAN
#include <sanitizer/asan_interface.h>
#endif

#undef free /* builds with KVS_INJECT count blocks of kvs_calloc alone */

static std::mutex lock; /* of all that is static here */
static thread_local cudaError_t last;
static thread_local int device;
static std::atomic<cudaError_t> broken; /* by an error that stays, whatever KVS_SHIM_FAIL says then */

/* ---- counting ---- */

std::atomic<long long> kvs_shim_so_far[COUNTS];

static uint64_t total_allocated(void);

long long kvs_shim_counted(const char *what) {
    static const char *const names[COUNTS] = {"waits", "to_host", "to_device", "graphs", "captures", "kernels",
                                              "early", "asked",   "blocks",    "pinned", "objects"};
    for (int i = 0; i < COUNTS; i++)
        if (!strcmp(what, names[i])) return kvs_shim_so_far[i];
    return strcmp(what, "bytes") ? -1 : (long long)total_allocated();
}

static void count_copy(cudaMemcpyKind kind) {
    if (kind == cudaMemcpyDeviceToHost) kvs_shim_so_far[TO_HOST]++;
    if (kind == cudaMemcpyHostToDevice) kvs_shim_so_far[TO_DEVICE]++;
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
    {cudaErrorAssert, "cudaErrorAssert", "device-side assert triggered"},
    {cudaErrorMisalignedAddress, "cudaErrorMisalignedAddress", "misaligned address"},
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

cudaError_t kvs_shim_fail(cudaError_t error) {
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
    else if (asked.name == "cudaStreamSynchronize" || asked.name.find("cuda"))
        asked.error = cudaErrorIllegalAddress;
    else if (asked.name == "cudaMalloc" || asked.name == "cudaMallocHost")
        asked.error = cudaErrorMemoryAllocation;
    return asked;
}

static bool stays(cudaError_t error) {
    return error == cudaErrorIllegalAddress || error == cudaErrorAssert || error == cudaErrorMisalignedAddress ||
           error == cudaErrorLaunchFailure;
}

static std::string said; /* by KVS_SHIM_FAIL */
static failure asked;    /* what that means */

/* What it says of this call, or of this kernel that begins. */
cudaError_t kvs_shim_asked(const char *name) {
    const char *text = getenv("KVS_SHIM_FAIL");
    std::lock_guard<std::mutex> hold(lock);
    if (said != (text ? text : "")) {
        said = text ? text : "";
        asked = parse_failure(said);
        kvs_shim_so_far[ASKED] = 0;
    }
    if (broken) return broken;
    if (said.empty() || asked.name != name || ++kvs_shim_so_far[ASKED] != asked.n) return cudaSuccess;
    if (stays(asked.error)) broken = asked.error;
    return asked.error;
}

cudaError_t kvs_shim_broken(void) { return broken; }
void kvs_shim_revive(void) {
    std::lock_guard<std::mutex> hold(lock);
    broken = last = cudaSuccess;
    said.clear(); /* counts begin anew */
}

/* ---- devices ---- */

static int64_t number(const char *variable, int64_t otherwise) {
    const char *text = getenv(variable);
    return text && *text ? strtoll(text, nullptr, 10) : otherwise;
}
static int driver_version(void) { return (int)number("KVS_SHIM_DRIVER", 13000); }
static int n_devices(void) { return (int)number("KVS_SHIM_DEVICES", 1); }
int32_t kvs_shim_capability(void) { return (int32_t)number("KVS_SHIM_SM", 90); }
size_t kvs_shim_max_shared(void) { return (kvs_shim_capability() < 80 ? 64 : 99) * 1024; }
static uint64_t device_memory(void) { return (uint64_t)number("KVS_SHIM_MEMORY", (int64_t)4 << 30); }

int kvs_shim_device(void) { return device; }

cudaError_t cudaDriverGetVersion(int *version) {
    ENTER(true);
    *version = driver_version();
    return cudaSuccess;
}
enum { RUNTIME = 13000 };
cudaError_t cudaRuntimeGetVersion(int *version) {
    ENTER(true);
    *version = RUNTIME;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int *n) {
    *n = 0;
    ENTER(true);
    if (driver_version() / 1000 < RUNTIME / 1000) return kvs_shim_fail(cudaErrorInsufficientDriver);
    *n = n_devices();
    return *n ? cudaSuccess : kvs_shim_fail(cudaErrorNoDevice);
}
cudaError_t cudaSetDevice(int which) {
    ENTER(true);
    if (which < 0 || which >= n_devices()) return kvs_shim_fail(cudaErrorInvalidDevice);
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
    if (which < 0 || which >= n_devices()) return kvs_shim_fail(cudaErrorInvalidDevice);
    const int sm = kvs_shim_capability();
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
    default: return kvs_shim_fail(cudaErrorInvalidValue);
    }
    return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize(void) {
    ENTER(false);
    kvs_shim_so_far[WAITS]++;
    kvs_shim_finish_all();
    return kvs_shim_fail(broken);
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

cudaError_t cudaMalloc(void **p, size_t bytes) {
    *p = nullptr;
    ENTER(false);
    if (!bytes) return cudaSuccess;
    if (bytes > device_memory()) return kvs_shim_fail(cudaErrorMemoryAllocation);
    std::lock_guard<std::mutex> hold(lock);
    if (allocated + whole(bytes) > device_memory()) return kvs_shim_fail(cudaErrorMemoryAllocation);
    uint8_t *block = (uint8_t *)aligned_alloc(ZONE, whole(bytes) + 2 * ZONE);
    if (!block) return kvs_shim_fail(cudaErrorMemoryAllocation);
    memset(block, ZONE_BYTE, ZONE);
    memset(block + ZONE, 0xff, bytes);
    memset(block + ZONE + bytes, ZONE_BYTE, whole(bytes) - bytes + ZONE);
#ifdef KVS_SHIM_ASAN
    __asan_poison_memory_region(block, ZONE);
    __asan_poison_memory_region(block + ZONE + bytes, whole(bytes) - bytes + ZONE);
#endif
    allocated += whole(bytes);
    kvs_shim_so_far[BLOCKS]++;
    blocks[block + ZONE] = bytes;
    kvs_races_device(block + ZONE, bytes);
    *p = block + ZONE;
    return cudaSuccess;
}

cudaError_t cudaFree(void *p) {
    cudaError_t error = kvs_shim_enter(__func__, false);
    if (!p || !kvs_shim_gives_back(error)) return error;
    kvs_shim_finish_all();
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
    kvs_races_device(p, bytes);
    allocated -= whole(bytes);
    kvs_shim_so_far[BLOCKS]--;
    blocks.erase(found);
    free(block);
    return error;
}

static std::map<const uint8_t *, size_t> pinned; /* address, bytes */

cudaError_t cudaMallocHost(void **p, size_t bytes) {
    *p = nullptr;
    ENTER(false);
    *p = malloc(KVS_MAX(bytes, (size_t)1));
    if (!*p) return kvs_shim_fail(cudaErrorMemoryAllocation);
    std::lock_guard<std::mutex> hold(lock);
    pinned[(const uint8_t *)*p] = bytes;
    kvs_shim_so_far[PINNED]++;
    return cudaSuccess;
}
/* Waits for nothing: what is still to be copied from there is NaN, and an error under AddressSanitizer. */
cudaError_t cudaFreeHost(void *p) {
    cudaError_t error = kvs_shim_enter(__func__, false);
    if (!p || !kvs_shim_gives_back(error)) return error;
    std::lock_guard<std::mutex> hold(lock);
    auto found = pinned.find((const uint8_t *)p);
    if (found == pinned.end()) kvs_shim_fatal("cudaFreeHost of %p, which is not there", p);
    memset(p, 0xff, found->second);
    pinned.erase(found);
    kvs_shim_so_far[PINNED]--;
    free(p);
    return error;
}
static bool is_pinned(const void *p) {
    std::lock_guard<std::mutex> hold(lock);
    auto next = pinned.upper_bound((const uint8_t *)p);
    return next != pinned.begin() && (--next, (const uint8_t *)p < next->first + next->second);
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

bool kvs_shim_on_device(const void *p) { return where_is(p, 1) == DEVICE; }

static bool may_copy(void *to, size_t to_bytes, const void *from, size_t from_bytes, cudaMemcpyKind kind) {
    where left = where_is(to, to_bytes), right = where_is(from, from_bytes);
    if (left == ACROSS || right == ACROSS) return false;
    return kind == cudaMemcpyDefault || (left == (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice ? DEVICE : HOST) &&
                                         right == (kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice ? DEVICE : HOST));
}

/* height lines of width bytes, one after the other in a stream */
struct lines {
    uint8_t *to;
    const uint8_t *from;
    size_t to_pitch, from_pitch, width, height;
    size_t to_bytes() const { return (height - 1) * to_pitch + width; }
    size_t from_bytes() const { return (height - 1) * from_pitch + width; }
};

static void copy_lines(const lines &l, cudaMemcpyKind kind) {
    count_copy(kind);
    if (kind != cudaMemcpyDeviceToHost)
        for (size_t i = 0; i < l.height; i++) kvs_races_written(l.to + i * l.to_pitch, l.width);
    for (size_t i = 0; i < l.height; i++) memmove(l.to + i * l.to_pitch, l.from + i * l.from_pitch, l.width);
}

/* As the driver does it: what lies in pageable memory has been read when the call returns, or written; pinned memory is for when its turn comes. */
static cudaError_t copy_later(lines l, cudaMemcpyKind kind, cudaStream_t stream) {
    if (!l.width || !l.height) return cudaSuccess;
    if (l.to_pitch < l.width || l.from_pitch < l.width || !may_copy(l.to, l.to_bytes(), l.from, l.from_bytes(), kind))
        return kvs_shim_fail(cudaErrorInvalidValue);
    const bool capturing = stream && stream->capture;
    if (kind == cudaMemcpyHostToDevice && !is_pinned(l.from) && !capturing) {
        std::vector<uint8_t> read(l.from, l.from + l.from_bytes());
        kvs_shim_do(stream, [=]() {
            lines there = l;
            there.from = read.data();
            copy_lines(there, kind);
        });
    } else {
        kvs_shim_do(stream, [=]() { copy_lines(l, kind); });
        if (kind == cudaMemcpyDeviceToHost && !is_pinned(l.to) && !capturing) kvs_shim_finish(stream);
    }
    return kvs_shim_fail(broken); /* what came before it in the stream may have failed by now */
}

/* Only what comes from the device has arrived for sure, and other streams than the default one are not waited for. */
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind) {
    ENTER(false);
    kvs_shim_so_far[WAITS]++;
    kvs_shim_finish(nullptr);
    cudaError_t error = copy_later({(uint8_t *)to, (const uint8_t *)from, bytes, bytes, bytes, 1}, kind, nullptr);
    if (kind == cudaMemcpyDeviceToHost) kvs_shim_finish(nullptr);
    return error ? error : kvs_shim_fail(broken);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    ENTER(stream && stream->capture);
    return copy_later({(uint8_t *)to, (const uint8_t *)from, bytes, bytes, bytes, 1}, kind, stream);
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              cudaMemcpyKind kind, cudaStream_t stream) {
    ENTER(stream && stream->capture);
    return copy_later({(uint8_t *)to, (const uint8_t *)from, to_pitch, from_pitch, width, height}, kind, stream);
}
static cudaError_t set_later(void *to, int value, size_t bytes, cudaStream_t stream) {
    if (bytes && where_is(to, bytes) != DEVICE) return kvs_shim_fail(cudaErrorInvalidValue);
    kvs_shim_do(stream, [=]() {
        kvs_races_written(to, bytes);
        memset(to, value, bytes);
    });
    return cudaSuccess;
}
cudaError_t cudaMemset(void *to, int value, size_t bytes) {
    ENTER(false);
    return set_later(to, value, bytes, nullptr);
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream) {
    ENTER(stream && stream->capture);
    return set_later(to, value, bytes, stream);
}
