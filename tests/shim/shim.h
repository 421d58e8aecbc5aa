/* shim.h - what native/cuda/device.cuh stands on where there is no CUDA: the kernels are compiled as C++17 and run on the CPU, for tests.
 *
 * One launch runs at a time. The threads of a block are fibers of the host thread that launches; blocks run one after the other. A thread runs until it comes to a
 * barrier or a warp primitive, then the next one does. KVS_SHIM_ORDER=reverse or random[:seed] (default forward) is the order of blocks,
 * warps, and lanes between two primitives. What a GPU would not forgive ends the process with the kernel's name on stderr: threads that
 * wait for others that will never come, lanes of one mask at different primitives, addresses that are not aligned, launches beyond the
 * limits. Shared memory is full of NaN when a block begins (under AddressSanitizer static __shared__ arrays hold what the block before left).
 * Races between blocks are seen by shim_races.cpp, in a build of its own.
 *
 * With AddressSanitizer fibers are announced, and overruns of device memory are seen; ThreadSanitizer does not know of them. */
#ifndef KVS_SHIM_H
#define KVS_SHIM_H
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <math.h>
#include <type_traits>

extern "C" {
#include "../../native/quant.h"
}
#include "shim_fiber.h" /* KVS_SHIM_ASAN */

#ifdef __GNUC__
#pragma GCC diagnostic ignored "-Wunknown-pragmas" /* #pragma unroll */
#endif

#define __global__
#ifdef KVS_SHIM_ASAN
#define __shared__ static /* with a zone around each, which arrays in sections don't have */
#else
#define __shared__ static __attribute__((section("kvs_shared"))) /* in static functions alone: those of others can't share a section */
#endif
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __align__(n)    __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define KVS_DEVICE __attribute__((always_inline)) inline /* not static: a template's specialization may not be */

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned vx = 1, unsigned vy = 1, unsigned vz = 1) : x(vx), y(vy), z(vz) {}
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
KVS_DEVICE float2 make_float2(float x, float y) { return {x, y}; }
KVS_DEVICE float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
KVS_DEVICE int2 make_int2(int x, int y) { return {x, y}; }
KVS_DEVICE int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
KVS_DEVICE uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
KVS_DEVICE uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

#include "shim_runtime.h"

/* ---- where a thread is; shim.cpp ---- */

struct kvs_shim_block {
    uint3 index;
    dim3 dim, grid;
    uint8_t *shared; /* dynamic; aligned to 16 bytes, and no more */
};
struct kvs_shim_place { /* a thread's own struct begins with it */
    uint3 index;
    const kvs_shim_block *block;
};
extern kvs_shim_place *kvs_shim_self __attribute__((visibility("hidden")));
#define threadIdx                      (kvs_shim_self->index)
#define blockIdx                       (kvs_shim_self->block->index)
#define blockDim                       (kvs_shim_self->block->dim)
#define gridDim                        (kvs_shim_self->block->grid)
#define KVS_DYNAMIC_SHARED(type, name) type *name = (type *)(void *)kvs_shim_self->block->shared

/* When a kernel begins: behind all that is in front of it; the same, but it calls kvs_await_previous; before the kernel in front has ended. Here it never
 * does, but shim_races.cpp sees what it may not read, or write, before it has waited. */
enum kvs_shim_begin { KVS_SHIM_BEHIND, KVS_SHIM_AWAITS, KVS_SHIM_EARLY };

/* Runs body() for every thread, at once, or whenever the graph runs that stream is being captured for. name: a literal. */
void kvs_shim_launch(const char *name, dim3 grid, dim3 block, size_t shared, cudaStream_t stream, std::function<void()> body,
                     int32_t begins = KVS_SHIM_BEHIND);
