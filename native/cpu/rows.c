/* rows.c - every kernel but the matrix products, compiled once per instruction set. Ends that do not fill a vector go
 * through the same vector code in a padded copy, so that a value's bits never depend on where in a row it stands. */
#include "attn_kernel.h"
#include "fit_kernel.h"

#if defined(KVS_ISA_AVX512)
#define ROWOPS   kvs_rowops_avx512
#define ISA_NAME "avx512"
#elif defined(KVS_ISA_AVX2)
#define ROWOPS   kvs_rowops_avx2
#define ISA_NAME "avx2"
#else
#define ROWOPS   kvs_rowops_base
#define ISA_NAME "base"
#endif

static inline vf load_part(const float *p, int64_t n) { /* n < VW values, then zeros */
    float part[VW] = {0};
    memcpy(part, p, (size_t)n * sizeof *p);
    return v_load(part);
}

static inline void store_part(float *p, vf a, int64_t n) {
    float part[VW];
    v_store(part, a);
    memcpy(p, part, (size_t)n * sizeof *p);
}

/* ---- norms ---- */

/* Sums in float32 over short runs, the runs in double: the mean of a row far from zero keeps its digits. */
enum { RUN = 256 };

static float run_squares(const float *x, float mean, int64_t n) {
    vf a = v_zero(), b = v_zero(), m = v_set(mean);
    int64_t i = 0;
    for (; i + 2 * VW <= n; i += 2 * VW) {
        vf x0 = v_sub(v_load(x + i), m), x1 = v_sub(v_load(x + i + VW), m);
        a = v_fma(x0, x0, a);
        b = v_fma(x1, x1, b);
    }
    float rest = 0.0f;
    for (; i < n; i++) rest += (x[i] - mean) * (x[i] - mean);
    return v_sum(v_add(a, b)) + rest;
}

static float run_sum(const float *x, int64_t n) {
    vf a = v_zero(), b = v_zero();
    int64_t i = 0;
    for (; i + 2 * VW <= n; i += 2 * VW) {
        a = v_add(a, v_load(x + i));
        b = v_add(b, v_load(x + i + VW));
    }
    float rest = 0.0f;
    for (; i < n; i++) rest += x[i];
    return v_sum(v_add(a, b)) + rest;
}

static float mean_of(const float *x, int64_t n) {
    double sum = 0;
    for (int64_t i = 0; i < n; i += RUN) sum += (double)run_sum(x + i, KVS_MIN(n - i, (int64_t)RUN));
    return (float)(sum / (double)n);
}

static float mean_square(const float *x, float mean, int64_t n) { /* of x - mean */
    double sum = 0;
    for (int64_t i = 0; i < n; i += RUN) sum += (double)run_squares(x + i, mean, KVS_MIN(n - i, (int64_t)RUN));
    return (float)(sum / (double)n);
}

static void rms_norm(float *y, const float *x, const float *w, float eps, int64_t n) {
    float scale = 1.0f / sqrtf(mean_square(x, 0.0f, n) + eps);
    for (int64_t i = 0; i < n; i++) y[i] = x[i] * scale * w[i];
}

static void layer_norm(float *y, const float *x, const float *w, const float *b, float eps, int64_t n) {
    float mean = mean_of(x, n);
    float scale = 1.0f / sqrtf(mean_square(x, mean, n) + eps);
    for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) * scale * w[i] + b[i];
}

/* ---- element by element ---- */

static void rope(float *x, const float *table, int32_t n_head, int32_t head_dim, int32_t n_rot) {
    for (int32_t h = 0; h < n_head; h++, x += head_dim)
        for (int32_t i = 0; i + 1 < n_rot; i += 2) {
            float c = table[i], s = table[i + 1], x0 = x[i], x1 = x[i + 1];
            x[i] = x0 * c - x1 * s;
            x[i + 1] = x0 * s + x1 * c;
        }
}

static void add(float *y, const float *x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] += x[i];
}

static void mix(float *y, const float *x, float weight_y, float weight_x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = weight_y * y[i] + weight_x * x[i];
}

static inline vf logistic(vf x) { /* x / (1 + e^-x), with x outside: callers multiply */
    return v_div(v_set(1.0f), v_add(v_set(1.0f), v_exp(v_sub(v_zero(), x))));
}

static inline vf silu_mul(vf g, vf u) { return v_mul(v_mul(g, logistic(g)), u); }

static void gate(float *g, const float *u, int64_t n) {
    int64_t i = 0;
    for (; i + VW <= n; i += VW) v_store(g + i, silu_mul(v_load(g + i), v_load(u + i)));
    if (i < n) store_part(g + i, silu_mul(load_part(g + i, n - i), load_part(u + i, n - i)), n - i);
}

/* x Phi(x) = max(x, 0) - |x| Phi(-|x|), with Phi(-a) = erfc(a / sqrt 2) / 2 after Abramowitz and Stegun 7.1.26
 * (absolute error below 8e-8 in Phi): nothing cancels in the tail. */
static inline vf gelu(vf x) {
    vf a = v_abs(x);
    vf t = v_div(v_set(1.0f), v_fma(v_set(0.3275911f * 0.70710678f), a, v_set(1.0f)));
    vf p = v_set(1.061405429f);
    p = v_fma(p, t, v_set(-1.453152027f));
    p = v_fma(p, t, v_set(1.421413741f));
    p = v_fma(p, t, v_set(-0.284496736f));
    p = v_fma(p, t, v_set(0.254829592f));
    vf tail = v_mul(v_mul(v_set(0.5f), v_mul(p, t)), v_exp(v_mul(v_mul(v_set(-0.5f), a), a)));
    return v_sub(v_max(x, v_zero()), v_mul(a, tail));
}

