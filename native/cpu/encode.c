/* encode.c - floats to blocks, for every type whose decoder stands in quant.c but the IQ ones.
 *
 * Work goes in units of 16 blocks of 16 or 32 values; a block is a column of fit_kernel.h and has a grid d q + m with q in lo..hi. In
 * the plain types d and m are its own, as F16. In the K types d = D s and m = -M t, with F16 D and M of a super-block of 256 values, and
 * whole numbers s and t of the block. The search is for the least squared error: first for each block alone, from several grids, each
 * made better in turn by rounding and by least squares; then, in the K types, for the s and t around the wanted ones, and for D and M,
 * in turn again. All sums are over columns in float32, in one order: every machine writes the same bits. */
#include "cpu.h"

#include <float.h>
#include <math.h>

enum { COLUMNS = KVS_FIT_BLOCKS, STARTS = 8, DESCENTS = 2, SHARES = 2 };

typedef struct scales { /* of a K type, by column: those of a super-block have the same D and M */
    float D[COLUMNS], M[COLUMNS], s[COLUMNS], t[COLUMNS];
    float error[COLUMNS];
} scales;

typedef struct unit {
    float x[32 * COLUMNS]; /* (n, COLUMNS) */
    kvs_fit f;
    float d[COLUMNS], m[COLUMNS], error[COLUMNS]; /* the best grids so far */
    scales k;                                     /* the best ones so far */
    int8_t q[32 * COLUMNS];                       /* (COLUMNS, n) */
} unit;

typedef struct format {
    int32_t n; /* values of a block that has a grid of its own */
    float lo, hi;
    bool has_m;
    float s_lo, s_hi;                                /* K types; t is in 0..s_hi */
    void (*pack)(const unit *u, int c, void *block); /* from column c on */
} format;

typedef struct encoder {
    unit u;
    const format *k;
    const kvs_rowops *ops;
} encoder;

static float clamp(float x, float lo, float hi) { return x < lo ? lo : x > hi ? hi : x; }

/* To a finite F16; only 0 becomes 0, so that a block of tiny values keeps what it can. */
static float half(float x) {
    float y = kvs_f16_to_f32(kvs_f32_to_f16(clamp(x, -65504.0f, 65504.0f)));
    return y != 0.0f ? y : x > 0.0f ? 0x1p-24f : x < 0.0f ? -0x1p-24f : 0.0f;
}

static bool is_k(const format *k) { return k->s_hi > 0; }

/* ---- the best grid of each block, d and m any numbers ---- */

static void fit_and_keep(encoder *e) {
    unit *u = &e->u;
    for (int c = 0; c < COLUMNS && !is_k(e->k); c++) u->f.d[c] = half(u->f.d[c]), u->f.m[c] = half(u->f.m[c]); /* as stored */
    e->ops->fit(u->x, e->k->n, &u->f);
    for (int c = 0; c < COLUMNS; c++) {
        if (!(u->f.ee[c] < u->error[c])) continue;
        u->error[c] = u->f.ee[c];
        u->d[c] = u->f.d[c], u->m[c] = u->f.m[c];
    }
}

/* Least squares with q as it came out. K types can take something away from all values of a block, not add it: m <= 0. */
static void improve(kvs_fit *f, const format *k) {
    for (int c = 0; c < COLUMNS; c++) {
        float det = (float)k->n * f->qq[c] - f->q[c] * f->q[c];
        float dm = k->has_m && det > 0.0f ? (f->qq[c] * f->e[c] - f->q[c] * f->eq[c]) / det : 0.0f;
        if (is_k(k)) dm = KVS_MIN(dm, -f->m[c]);
        f->d[c] += f->qq[c] > 0.0f ? (f->eq[c] - dm * f->q[c]) / f->qq[c] : 0.0f;
        f->m[c] += dm;
    }
}

static void descend(encoder *e) {
    fit_and_keep(e);
    for (int i = 0; i < DESCENTS; i++) {
        improve(&e->u.f, e->k);
        fit_and_keep(e);
    }
}

static void range(const unit *u, const format *k, float *low, float *high) {
    bool from_zero = !k->has_m || is_k(k);
    for (int c = 0; c < COLUMNS; c++) low[c] = high[c] = from_zero ? 0.0f : u->x[c];
    for (int i = 0; i < k->n * COLUMNS; i++) {
        int c = i % COLUMNS;
        low[c] = KVS_MIN(low[c], u->x[i]), high[c] = KVS_MAX(high[c], u->x[i]);
    }
}

