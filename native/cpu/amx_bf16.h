/* amx_bf16.h - dots_bf16.h and attn_bf16.h on the tiles of AMX. Panels of weights, keys and values are theirs: sixteen pairs of columns
 * of sixteen rows are a tile. Activations stay rows: groups of 32, in turns of 32 columns, which is two tiles each. Sums stay in tiles
 * over a whole panel; they begin with what they are added to. */
#ifndef KVS_AMX_BF16_H
#define KVS_AMX_BF16_H
#include "amx.h"
#include "attn_bf16.h"
#include "dots_amx.h"

_Static_assert((int)TILE_X == (int)ATTN_ROWS && BF16_PR == 32, "two tiles by two");

typedef struct amx_bf16_scratch {
    bf16_scratch panel;
    float edge[TILE_X][BF16_PR]; /* in place of rows of y that are not all there */
    float bias[BF16_PR];
} amx_bf16_scratch;
_Static_assert(sizeof(amx_bf16_scratch) <= KVS_DOTS_SCRATCH, "scratch of a thread");

/* (groups, cols / 32, TILE_X rows, 16 words) */
BF16 static void amx_round(const float *x, int64_t x_step, int64_t rows, int64_t cols, uint32_t *out) {
    const __m512i zero = _mm512_setzero_si512();
    for (int64_t i = 0; i < (rows + TILE_X - 1) / TILE_X * TILE_X; i++)
        for (int64_t k = 0; k < cols; k += 32) {
            uint32_t *to = out + i / TILE_X * TILE_X * kvs_bf16_pairs(cols) + k / 2 * TILE_X + i % TILE_X * 16;
            const uint8_t *row = (const uint8_t *)(x + i * x_step);
            _mm512_storeu_si512(to, i < rows ? row_pairs(KVS_TYPE_F32, row, k, cols - k) : zero);
        }
}

/* ---- products ---- */

static void tiles_from(const float *p, int64_t step) {
    KVS_TILE_LOAD(0, p, 4 * step);
    KVS_TILE_LOAD(1, p + 16, 4 * step);
    KVS_TILE_LOAD(2, p + 16 * step, 4 * step);
    KVS_TILE_LOAD(3, p + 16 * step + 16, 4 * step);
}

static void tiles_to(float *p, int64_t step) {
    KVS_TILE_STORE(0, p, 4 * step);
    KVS_TILE_STORE(1, p + 16, 4 * step);
    KVS_TILE_STORE(2, p + 16 * step, 4 * step);
    KVS_TILE_STORE(3, p + 16 * step + 16, 4 * step);
}

/* Sums += products of 32 rows of x with those of w, of so many columns. row_step, x_step: words to the next row, to the next 32 columns */
static void add_columns_of(const uint32_t (*w)[BF16_PR], const uint32_t *x, int64_t row_step, int64_t x_step, int64_t cols) {
    for (int64_t k = 0; k < cols; k += 32, x += x_step, w += 16) {
        KVS_TILE_LOAD(4, x, 4 * row_step);
        KVS_TILE_LOAD(6, w[0], sizeof w[0]);
        KVS_TILE_LOAD(7, w[0] + 16, sizeof w[0]);
        KVS_TILE_LOAD(5, x + 16 * row_step, 4 * row_step);
        KVS_TILE_DOT_BF16(0, 4, 6);
        KVS_TILE_DOT_BF16(1, 4, 7);
        KVS_TILE_DOT_BF16(2, 5, 6);
        KVS_TILE_DOT_BF16(3, 5, 7);
    }
}

static void copy_rows(float *to, int64_t to_step, const float *from, int64_t from_step, int64_t rows, int64_t cols) {
    for (int64_t i = 0; i < rows; i++) memcpy(to + i * to_step, from + i * from_step, (size_t)cols * sizeof *to);
}

