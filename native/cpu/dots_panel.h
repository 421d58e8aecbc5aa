/* dots_panel.h - integer kernels for many activation rows. 256 columns of a panel of weight rows are unpacked once, turned so
 * that a vector holds four neighbouring values of each of its rows; then each tile of activation rows passes over them. Lanes
 * are weight rows: nothing is summed across lanes, and a scale is applied once per sub-block, not once per vector. */
#ifndef KVS_DOTS_PANEL_H
#define KVS_DOTS_PANEL_H
#include "dots_x86.h"

#ifdef KVS_ISA_AVX512
#define VI 16 /* weight rows of a vector */
typedef __m512i vi;
KVS_INLINE vi vi_zero(void) { return _mm512_setzero_si512(); }
KVS_INLINE vi vi_load(const void *p) { return _mm512_loadu_si512(p); }
KVS_INLINE vi vi_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
KVS_INLINE vi vi_sub(vi a, vi b) { return _mm512_sub_epi32(a, b); }
KVS_INLINE vi vi_set(int32_t x) { return _mm512_set1_epi32(x); }
#ifdef KVS_EMULATE_AVX512 /* SIMDe 0.7.4 defines its macro with the wrong number of arguments */
KVS_INLINE vi vi_madd(vi a, vi b) { return simde_mm512_madd_epi16(a, b); }
#else
KVS_INLINE vi vi_madd(vi a, vi b) { return _mm512_madd_epi16(a, b); }
#endif
KVS_INLINE vi vi_shift(vi a, int n) { return _mm512_slli_epi32(a, (unsigned)n); }
KVS_INLINE vf vi_float(vi a) { return _mm512_cvtepi32_ps(a); }
#else
#define VI 8
typedef __m256i vi;
KVS_INLINE vi vi_zero(void) { return _mm256_setzero_si256(); }
KVS_INLINE vi vi_load(const void *p) { return load8(p); }
KVS_INLINE vi vi_add(vi a, vi b) { return _mm256_add_epi32(a, b); }
KVS_INLINE vi vi_sub(vi a, vi b) { return _mm256_sub_epi32(a, b); }
KVS_INLINE vi vi_set(int32_t x) { return _mm256_set1_epi32(x); }
KVS_INLINE vi vi_madd(vi a, vi b) { return _mm256_madd_epi16(a, b); }
KVS_INLINE vi vi_shift(vi a, int n) { return _mm256_slli_epi32(a, n); }
KVS_INLINE vf vi_float(vi a) { return _mm256_cvtepi32_ps(a); }
#endif
#define NV 2         /* vectors of a panel */
#define PR (NV * VI) /* weight rows of a panel */

KVS_INLINE vi vi_four(const void *p) { /* four bytes for every lane */
    int32_t x;
    memcpy(&x, p, 4);
    return vi_set(x);
}

typedef struct packed {     /* 256 columns of PR rows */
    uint8_t q[64][PR][4];   /* values as unsigned bytes; of Q8_0 magnitudes (AVX2) or values + 128 (VNNI) */
    int8_t sign[64][PR][4]; /* Q8_0 on AVX2: the values themselves, for their signs */
    int32_t scale[16][PR];  /* of each sub-block, as sub_sum wants it */
    int32_t pair[8][PR];    /* what meets the sums of x, in pairs of 16 bits: minima (Q4_K, Q5_K), scales (Q6_K) */
    float d[8][PR], m[PR];  /* d of 256 columns, or of each 32 */
} packed;

typedef struct panel_scratch {
    packed w;
    float sums[4][KVS_XT][PR]; /* p[b % 4] of dots.h */
} panel_scratch;
_Static_assert(sizeof(panel_scratch) <= KVS_DOTS_SCRATCH && PR <= KVS_ROWS_MAX, "scratch of a thread");

/* ---- unpacking: eight rows at a time ---- */
static const uint8_t no_block[8 * 34]; /* stands for the blocks of rows beyond the last: 256 columns of any type */

