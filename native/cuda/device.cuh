/* device.cuh - what kernels are written with. The same sources are compiled by nvcc for GPUs and, with KVS_SHIM, by a C++ compiler
 * against tests/shim/, where threads are fibers: so every kernel runs in tests on any machine. A kernel is static, and may use what stands
 * here, and of CUDA: threadIdx blockIdx blockDim gridDim, __shared__ arrays of a fixed size, __syncthreads __syncwarp __shfl_sync __shfl_xor_sync
 * __shfl_down_sync __ballot_sync __any_sync __all_sync (all lanes of the mask take part), atomicAdd atomicMin atomicMax atomicCAS atomicExch
 * __threadfence, fminf fmaxf fabsf sqrtf rsqrtf expf logf sinf cosf erff tanhf floorf fmaf and their kin, float2 float4 int4 uint2 uint4.
 * A GPU faults where an address is not a multiple of what is loaded from it; the shim checks that in the functions below. */
#ifndef KVS_DEVICE_CUH
#define KVS_DEVICE_CUH
#include <stdint.h>
#include <string.h>

#ifdef KVS_SHIM
#include "shim.h" /* defines everything that is declared below, too */
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define KVS_DEVICE __device__ __forceinline__

/* Shared memory whose size the launch says, aligned to 16 bytes. Once per kernel. */
#define KVS_DYNAMIC_SHARED(type, name)                                                                                                     \
    extern __shared__ __align__(16) uint8_t kvs_dynamic_shared[];                                                                          \
    type *name = (type *)kvs_dynamic_shared

/* Halves are uint16_t in memory; two of them, the first in the low bits, are a uint32_t. */
KVS_DEVICE float kvs_half_float(uint16_t h) { return __half2float(__ushort_as_half(h)); }
KVS_DEVICE uint16_t kvs_float_half(float x) { return __half_as_ushort(__float2half_rn(x)); } /* to nearest, ties to even */
KVS_DEVICE float2 kvs_half2_float2(uint32_t h) { return make_float2(kvs_half_float(h & 0xffff), kvs_half_float(h >> 16)); }
KVS_DEVICE uint32_t kvs_float2_half2(float low, float high) { return kvs_float_half(low) | (uint32_t)kvs_float_half(high) << 16; }
KVS_DEVICE float kvs_bf16_float(uint16_t h) { return __uint_as_float((uint32_t)h << 16); }

/* Aligned loads: 2, 4, 8, 16 bytes */
KVS_DEVICE uint16_t kvs_load2(const void *p) { return *(const uint16_t *)p; }
KVS_DEVICE uint32_t kvs_load4(const void *p) { return *(const uint32_t *)p; }
KVS_DEVICE uint2 kvs_load8(const void *p) { return *(const uint2 *)p; }
KVS_DEVICE uint4 kvs_load16(const void *p) { return *(const uint4 *)p; }
KVS_DEVICE uint4 kvs_load16_once(const void *p) { return __ldcs((const uint4 *)p); } /* global memory that is read by nobody else */
KVS_DEVICE void kvs_store16(void *p, uint4 x) { *(uint4 *)p = x; }

KVS_DEVICE int32_t kvs_dp4a(uint32_t a, uint32_t b, int32_t c) { return __dp4a((int32_t)a, (int32_t)b, c); } /* signed bytes */

/* c (16, 8) += a (16, 16) b (16, 8), one warp; a, b halves, c float32. With g = lane / 4, t = lane % 4 a lane holds: a[0] = A[g][2t, 2t+1],
 * a[1] = A[g+8][2t..], a[2] = A[g][2t+8..], a[3] = A[g+8][2t+8..]; b[0] = B[2t, 2t+1][g], b[1] = B[2t+8, 2t+9][g]; c[0], c[1] =
 * C[g][2t, 2t+1], c[2], c[3] = C[g+8][2t, 2t+1]. */
KVS_DEVICE void kvs_mma_f16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int i = 0; i < 2; i++)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
#endif
}

/* Four 8 x 8 matrices of halves from shared memory, one warp: lane i gives the address (16-byte aligned) of row i % 8 of matrix i / 8;
 * r[m] = row lane / 4, columns 2 (lane % 4), 2 (lane % 4) + 1 of matrix m. */