const char *kvs_shim_last(void); /* the name of the last one that ran */
/* Ends the process; the message begins with the kernel, the block and the thread. */
[[noreturn]] void kvs_shim_fatal(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ---- barriers and warp primitives ---- */

enum kvs_shim_kind {
    KVS_SHFL,
    KVS_SHFL_XOR,
    KVS_SHFL_UP,
    KVS_SHFL_DOWN,
    KVS_VOTE,
    KVS_SYNCWARP,
    KVS_MMA,
    KVS_LDMATRIX,
    KVS_LDMATRIX_TURNED
};

struct kvs_shim_call { /* of a warp primitive by one lane; all lanes of the mask get their results when the last has come */
    int32_t kind;
    uint32_t mask;
    const char *file;
    int32_t line;
    int32_t lane, width; /* shuffles: as the kernel says them */
    uint64_t value;      /* shuffles, vote: in, out */
    const void *a, *b;   /* mma: uint32_t[4], [2]; ldmatrix: a row of a matrix */
    float *c;            /* mma */
    uint32_t *r;         /* ldmatrix */
};
void kvs_shim_warp(kvs_shim_call *call);
void kvs_shim_barrier(const char *file, int32_t line);

/* Default arguments tell where a primitive is called: all threads must be at the same __syncthreads, mma or ldmatrix. */
#define KVS_SHIM_HERE const char *file = __builtin_FILE(), int32_t line = __builtin_LINE()

KVS_DEVICE void __syncthreads(KVS_SHIM_HERE) { kvs_shim_barrier(file, line); }

template <class T>
KVS_DEVICE T kvs_shim_shuffle(int32_t kind, uint32_t mask, T x, int32_t lane, int32_t width, const char *file, int32_t line) {
    static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, long> || std::is_same_v<T, unsigned long> ||
                      std::is_same_v<T, long long> || std::is_same_v<T, unsigned long long> || std::is_same_v<T, float> ||
                      std::is_same_v<T, double>,
                  "CUDA does not shuffle values of this type");
    kvs_shim_call call = {kind, mask, file, line, lane, width, 0, nullptr, nullptr, nullptr, nullptr};
    memcpy(&call.value, &x, sizeof x);
    kvs_shim_warp(&call);
    memcpy(&x, &call.value, sizeof x);
    return x;
}
template <class T> KVS_DEVICE T __shfl_sync(uint32_t mask, T x, int source, int width = 32, KVS_SHIM_HERE) {
    return kvs_shim_shuffle(KVS_SHFL, mask, x, source, width, file, line);
}
template <class T> KVS_DEVICE T __shfl_xor_sync(uint32_t mask, T x, int lanes, int width = 32, KVS_SHIM_HERE) {
    return kvs_shim_shuffle(KVS_SHFL_XOR, mask, x, lanes, width, file, line);
}
template <class T> KVS_DEVICE T __shfl_up_sync(uint32_t mask, T x, unsigned delta, int width = 32, KVS_SHIM_HERE) {
    return kvs_shim_shuffle(KVS_SHFL_UP, mask, x, (int32_t)delta, width, file, line);
}
template <class T> KVS_DEVICE T __shfl_down_sync(uint32_t mask, T x, unsigned delta, int width = 32, KVS_SHIM_HERE) {
    return kvs_shim_shuffle(KVS_SHFL_DOWN, mask, x, (int32_t)delta, width, file, line);
}
KVS_DEVICE unsigned __ballot_sync(uint32_t mask, int predicate, KVS_SHIM_HERE) {
    kvs_shim_call call = {KVS_VOTE, mask, file, line, 0, 0, predicate != 0, nullptr, nullptr, nullptr, nullptr};
    kvs_shim_warp(&call);
    return (unsigned)call.value;
}
KVS_DEVICE int __any_sync(uint32_t mask, int predicate, KVS_SHIM_HERE) { return __ballot_sync(mask, predicate, file, line) != 0; }
KVS_DEVICE int __all_sync(uint32_t mask, int predicate, KVS_SHIM_HERE) { return __ballot_sync(mask, predicate, file, line) == mask; }
KVS_DEVICE void __syncwarp(uint32_t mask = 0xffffffffu, KVS_SHIM_HERE) {
    kvs_shim_call call = {KVS_SYNCWARP, mask, file, line, 0, 0, 0, nullptr, nullptr, nullptr, nullptr};
    kvs_shim_warp(&call);
}

/* ---- arithmetic ---- */

