/* dots_panel.h - integer kernels for many activation rows. 256 columns of a panel of weight rows are unpacked once, to bytes in the
 * order of stripes; then each tile of activation rows passes over them. */
#ifndef KVS_DOTS_PANEL_H
#define KVS_DOTS_PANEL_H
#include "dots_stripes.h"

#define NV 2                    /* vectors of a panel */
#define PR (NV * VI)            /* weight rows of a panel */
enum { NX = VI == 16 ? 6 : 4 }; /* activation rows that pass over it together: their 2 NV NX sums take most registers */

typedef struct packed {       /* 256 columns of PR rows */
    uint8_t q[64][PR][4];     /* values as unsigned bytes; magnitudes of those that stay signed */
    int8_t sign[64][PR][4];   /* those themselves, for their signs */
    int32_t scale[16][PR];    /* of each sub-block, as scaled() wants it */
    int32_t pair[8][PR];      /* what meets the sums of x, in pairs of 16 bits */
    float d[8][PR], m[8][PR]; /* of 256 columns, or of each 32 */
} packed;

typedef float planes[4][KVS_XT][PR]; /* p[b % 4] of dots.h */
typedef struct panel_scratch {
    planes sums; /* first: see panel() */
    packed w;
} panel_scratch;
_Static_assert(sizeof(panel_scratch) <= KVS_DOTS_SCRATCH && PR <= KVS_ROWS_MAX && KVS_UNIT % PR == 0, "scratch of a thread");

/* ---- unpacking VI rows, from row at of a stripe, to lanes to.. of the panel ---- */
KVS_INLINE void put(kind t, packed *w, int word, int to, vi v) {
#ifndef KVS_ISA_AVX512
    if (stays_signed(t)) {
        vi_store(w->sign[word][to], v);
        v = _mm256_abs_epi8(v);
    }
#endif
    (void)t;
    vi_store(w->q[word][to], v);
}

/* Block b of the panel's 256 columns */
KVS_INLINE void pack_lanes(int32_t type, packed *w, const uint8_t *block, int b, int at, int to) {
    const kind t = kinds[type];
    KVS_EACH (g, t.block / 4 / (t.runs * t.steps))
        for (int k = 0; k < t.steps; k++) {
            vi v[4];
            values(type, block, g, k, at, v);
            KVS_EACH (r, t.runs) put(t, w, b * t.block / 4 + k + t.steps * (t.runs * g + r), to, v[r]);
        }
    v_store(w->d[b] + to, halves_of(block, t.d, at));
    if (t.m) v_store(w->m[b] + to, halves_of(block, t.m, at));
    if (t.block == 32) return;
    heads h = heads_of(type, block, at);
    KVS_EACH (j, t.block / t.sub) vi_store(&w->scale[j][to], scale_of(h.scale, j));
    KVS_EACH (j, pairs(t)) vi_store(&w->pair[j][to], sums_pair(t, &h, j));
}

/* ---- the product of a panel with nx activation rows ---- */
typedef struct panel_call {
    const packed *w;
    const kvs_acts *acts;
    int64_t at;                /* place of the first row's first block */
    float (*sums)[KVS_XT][PR]; /* of the first row: [plane][row] */
    int64_t first;             /* number of the first block */
    int n_blocks;
} panel_call;

KVS_INLINE vi times_scale(vi acc, vi s, const packed *w, int v, int scale_row) {
    return scale_row < 0 ? unscaled(acc, s) : scaled(acc, s, vi_load(w->scale[scale_row] + v * VI));
}

/* acc += products of words t..t + n, all of one scale; depth: steps that fit a sum of dot() */
KVS_INLINE void steps(vi acc[NV][NX], int nx, int n, int depth, const packed *w, int t, const int8_t *const x[NX], int scale_row) {
    for (int begin = t; begin < t + n; begin += depth) {
        vi s[NV][NX];
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
            KVS_EACH (i, nx) acc[v][i] = times_scale(acc[v][i], s[v][i], w, v, scale_row);
    }
}