/* From grids on whose last step the outermost values lie, or up to a tenth within, or less than half a step beyond. Without m the two ends
 * differ by one, and either may be that of the outermost value. */
static void search(encoder *e) {
    unit *u = &e->u;
    const format *k = e->k;
    float low[COLUMNS], high[COLUMNS];
    range(u, k, low, high);
    u->f.lo = k->lo, u->f.hi = k->hi;
    for (int c = 0; c < COLUMNS; c++) u->error[c] = FLT_MAX;
    bool both = !k->has_m && k->lo != -k->hi;
    for (int i = 0; i < (both ? 2 : 1) * STARTS; i++) {
        float end = i < STARTS ? k->hi : k->lo, short_of = (float)(i % STARTS) / (STARTS - 2);
        float steps = i % STARTS < STARTS - 1 ? end * (1.0f - 0.1f * short_of) : end + (end > 0 ? 0.4f : -0.4f);
        for (int c = 0; c < COLUMNS; c++) {
            float top = k->has_m ? high[c] - low[c] : high[c] > -low[c] ? high[c] : low[c];
            u->f.d[c] = top / steps, u->f.m[c] = k->has_m ? low[c] : 0.0f;
        }
        descend(e);
    }
}

/* ---- the scales of super-blocks ---- */

static void fit_scales(encoder *e, scales *now) {
    unit *u = &e->u;
    for (int c = 0; c < COLUMNS; c++) u->f.d[c] = now->D[c] * now->s[c], u->f.m[c] = -now->M[c] * now->t[c];
    e->ops->fit(u->x, e->k->n, &u->f);
    memcpy(now->error, u->f.ee, sizeof now->error);
}

static void copy_column(scales *to, const scales *from, int c) {
    to->D[c] = from->D[c], to->M[c] = from->M[c], to->s[c] = from->s[c], to->t[c] = from->t[c], to->error[c] = from->error[c];
}

static void keep_scales(encoder *e, const scales *now) {
    int per = 256 / e->k->n;
    scales *best = &e->u.k;
    for (int c0 = 0; c0 < COLUMNS; c0 += per) {
        float error = 0.0f, least = 0.0f;
        for (int c = c0; c < c0 + per; c++) error += now->error[c], least += best->error[c];
        for (int c = c0; c < c0 + per && error < least; c++) copy_column(best, now, c);
    }
}

/* The widest grids get the outermost s and t. */
static void first_scales(const encoder *e, scales *now) {
    const unit *u = &e->u;
    const format *k = e->k;
    int per = 256 / k->n;
    for (int c0 = 0; c0 < COLUMNS; c0 += per) {
        float d = 0.0f, m = 0.0f;
        for (int c = c0; c < c0 + per; c++) {
            if (k->s_lo < 0 ? fabsf(u->d[c]) > fabsf(d) : u->d[c] > d) d = u->d[c];
            m = KVS_MAX(m, -u->m[c]);
        }
        float D = half(d / (k->s_lo < 0 ? k->s_lo : k->s_hi)), M = half(m / k->s_hi);
        for (int c = c0; c < c0 + per; c++) {
            now->D[c] = D, now->s[c] = D != 0.0f ? clamp(rintf(u->d[c] / D), k->s_lo, k->s_hi) : 0.0f;
            now->M[c] = M, now->t[c] = M != 0.0f ? clamp(rintf(-u->m[c] / M), 0.0f, k->s_hi) : 0.0f;
        }
    }
}

/* The best s and t of each block among those beside the present ones, D and M as they are. */
static void step_scales(encoder *e, scales *now) {
    const format *k = e->k;
    scales best = *now, tried = *now;
    for (int c = 0; c < COLUMNS; c++) best.error[c] = FLT_MAX;
    int reach = k->has_m ? 1 : 0;
    for (int i = -1; i <= 1; i++)
        for (int j = -reach; j <= reach; j++) {
            for (int c = 0; c < COLUMNS; c++) {
                tried.s[c] = clamp(now->s[c] + (float)i, k->s_lo, k->s_hi);
                tried.t[c] = clamp(now->t[c] + (float)j, 0.0f, k->s_hi);
            }
            fit_scales(e, &tried);
            for (int c = 0; c < COLUMNS; c++)
                if (tried.error[c] < best.error[c]) copy_column(&best, &tried, c);
        }
    *now = best;
}

