/* mix.h - weighted sums of rows, y_j = sum_i w_ij x_i, with the weights that are worth a product: for the op kv_mix.
 *
 * Four columns j are a panel: the rows i that any of them needs, each with its four weights. Neighbouring patches need nearly the
 * same rows, so a row that was loaded serves four sums; a full matrix is the same with every row in every panel. */
#ifndef KVS_MIX_H
#define KVS_MIX_H
#include "util.h"

enum { KVS_MIX_COLUMNS = 4 };

typedef struct kvs_mix {
    int32_t n;       /* rows that are mixed; i and j are in 0..n */
    int32_t n_panel; /* those of targets: the rows of no panel stay as they are */
    int32_t *target; /* (n_panel, KVS_MIX_COLUMNS) j, rising; -1 behind the last */
    int32_t *start;  /* (n_panel + 1) into source and weight */
    int32_t *source; /* i */
    float *weight;   /* (start[n_panel], KVS_MIX_COLUMNS) */
    int32_t room;    /* of source and weight */
} kvs_mix;

/* Room for n rows and nothing in it yet; false = out of memory. mix is zeroed, or was reset before. */
bool kvs_mix_reset(kvs_mix *mix, int32_t n);
/* The next panel: columns (n_target, n) of the targets, 1..KVS_MIX_COLUMNS of them. */
bool kvs_mix_add(kvs_mix *mix, const int32_t *target, int32_t n_target, const float *columns);
void kvs_mix_free(kvs_mix *mix);
#endif