#ifdef KVS_ISA_AVX512
KVS_INLINE void signed_steps(vi acc[NV][NX], int nx, int n, const packed *w, int t, const int8_t *const x[NX], int scale_row) {
    steps(acc, nx, n, n, w, t, x, scale_row);
}
#else
KVS_INLINE void signed_steps(vi acc[NV][NX], int nx, int n, const packed *w, int t, const int8_t *const x[NX], int scale_row) {
    KVS_EACH (k, n) {
        vi xv[NX];
        KVS_EACH (i, nx) xv[i] = vi_word(x[i] + 4 * (t + k));
        KVS_EACH (v, NV) {
            vi u = vi_load(w->q[t + k][v * VI]), sign = vi_load(w->sign[t + k][v * VI]);
            KVS_EACH (i, nx) {
                acc[v][i] = times_scale(acc[v][i], dot(vi_zero(), u, _mm256_sign_epi8(xv[i], sign)), w, v, scale_row);
                KVS_KEEP(acc[v][i]);
            }
        }
    }
}
#endif

/* What block_sums() calls m: of a block of 32, or the products of pairs */
KVS_INLINE vi sums_times(kind t, const vi *pair, const int16_t *sums) {
    vi m = vi_set(t.block == 32 ? -*sums : 0);
    KVS_EACH (j, pairs(t)) m = vi_madd_to(m, pair[j], vi_word(sums + 2 * j));
    return m;
}

/* Block b to p[b % 4]. Vector by vector: what is the panel's stays in registers for all rows. */
KVS_INLINE void add_to_sums(kind t, const panel_call *c, int b, int nx, vi acc[NV][NX], const int16_t *sums, const float *xd) {
    KVS_EACH (v, NV) {
        vi pair[8];
        KVS_EACH (j, pairs(t)) pair[j] = vi_load(c->w->pair[j] + v * VI);
        vf d = v_load(c->w->d[b] + v * VI), dm = t.m ? v_load(c->w->m[b] + v * VI) : v_zero();
        KVS_EACH (i, nx) {
            float *to = c->sums[(c->first + b) % 4][i] + v * VI;
            vi isum = acc[v][i], m = has_sums(t) ? sums_times(t, pair, sums + i * (t.block / t.sub)) : vi_zero();
            if (t.block == 256 && t.offset && has_sums(t)) isum = vi_sub(isum, vi_left(m, __builtin_ctz((unsigned)t.offset)));
            vf y = v_add(v_load(to), v_mul(v_mul(d, v_set(xd[i])), vi_float(isum)));
            if (t.m) y = v_sub(y, v_mul(v_mul(dm, v_set(xd[i])), vi_float(m)));
            v_store(to, y);
        }
    }
}

KVS_INLINE void block_times(int32_t type, const panel_call *c, int nx, int b) {
    const kind t = kinds[type];
    const kvs_acts *a = c->acts;
    const int64_t at = c->at + b * a->n;
    const int16_t *sums = (t.sub == 16 ? a->s16 : a->s32) + at * (t.block / t.sub);
    const int8_t *x[NX];
    vi acc[NV][NX];
    KVS_EACH (i, nx) {
        x[i] = a->q + (at + i - b) * t.block;
        KVS_EACH (v, NV) acc[v][i] = vi_set(t.block == 32 && has_sums(t) ? -t.offset * sums[i] : 0);
    }
    for (int j = 0; j < t.block / t.sub; j++) {
        const int word = (b * t.block + j * t.sub) / 4, scale_row = t.block == 32 ? -1 : j;
        if (stays_signed(t))
            signed_steps(acc, nx, t.sub / 4, c->w, word, x, scale_row);
        else
            steps(acc, nx, t.sub / 4, KVS_MIN(t.sub / 4, fitting(t)), c->w, word, x, scale_row);
    }
    add_to_sums(t, c, b, nx, acc, sums, a->d + at);
}

KVS_INLINE void times(int32_t type, const panel_call *c, int nx) {
    for (int b = 0; b < c->n_blocks; b++) block_times(type, c, nx, b);
}