/* Least squares for D and M with s, t and q as they are. In double: two normal equations of many squares. */
static void improve_shared(const encoder *e, scales *now) {
    const kvs_fit *f = &e->u.f;
    int per = 256 / e->k->n;
    for (int c0 = 0; c0 < COLUMNS; c0 += per) {
        double ss = 0, st = 0, tt = 0, se = 0, te = 0;
        for (int c = c0; c < c0 + per; c++) {
            double s = (double)now->s[c], t = (double)-now->t[c];
            ss += s * s * (double)f->qq[c], st += s * t * (double)f->q[c], tt += t * t * e->k->n;
            se += s * (double)f->eq[c], te += t * (double)f->e[c];
        }
        double det = ss * tt - st * st;
        bool two = det > 1e-6 * ss * tt;
        double dD = two ? (se * tt - te * st) / det : ss > 0 ? se / ss : 0, dM = two ? (te * ss - se * st) / det : 0;
        float D = half((float)((double)now->D[c0] + dD)), M = half(KVS_MAX(0.0f, (float)((double)now->M[c0] + dM)));
        for (int c = c0; c < c0 + per; c++) now->D[c] = D, now->M[c] = M;
    }
}

static void share(encoder *e) {
    unit *u = &e->u;
    scales now;
    first_scales(e, &now);
    for (int c = 0; c < COLUMNS; c++) u->k.error[c] = FLT_MAX / COLUMNS;
    for (int i = 0; i < SHARES; i++) {
        step_scales(e, &now);
        fit_scales(e, &now); /* for its sums */
        keep_scales(e, &now);
        improve_shared(e, &now);
        fit_scales(e, &now);
        keep_scales(e, &now);
    }
    for (int c = 0; c < COLUMNS; c++) u->d[c] = u->k.D[c] * u->k.s[c], u->m[c] = -u->k.M[c] * u->k.t[c];
}

/* ---- bits ---- */

static void quantize(unit *u, const format *k) { /* as fit_kernel.h does */
    const float magic = 12582912.0f;             /* 1.5 * 2^23: adding it rounds to a whole number, ties to even */
    float inverse[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) inverse[c] = fabsf(u->d[c]) > KVS_FIT_TINY ? 1.0f / u->d[c] : 0.0f;
    for (int i = 0; i < k->n * COLUMNS; i++) {
        int c = i % COLUMNS;
        u->q[c * k->n + i / COLUMNS] = (int8_t)(clamp((u->x[i] - u->m[c]) * inverse[c], k->lo, k->hi) + magic - magic);
    }
}

/* Where blocks hold their low bits in nibbles: values 0..15 and 16..31. */
static void pack_nibbles(const int8_t *q, int offset, uint8_t *low) {
    for (int i = 0; i < 16; i++) low[i] = (uint8_t)(((q[i] + offset) & 15) | ((q[i + 16] + offset) & 15) << 4);
}

static void pack_fifth(const int8_t *q, int offset, uint8_t *high) {
    for (int i = 0; i < 4; i++) high[i] = 0;
    for (int i = 0; i < 32; i++) high[i / 8] |= (uint8_t)((q[i] + offset) >> 4 << i % 8);
}

static void pack_q4_0(const unit *u, int c, void *block) {
    kvs_q4_0 *b = block;
    b->d = kvs_f32_to_f16(u->d[c]);
    pack_nibbles(u->q + 32 * c, 8, b->q);
}

static void pack_q4_1(const unit *u, int c, void *block) {
    kvs_q4_1 *b = block;
    b->d = kvs_f32_to_f16(u->d[c]);
    b->m = kvs_f32_to_f16(u->m[c]);
    pack_nibbles(u->q + 32 * c, 0, b->q);
}

static void pack_q5_0(const unit *u, int c, void *block) {
    kvs_q5_0 *b = block;
    b->d = kvs_f32_to_f16(u->d[c]);
    pack_nibbles(u->q + 32 * c, 16, b->q);
    pack_fifth(u->q + 32 * c, 16, b->h);
}

static void pack_q5_1(const unit *u, int c, void *block) {
    kvs_q5_1 *b = block;
    b->d = kvs_f32_to_f16(u->d[c]);
    b->m = kvs_f32_to_f16(u->m[c]);
    pack_nibbles(u->q + 32 * c, 0, b->q);
    pack_fifth(u->q + 32 * c, 0, b->h);
}

static void pack_q8_0(const unit *u, int c, void *block) {
    kvs_q8_0 *b = block;
    b->d = kvs_f32_to_f16(u->d[c]);
    memcpy(b->q, u->q + 32 * c, 32);
}

