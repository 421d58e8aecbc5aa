/* dots.h - products of weight rows with activation rows: what dots.c (once per instruction set) gives to matmul.c.
 *
 * Integer types (all that have blocks): activations are rounded to int8 first, in blocks as long as the weights' (32 or 256
 * values) with one float32 scale each. A block's product is an exact int32, so that
 *     p[b % 4] += (d d_x) (float)isum       and, for types with an m,       p[b % 4] -= (m d_x) (float)msum
 * over the blocks b, without fused operations, and at last (p0 + p1) + (p2 + p3), give the same bits on every instruction set,
 * whatever the batch. Here isum are products of x with scale times q, and msum with the minimum, which is -1 where a type adds m
 * (Q4_1, Q5_1). dots_base.h says it in plain C.
 * Other types: activations stay float32. Columns are summed in panels of KVS_KC, one vector of partial sums each; the bits do
 * not depend on the batch, but they do on the instruction set. */
#ifndef KVS_DOTS_H
#define KVS_DOTS_H
#include "stripes.h"

enum {
    KVS_KC = 512,        /* columns of a float panel: a multiple of every block */
    KVS_XT = 320,        /* activation rows of one call at most: half a picture's prompt */
    KVS_XT_FLOAT = 128,  /* of a pass over a float panel: their rows are four times as long, and more would leave the second-level cache */
    KVS_FEW = 4,         /* up to so many activation rows, stripes are read once, and nothing is unpacked to memory */
    KVS_FEW_FLOAT = 3,   /* the same for float weights: straight from their rows */
    KVS_ROWS_FLOAT = 32, /* weight rows of a float panel */
    KVS_ROWS_MAX = 32,   /* weight rows of any panel at most */
    KVS_ACTS_MORE = 31,  /* activation rows beyond the last one: kernels may read their q, whatever it is */
    KVS_UNIT = 32        /* what matmul.c hands out: a multiple of every panel */
};

#define KVS_INLINE static inline __attribute__((always_inline))
/* A loop over registers: an array that is indexed at run time would live in memory. */
#if defined(KVS_EMULATE_AVX512) || defined(__SANITIZE_ADDRESS__) /* unrolled, these would take minutes to compile */
#define KVS_EACH(i, n) for (int i = 0; i < (n); i++)
#elif defined(__clang__)
#define KVS_EACH(i, n) _Pragma("unroll") for (int i = 0; i < (n); i++)
#else
#define KVS_EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); i++)
#endif

typedef struct kvs_acts { /* n activation rows as integers; block b of row r stands at place b n + r */
    int32_t block;        /* 32 or 256; 0 = not prepared */
    int64_t n;
    int8_t *q;    /* (places, block) in -127..127 */
    float *d;     /* (places) q d = x; NaN where x was not finite */
    int16_t *s32; /* (places, block / 32) sums of 32 values of q; base needs none */
    int16_t *s16; /* (places, 16) sums of 16, for 256 only; the same */
} kvs_acts;

typedef struct kvs_panel { /* the part of a weight matrix that one call works on */
    int32_t type;
    const uint8_t *w; /* first row, or the stripe that it begins */
    int64_t row_bytes, rows, cols;
    int64_t ahead; /* kvs_isa_ahead() */
} kvs_panel;

/* Operands rounded to bf16 first, sums in float32: dots_bf16.h, amx_bf16.h. They are turned, each group of rows, or panel of KVS_UNIT
 * rows, into an order of its own that takes so many words for a row: a word is a pair of neighbouring columns, zeros fill up the last. */
static inline int64_t kvs_bf16_pairs(int64_t cols) { return (cols + 31) / 32 * 16; }

typedef struct kvs_bf16_attn { /* one head: its keys and values as keys() and values() turned them */
    const uint32_t *k, *v;
    int64_t n_keys, head_dim, step; /* step: from row to row of queries and outputs */
    float scale;
} kvs_bf16_attn;

typedef struct kvs_bf16 kvs_bf16;
struct kvs_bf16 {
    int64_t group; /* activation rows, or queries, that are turned together */
    void (*round)(const float *x, int64_t x_step, int64_t rows, int64_t cols, uint32_t *turned);
    /* y[i * y_step + r] of n activation rows, from the first of a group on, and all rows of the panel, KVS_UNIT at most; bias may be NULL */
    void (*many)(const kvs_panel *p, const uint32_t *turned, int64_t n, const float *bias, float *y, int64_t y_step, void *scratch);
    /* one head of n rows: (n rounded up to KVS_UNIT) * pairs(head_dim), (head_dim rounded up to KVS_UNIT) * pairs(n) */
    void (*keys)(const float *k, int64_t step, int64_t n, int64_t head_dim, uint32_t *turned);
    void (*values)(const float *v, int64_t step, int64_t n, int64_t head_dim, uint32_t *turned);
    void (*attend)(const kvs_bf16_attn *t, const float *q, int64_t n, float *out, void *scratch); /* n rows that see all keys */
};

typedef struct kvs_dots {
    const char *isa;
    bool striped; /* few and many read stripes (stripes.h), not rows */
    void (*quantize)(const float *x, int64_t cols, const kvs_acts *acts, int64_t row);
    /* y[i * y_step + r] for activation rows row..row + n and all rows of the panel; n <= KVS_FEW: no scratch; n <= KVS_XT */
    void (*few)(const kvs_panel *p, const kvs_acts *acts, int64_t row, int64_t n, float *y, int64_t y_step);
    void (*many)(const kvs_panel *p, const kvs_acts *acts, int64_t row, int64_t n, float *y, int64_t y_step, void *scratch);
    void (*floats)(const kvs_panel *p, const float *x, int64_t n, float *y, int64_t y_step, void *scratch);
    const kvs_bf16 *bf16; /* NULL: none in this build. Only for CPUs with avx512bf16: kvs_isa_bf16 */
} kvs_dots;

enum { KVS_DOTS_SCRATCH = 192 << 10 }; /* bytes per thread, aligned to 64 */

static inline int32_t kvs_acts_block(int32_t type) { /* 0: activations stay float */
    return kvs_striped(type) ? kvs_type_get(type)->block : 0;
}
#endif
