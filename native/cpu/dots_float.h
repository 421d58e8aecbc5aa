/* dots_float.h - weights times float32 activations. Tiles of four weight rows by up to three activation rows: twelve vectors of
 * sums, which is what 16 registers hold. Every product of a row pair is summed in the same order in every tile. */
#ifndef KVS_DOTS_FLOAT_H
#define KVS_DOTS_FLOAT_H
#include "dots.h"
#include "simd.h"

/* sums of the lanes of four vectors */
KVS_INLINE void lane_sums(float out[4], vf a, vf b, vf c, vf d) {
#if defined(KVS_ISA_AVX2) || defined(KVS_ISA_AVX512)
#ifdef KVS_ISA_AVX512
    __m256 v[4];
    const vf in[4] = {a, b, c, d};
    for (int i = 0; i < 4; i++) v[i] = _mm256_add_ps(_mm512_castps512_ps256(in[i]), _mm512_extractf32x8_ps(in[i], 1));
#else
    const __m256 v[4] = {a, b, c, d};
#endif
    __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(v[0], v[1]), _mm256_unpackhi_ps(v[0], v[1]));
    __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(v[2], v[3]), _mm256_unpackhi_ps(v[2], v[3]));
    __m256 s = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
#else
    out[0] = v_sum(a), out[1] = v_sum(b), out[2] = v_sum(c), out[3] = v_sum(d);
#endif
}

KVS_INLINE vf load_weights(int32_t type, const uint8_t *row, int64_t k) {
    return type == KVS_TYPE_F32   ? v_load((const float *)(const void *)row + k)
           : type == KVS_TYPE_F16 ? v_load_f16((const uint16_t *)(const void *)row + k)
                                  : v_load_bf16((const uint16_t *)(const void *)row + k);
}

static inline int64_t size_of(int32_t type) { return type == KVS_TYPE_F32 ? 4 : 2; }

KVS_INLINE vf load_last(int32_t type, const void *row, int64_t k, int64_t n) { /* n < VW values, zeros after them */
    int64_t size = size_of(type);
    uint8_t part[VW * 4] = {0};
    memcpy(part, (const uint8_t *)row + k * size, (size_t)(n * size));
    return load_weights(type, part, 0);
}

/* sums[x][row] of n columns; rows row_bytes apart, of activations x_step values */
KVS_INLINE void tile(int32_t type, int nx, const uint8_t *const w[4], const float *x, int64_t x_step, int64_t n, float sums[][4]) {
    vf s[3][4];
    KVS_EACH (i, nx)
        for (int r = 0; r < 4; r++) s[i][r] = v_zero();
    int64_t k = 0;
    for (; k + VW <= n; k += VW) {
        vf v[3];
        KVS_EACH (i, nx) v[i] = v_load(x + i * x_step + k);
        KVS_EACH (r, 4) {
            vf u = load_weights(type, w[r], k);
            KVS_EACH (i, nx) s[i][r] = v_fma(u, v[i], s[i][r]);
        }
    }
    if (k < n) {
        KVS_EACH (r, 4) {
            vf u = load_last(type, w[r], k, n - k);
            KVS_EACH (i, nx) s[i][r] = v_fma(u, load_last(KVS_TYPE_F32, x + i * x_step, k, n - k), s[i][r]);
        }
    }
    KVS_EACH (i, nx) lane_sums(sums[i], s[i][0], s[i][1], s[i][2], s[i][3]);
}

typedef struct strip { /* up to four weight rows, n columns of them */
    const uint8_t *w[4];
    int64_t rows, n;
    bool first; /* the first panel of columns sets y, the others add to it */
} strip;

KVS_INLINE void strip_times(int32_t type, int nx, const strip *s, const float *x, int64_t x_step, float *y, int64_t y_step) {
    float sums[3][4];
    tile(type, nx, s->w, x, x_step, s->n, sums);
    for (int i = 0; i < nx; i++)
        for (int64_t r = 0; r < s->rows; r++) y[i * y_step + r] = s->first ? sums[i][r] : y[i * y_step + r] + sums[i][r];
}