static void pack_q2_k(const unit *u, int c, void *block) {
    kvs_q2_k *b = block;
    const int8_t *q = u->q + 16 * c;
    memset(b, 0, sizeof *b);
    b->d = kvs_f32_to_f16(u->k.D[c]);
    b->m = kvs_f32_to_f16(u->k.M[c]);
    for (int j = 0; j < 16; j++) b->scales[j] = (uint8_t)((int)u->k.s[c + j] | (int)u->k.t[c + j] << 4);
    for (int i = 0; i < 256; i++) b->q[i / 128 * 32 + i % 32] |= (uint8_t)(q[i] << i % 128 / 32 * 2);
}

static void pack_q3_k(const unit *u, int c, void *block) {
    kvs_q3_k *b = block;
    const int8_t *q = u->q + 16 * c;
    memset(b, 0, sizeof *b);
    b->d = kvs_f32_to_f16(u->k.D[c]);
    for (int j = 0; j < 16; j++) {
        int s = (int)u->k.s[c + j] + 32;
        b->scales[j % 8] |= (uint8_t)((s & 15) << j / 8 * 4);
        b->scales[8 + j % 4] |= (uint8_t)(s >> 4 << j / 4 * 2);
    }
    for (int i = 0; i < 256; i++) {
        int v = q[i] + 4;
        b->q[i / 128 * 32 + i % 32] |= (uint8_t)((v & 3) << i % 128 / 32 * 2);
        b->h[i % 32] |= (uint8_t)(v >> 2 << i / 32);
    }
}

static void pack_k4_scales(const unit *u, int c, uint8_t packed[12]) {
    memset(packed, 0, 12);
    for (int j = 0; j < 8; j++) {
        int s = (int)u->k.s[c + j], t = (int)u->k.t[c + j];
        if (j < 4) {
            packed[j] |= (uint8_t)s;
            packed[j + 4] |= (uint8_t)t;
        } else {
            packed[j + 4] |= (uint8_t)((s & 15) | (t & 15) << 4);
            packed[j - 4] |= (uint8_t)(s >> 4 << 6);
            packed[j] |= (uint8_t)(t >> 4 << 6);
        }
    }
}

static void pack_q4_k(const unit *u, int c, void *block) {
    kvs_q4_k *b = block;
    const int8_t *q = u->q + 32 * c;
    b->d = kvs_f32_to_f16(u->k.D[c]);
    b->m = kvs_f32_to_f16(u->k.M[c]);
    pack_k4_scales(u, c, b->scales);
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 32; i++) b->q[32 * j + i] = (uint8_t)(q[64 * j + i] | q[64 * j + 32 + i] << 4);
}

static void pack_q5_k(const unit *u, int c, void *block) {
    kvs_q5_k *b = block;
    const int8_t *q = u->q + 32 * c;
    b->d = kvs_f32_to_f16(u->k.D[c]);
    b->m = kvs_f32_to_f16(u->k.M[c]);
    pack_k4_scales(u, c, b->scales);
    memset(b->h, 0, sizeof b->h);
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 32; i++) b->q[32 * j + i] = (uint8_t)((q[64 * j + i] & 15) | (q[64 * j + 32 + i] & 15) << 4);
    for (int j = 0; j < 8; j++)
        for (int i = 0; i < 32; i++) b->h[i] |= (uint8_t)(q[32 * j + i] >> 4 << j);
}

static void pack_q6_k(const unit *u, int c, void *block) {
    kvs_q6_k *b = block;
    memset(b, 0, sizeof *b);
    b->d = kvs_f32_to_f16(u->k.D[c]);
    for (int j = 0; j < 16; j++) b->scales[j] = (int8_t)u->k.s[c + j];
    for (int i = 0; i < 256; i++) {
        int upper = i / 128, run = i % 128 / 32, l = i % 32, v = u->q[16 * c + i] + 32;
        b->q[64 * upper + 32 * (run % 2) + l] |= (uint8_t)((v & 15) << run / 2 * 4);
        b->h[32 * upper + l] |= (uint8_t)(v >> 4 << 2 * run);
    }
}

static const format formats[] = {
    [KVS_TYPE_Q4_0] = {32, -8, 7, false, 0, 0, pack_q4_0},     [KVS_TYPE_Q4_1] = {32, 0, 15, true, 0, 0, pack_q4_1},
    [KVS_TYPE_Q5_0] = {32, -16, 15, false, 0, 0, pack_q5_0},   [KVS_TYPE_Q5_1] = {32, 0, 31, true, 0, 0, pack_q5_1},
    [KVS_TYPE_Q8_0] = {32, -127, 127, false, 0, 0, pack_q8_0}, [KVS_TYPE_Q2_K] = {16, 0, 3, true, 0, 15, pack_q2_k},
    [KVS_TYPE_Q3_K] = {16, -4, 3, false, -32, 31, pack_q3_k},  [KVS_TYPE_Q4_K] = {32, 0, 15, true, 0, 63, pack_q4_k},
    [KVS_TYPE_Q5_K] = {32, 0, 31, true, 0, 63, pack_q5_k},     [KVS_TYPE_Q6_K] = {16, -32, 31, false, -128, 127, pack_q6_k},
};
enum { N_FORMATS = sizeof formats / sizeof *formats };

