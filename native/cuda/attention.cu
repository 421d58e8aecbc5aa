/* attention.cu - the two attention ops: which kernel, and with what. */
#include "attn.cuh"

enum { SCRATCH_BYTES = 64 << 20, ROWS_PER_SESSION = 8, MAX_ROWS_AT_ONCE = 1024 };

/* Steps of few rows, and of many sessions with few rows each, which would leave most of a block's rows idle */
static bool row_by_row(const kvs_step *step) {
    int32_t sessions = 1;
    if (step->n <= KVS_GRAPH_PROMPT_ROWS) return true;
    for (int32_t i = 1; i < step->n; i++) sessions += step->rows[i].kv != step->rows[i - 1].kv;
    return step->n < ROWS_PER_SESSION * sessions;
}

/* Tiles that the longest row sees, a power of two: graphs hold the grid. */
static int32_t most_tiles(const kvs_step *step, int32_t layer) {
    int32_t tiles = 1;
    for (int32_t i = 0; i < step->n; i++) {
        int32_t seen = kvs_kv_place(step->rows[i].kv, layer, step->rows[i].index) + 1;
        while ((int64_t)tiles * KVS_ATTN_TILE < seen) tiles *= 2;
    }
    return tiles;
}

static bool make_room(kvs_cuda *cu, kvs_attn_args *a) {
    const kvs_step *step = cu->step;
    a->n_tiles = most_tiles(step, a->layer);
    for (int32_t i = 0; i < step->n; i++)
        a->piece_bytes = KVS_MAX(a->piece_bytes, kvs_attn_piece_bytes(step->rows[i].kv->type, a->head_dim));
    uint64_t tiles = (uint64_t)a->n_head * (uint64_t)a->n_tiles, row_bytes = tiles * kvs_attn_left_bytes(a->head_dim);
    uint64_t rows = KVS_MAX((uint64_t)SCRATCH_BYTES / row_bytes, (uint64_t)1);
    a->rows_at_once = (int32_t)KVS_MIN(KVS_MIN(rows, (uint64_t)MAX_ROWS_AT_ONCE), (uint64_t)a->n);
    uint8_t *room = kvs_cuda_scratch(cu, KVS_SCRATCH_OP, (uint64_t)a->rows_at_once * row_bytes);
    if (!room) return false;
    a->left = (kvs_attn_left *)(void *)room;
    a->sums = (float *)(void *)(a->left + (uint64_t)a->rows_at_once * tiles); /* behind: rows of an odd head_dim are not aligned */
    return true;
}

static bool make_late_room(kvs_cuda *cu, kvs_attn_args *a, int32_t n_layer) {
    const uint64_t floats = 3 * (uint64_t)n_layer * (uint64_t)a->n * (uint64_t)a->n_head;
    if (cu->noting && cu->fuses) a->late = (float *)(void *)kvs_cuda_scratch(cu, KVS_SCRATCH_TAPS, floats * sizeof(float));
    return !cu->status;
}

void kvs_cuda_attn(kvs_backend *be, int32_t layer, const float *q, float *out, const kvs_taps *taps) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (kvs_cuda_stopped(cu) || cu->step->n < 1) return;
    const kvs_kv *kv = cu->step->rows[0].kv; /* all sessions of a step are of one model; the types of their caches may differ */
    KVS_ARGS(kvs_attn_args, a);
    a.rows = cu->rows;
    a.q = q;
    a.out = out;
    a.taps = *taps;
    a.layer = layer;
    a.n = cu->step->n;
    a.n_head = kv->n_head;
    a.n_kv_head = kv->n_kv_head;
    a.head_dim = kv->head_dim;
    a.scale = 1.0f / sqrtf((float)kv->head_dim);
    if (!row_by_row(cu->step))
        kvs_cuda_op<kvs_attn_launch_tile>(cu, &a);
    else if (make_room(cu, &a) && make_late_room(cu, &a, kv->n_layer))
        kvs_cuda_op<kvs_attn_launch_decode, KVS_CUDA_ATTN>(cu, &a);
}

/* Float32, whatever the rounding: on a GPU nothing is won by rounding first. */
void kvs_cuda_attn_full(kvs_backend *be, const float *q, const float *k, const float *v, float *out, int32_t n, int32_t n_head,
                        int32_t head_dim, int32_t rounding) {
    kvs_cuda *cu = (kvs_cuda *)be;
    (void)rounding;
    if (kvs_cuda_stopped(cu) || n < 1) return;
    KVS_ARGS(kvs_attn_args, a);
    a.q = q;
    a.k = k;
    a.v = v;
    a.out = out;
    a.n = n;
    a.n_head = a.n_kv_head = n_head;
    a.head_dim = head_dim;
    a.scale = 1.0f / sqrtf((float)head_dim);
    kvs_cuda_op<kvs_attn_launch_tile>(cu, &a);
}