template <class T, class F> KVS_DEVICE T kvs_shim_bits(F x) {
    T y;
    static_assert(sizeof x == sizeof y, "not the same size");
    memcpy(&y, &x, sizeof y);
    return y;
}
KVS_DEVICE float __uint_as_float(unsigned x) { return kvs_shim_bits<float>(x); }
KVS_DEVICE unsigned __float_as_uint(float x) { return kvs_shim_bits<unsigned>(x); }
KVS_DEVICE float __int_as_float(int x) { return kvs_shim_bits<float>(x); }
KVS_DEVICE int __float_as_int(float x) { return kvs_shim_bits<int>(x); }
KVS_DEVICE float __fmul_rn(float x, float y) { return x * y; } /* never part of an fma */
KVS_DEVICE float __fadd_rn(float x, float y) { return x + y; }
KVS_DEVICE int __float2int_rn(float x) { return (int)lrintf(x); }
KVS_DEVICE int __popc(unsigned x) { return __builtin_popcount(x); }
KVS_DEVICE int __ffs(int x) { return __builtin_ffs(x); }
KVS_DEVICE int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
KVS_DEVICE float kvs_shim_rsqrtf(float x) { return 1.0f / sqrtf(x); }
#define rsqrtf kvs_shim_rsqrtf /* some C libraries have one */

/* One host thread runs a launch, so nothing has to be atomic; shim_races.cpp must know what is. */
#ifdef KVS_SHIM_RACES
extern bool kvs_shim_in_atomic;
KVS_DEVICE void kvs_shim_atomic_part(bool begins) { /* no access may be moved from one side to the other */
    asm volatile("" ::: "memory");
    kvs_shim_in_atomic = begins;
    asm volatile("" ::: "memory");
}
#else
KVS_DEVICE void kvs_shim_atomic_part(bool) {}
#endif
template <class T> struct kvs_shim_same { typedef T type; };
template <class T> using kvs_shim_value = typename kvs_shim_same<T>::type;
template <class T>
constexpr bool kvs_shim_counts = std::is_same_v<T, int> || std::is_same_v<T, unsigned> || std::is_same_v<T, unsigned long long>;
template <class T, class F> KVS_DEVICE T kvs_shim_atomic(T *p, F f) {
    if ((uintptr_t)p % sizeof(T)) kvs_shim_fatal("an atomic operation at an address that is not a multiple of %zu", sizeof(T));
    kvs_shim_atomic_part(true);
    T old = *p;
    *p = f(old);
    kvs_shim_atomic_part(false);
    return old;
}
template <class T> KVS_DEVICE T atomicAdd(T *p, kvs_shim_value<T> x) {
    static_assert(kvs_shim_counts<T> || std::is_same_v<T, float> || std::is_same_v<T, double>, "CUDA has none for this type");
    return kvs_shim_atomic(p, [x](T old) { return (T)(old + x); });
}
template <class T> KVS_DEVICE T atomicMin(T *p, kvs_shim_value<T> x) {
    static_assert(kvs_shim_counts<T> || std::is_same_v<T, long long>, "CUDA has none for this type");
    return kvs_shim_atomic(p, [x](T old) { return x < old ? x : old; });
}
template <class T> KVS_DEVICE T atomicMax(T *p, kvs_shim_value<T> x) {
    static_assert(kvs_shim_counts<T> || std::is_same_v<T, long long>, "CUDA has none for this type");
    return kvs_shim_atomic(p, [x](T old) { return x > old ? x : old; });
}
template <class T> KVS_DEVICE T atomicOr(T *p, kvs_shim_value<T> x) {
    static_assert(kvs_shim_counts<T>, "CUDA has none for this type");
    return kvs_shim_atomic(p, [x](T old) { return (T)(old | x); });
}
template <class T> KVS_DEVICE T atomicExch(T *p, kvs_shim_value<T> x) {
    static_assert(kvs_shim_counts<T> || std::is_same_v<T, float>, "CUDA has none for this type");
    return kvs_shim_atomic(p, [x](T) { return x; });
}
template <class T> KVS_DEVICE T atomicCAS(T *p, kvs_shim_value<T> expected, kvs_shim_value<T> x) {
    static_assert(kvs_shim_counts<T>, "CUDA has none for this type");
    return kvs_shim_atomic(p, [=](T old) { return old == expected ? x : old; });
}
KVS_DEVICE void __threadfence(void) {}
KVS_DEVICE void __threadfence_block(void) {}