KVS_INLINE void strip_by_type(int32_t type, const strip *s, const float *x, int64_t x_step, int64_t n, float *y, int64_t y_step) {
    int64_t i = 0;
    for (; i + 3 <= n; i += 3) strip_times(type, 3, s, x + i * x_step, x_step, y + i * y_step, y_step);
    if (n - i == 2) strip_times(type, 2, s, x + i * x_step, x_step, y + i * y_step, y_step);
    if (n - i == 1) strip_times(type, 1, s, x + i * x_step, x_step, y + i * y_step, y_step);
}

static void strip_f32(const strip *s, const float *x, int64_t x_step, int64_t n, float *y, int64_t y_step) {
    strip_by_type(KVS_TYPE_F32, s, x, x_step, n, y, y_step);
}
static void strip_f16(const strip *s, const float *x, int64_t x_step, int64_t n, float *y, int64_t y_step) {
    strip_by_type(KVS_TYPE_F16, s, x, x_step, n, y, y_step);
}
static void strip_bf16(const strip *s, const float *x, int64_t x_step, int64_t n, float *y, int64_t y_step) {
    strip_by_type(KVS_TYPE_BF16, s, x, x_step, n, y, y_step);
}

/* n columns of a row, from column k, as float32 */
static void widen(const kvs_panel *p, int64_t row, int64_t k, int64_t n, float *out) {
    const kvs_type_traits *t = kvs_type_get(p->type);
    t->to_f32(p->w + row * p->row_bytes + k / t->block * t->block_bytes, out, n);
}

/* Rows are taken as they are (wide NULL), or from wide, which holds the panel's columns k..k + n as float32. */
static void float_strips(const kvs_panel *p, const float *wide, int64_t k, int64_t n, const float *x, int64_t nx, float *y,
                         int64_t y_step) {
    int64_t at = size_of(p->type) * k;
    void (*times)(const strip *, const float *, int64_t, int64_t, float *, int64_t) = wide || p->type == KVS_TYPE_F32 ? strip_f32
                                                                                      : p->type == KVS_TYPE_F16       ? strip_f16
                                                                                                                      : strip_bf16;
    for (int64_t r = 0; r < p->rows; r += 4) {
        strip s = {.rows = KVS_MIN(4, p->rows - r), .n = n, .first = k == 0};
        for (int64_t j = 0; j < 4; j++) { /* a strip that is not full reads its last row again */
            int64_t row = r + KVS_MIN(j, s.rows - 1);
            s.w[j] = wide ? (const uint8_t *)(wide + row * KVS_KC) : p->w + row * p->row_bytes + at;
        }
        times(&s, x + k, p->cols, nx, y + r, y_step);
    }
}

/* Columns are widened once for all activation rows. */
static void float_panel(const kvs_panel *p, const float *x, int64_t n, float *y, int64_t y_step, float *wide) {
    for (int64_t k = 0; k < p->cols; k += KVS_KC) {
        int64_t kn = KVS_MIN(KVS_KC, p->cols - k);
        for (int64_t r = 0; r < p->rows && wide; r++) widen(p, r, k, kn, wide + r * KVS_KC);
        for (int64_t i = 0; i < n; i += KVS_XT_FLOAT)
            float_strips(p, wide, k, kn, x + i * p->cols, KVS_MIN(KVS_XT_FLOAT, n - i), y + i * y_step, y_step);
    }
}

/* ---- few activation rows ---- */

/* s[x][j] += the products of columns k.. of panel j, n of them in each; n % VW == 0 */
KVS_INLINE void four_panels(int32_t type, int nx, const uint8_t *row, const float *x, int64_t x_step, int64_t n, vf s[3][4]) {
    for (int64_t k = 0; k < n; k += VW)
        KVS_EACH (j, 4) {
            vf u = load_weights(type, row, j * KVS_KC + k);
            KVS_EACH (i, nx) s[i][j] = v_fma(u, v_load(x + i * x_step + j * KVS_KC + k), s[i][j]);
        }
}

