/* dots_amx.h - integer kernels for many activation rows on the tiles of AMX: the panels of dots_panel.h, whose words of stripes are rows
 * of a tile as they are. 32 activation rows pass at once, as two tiles, over two tiles of 16 weight rows. Scales are multiplied into the
 * values while these are unpacked; what does not fit a byte becomes two digits, in a tile each, so that a block's product is exact:
 * isum = (sum of high x << bits) + sum of low x. Vectors add a product to the sums while tiles compute the next one. */
#ifndef KVS_DOTS_AMX_H
#define KVS_DOTS_AMX_H
#include "amx.h"
#include "dots_panel.h"

enum { TILE_X = 32 /* activation rows that pass over a panel together */ };
_Static_assert(TILE_X <= (int)KVS_ACTS_MORE + 1 && PR == 2 * KVS_STRIPE, "two tiles by two");

typedef struct digits { /* 256 columns of PR rows */
    /* two digits: high and low ones of the first stripe, of the second; one: of the first stripe, of the second */
    uint8_t q[4][64][KVS_STRIPE][4];
    int32_t pair[8][PR]; /* minima, as packed has them */
    float d[8][PR], m[8][PR];
} digits;

typedef int32_t tile_sums[TILE_X][2][KVS_STRIPE]; /* a product: of either tile of weights */
typedef struct tile_scratch {
    planes sums;
    digits w;
    tile_sums products[2]; /* of which one is added, and one computed */
} tile_scratch;
_Static_assert(sizeof(tile_scratch) <= KVS_DOTS_SCRATCH, "scratch of a thread");

/* ---- digits ---- */

KVS_INLINE int largest(kind t) { return t.scale * KVS_MAX(t.top - t.offset, t.offset); }
KVS_INLINE int n_digits(kind t) { return largest(t) > 128 ? 2 : 1; }
KVS_INLINE int stripes_of(kind t) { return 2 / n_digits(t); } /* of two tiles */
KVS_INLINE int min_pairs(kind t) { return t.m ? pairs(t) : 0; }
/* 128 itself is no byte, -128 is one: Q3_K, where it is scale -32 times -4, is multiplied with the opposite of all scales */
KVS_INLINE bool opposite(kind t) { return t.block == 256 && largest(t) == 128; }
/* Without an offset digits are the scale's, both with u an unsigned byte; with one, the product's, and the high one is signed. */
KVS_INLINE int digit_bits(kind t) { return t.offset ? 8 : 3; }

typedef struct factors {
    vi high, low, less; /* in 16 bits: what meets even and odd bytes, and offset times scale; or the digits of the scale */
} factors;

KVS_INLINE factors factors_of(kind t, vi scale) {
    vi s = opposite(t) ? vi_sub(vi_zero(), scale) : scale;
    s = vi_or(vi_and(s, vi_set(0xffff)), vi_left(s, 16));
    if (t.offset) return (factors){vi_left16(s, 8), vi_and(s, vi_set(0x00ff00ff)), vi_left16(s, __builtin_ctz((unsigned)t.offset))};
    return n_digits(t) == 1 ? (factors){s, s, s} : (factors){vi_right16(s, digit_bits(t)), vi_and(s, vi_set(0x00070007)), s};
}

KVS_INLINE vi even_or(vi even, vi odd) { return _mm512_ternarylogic_epi32(vi_set(0x00ff00ff), even, odd, 0xca); } /* by bytes */

KVS_INLINE void to_digits(kind t, vi u, factors f, vi out[2]) {
    if (t.block == 32) {
        out[0] = vi_sub8(u, vi_bytes(t.offset));
    } else if (!t.offset) { /* two products fit 16 bits without a carry */
        out[0] = _mm512_mullo_epi16(u, f.high);
        if (n_digits(t) == 2) out[1] = _mm512_mullo_epi16(u, f.low);
    } else {
        vi even = _mm512_sub_epi16(_mm512_maddubs_epi16(u, f.low), f.less), odd = _mm512_sub_epi16(_mm512_maddubs_epi16(u, f.high), f.less);
        vi low = even_or(even, vi_left16(odd, 8));
        if (n_digits(t) == 2)
            out[0] = even_or(vi_right16(even, 8), odd), out[1] = low;
        else
            out[0] = low;
    }
}

