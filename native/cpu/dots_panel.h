/* dots_panel.h - integer kernels for many activation rows. 256 columns of a panel of weight rows are unpacked once, to bytes in the
 * order of stripes; then each tile of activation rows passes over them. */
#ifndef KVS_DOTS_PANEL_H
#define KVS_DOTS_PANEL_H
#include "dots_stripes.h"

#define NV 2         /* vectors of a panel */
#define PR (NV * VI) /* weight rows of a panel */

typedef struct packed {     /* 256 columns of PR rows */
    uint8_t q[64][PR][4];   /* values as unsigned bytes; of Q8_0 magnitudes (AVX2) or values + 128 (VNNI) */
    int8_t sign[64][PR][4]; /* Q8_0 on AVX2: the values themselves, for their signs */
    int32_t scale[16][PR];  /* of each sub-block, as scaled() wants it */
    int32_t pair[8][PR];    /* what meets the sums of x, in pairs of 16 bits: minima (Q4_K, Q5_K), scales (Q6_K) */
    float d[8][PR], m[PR];  /* d of 256 columns, or of each 32 */
} packed;

typedef struct panel_scratch {
    packed w;
    float sums[4][KVS_XT][PR]; /* p[b % 4] of dots.h */
} panel_scratch;
_Static_assert(sizeof(panel_scratch) <= KVS_DOTS_SCRATCH && PR <= KVS_ROWS_MAX && KVS_UNIT % PR == 0, "scratch of a thread");

/* ---- unpacking VI rows, from row at of a stripe, to lanes to.. of the panel ---- */
KVS_INLINE void put(packed *w, int t, int to, vi a) { vi_store(w->q[t][to], a); }

KVS_INLINE void k4_pack(bool five, packed *w, const void *block, int at, int to) {
    k4_head head = k4_head_of(block, at);
    KVS_EACH (c, 4)
        for (int k = 0; k < 8; k++) {
            two v = k4_values(five, block, c, k, at);
            put(w, 16 * c + k, to, v.even);
            put(w, 16 * c + 8 + k, to, v.odd);
        }
    KVS_EACH (j, 8) vi_store(&w->scale[j][to], unsigned_scale(head.scale[j / 4], j % 4));
    KVS_EACH (j, 4) vi_store(&w->pair[j][to], unsigned_pair(head.min[j / 2], j % 2));
}

static void q6_k_pack(packed *w, const kvs_stripe_q6_k *s, int at, int to) {
    for (int half = 0; half < 2; half++)
        for (int k = 0; k < 8; k++) {
            vi v[4];
            q6_k_values(s, half, k, at, v);
            KVS_EACH (r, 4) put(w, 32 * half + 8 * r + k, to, v[r]);
        }
    KVS_EACH (j, 16) vi_store(&w->scale[j][to], signed_scale(vi_load(s->scales[j / 4][at]), j % 4));
    KVS_EACH (j, 8) vi_store(&w->pair[j][to], signed_pair(vi_load(s->scales[j / 2][at]), j % 2));
}

static void q8_0_pack(packed *w, const kvs_stripe_q8_0 *s, int b, int at, int to) {
    for (int k = 0; k < 8; k++) {
        vi v = vi_load(s->q[k][at]);
#ifdef KVS_ISA_AVX512
        put(w, 8 * b + k, to, _mm512_xor_si512(v, vi_bytes(-128)));
#else
        put(w, 8 * b + k, to, _mm256_abs_epi8(v));
        vi_store(w->sign[8 * b + k][to], v);
#endif
    }
}

static void q4_0_pack(packed *w, const kvs_stripe_q4_0 *s, int b, int at, int to) {
    for (int k = 0; k < 4; k++) {
        vi v = vi_load(s->q[k][at]);
        put(w, 8 * b + k, to, low_nibbles(v));
        put(w, 8 * b + 4 + k, to, high_nibbles(v));
    }
}

KVS_INLINE void put_d(float *to, const uint16_t *d) { v_store(to, v_load_f16(d)); }

