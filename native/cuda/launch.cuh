/* launch.cuh - starting a kernel on a stream: of a GPU, or of tests/shim. */
#ifndef KVS_LAUNCH_CUH
#define KVS_LAUNCH_CUH
#include "device.cuh"

enum { KVS_KERNELS_AWAIT = 90 }; /* compiled for less, kvs_await_previous does nothing */
enum { KVS_KERNEL_ARGS = 4096 }; /* bytes that a kernel's arguments may have; CUDA 12.0 takes no more */

/* The architecture that a kernel was compiled for: older than the device where its driver makes it of PTX. 0: not known */
template <class... P> static inline int32_t kvs_compiled_for(void (*kernel)(P...)) {
#ifdef KVS_SHIM
    (void)kernel;
    return kvs_shim_capability();
#else
    cudaFuncAttributes of = {};
    return cudaFuncGetAttributes(&of, kernel) == cudaSuccess ? of.ptxVersion : 0;
#endif
}

/* name: a literal. awaits: it calls kvs_await_previous. early: it may begin before the kernel in front of it has ended; it awaits, then, and was compiled
 * for an architecture where that waits. */
template <class... P, class... A>
static inline cudaError_t kvs_launch_kernel(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
                                            cudaStream_t stream, bool awaits, bool early, A... args) {
#ifdef KVS_SHIM
    const int32_t begins = early ? KVS_SHIM_EARLY : awaits ? KVS_SHIM_AWAITS : KVS_SHIM_BEHIND;
    kvs_shim_launch(
        name, grid, block, shared, stream, [=]() { kernel(P(args)...); }, begins);
    return cudaSuccess;
#else
    (void)name, (void)awaits;
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &overlap;
    config.numAttrs = early;
    return cudaLaunchKernelEx(&config, kernel, P(args)...);
#endif
}
#endif