/* Block b of the panel's 256 columns */
KVS_INLINE void pack_digits(int32_t type, digits *w, const uint8_t *block, int b, int stripe) {
    const kind t = kinds[type];
    factors f[16];
    f[0] = factors_of(t, vi_zero()); /* a block of 32 has none */
    if (t.block == 256) {
        heads h = heads_of(type, block, 0);
        KVS_EACH (j, t.block / t.sub) f[j] = factors_of(t, scale_of(h.scale, j));
        KVS_EACH (j, min_pairs(t)) vi_store(&w->pair[j][stripe * VI], sums_pair(t, &h, j));
    }
    KVS_EACH (g, t.block / 4 / (t.runs * t.steps))
        for (int k = 0; k < t.steps; k++) {
            vi v[4], out[2];
            values(type, block, g, k, 0, v);
            KVS_EACH (r, t.runs) {
                const int word = k + t.steps * (t.runs * g + r);
                to_digits(t, v[r], f[4 * word / t.sub], out);
                KVS_EACH (i, n_digits(t)) vi_store(w->q[n_digits(t) * stripe + i][b * t.block / 4 + word], out[i]);
            }
        }
    vf d = halves_of(block, t.d, 0);
    v_store(w->d[b] + stripe * VI, opposite(t) ? v_sub(v_zero(), d) : d);
    if (t.m) v_store(w->m[b] + stripe * VI, halves_of(block, t.m, 0));
}

/* ---- products ---- */
typedef struct tile_call {
    tile_scratch *s;
    const kvs_acts *acts;
    int64_t at;    /* place of the first row's first block */
    int64_t first; /* number of the first block */
} tile_call;

typedef struct product { /* of TILE_X activation rows, of which n are there */
    int64_t row, n;      /* from row on */
    int b, pair;         /* block of the 256 columns; which two tiles of weights */
    tile_sums *sums;
} product;

/* Words k.. of the block: as many as there are in a block of 32, or 16 */
KVS_INLINE void tiles_times(kind t, const tile_call *c, const product *p, int k) {
    const uint8_t *w = c->s->w.q[2 * p->pair][p->b * t.block / 4 + k][0];
    const int8_t *x = c->acts->q + (c->at + p->b * c->acts->n + p->row) * t.block + 4 * k;
    KVS_TILE_LOAD(4, x, t.block);
    KVS_TILE_LOAD(6, w, 64);
    KVS_TILE_LOAD(7, w + sizeof c->s->w.q[0], 64);
    KVS_TILE_LOAD(5, x + 16 * t.block, t.block);
    if (n_digits(t) == 1) {
        KVS_TILE_DOT_SIGNED(0, 4, 6);
        KVS_TILE_DOT_SIGNED(1, 4, 7);
        KVS_TILE_DOT_SIGNED(2, 5, 6);
        KVS_TILE_DOT_SIGNED(3, 5, 7);
    } else if (t.offset) {
        KVS_TILE_DOT_SIGNED(0, 4, 6);
        KVS_TILE_DOT_UNSIGNED(1, 4, 7);
        KVS_TILE_DOT_SIGNED(2, 5, 6);
        KVS_TILE_DOT_UNSIGNED(3, 5, 7);
    } else {
        KVS_TILE_DOT_UNSIGNED(0, 4, 6);
        KVS_TILE_DOT_UNSIGNED(1, 4, 7);
        KVS_TILE_DOT_UNSIGNED(2, 5, 6);
        KVS_TILE_DOT_UNSIGNED(3, 5, 7);
    }
}