/* Block b of the panel's 256 columns */
static void pack_lanes(packed *w, int32_t type, const void *block, int b, int at, int to) {
    const kvs_stripe_q4_0 *q4_0 = block;
    const kvs_stripe_q8_0 *q8_0 = block;
    const kvs_stripe_q4_k *q4_k = block;
    const kvs_stripe_q5_k *q5_k = block;
    const kvs_stripe_q6_k *q6_k = block;
    switch (type) {
    case KVS_TYPE_Q4_0: q4_0_pack(w, q4_0, b, at, to), put_d(w->d[b] + to, q4_0->d + at); break;
    case KVS_TYPE_Q8_0: q8_0_pack(w, q8_0, b, at, to), put_d(w->d[b] + to, q8_0->d + at); break;
    case KVS_TYPE_Q4_K:
        k4_pack(false, w, block, at, to);
        put_d(w->d[0] + to, q4_k->d + at), put_d(w->m + to, q4_k->m + at);
        break;
    case KVS_TYPE_Q5_K:
        k4_pack(true, w, block, at, to);
        put_d(w->d[0] + to, q5_k->d + at), put_d(w->m + to, q5_k->m + at);
        break;
    default: q6_k_pack(w, q6_k, at, to), put_d(w->d[0] + to, q6_k->d + at);
    }
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

/* acc += products of steps t..t + n, all of one scale; depth as in k4_sums */
KVS_INLINE void steps(vi acc[NV][4], int nx, int n, int depth, const packed *w, int t, const int8_t *const x[4], int scale_row) {
    for (int begin = t; begin < t + n; begin += depth) {
        vi s[NV][4];
        KVS_EACH (v, NV)
            KVS_EACH (i, nx) s[v][i] = vi_zero();
        KVS_EACH (k, depth)
            KVS_EACH (i, nx) {
                vi xv = vi_word(x[i] + 4 * (begin + k));
                KVS_EACH (v, NV) {
                    s[v][i] = dot(s[v][i], vi_load(w->q[begin + k][v * VI]), xv);
                    if (!VNNI) KVS_KEEP(s[v][i]);
                }
            }
        KVS_EACH (v, NV)
            KVS_EACH (i, nx)
                acc[v][i] =
                    scale_row < 0 ? unscaled(acc[v][i], s[v][i]) : scaled(acc[v][i], s[v][i], vi_load(w->scale[scale_row] + v * VI));
    }
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
            acc[v][i] = vi_zero();
            for (int j = 0; j < pairs; j++)
                acc[v][i] = vi_madd_to(acc[v][i], vi_load(w->pair[j] + v * VI), vi_word(sums + i * sums_step + 2 * j));
        }
}

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
            KVS_EACH (i, nx) acc[v][i] = vi_sub(acc[v][i], vi_left(other[v][i], 5));
        add_to_sums(c, c->plane, nx, acc, c->w->d[0], a->d + c->at);
    }
}

KVS_INLINE void q4_0_times(const panel_call *c, int nx) {
    const kvs_acts *a = c->acts;
    for (int b = 0; b < c->n_blocks; b++) {
        int64_t at = c->at + b * a->n;
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
        KVS_EACH (i, nx) xv[i] = vi_word(x[i] + 4 * (t + k));
        KVS_EACH (v, NV) {
            vi u = vi_load(w->q[t + k][v * VI]), sign = vi_load(w->sign[t + k][v * VI]);
            KVS_EACH (i, nx) {
                acc[v][i] = unscaled(acc[v][i], _mm256_maddubs_epi16(u, _mm256_sign_epi8(xv[i], sign)));
                KVS_KEEP(acc[v][i]);
            }
        }
    }
}
#endif

KVS_INLINE void q8_0_times(const panel_call *c, int nx) {
    const kvs_acts *a = c->acts;
    for (int b = 0; b < c->n_blocks; b++) {
        int64_t at = c->at + b * a->n;
        const int8_t *x[4];
        vi acc[NV][4];
        KVS_EACH (i, nx) {
            x[i] = a->q + (at + i) * 32 - 32 * b;
            KVS_EACH (v, NV) acc[v][i] = vi_set(VNNI ? -128 * a->s32[at + i] : 0);
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
    case KVS_TYPE_Q5_K: k_times(c, nx, 8, VNNI ? 8 : 4, true); break;
    default: k_times(c, nx, 4, VNNI ? 4 : 2, false);
    }
}

KVS_INLINE void times_all(int32_t type, panel_call c, int64_t n) {
    int64_t i = 0;
    for (; i + 4 <= n; i += 4, c.at += 4, c.sums = (float(*)[KVS_XT][PR])(c.sums[0] + 4)) times(type, &c, 4);
    for (; i < n; i++, c.at++, c.sums = (float(*)[KVS_XT][PR])(c.sums[0] + 1)) times(type, &c, 1);
}

/* ---- panels ---- */
static void panel_times(const kvs_panel *p, const panel_call *c, int64_t n) {
    switch (p->type) {
    case KVS_TYPE_Q4_0: times_all(KVS_TYPE_Q4_0, *c, n); break;
    case KVS_TYPE_Q8_0: times_all(KVS_TYPE_Q8_0, *c, n); break;
    case KVS_TYPE_Q4_K: times_all(KVS_TYPE_Q4_K, *c, n); break;
    case KVS_TYPE_Q5_K: times_all(KVS_TYPE_Q5_K, *c, n); break;
    default: times_all(KVS_TYPE_Q6_K, *c, n);
    }
}

/* Lanes beyond the last stripe get it once more: nobody reads their sums. */
static void pack(packed *w, const kvs_panel *p, int64_t first_block, int n_blocks) {
    const int64_t bytes = KVS_STRIPE * p->row_bytes / (p->cols / kvs_acts_block(p->type));
    for (int to = 0; to < PR; to += VI) {
        int64_t stripe = KVS_MIN(to / KVS_STRIPE, (p->rows - 1) / KVS_STRIPE);
        const uint8_t *block = p->w + stripe * KVS_STRIPE * p->row_bytes + first_block * bytes;
        for (int b = 0; b < n_blocks; b++) pack_lanes(w, p->type, block + b * bytes, b, to % KVS_STRIPE, to);
    }
}

static void panel(const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n, float *y, int64_t y_step, panel_scratch *s) {
    for (int plane = 0; plane < 4; plane++) memset(s->sums[plane], 0, (size_t)n * sizeof s->sums[0][0]);
    for (int64_t k = 0; k < p->cols; k += 256) {
        int64_t first = k / a->block;
        int n_blocks = (int)(KVS_MIN(256, p->cols - k) / a->block);
        pack(&s->w, p, first, n_blocks);
        panel_call c = {&s->w, a, first * a->n + row, s->sums, k / 256 % 4, n_blocks};
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
