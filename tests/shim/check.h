/* check.h - what check.cu's checks are written with: arrays on the device, launches, expectations. */
#ifndef KVS_SHIM_CHECK_H
#define KVS_SHIM_CHECK_H
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifndef KVS_SHIM
#include <cuda_runtime.h>
extern "C" {
#include "../../native/quant.h"
}
#endif

struct named_check {
    const char *name;
    void (*run)();
};

__attribute__((format(printf, 2, 3))) static inline void expect(bool good, const char *format, ...) {
    if (good) return;
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, "\n");
    exit(1);
}

static inline void call(cudaError_t error, const char *what) { expect(!error, "%s: %s", what, cudaGetErrorString(error)); }

static inline cudaStream_t the_stream() {
    static cudaStream_t stream;
    if (!stream) call(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    return stream;
}

template <class T> struct device_array { /* zeros, or what stands in from; there when it is made: streams don't wait for cudaMemset */
    T *p;
    size_t n;
    explicit device_array(size_t count) : n(count) {
        call(cudaMalloc((void **)&p, n * sizeof(T)), "cudaMalloc");
        call(cudaMemset(p, 0, n * sizeof(T)), "cudaMemset");
        call(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    }
    explicit device_array(const std::vector<T> &from) : device_array(from.size()) {
        call(cudaMemcpy(p, from.data(), n * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
        call(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    }
    device_array(const device_array &) = delete;
    device_array &operator=(const device_array &) = delete;
    ~device_array() { call(cudaFree(p), "cudaFree"); }
    std::vector<T> get() const {
        std::vector<T> to(n);
        call(cudaStreamSynchronize(the_stream()), "cudaStreamSynchronize");
        call(cudaMemcpy(to.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
        return to;
    }
};

#define LAUNCH(kernel, grid, block, shared, ...) start(#kernel, kernel, grid, block, shared, __VA_ARGS__)
template <class... P, class... A>
static inline void start(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A... args) {
    call(kvs_launch_kernel(name, kernel, grid, block, shared, the_stream(), false, false, args...), name);
}

/* A kernel that awaits the one in front of it, and begins before that has ended */
#define LAUNCH_EARLY(kernel, grid, block, ...) start_early(#kernel, kernel, grid, block, __VA_ARGS__)
template <class... P, class... A> static inline void start_early(const char *name, void (*kernel)(P...), dim3 grid, dim3 block, A... args) {
    const bool early = kvs_compiled_for(kernel) >= KVS_KERNELS_AWAIT;
    call(kvs_launch_kernel(name, kernel, grid, block, 0, the_stream(), true, early, args...), name);
}

static inline uint32_t next_number() {
    static uint64_t state = 88172645463325252ull;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return (uint32_t)(state >> 32);
}
/* -most..most: sums of such numbers, and of their products, are exact in any order */
static inline std::vector<float> whole_numbers(int32_t n, int32_t most) {
    std::vector<float> x((size_t)n);
    for (float &v : x) v = (float)((int32_t)(next_number() % (uint32_t)(2 * most + 1)) - most);
    return x;
}
static inline std::vector<uint16_t> halves(const std::vector<float> &x) {
    std::vector<uint16_t> h;
    for (float v : x) h.push_back(kvs_f32_to_f16(v));
    return h;
}
#endif