/* y of n rows and the panel's += products of the panel's columns from k on; the first ones begin with the bias */
static void add_to_group(const kvs_panel *p, amx_bf16_scratch *s, int64_t k, const uint32_t *x, int64_t n, float *y, int64_t y_step) {
    const bool whole = n >= TILE_X && p->rows == BF16_PR;
    float *to = whole ? y : s->edge[0];
    const int64_t step = whole ? y_step : BF16_PR;
    if (!whole && k) copy_rows(to, step, y, y_step, KVS_MIN(n, TILE_X), p->rows);
    tiles_from(k ? to : s->bias, k ? step : 0);
    add_columns_of(s->panel.w, x, 16, 16 * TILE_X, KVS_MIN(BF16_KC, p->cols - k));
    tiles_to(to, step);
    if (!whole) copy_rows(y, y_step, to, step, KVS_MIN(n, TILE_X), p->rows);
}

BF16 static void amx_bf16_many(const kvs_panel *p, const uint32_t *x, int64_t n, const float *bias, float *y, int64_t y_step,
                               void *scratch) {
    const kvs_tile_config config = kvs_tiles_2x2(64);
    amx_bf16_scratch *s = scratch;
    memset(s->bias, 0, sizeof s->bias);
    if (bias) memcpy(s->bias, bias, (size_t)p->rows * sizeof *bias);
    KVS_TILES_BEGIN(&config);
    for (int64_t k = 0; k < p->cols; k += BF16_KC) {
        load_panel(p, k, KVS_MIN(BF16_KC, p->cols - k), &s->panel);
        for (int64_t i = 0; i < n; i += TILE_X)
            add_to_group(p, s, k, x + i * kvs_bf16_pairs(p->cols) + k / 2 * TILE_X, n - i, y + i * y_step, y_step);
    }
    KVS_TILES_END();
}

/* ---- attention ---- */

static void amx_score_keys(attn_bf16_scratch *s, const kvs_bf16_attn *t, int64_t first, int64_t n) {
    for (int64_t i = 0; i < n; i += BF16_PR) {
        const uint32_t(*w)[BF16_PR] = (const uint32_t(*)[BF16_PR])(t->k + (first + i) * kvs_bf16_pairs(t->head_dim));
        KVS_TILE_ZERO(0);
        KVS_TILE_ZERO(1);
        KVS_TILE_ZERO(2);
        KVS_TILE_ZERO(3);
        add_columns_of(w, s->q, 16, 16 * TILE_X, t->head_dim);
        tiles_to(s->s[0] + i, ATTN_TILE);
    }
}

BF16 static void amx_add_values(attn_bf16_scratch *s, const kvs_bf16_attn *t, int64_t first, int64_t n) {
    for (int64_t d = 0; d < t->head_dim; d += BF16_PR) {
        const uint32_t(*w)[BF16_PR] = (const uint32_t(*)[BF16_PR])(t->v + d * kvs_bf16_pairs(t->n_keys)) + first / 2;
        for (int64_t r = 0; r < TILE_X; r++)
            for (int64_t i = d; i < d + BF16_PR; i += 16)
                _mm512_storeu_ps(s->o[r] + i, _mm512_mul_ps(_mm512_set1_ps(s->c[r]), _mm512_loadu_ps(s->o[r] + i)));
        tiles_from(s->o[0] + d, KVS_MAX_HEAD_DIM);
        add_columns_of(w, s->p[0], ATTN_PAIRS, 16, n);
        tiles_to(s->o[0] + d, KVS_MAX_HEAD_DIM);
    }
}

BF16 static void amx_attend(const kvs_bf16_attn *t, const float *q, int64_t n, float *out, void *scratch) {
    static const attn_kernels kernels = {TILE_X, amx_score_keys, amx_add_values};
    const kvs_tile_config config = kvs_tiles_2x2(64);
    attn_bf16_scratch *s = scratch;
    KVS_TILES_BEGIN(&config);
    for (int64_t i = 0; i < n; i += TILE_X) {
        int64_t here = KVS_MIN(TILE_X, n - i);
        amx_round(q + i * t->step, t->step, here, t->head_dim, s->q);
        attend_group(&kernels, t, here, out + i * t->step, s);
    }
    KVS_TILES_END();
}
#endif