KVS_INLINE void transpose(v8 r[8]) { /* 8 x 8 words of four bytes */
    v8 a[8], b[8];
    for (int i = 0; i < 4; i++) {
        a[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        a[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
        r[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
}

KVS_INLINE void load_turned(v8 r[8], const uint8_t *const *block, int64_t at) {
    for (int i = 0; i < 8; i++) r[i] = load8(block[i] + at);
    transpose(r);
}

KVS_INLINE void put(packed *w, int t, int first, v8 a) { _mm256_storeu_si256((v8 *)w->q[t][first], a); }

static void k4_pack(bool five, packed *w, const uint8_t *const *block, int first) {
    v8 v[8], h[8];
    if (five) load_turned(h, block, 16);
    for (int c = 0; c < 4; c++) {
        load_turned(v, block, (five ? 48 : 16) + 32 * c);
        for (int k = 0; k < 8; k++) {
            v8 even = nibbles(v[k]), odd = nibbles(_mm256_srli_epi16(v[k], 4));
            if (five) {
                v8 bits = _mm256_srl_epi16(h[k], _mm_cvtsi32_si128(2 * c));
                even = _mm256_or_si256(even, _mm256_and_si256(_mm256_slli_epi16(bits, 4), splat8(16)));
                odd = _mm256_or_si256(odd, _mm256_and_si256(_mm256_slli_epi16(bits, 3), splat8(16)));
            }
            put(w, 16 * c + k, first, even);
            put(w, 16 * c + 8 + k, first, odd);
        }
    }
}

static void q6_k_pack(packed *w, const uint8_t *const *block, int first) {
    v8 a[8], b[8], h[8];
    for (int half = 0; half < 2; half++) {
        load_turned(a, block, 64 * half);
        load_turned(b, block, 64 * half + 32);
        load_turned(h, block, 128 + 32 * half);
        for (int k = 0; k < 8; k++) {
            v8 out[4];
            q6_k_values(a[k], b[k], h[k], out);
            for (int r = 0; r < 4; r++) put(w, 32 * half + 8 * r + k, first, out[r]);
        }
    }
}

static void q8_0_pack(packed *w, const uint8_t *const *block, int first, int n_blocks) {
    v8 v[8];
    for (int b = 0; b < n_blocks; b++) {
        load_turned(v, block, 34 * b + 2);
        for (int k = 0; k < 8; k++) {
#ifdef KVS_ISA_AVX512
            put(w, 8 * b + k, first, _mm256_xor_si256(v[k], splat8(-128)));
#else
            put(w, 8 * b + k, first, _mm256_abs_epi8(v[k]));
            _mm256_storeu_si256((v8 *)w->sign[8 * b + k][first], v[k]);
#endif
        }
    }
}

static void q4_0_pack(packed *w, const uint8_t *const *block, int first, int n_blocks) {
    v8 v[8];
    for (int b = 0; b < n_blocks; b++) {
        for (int i = 0; i < 8; i++) v[i] = nibble_values(block[i] + 18 * b + 2);
        transpose(v);
        for (int k = 0; k < 8; k++) put(w, 8 * b + k, first, v[k]);
    }
}

/* ---- scales ---- */
KVS_INLINE int32_t twice(int32_t low, int32_t high) { return (int32_t)((uint32_t)low & 0xffff) | (int32_t)((uint32_t)high << 16); }
#ifdef KVS_ISA_AVX512
KVS_INLINE int32_t as_scale(int32_t s) { return s; } /* for a product of 32 bits */
#else
KVS_INLINE int32_t as_scale(int32_t s) { return twice(s, s); } /* for madd */
#endif

static void k4_head_row(packed *w, const uint8_t *block, int r) {
    uint8_t s[8], m[8];
    for (int j = 0; j < 8; j++) kvs_k4_scale(block + 4, j, &s[j], &m[j]);
    for (int j = 0; j < 8; j++) w->scale[j][r] = as_scale(s[j]);
    for (int j = 0; j < 4; j++) w->pair[j][r] = twice(m[2 * j], m[2 * j + 1]);
    w->d[0][r] = f16_at(block);
    w->m[r] = f16_at(block + 2);
}

static void q6_k_head_row(packed *w, const uint8_t *block, int r) {
    int8_t s[16];
    memcpy(s, block + 192, 16);
    for (int j = 0; j < 16; j++) w->scale[j][r] = as_scale(s[j]);
    for (int j = 0; j < 8; j++) w->pair[j][r] = twice(s[2 * j], s[2 * j + 1]);
    w->d[0][r] = f16_at(block + 208);
}

/* ---- the product of a panel with nx activation rows ---- */
typedef struct panel_call {
    const packed *w;
    const kvs_acts *acts;
    int64_t at;                /* place of the first row's (first) block */
    float (*sums)[KVS_XT][PR]; /* of the first row: [plane][row] */
    int64_t plane;
    int n_blocks; /* of 32, for the types that have such */
} panel_call;

/* acc += sums of four products, over steps t..t + n, each as many steps deep in 16 bits as they surely fit */
KVS_INLINE void steps(vi acc[NV][4], int nx, int n, int depth, const packed *w, int t, const int8_t *const x[4], int scale_row) {
#ifdef KVS_ISA_AVX512
    (void)depth;
    vi s[NV][4];
    KVS_EACH (v, NV)
        KVS_EACH (i, nx) s[v][i] = vi_zero();
    KVS_EACH (k, n)
        KVS_EACH (i, nx) {
            vi xv = vi_four(x[i] + 4 * (t + k));
            KVS_EACH (v, NV) s[v][i] = _mm512_dpbusd_epi32(s[v][i], vi_load(w->q[t + k][v * VI]), xv);
        }
    KVS_EACH (v, NV)
        KVS_EACH (i, nx) {
            vi scaled = scale_row < 0 ? s[v][i] : _mm512_mullo_epi32(s[v][i], vi_load(w->scale[scale_row] + v * VI));
            acc[v][i] = vi_add(acc[v][i], scaled);
        }
#else
    for (int begin = t; begin < t + n; begin += depth) {
        vi s[NV][4];
        KVS_EACH (v, NV)
            KVS_EACH (i, nx) s[v][i] = vi_zero();
        KVS_EACH (k, depth) {
            vi u[NV];
            KVS_EACH (v, NV) u[v] = vi_load(w->q[begin + k][v * VI]);
            KVS_EACH (i, nx) {
                vi xv = vi_four(x[i] + 4 * (begin + k));
                KVS_EACH (v, NV) {
                    vi p = _mm256_maddubs_epi16(u[v], xv);
                    s[v][i] = _mm256_add_epi16(s[v][i], p);
                    KVS_KEEP(s[v][i]);
                }
            }
        }
        KVS_EACH (v, NV) {
            vi scale = scale_row < 0 ? _mm256_set1_epi16(1) : vi_load(w->scale[scale_row] + v * VI);
            KVS_EACH (i, nx) acc[v][i] = vi_add(acc[v][i], vi_madd(s[v][i], scale));
        }
    }
#endif
}

KVS_INLINE void add_to_sums(const panel_call *c, int64_t plane, int nx, vi acc[NV][4], const float *d, const float *xd) {
    KVS_EACH (i, nx)
        KVS_EACH (v, NV) {
            float *y = c->sums[plane][i] + v * VI;
            v_store(y, v_add(v_load(y), v_mul(v_mul(v_load(d + v * VI), v_set(xd[i])), vi_float(acc[v][i]))));
        }
}

KVS_INLINE void sub_from_sums(const panel_call *c, int nx, vi acc[NV][4], const float *xd) {
    KVS_EACH (i, nx)
        KVS_EACH (v, NV) {
            float *y = c->sums[c->plane][i] + v * VI;
            v_store(y, v_sub(v_load(y), v_mul(v_mul(v_load(c->w->m + v * VI), v_set(xd[i])), vi_float(acc[v][i]))));
        }
}

KVS_INLINE void pair_sums(vi acc[NV][4], int nx, int pairs, const packed *w, const int16_t *sums, int64_t sums_step) {
    KVS_EACH (v, NV)
        KVS_EACH (i, nx) {
            vi s = vi_zero();
            for (int j = 0; j < pairs; j++) s = vi_add(s, vi_madd(vi_load(w->pair[j] + v * VI), vi_four(sums + i * sums_step + 2 * j)));
            acc[v][i] = s;
        }
}

/* sub: steps of a sub-block; depth: steps whose products fit 16 bits: 15, 31, 63 times 127 times 2 times depth */
KVS_INLINE void k_times(const panel_call *c, int nx, int sub, int depth, bool has_min) {
    const kvs_acts *a = c->acts;
    const int8_t *x[4];
    KVS_EACH (i, nx) x[i] = a->q + (c->at + i) * 256;
    vi acc[NV][4], other[NV][4];
    KVS_EACH (v, NV)
        KVS_EACH (i, nx) acc[v][i] = vi_zero();
    for (int j = 0; j < 64 / sub; j++) steps(acc, nx, sub, depth, c->w, j * sub, x, j);
    if (has_min) {
        add_to_sums(c, c->plane, nx, acc, c->w->d[0], a->d + c->at);
        pair_sums(other, nx, 4, c->w, a->s32 + c->at * 8, 8);
        sub_from_sums(c, nx, other, a->d + c->at);
    } else {
        pair_sums(other, nx, 8, c->w, a->s16 + c->at * 16, 16);
        KVS_EACH (v, NV)
            KVS_EACH (i, nx) acc[v][i] = vi_sub(acc[v][i], vi_shift(other[v][i], 5));
        add_to_sums(c, c->plane, nx, acc, c->w->d[0], a->d + c->at);
    }
}

KVS_INLINE void q4_0_times(const panel_call *c, int nx) {
    const kvs_acts *a = c->acts;
    for (int b = 0; b < c->n_blocks; b++) {
        int64_t at = c->at + b * a->block_step;
        const int8_t *x[4];
        vi acc[NV][4];
        KVS_EACH (i, nx) {
            x[i] = a->q + (at + i) * 32 - 32 * b;
            KVS_EACH (v, NV) acc[v][i] = vi_set(-8 * a->s32[at + i]);
        }
        steps(acc, nx, 8, 8, c->w, 8 * b, x, -1);
        add_to_sums(c, b % 4, nx, acc, c->w->d[b], a->d + at);
    }
}

#ifndef KVS_ISA_AVX512
KVS_INLINE void sign_steps(vi acc[NV][4], int nx, const packed *w, int t, const int8_t *const x[4]) {
    KVS_EACH (k, 8) {
        vi xv[4];
        KVS_EACH (i, nx) xv[i] = vi_four(x[i] + 4 * (t + k));
        KVS_EACH (v, NV) {
            vi u = vi_load(w->q[t + k][v * VI]), sign = vi_load(w->sign[t + k][v * VI]);
            KVS_EACH (i, nx) {
                acc[v][i] = vi_add(acc[v][i], dot4(u, _mm256_sign_epi8(xv[i], sign)));
                KVS_KEEP(acc[v][i]);
            }
        }
    }
}
#endif

KVS_INLINE void q8_0_times(const panel_call *c, int nx) {
    const kvs_acts *a = c->acts;
    for (int b = 0; b < c->n_blocks; b++) {
        int64_t at = c->at + b * a->block_step;
        const int8_t *x[4];
        vi acc[NV][4];
        KVS_EACH (i, nx) {
            x[i] = a->q + (at + i) * 32 - 32 * b;
#ifdef KVS_ISA_AVX512
            KVS_EACH (v, NV) acc[v][i] = vi_set(-128 * a->s32[at + i]);
#else
            KVS_EACH (v, NV) acc[v][i] = vi_zero();
#endif
        }
#ifdef KVS_ISA_AVX512
        steps(acc, nx, 8, 8, c->w, 8 * b, x, -1);
#else
        sign_steps(acc, nx, c->w, 8 * b, x);
#endif
        add_to_sums(c, b % 4, nx, acc, c->w->d[b], a->d + at);
    }
}

KVS_INLINE void times(int32_t type, const panel_call *c, int nx) {
    switch (type) {
    case KVS_TYPE_Q4_0: q4_0_times(c, nx); break;
    case KVS_TYPE_Q8_0: q8_0_times(c, nx); break;
    case KVS_TYPE_Q4_K: k_times(c, nx, 8, 8, true); break;
    case KVS_TYPE_Q5_K: k_times(c, nx, 8, 4, true); break;
    default: k_times(c, nx, 4, 2, false);
    }
}

KVS_INLINE void times_all(int32_t type, panel_call c, int64_t n) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4, c.at += 4, c.sums = (float(*)[KVS_XT][PR])(c.sums[0] + 4)) times(type, &c, 4);
    for (; i < n; i++, c.at++, c.sums = (float(*)[KVS_XT][PR])(c.sums[0] + 1)) times(type, &c, 1);
}

/* ---- panels ---- */
static void pack(packed *w, int32_t type, const uint8_t *const block[PR], int n_blocks) {
    for (int first = 0; first < PR; first += 8) {
        switch (type) {
        case KVS_TYPE_Q4_0: q4_0_pack(w, block + first, first, n_blocks); break;
        case KVS_TYPE_Q8_0: q8_0_pack(w, block + first, first, n_blocks); break;
        case KVS_TYPE_Q4_K: k4_pack(false, w, block + first, first); break;
        case KVS_TYPE_Q5_K: k4_pack(true, w, block + first, first); break;
        default: q6_k_pack(w, block + first, first);
        }
    }
    for (int r = 0; r < PR; r++) {
        if (type == KVS_TYPE_Q4_K || type == KVS_TYPE_Q5_K) k4_head_row(w, block[r], r);
        if (type == KVS_TYPE_Q6_K) q6_k_head_row(w, block[r], r);
        if (type == KVS_TYPE_Q4_0 || type == KVS_TYPE_Q8_0)
            for (int b = 0; b < n_blocks; b++) w->d[b][r] = f16_at(block[r] + b * (type == KVS_TYPE_Q4_0 ? 18 : 34));
    }
}

static void panel_times(const kvs_panel *p, const panel_call *c, int64_t n) {
    switch (p->type) {
    case KVS_TYPE_Q4_0: times_all(KVS_TYPE_Q4_0, *c, n); break;
    case KVS_TYPE_Q8_0: times_all(KVS_TYPE_Q8_0, *c, n); break;
    case KVS_TYPE_Q4_K: times_all(KVS_TYPE_Q4_K, *c, n); break;
    case KVS_TYPE_Q5_K: times_all(KVS_TYPE_Q5_K, *c, n); break;
    default: times_all(KVS_TYPE_Q6_K, *c, n);
    }
}

static void panel(const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n, float *y, int64_t y_step, panel_scratch *s) {
    const kvs_type_traits *t = kvs_type_get(p->type);
    for (int plane = 0; plane < 4; plane++) memset(s->sums[plane], 0, (size_t)n * sizeof s->sums[0][0]);
    for (int64_t k = 0; k < p->cols; k += 256) {
        const uint8_t *block[PR];
        for (int64_t r = 0; r < PR; r++) block[r] = r < p->rows ? p->w + r * p->row_bytes + k / t->block * t->block_bytes : no_block;
        int n_blocks = (int)(KVS_MIN(256, p->cols - k) / t->block);
        pack(&s->w, p->type, block, n_blocks);
        panel_call c = {&s->w, a, row * a->row_step + k / t->block * a->block_step, s->sums, k / 256 % 4, n_blocks};
        panel_times(p, &c, n);
    }
    for (int64_t i = 0; i < n; i++)
        for (int64_t r = 0; r < KVS_MIN(PR, p->rows); r++)
            y[i * y_step + r] = (s->sums[0][i][r] + s->sums[1][i][r]) + (s->sums[2][i][r] + s->sums[3][i][r]);
}

static void many(const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n, float *y, int64_t y_step, void *scratch) {
    for (int64_t r = 0; r < p->rows; r += PR) {
        kvs_panel part = *p;
        part.w += r * p->row_bytes;
        part.rows = p->rows - r;
        panel(&part, a, row, n, y + r, y_step, scratch);
    }
}
#endif