static inline vf gelu_tanh(vf x) { /* (1 + tanh z) / 2 = logistic(2z) */
    vf z = v_mul(v_set(2 * 0.79788456f), v_mul(x, v_fma(v_set(0.044715f), v_mul(x, x), v_set(1.0f))));
    return v_mul(x, logistic(z));
}

static inline vf gelu_quick(vf x) { return v_mul(x, logistic(v_mul(v_set(1.702f), x))); }

static inline vf activate(int32_t kind, vf x) { return kind == KVS_GELU ? gelu(x) : kind == KVS_GELU_TANH ? gelu_tanh(x) : gelu_quick(x); }

static inline void activate_all(int32_t kind, float *x, int64_t n) {
    int64_t i = 0;
    for (; i + VW <= n; i += VW) v_store(x + i, activate(kind, v_load(x + i)));
    if (i < n) store_part(x + i, activate(kind, load_part(x + i, n - i)), n - i);
}

static void unary(int32_t kind, float *x, int64_t n) { /* one loop each, so that kind is no question inside it */
    if (kind == KVS_GELU)
        activate_all(KVS_GELU, x, n);
    else if (kind == KVS_GELU_TANH)
        activate_all(KVS_GELU_TANH, x, n);
    else
        activate_all(KVS_GELU_QUICK, x, n);
}

static bool within(const float *x, float limit, int64_t n) {
    int32_t beyond = 0;
    for (int64_t i = 0; i < n; i++) beyond |= !(fabsf(x[i]) <= limit);
    return !beyond;
}

/* ---- cache rows ---- */

static void store_f16(uint8_t *row, const float *x, int32_t n) {
    uint16_t *h = (uint16_t *)(void *)row;
    int32_t i = 0;
    for (; i + VW <= n; i += VW) v_store_f16(h + i, v_load(x + i));
    for (; i < n; i++) h[i] = kvs_f32_to_f16(x[i]);
}

/* The quants are taken against the scale as it is stored, so that its rounding costs nothing. */
static void store_q8_block(uint8_t *block, const float *x, int32_t n) {
    float top = 0.0f;
    for (int32_t i = 0; i < n; i++) top = KVS_MAX(top, fabsf(x[i]));
    uint16_t scale = kvs_f32_to_f16(KVS_MIN(top / 127.0f, 65504.0f));
    float d = kvs_f16_to_f32(scale);
    memcpy(block, &scale, 2);
    for (int32_t i = 0; i < 32; i++) {
        float q = i < n && d > 0.0f ? nearbyintf(x[i] / d) : 0.0f;
        block[2 + i] = (uint8_t)(int8_t)(q > 127.0f ? 127.0f : q < -127.0f ? -127.0f : q == q ? q : 0.0f);
    }
}

static void store(int32_t type, void *row, const float *x, int32_t head_dim) {
    if (type == KVS_TYPE_F32)
        memcpy(row, x, (size_t)head_dim * sizeof *x);
    else if (type == KVS_TYPE_F16)
        store_f16(row, x, head_dim);
    else
        for (int32_t i = 0; i < head_dim; i += 32) store_q8_block((uint8_t *)row + i / 32 * 34, x + i, KVS_MIN(32, head_dim - i));
}

static void load_f16(const uint8_t *row, float *x, int32_t n) {
    const uint16_t *h = (const uint16_t *)(const void *)row;
    int32_t i = 0;
    for (; i + VW <= n; i += VW) v_store(x + i, v_load_f16(h + i));
    for (; i < n; i++) x[i] = kvs_f16_to_f32(h[i]);
}

static void load(int32_t type, const void *row, float *x, int32_t head_dim) {
    if (type == KVS_TYPE_F16)
        load_f16(row, x, head_dim);
    else
        kvs_kv_row_to_f32(type, row, x, head_dim);
}

/* tile vectors of each sum stay in registers; tile is a constant where this is called */
static inline __attribute__((always_inline)) void weigh_tile(float *y, const float *x, int32_t width, const int32_t *source,
                                                             const float *weight, int32_t n, const int tile) {
    vf sum[KVS_MIX_COLUMNS][4];
    for (int c = 0; c < KVS_MIX_COLUMNS; c++)
        for (int t = 0; t < tile; t++) sum[c][t] = v_zero();
    for (int32_t s = 0; s < n; s++) {
        const float *row = x + (int64_t)source[s] * width;
        vf part[4];
        for (int t = 0; t < tile; t++) part[t] = v_load(row + t * VW);
        for (int c = 0; c < KVS_MIX_COLUMNS; c++) {
            vf w = v_set(weight[s * KVS_MIX_COLUMNS + c]);
            for (int t = 0; t < tile; t++) sum[c][t] = v_fma(w, part[t], sum[c][t]);
        }
    }
    for (int c = 0; c < KVS_MIX_COLUMNS; c++)
        for (int t = 0; t < tile; t++) v_store(y + (int64_t)c * width + t * VW, sum[c][t]);
}

static void combine(float *y, const float *x, int32_t width, const int32_t *source, const float *weight, int32_t n) {
    const int tile = VW == 16 ? 4 : 2; /* AVX2 has 16 registers */
    int32_t i = 0;
    for (; i + tile * VW <= width; i += tile * VW) weigh_tile(y + i, x + i, width, source, weight, n, tile);
    for (; i < width; i += VW) weigh_tile(y + i, x + i, width, source, weight, n, 1);
}

const kvs_rowops ROWOPS = {
    .isa = ISA_NAME,
    .rms_norm = rms_norm,
    .layer_norm = layer_norm,
    .rope = rope,
    .add = add,
    .gate = gate,
    .unary = unary,
    .within = within,
    .attn = attn,
    .store = store,
    .weigh = weigh,
    .load = load,
    .mix = mix,
    .combine = combine,
    .fit = fit,
};