/* n values: whole blocks of the type, which need not fill the last unit. */
static void encode_blocks(int32_t type, const kvs_rowops *ops, const float *x, int64_t n, uint8_t *out) {
    const kvs_type_traits *traits = kvs_type_get(type);
    encoder e = {.k = &formats[type], .ops = ops};
    unit *u = &e.u;
    int64_t width = e.k->n, count = n / width;
    for (int64_t at = 0; at < count; at += COLUMNS) {
        int here = (int)KVS_MIN(count - at, COLUMNS);
        memset(u->x, 0, sizeof u->x);
        for (int c = 0; c < here; c++)
            for (int i = 0; i < width; i++) u->x[i * COLUMNS + c] = x[(at + c) * width + i];
        search(&e);
        if (is_k(e.k)) share(&e);
        quantize(u, e.k);
        for (int c = 0; c < here; c += traits->block / (int)width, out += traits->block_bytes) e.k->pack(u, c, out);
    }
}

/* ---- floats ---- */

static void store_u16(uint8_t *p, int64_t i, uint16_t h) { memcpy(p + 2 * i, &h, 2); }

static uint16_t to_bf16(float x) { /* finite: to nearest, ties to even */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void encode_floats(int32_t type, const float *x, int64_t n, uint8_t *out) {
    if (type == KVS_TYPE_F32) memcpy(out, x, (size_t)n * sizeof *x);
    if (type == KVS_TYPE_F16)
        for (int64_t i = 0; i < n; i++) store_u16(out, i, kvs_f32_to_f16(x[i]));
    if (type == KVS_TYPE_BF16)
        for (int64_t i = 0; i < n; i++) store_u16(out, i, to_bf16(x[i]));
}

/* ---- the entry ---- */

static float largest(int32_t type) { /* what a value, or the F16 scale of a block, can be */
    return type == KVS_TYPE_F32 ? FLT_MAX : type == KVS_TYPE_BF16 ? 0x1.fep127f : 65504.0f;
}

static bool all_fit(const float *x, int64_t n, float limit) {
    bool fits = true;
    for (int64_t i = 0; i < n; i++) fits &= fabsf(x[i]) <= limit; /* false for NaN, too */
    return fits;
}

int32_t kvs_encode(int32_t type, const float *values, int64_t rows, int64_t cols, void *out, kvs_error *err) {
    const kvs_type_traits *traits = kvs_type_get(type);
    bool plain = traits && traits->block == 1;
    const kvs_isa *isa;
    if (!traits || (!plain && (type >= N_FORMATS || !formats[type].pack)))
        return kvs_fail(err, KVS_E_ARGUMENT, "type: %s can't be written", traits ? traits->name : "this number");
    if (rows < 0 || cols < 0 || cols % traits->block)
        return kvs_fail(err, KVS_E_ARGUMENT, "cols: rows of %lld values are not whole %s blocks of %d", (long long)cols, traits->name,
                        traits->block);
    int64_t n;
    if (__builtin_mul_overflow(rows, cols, &n) || n > INT64_MAX / (int64_t)sizeof *values)
        return kvs_fail(err, KVS_E_ARGUMENT, "rows: %lld rows of %lld values are more than there can be", (long long)rows, (long long)cols);
    int status = kvs_isa_choose(NULL, &isa, err);
    if (status) return status;
    float limit = largest(type);
    if (!all_fit(values, n, limit)) {
        int64_t i = 0;
        while (all_fit(values + i, 1, limit)) i++;
        kvs_fail(err, KVS_E_ARGUMENT, "%s holds finite values up to %g, not %g", traits->name, (double)limit, (double)values[i]);
        if (err) err->offset = i;
        return KVS_E_ARGUMENT;
    }
    if (plain)
        encode_floats(type, values, n, out);
    else
        encode_blocks(type, isa->rows, values, n, out);
    return KVS_OK;
}

int32_t kvs_decode(int32_t type, const void *blocks, int64_t n, float *out) {
    if (kvs_row_bytes(type, n) < 0) return KVS_E_ARGUMENT;
    kvs_type_get(type)->to_f32(blocks, out, n);
    return KVS_OK;
}