/* Rows begin..end of a product to p[b % 4]. Stripe by stripe: what is the panel's stays in registers for all rows. */
KVS_INLINE void add_product(kind t, const tile_call *c, const product *p, int64_t begin, int64_t end) {
    const kvs_acts *a = c->acts;
    const digits *w = &c->s->w;
    const int two = n_digits(t) == 2, per_block = t.block / t.sub;
    const int64_t at = c->at + p->b * a->n + p->row;
    const int16_t *sums = (t.sub == 16 ? a->s16 : a->s32) + at * per_block;
    KVS_EACH (v, stripes_of(t)) {
        const int lane = (two ? p->pair : v) * VI;
        float(*to)[PR] = c->s->sums[(c->first + p->b) % 4] + p->row;
        vi pair[8];
        KVS_EACH (j, min_pairs(t)) pair[j] = vi_load(w->pair[j] + lane);
        vf d = v_load(w->d[p->b] + lane), dm = t.m ? v_load(w->m[p->b] + lane) : v_zero();
        for (int64_t i = begin; i < KVS_MIN(end, p->n); i++) {
            vi isum = vi_load(p->sums[0][i][v]);
            if (two) isum = vi_add(vi_left(isum, digit_bits(t)), vi_load(p->sums[0][i][1]));
            vf dx = v_set(a->d[at + i]), y = v_add(v_load(to[i] + lane), v_mul(v_mul(d, dx), vi_float(isum)));
            if (t.m) y = v_sub(y, v_mul(v_mul(dm, dx), vi_float(sums_times(t, pair, sums + i * per_block))));
            v_store(to[i] + lane, y);
        }
    }
}

/* Computes p, while it adds the one before: a part of it behind each step */
KVS_INLINE void compute(kind t, const tile_call *c, const product *p, const product *before) {
    const int steps = t.block == 256 ? 4 : 1;
    int32_t *out = p->sums[0][0][0];
    KVS_TILE_ZERO(0);
    KVS_TILE_ZERO(1);
    KVS_TILE_ZERO(2);
    KVS_TILE_ZERO(3);
    KVS_EACH (i, steps) {
        tiles_times(t, c, p, 16 * i);
        add_product(t, c, before, i * TILE_X / steps, (i + 1) * TILE_X / steps);
    }
    KVS_TILE_STORE(0, out, sizeof p->sums[0][0]);
    KVS_TILE_STORE(1, out + KVS_STRIPE, sizeof p->sums[0][0]);
    KVS_TILE_STORE(2, out + 32 * KVS_STRIPE, sizeof p->sums[0][0]);
    KVS_TILE_STORE(3, out + 33 * KVS_STRIPE, sizeof p->sums[0][0]);
}

KVS_INLINE void products(int32_t type, const tile_call *c, int64_t n, int n_blocks) {
    const kind t = kinds[type];
    product before = {.sums = c->s->products};
    for (int64_t row = 0; row < n; row += TILE_X)
        for (int b = 0; b < n_blocks; b++)
            for (int pair = 0; pair < n_digits(t); pair++) {
                product p = {row, KVS_MIN(TILE_X, n - row), b, pair, c->s->products + (before.sums == c->s->products)};
                compute(t, c, &p, &before);
                before = p;
            }
    add_product(t, c, &before, 0, TILE_X);
}

/* ---- panels ---- */
/* A second stripe that is not there is the last one once more: nobody reads its sums. */
KVS_INLINE void add_tiles(int32_t type, const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n, int64_t first, tile_scratch *s) {
    const columns c = columns_of(p, kinds[type].block, first);
    for (int stripe = 0; stripe < PR / KVS_STRIPE; stripe++)
        for (int b = 0; b < c.n_blocks; b++)
            pack_digits(type, &s->w, stripe_columns(p, &c, KVS_MIN(stripe * KVS_STRIPE, p->rows - 1)) + b * c.bytes, b, stripe);
    products(type, &(tile_call){s, a, first * a->n + row, first}, n, c.n_blocks);
}

static void tiles_by_type(const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n, int64_t first, void *s) {
#define CASE(type)                                                                                                                         \
    case KVS_TYPE_##type: add_tiles(KVS_TYPE_##type, p, a, row, n, first, s); break;
    switch (p->type) { EACH_TYPE(CASE) }
#undef CASE
}

static void amx_many(const kvs_panel *p, const kvs_acts *a, int64_t row, int64_t n, float *y, int64_t y_step, void *scratch) {
    const kvs_tile_config config = kvs_tiles_2x2(KVS_MIN(a->block, 64));
    KVS_TILES_BEGIN(&config);
    panels(p, a, row, n, y, y_step, tiles_by_type, scratch);
    KVS_TILES_END();
}
#endif
