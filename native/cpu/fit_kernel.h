/* fit_kernel.h - how well blocks of weights lie on a grid: the inner loop of encode.c. Part of rows.c. No fused products, no sums
 * across lanes: the bits are the same on every instruction set. */
#ifndef KVS_FIT_KERNEL_H
#define KVS_FIT_KERNEL_H
#include "cpu.h"
#include "simd.h"

static void fit_part(const float *x, int32_t n, int32_t c, kvs_fit *f) {
    float inverse[VW];
    for (int32_t i = 0; i < VW; i++) inverse[i] = fabsf(f->d[c + i]) > KVS_FIT_TINY ? 1.0f / f->d[c + i] : 0.0f;
    const vf d = v_load(f->d + c), m = v_load(f->m + c), inv = v_load(inverse), lo = v_set(f->lo), hi = v_set(f->hi);
    vf e1 = v_zero(), e2 = v_zero(), q1 = v_zero(), q2 = v_zero(), eq = v_zero();
    for (int32_t i = 0; i < n; i++) {
        vf r = v_sub(v_load(x + i * KVS_FIT_BLOCKS + c), m);
        vf q = v_round(v_max(v_min(v_mul(r, inv), hi), lo)), e = v_sub(r, v_mul(d, q));
        e1 = v_add(e1, e), e2 = v_add(e2, v_mul(e, e));
        q1 = v_add(q1, q), q2 = v_add(q2, v_mul(q, q));
        eq = v_add(eq, v_mul(e, q));
    }
    v_store(f->e + c, e1), v_store(f->ee + c, e2), v_store(f->q + c, q1), v_store(f->qq + c, q2), v_store(f->eq + c, eq);
}

static void fit(const float *x, int32_t n, kvs_fit *f) {
    for (int32_t c = 0; c < KVS_FIT_BLOCKS; c += VW) fit_part(x, n, c, f);
}
#endif