/* Single rows are dear: fours before them as often as that leaves fewer */
KVS_INLINE void times_all(int32_t type, panel_call c, int64_t n) {
    for (int64_t left = n, nx; left > 0; left -= nx, c.at += nx, c.sums = (float(*)[KVS_XT][PR])(c.sums[0] + nx)) {
        nx = left >= 4 && left % NX > 1 ? 4 : left >= NX ? NX : 1;
        if (nx == NX)
            times(type, &c, NX);
        else if (nx == 4)
            times(type, &c, 4);
        else
            times(type, &c, 1);
    }
}

/* ---- panels ---- */
typedef struct columns {  /* some 256 of them, of a panel */
    int64_t first, bytes; /* number of the first block; of a stripe's block */
    int n_blocks;
} columns;

static const uint8_t *stripe_columns(const kvs_panel *p, const columns *c, int64_t row) {
    return p->w + row / KVS_STRIPE * KVS_STRIPE * p->row_bytes + c->first * c->bytes;
}

/* Block number first, and those that fill up 256 columns with it */
KVS_INLINE columns columns_of(const kvs_panel *p, int32_t block, int64_t first) {
    return (columns){first, KVS_STRIPE * p->row_bytes / (p->cols / block), (int)KVS_MIN(256 / block, p->cols / block - first)};
}

/* Lanes beyond the last stripe get it once more: nobody reads their sums. */
KVS_INLINE void pack(int32_t type, packed *w, const kvs_panel *p, const columns *c) {
    for (int to = 0; to < PR; to += VI) {
        const uint8_t *block = stripe_columns(p, c, KVS_MIN(to, p->rows - 1));
        for (int b = 0; b < c->n_blocks; b++) pack_lanes(type, w, block + b * c->bytes, b, to % KVS_STRIPE, to);
    }
}

KVS_INLINE void fetch_next(const kvs_panel *p, const columns *c) {
    for (int64_t r = 0; r < KVS_MIN(p->rows, PR); r += KVS_STRIPE)
        fetch(stripe_columns(p, c, r) + c->n_blocks * c->bytes, c->n_blocks * c->bytes);
}

KVS_INLINE void add_columns(int32_t type, const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n, int64_t first, panel_scratch *s) {
    const columns c = columns_of(p, kinds[type].block, first);
    pack(type, &s->w, p, &c);
    if (p->ahead) fetch_next(p, &c);
    times_all(type, (panel_call){&s->w, a, first * a->n + row, s->sums, first, c.n_blocks}, n);
}

static void columns_by_type(const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n, int64_t first, void *s) {
#define CASE(type)                                                                                                                         \
    case KVS_TYPE_##type: add_columns(KVS_TYPE_##type, p, a, row, n, first, s); break;
    switch (p->type) { EACH_TYPE(CASE) }
#undef CASE
}

typedef void (*add_columns_fn)(const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n, int64_t first, void *scratch);

/* scratch begins with planes, to which add() adds */
static void panel(const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n, float *y, int64_t y_step, add_columns_fn add,
                  void *scratch) {
    float(*s)[KVS_XT][PR] = scratch;
    for (int plane = 0; plane < 4; plane++) memset(s[plane], 0, (size_t)n * sizeof s[0][0]);
    for (int64_t first = 0; first < p->cols / a->block; first += 256 / a->block) add(p, a, row, n, first, scratch);
    for (int64_t i = 0; i < n; i++)
        for (int64_t r = 0; r < KVS_MIN(PR, p->rows); r++) y[i * y_step + r] = (s[0][i][r] + s[1][i][r]) + (s[2][i][r] + s[3][i][r]);
}

static void panels(const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n, float *y, int64_t y_step, add_columns_fn add,
                   void *scratch) {
    for (int64_t r = 0; r < p->rows; r += PR) {
        kvs_panel part = *p;
        part.w += r * p->row_bytes;
        part.rows = p->rows - r;
        panel(&part, a, row, n, y + r, y_step, add, scratch);
    }
}

static void many(const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n, float *y, int64_t y_step, void *scratch) {
    panels(p, a, row, n, y, y_step, columns_by_type, scratch);
}
#endif