KVS_DEVICE void kvs_ldmatrix_x4(uint32_t r[4], const void *shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(shared))
                 : "memory");
}
KVS_DEVICE void kvs_ldmatrix_x4_turned(uint32_t r[4], const void *shared) { /* of each matrix turned: r[m] = columns' pairs of rows */
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((uint32_t)__cvta_generic_to_shared(shared))
                 : "memory");
}

/* 16 bytes from global to shared memory, later: commit ends a group, wait<n> waits until at most the last n groups are under way;
 * then __syncthreads shows them to the block. */
KVS_DEVICE void kvs_async16(void *shared, const void *global) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)), "l"(global) : "memory");
#else
    *(uint4 *)shared = *(const uint4 *)global;
#endif
}
KVS_DEVICE void kvs_async_commit(void) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N> KVS_DEVICE void kvs_async_wait(void) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

/* A kernel that KVS_LAUNCH_EARLY launches may begin before the one in front of it has ended (programmatic dependent launch). Until a thread
 * has come to kvs_await_previous it may read arguments, weights and what is staged for the step, and write nothing but shared memory; some thread
 * must come there, else the next kernel would not wait for the one in front. kvs_let_next_begin: as soon as all blocks have begun. */
KVS_DEVICE void kvs_await_previous(void) {
#if __CUDA_ARCH__ >= 900
    cudaGridDependencySynchronize();
#endif
}
KVS_DEVICE void kvs_let_next_begin(void) {
#if __CUDA_ARCH__ >= 900
    cudaTriggerProgrammaticLaunchCompletion();
#endif
}
#endif

/* A float's bits, a float of bits; and four bytes of the eight of b, a (a's are 0 to 3): nibble i of the selector, 0..7, is where byte i comes from */
KVS_DEVICE float kvs_bits_float(uint32_t bits) {
    float y;
    memcpy(&y, &bits, 4);
    return y;
}
KVS_DEVICE uint32_t kvs_float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}
KVS_DEVICE uint32_t kvs_byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef KVS_SHIM
    uint64_t bytes = (uint64_t)b << 32 | a;
    uint32_t y = 0;
    for (int i = 0; i < 4; i++) y |= (uint32_t)(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return y;
#else
    return __byte_perm(a, b, selector);
#endif
}

/* a b + c of two halves at once */
KVS_DEVICE uint32_t kvs_half2_fma(uint32_t a, uint32_t b, uint32_t c) {
#ifdef KVS_SHIM
    const float2 x = kvs_half2_float2(a), y = kvs_half2_float2(b), z = kvs_half2_float2(c);
    return kvs_float2_half2(fmaf(x.x, y.x, z.x), fmaf(x.y, y.y, z.y));
#else
    uint32_t y;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
#endif
}

#define KVS_WARP      32
#define KVS_ALL_LANES 0xffffffffu

/* A product that is rounded by itself. The CPU's rows are mixed and turned so, and a compiler that makes one fmaf of a product and a sum
 * would give other bits; this it may not touch, whatever the flags of a build are. */
KVS_DEVICE float kvs_mul(float a, float b) { return __fmul_rn(a, b); }

KVS_DEVICE float4 kvs_load_float4(const float *p) { /* p is a multiple of 16 bytes */
    uint4 bits = kvs_load16(p);
    float4 x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
KVS_DEVICE void kvs_store_float4(float *p, float4 x) {
    uint4 bits;
    memcpy(&bits, &x, sizeof bits);
    kvs_store16(p, bits);
}

KVS_DEVICE float kvs_warp_sum(float x) {
    for (int d = KVS_WARP / 2; d; d /= 2) x += __shfl_xor_sync(KVS_ALL_LANES, x, d);
    return x;
}
KVS_DEVICE float kvs_warp_max(float x) {
    for (int d = KVS_WARP / 2; d; d /= 2) x = fmaxf(x, __shfl_xor_sync(KVS_ALL_LANES, x, d));
    return x;
}
/* Over all threads of a block (whole warps, up to 1024); lines: KVS_WARP floats of shared memory that nobody else uses. */
KVS_DEVICE float kvs_block_sum(float x, float *lines) {
    int lane = threadIdx.x % KVS_WARP, warp = threadIdx.x / KVS_WARP, n = (blockDim.x + KVS_WARP - 1) / KVS_WARP;
    x = kvs_warp_sum(x);
    __syncthreads(); /* who read lines before has done so */
    if (!lane) lines[warp] = x;
    __syncthreads();
    return kvs_warp_sum(lane < n ? lines[lane] : 0.0f);
}
#endif