/* ---- device.cuh's own ---- */

KVS_DEVICE float kvs_half_float(uint16_t h) { return kvs_f16_to_f32(h); }
KVS_DEVICE uint16_t kvs_float_half(float x) { return kvs_f32_to_f16(x); }
KVS_DEVICE float2 kvs_half2_float2(uint32_t h) { return {kvs_half_float((uint16_t)h), kvs_half_float((uint16_t)(h >> 16))}; }
KVS_DEVICE uint32_t kvs_float2_half2(float low, float high) { return kvs_float_half(low) | (uint32_t)kvs_float_half(high) << 16; }
KVS_DEVICE float kvs_bf16_float(uint16_t h) { return kvs_bf16_to_f32(h); }

KVS_DEVICE void kvs_shim_aligned(const void *p, size_t bytes, const char *what) {
    if ((uintptr_t)p % bytes) kvs_shim_fatal("%s: the address %p is not a multiple of %zu", what, p, bytes);
}
template <class T> KVS_DEVICE T kvs_shim_load(const void *p, const char *what) {
    T x;
    kvs_shim_aligned(p, sizeof x, what);
    memcpy(&x, p, sizeof x);
    return x;
}
KVS_DEVICE uint16_t kvs_load2(const void *p) { return kvs_shim_load<uint16_t>(p, "kvs_load2"); }
KVS_DEVICE uint32_t kvs_load4(const void *p) { return kvs_shim_load<uint32_t>(p, "kvs_load4"); }
KVS_DEVICE uint2 kvs_load8(const void *p) { return kvs_shim_load<uint2>(p, "kvs_load8"); }
KVS_DEVICE uint4 kvs_load16(const void *p) { return kvs_shim_load<uint4>(p, "kvs_load16"); }
KVS_DEVICE uint4 kvs_load16_once(const void *p) { return kvs_shim_load<uint4>(p, "kvs_load16_once"); }
KVS_DEVICE void kvs_store16(void *p, uint4 x) {
    kvs_shim_aligned(p, sizeof x, "kvs_store16");
    memcpy(p, &x, sizeof x);
}

KVS_DEVICE int32_t kvs_dp4a(uint32_t a, uint32_t b, int32_t c) {
    for (int i = 0; i < 32; i += 8) c += (int8_t)(a >> i) * (int8_t)(b >> i);
    return c;
}

KVS_DEVICE void kvs_mma_f16(float c[4], const uint32_t a[4], const uint32_t b[2], KVS_SHIM_HERE) {
    kvs_shim_call call = {KVS_MMA, 0xffffffffu, file, line, 0, 0, 0, a, b, c, nullptr};
    kvs_shim_warp(&call);
}
KVS_DEVICE void kvs_ldmatrix_x4(uint32_t r[4], const void *shared, KVS_SHIM_HERE) {
    kvs_shim_call call = {KVS_LDMATRIX, 0xffffffffu, file, line, 0, 0, 0, shared, nullptr, nullptr, r};
    kvs_shim_warp(&call);
}
KVS_DEVICE void kvs_ldmatrix_x4_turned(uint32_t r[4], const void *shared, KVS_SHIM_HERE) {
    kvs_shim_call call = {KVS_LDMATRIX_TURNED, 0xffffffffu, file, line, 0, 0, 0, shared, nullptr, nullptr, r};
    kvs_shim_warp(&call);
}

/* What is to be copied is NaN from the call on, and copied when it is waited for: both who reads too early and who still reads
 * what stood there before will see it. On a device before 8.0 it is copied at once. */
void kvs_shim_async(void *shared, const void *global);
void kvs_shim_async_commit(void);
void kvs_shim_async_wait(uint32_t n);
void kvs_shim_await(void);
KVS_DEVICE void kvs_await_previous(void) { kvs_shim_await(); }
KVS_DEVICE void kvs_let_next_begin(void) {}
KVS_DEVICE void kvs_async16(void *shared, const void *global) { kvs_shim_async(shared, global); }
KVS_DEVICE void kvs_async_commit(void) { kvs_shim_async_commit(); }
template <int N> KVS_DEVICE void kvs_async_wait(void) { kvs_shim_async_wait(N); }
#endif
