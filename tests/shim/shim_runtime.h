/* shim_runtime.h - the part of CUDA's runtime API that the backend uses, over plain memory, for tests: shim_runtime.cpp, shim_stream.cpp.
 *
 * What is put into a stream waits there until somebody waits for it, or gives memory of the device back: as late as on a GPU that is busy. So who
 * writes to pinned memory that is still to be copied, or reads a result that nobody waited for, gets wrong numbers. KVS_SHIM_STREAMS=early does
 * everything at once: as on a GPU that is idle. Streams don't wait for the default stream, nor it for them (cudaStreamNonBlocking).
 *
 * From the environment, looked at when it matters: KVS_SHIM_DEVICES (1), KVS_SHIM_MEMORY (bytes of all devices together, 4 GiB), KVS_SHIM_SM
 * (compute capability, 90; below 80 a block has 64 KiB of shared memory at most, else 99), KVS_SHIM_DRIVER (13000: the CUDA that the driver knows;
 * 0: there is none), and KVS_SHIM_FAIL=name:n:error, which makes the n-th call of that function from then on fail with the error of that number.
 * Without a number it is cudaErrorMemoryAllocation for those that allocate, cudaErrorIllegalAddress for cudaStreamSynchronize, else
 * cudaErrorUnknown. A kernel's name makes its n-th run fail, when its turn comes, with cudaErrorIllegalAddress: who waits for it, or calls
 * anything behind it, is told. After that error, and those like it, everything fails until the process ends, as on a GPU, whatever
 * KVS_SHIM_FAIL says then; kvs_shim_revive, which no GPU has, is for tests that would otherwise need a process each.
 * Device memory begins as NaN, has 256 bytes around it that nobody may write to (looked at by cudaFree), and copies whose kind does not fit the
 * addresses are refused. */
#ifndef KVS_SHIM_RUNTIME_H
#define KVS_SHIM_RUNTIME_H
#include <cstddef>
#include <functional>

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorNotReady = 600,
    cudaErrorIllegalAddress = 700,
    cudaErrorAssert = 710,
    cudaErrorMisalignedAddress = 716,
    cudaErrorLaunchFailure = 719,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
    cudaErrorUnknown = 999
};
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeThreadLocal, cudaStreamCaptureModeRelaxed };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
enum cudaDeviceAttr {
    cudaDevAttrMaxThreadsPerBlock = 1,
    cudaDevAttrMaxSharedMemoryPerBlock = 8,
    cudaDevAttrWarpSize = 10,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrIntegrated = 18,
    cudaDevAttrL2CacheSize = 38,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum { cudaStreamDefault = 0, cudaStreamNonBlocking = 1, cudaEventDefault = 0, cudaEventBlockingSync = 1, cudaEventDisableTiming = 2 };

typedef struct kvs_shim_stream *cudaStream_t;
typedef struct kvs_shim_event *cudaEvent_t;
typedef struct kvs_shim_graph *cudaGraph_t;
typedef struct kvs_shim_exec *cudaGraphExec_t;
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin;
    int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock, integrated, l2CacheSize;
};

const char *cudaGetErrorName(cudaError_t error);
const char *cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError(void);
cudaError_t cudaPeekAtLastError(void);
cudaError_t cudaDriverGetVersion(int *version);
cudaError_t cudaRuntimeGetVersion(int *version);
cudaError_t cudaGetDeviceCount(int *n);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaGetDevice(int *device);
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int device);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *properties, int device);
cudaError_t cudaDeviceSynchronize(void);

cudaError_t cudaMemGetInfo(size_t *available, size_t *total);
cudaError_t cudaMalloc(void **p, size_t bytes);
cudaError_t cudaMallocHost(void **p, size_t bytes);
template <class T> inline cudaError_t cudaMalloc(T **p, size_t bytes) { return cudaMalloc((void **)(void *)p, bytes); }
template <class T> inline cudaError_t cudaMallocHost(T **p, size_t bytes) { return cudaMallocHost((void **)(void *)p, bytes); }
cudaError_t cudaFree(void *p);
cudaError_t cudaFreeHost(void *p);
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind);
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream = nullptr);
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              cudaMemcpyKind kind, cudaStream_t stream = nullptr);
cudaError_t cudaMemset(void *to, int value, size_t bytes);
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream = nullptr);

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags);
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream = nullptr);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to);

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags = 0);
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec);
cudaError_t cudaGraphDestroy(cudaGraph_t graph);
template <class... P> inline cudaError_t cudaFuncSetAttribute(void (*)(P...), cudaFuncAttribute, int) { return cudaSuccess; }

size_t kvs_shim_max_shared(void);  /* bytes of a block */
int32_t kvs_shim_capability(void); /* 90: of a device of 9.0 */
/* So far in this process: waits of the host for a stream or an event ("waits"), copies to the host and from it ("to_host", "to_device"; those of
 * a graph count each time that it runs, as its "kernels" do), "graphs" launched and "captures" of new ones. Since KVS_SHIM_FAIL changed: calls of the function that
 * it names ("asked"). There now: "blocks" of devices, their "bytes", "pinned" blocks, "objects" (streams, events, graphs). -1 for another word. For tests,
 * which find it by its name in the library. */
extern "C" __attribute__((visibility("default"))) long long kvs_shim_counted(const char *what);
extern "C" __attribute__((visibility("default"))) void kvs_shim_revive(void);
/* When stream's turn comes, or as a part of the graph that it is captured for. */
void kvs_shim_do(cudaStream_t stream, std::function<void()> work);
#endif