KVS_INLINE void one_panel(int32_t type, int nx, const uint8_t *row, const float *x, int64_t x_step, int64_t n, vf s[3][4], int j) {
    int64_t k = 0;
    for (; k + VW <= n; k += VW) {
        vf u = load_weights(type, row, k);
        KVS_EACH (i, nx) s[i][j] = v_fma(u, v_load(x + i * x_step + k), s[i][j]);
    }
    if (k == n) return;
    vf u = load_last(type, row + k * size_of(type), 0, n - k);
    KVS_EACH (i, nx) s[i][j] = v_fma(u, load_last(KVS_TYPE_F32, x + i * x_step + k, 0, n - k), s[i][j]);
}

/* Weights are read row by row, one rising stream, and asked for ahead bytes before their use. Sums are those of strips: one vector for
 * each panel of columns, four panels at a time. */
KVS_INLINE void row_times(int32_t type, int nx, const kvs_panel *p, const uint8_t *row, const float *x, float *y, int64_t y_step) {
    const int64_t cols = p->cols, size = size_of(type);
    for (int64_t at = 0; at < cols; at += 4 * KVS_KC) {
        int64_t n = KVS_MIN(4 * KVS_KC, cols - at);
        const uint8_t *w = row + at * size;
        vf s[3][4];
        KVS_EACH (i, nx)
            KVS_EACH (j, 4) s[i][j] = v_zero();
        for (int64_t i = 0; p->ahead && i < n * size; i += 64) __builtin_prefetch(w + p->ahead + i);
        if (n == 4 * KVS_KC)
            four_panels(type, nx, w, x + at, cols, KVS_KC, s);
        else
            KVS_EACH (j, 4)
                if (j * KVS_KC < n)
                    one_panel(type, nx, w + j * KVS_KC * size, x + at + j * KVS_KC, cols, KVS_MIN(KVS_KC, n - j * KVS_KC), s, j);
        KVS_EACH (i, nx) {
            float sums[4];
            lane_sums(sums, s[i][0], s[i][1], s[i][2], s[i][3]);
            for (int64_t j = 0; j * KVS_KC < n; j++) y[i * y_step] = at || j ? y[i * y_step] + sums[j] : sums[j];
        }
    }
}

KVS_INLINE void rows_times(int32_t type, const kvs_panel *p, const float *x, int64_t n, float *y, int64_t y_step) {
    for (int64_t r = 0; r < p->rows; r++) {
        const uint8_t *row = p->w + r * p->row_bytes;
        if (n == 1) row_times(type, 1, p, row, x, y + r, y_step);
        if (n == 2) row_times(type, 2, p, row, x, y + r, y_step);
        if (n == 3) row_times(type, 3, p, row, x, y + r, y_step);
    }
}

static void floats(const kvs_panel *p, const float *x, int64_t n, float *y, int64_t y_step, void *scratch) {
    bool plain = p->type == KVS_TYPE_F32 || (VW > 1 && (p->type == KVS_TYPE_F16 || p->type == KVS_TYPE_BF16));
    if (plain && n <= KVS_FEW_FLOAT) {
        if (p->type == KVS_TYPE_F32) rows_times(KVS_TYPE_F32, p, x, n, y, y_step);
        if (p->type == KVS_TYPE_F16) rows_times(KVS_TYPE_F16, p, x, n, y, y_step);
        if (p->type == KVS_TYPE_BF16) rows_times(KVS_TYPE_BF16, p, x, n, y, y_step);
        return;
    }
    for (int64_t r = 0; r < p->rows; r += KVS_ROWS_FLOAT) {
        kvs_panel part = *p;
        part.w += r * p->row_bytes;
        part.rows = KVS_MIN(KVS_ROWS_FLOAT, p->rows - r);
        float_panel(&part, x, n, y + r, y_step, plain ? NULL : scratch);
    }
}
#endif
