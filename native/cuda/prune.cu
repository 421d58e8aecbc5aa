/* prune.cu - rows of pictures: what attention the newest row pays each of them, and rows that leave the store or come back. */
#include "cuda.h"
#include "kv.cuh"

#include <math.h>
#include <stdlib.h>

enum {
    SCORE_WARPS = 4,
    MOVE_THREADS = 512,
    HELD = 4,            /* words of a thread on their way */
    MOVES = 256,         /* that are staged at once: more than a layer has heads */
    STAGED = 256,        /* what is staged begins at multiples of that, at most */
    KEPT_BYTES = 8 << 20 /* of scratch for rows on their way to or from the host */
};

/* ---- kv_score ---- */

typedef struct score_args {
    const kvs_kv *kv; /* [dev] */
    float *scores;    /* (heads, n) */
    float scale;
    int32_t layer, maximum, n, heads;
} score_args;

/* The place of row i of the spans of a head. */
KVS_DEVICE int32_t place_of(const kvs_range *spans, int32_t i) {
    for (; i >= spans->n; spans++) i -= spans->n;
    return spans->first + i;
}

/* e^(scale q.k - lse) for query head h and a key, in all lanes of the warp. */
KVS_DEVICE float weigh(const score_args &a, int32_t h, const uint8_t *row) {
    const kvs_kv *kv = a.kv;
    int64_t head = (int64_t)a.layer * kv->n_head + h;
    const float *q = kv->query + head * kv->head_dim;
    float sum = 0.0f;
    for (int32_t d = threadIdx.x % KVS_WARP; d < kv->head_dim; d += KVS_WARP) sum = fmaf(q[d], kvs_kv_get(kv->type, row, d), sum);
    return expf(kvs_mul(kvs_warp_sum(sum), a.scale) - kv->lse[head]);
}

/* One warp for each row of a KV head (blocks along y). */
static __global__ void score_kernel(score_args a) {
    int32_t i = blockIdx.x * SCORE_WARPS + threadIdx.x / KVS_WARP, head = blockIdx.y;
    if (i >= a.n) return;
    const kvs_kv *kv = a.kv;
    int32_t group = kv->n_head / a.heads, place = place_of(kvs_kv_spans(kv, a.layer, head), i);
    const uint8_t *row = kvs_kv_rows(kv, kv->k, a.layer, head) + place * kv->row_bytes;
    float top = weigh(a, head * group, row);
    double sum = (double)top;
    for (int32_t h = 1; h < group; h++) {
        float weight = weigh(a, head * group + h, row);
        sum += (double)weight;
        if (!(top >= weight)) top = weight; /* NaN wins */
    }
    if (threadIdx.x % KVS_WARP == 0) a.scores[(int64_t)head * a.n + i] = a.maximum ? top : (float)(sum / group);
}

static void launch_score(kvs_cuda *cu, const score_args *a) {
    dim3 grid((unsigned)kvs_ceil_div(a->n, SCORE_WARPS), (unsigned)a->heads);
    KVS_LAUNCH(cu, score_kernel, grid, dim3(SCORE_WARPS * KVS_WARP), 0, *a);
}

/* Once in a step, what kv_gather will need for rows that leave after these scores: there failure has no way out. */
static void reserve(kvs_cuda *cu, const kvs_kv *kv, int32_t n) {
    const void **done = kvs_cuda_once_slot(cu, kv, 0);
    uint64_t heads = (uint64_t)kv->n_kv_head, kept = 2 * (uint64_t)n * (uint64_t)kv->row_bytes;
    if (*done) return;
    kvs_cuda_scratch(cu, KVS_SCRATCH_OP, KVS_MIN(heads * kept, KVS_MAX(kept, (uint64_t)KEPT_BYTES)));
    *done = kvs_cuda_stage(cu, NULL, 0, heads * ((uint64_t)n * sizeof(int32_t) + 2 * STAGED));
}

void kvs_cuda_kv_score(kvs_backend *be, const kvs_kv *kv, int32_t layer, int32_t maximum, float *scores) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (kvs_cuda_stopped(cu)) return;
    KVS_ARGS(score_args, a);
    const kvs_range *spans = kvs_kv_spans(kv, layer, 0); /* lists of other heads have other rows, but as many */
    for (int32_t i = 0; i < kv->n_spans; i++) a.n += spans[i].n;
    if (!a.n) return;
    a.kv = kvs_cuda_kv(cu, kv);
    a.scores = scores;
    a.scale = 1.0f / sqrtf((float)kv->head_dim);
    a.layer = layer;
    a.maximum = maximum;
    a.heads = kv->n_kv_head;
    reserve(cu, kv, a.n);
    if (a.kv) kvs_cuda_op<launch_score>(cu, &a);
}

/* ---- kv_gather, kv_scatter ---- */

typedef struct staged_move { /* a kvs_move as it is staged */
    uint8_t *side[2];        /* rows of K and V of the head */
    uint8_t *kept;           /* (2, n, row_bytes) or NULL */
    const int32_t *places;   /* (n) rising */
    int32_t n, n_rows;
} staged_move;

typedef struct move_args {
    const staged_move *moves; /* [dev] (n) */
    int64_t row_bytes;
    int32_t n, back;
} move_args;

/* The place of row i of those that stay while the others are there, too. */
KVS_DEVICE int32_t place_before(const staged_move *m, int32_t i) {
    int32_t low = 0, high = m->n; /* how many of the others stand before it: places[k] - k rises */
    while (low < high) {
        int32_t middle = (low + high) / 2;
        if (m->places[middle] - middle <= i)
            low = middle + 1;
        else
            high = middle;
    }
    return i + low;
}

/* Rows places[i] of the head to kept[i], or back from there. size: of a row in words. */
template <class WORD> KVS_DEVICE void move_kept(const staged_move *m, WORD *rows, WORD *kept, int32_t size, bool back) {
    for (int64_t w = threadIdx.x; kept && w < (int64_t)m->n * size; w += blockDim.x) {
        WORD *row = rows + (int64_t)m->places[w / size] * size + w % size;
        if (back)
            *row = kept[w];
        else
            kept[w] = *row;
    }
}

/* The rows that stay, in place, a tile of words after the other: rising where they slide down, falling where they slide up. A tile is
 * held in registers while all of it is read (the barrier), so it may overlap itself. The next one may be read while this one is
 * written: it is read from beyond where this one goes to, because a row never slides against the direction. */
template <class WORD> KVS_DEVICE void slide(const staged_move *m, WORD *rows, int32_t size, bool back) {
    const int64_t tile = (int64_t)HELD * blockDim.x;
    int64_t first = (int64_t)m->places[0] * size, n = (int64_t)(m->n_rows - m->n) * size - first, tiles = (n + tile - 1) / tile;
    for (int64_t t = 0; t < tiles; t++) {
        WORD held[HELD];
        int64_t to[HELD];
        for (int k = 0; k < HELD; k++) {
            int64_t w = (back ? tiles - 1 - t : t) * tile + (int64_t)k * blockDim.x + threadIdx.x, without = first + w;
            to[k] = -1;
            if (w >= n) continue;
            int64_t with = (int64_t)place_before(m, (int32_t)(without / size)) * size + without % size;
            to[k] = back ? with : without;
            held[k] = rows[back ? without : with];
        }
        __syncthreads();
        for (int k = 0; k < HELD; k++)
            if (to[k] >= 0) rows[to[k]] = held[k];
    }
    __syncthreads();
}

/* One block for each side (along x) of each move (along y). */
template <class WORD> static __global__ void move_kernel(move_args a) {
    const staged_move *m = &a.moves[blockIdx.y];
    int32_t size = (int32_t)(a.row_bytes / (int64_t)sizeof(WORD));
    WORD *rows = (WORD *)m->side[blockIdx.x], *kept = m->kept ? (WORD *)m->kept + (int64_t)blockIdx.x * m->n * size : NULL;
    if (!a.back) move_kept(m, rows, kept, size, false); /* nothing is written to rows before the first barrier of slide */
    slide(m, rows, size, a.back);
    if (a.back) move_kept(m, rows, kept, size, true);
}

/* Rows begin at multiples of their size, and so do those that are kept: words as large as their size allows. */
static void launch_move(kvs_cuda *cu, const move_args *a) {
    dim3 grid(2, (unsigned)a->n);
    if (a->row_bytes % 16 == 0)
        KVS_LAUNCH(cu, move_kernel<uint4>, grid, dim3(MOVE_THREADS), 0, *a);
    else if (a->row_bytes % 4 == 0)
        KVS_LAUNCH(cu, move_kernel<uint32_t>, grid, dim3(MOVE_THREADS), 0, *a);
    else
        KVS_LAUNCH(cu, move_kernel<uint16_t>, grid, dim3(MOVE_THREADS), 0, *a);
}

static int64_t kept_bytes(const kvs_move *m, int64_t row_bytes) { return m->rows ? 2 * (int64_t)m->n * row_bytes : 0; }

/* Between host memory and scratch; moves whose rows follow each other on the host go in one copy. */
static void copy_kept(kvs_backend *be, const kvs_move *moves, int32_t n, int64_t row_bytes, uint8_t *kept, bool back) {
    for (int32_t i = 0; i < n;) {
        uint8_t *host = moves[i].rows;
        int64_t bytes = 0;
        while (i < n && (!bytes || moves[i].rows == host + bytes)) {
            if (!bytes) host = moves[i].rows;
            bytes += kept_bytes(&moves[i++], row_bytes);
        }
        if (bytes && back) be->ops->upload(be, kept, host, (uint64_t)bytes);
        if (bytes && !back) be->ops->download(be, host, kept, (uint64_t)bytes);
        kept += bytes;
    }
}

/* The moves from first on whose rows go through scratch together: one at least, all of them if they fit into KEPT_BYTES. */
static int32_t group_end(const kvs_move *moves, int32_t n, int32_t first, int64_t row_bytes, int64_t *bytes) {
    int32_t end = first;
    for (*bytes = 0; end < n && (end == first || *bytes + kept_bytes(&moves[end], row_bytes) <= KEPT_BYTES); end++)
        *bytes += kept_bytes(&moves[end], row_bytes);
    return end;
}

static const staged_move *stage_moves(kvs_cuda *cu, const kvs_kv *kv, const kvs_move *moves, int32_t n, uint8_t *scratch) {
    staged_move staged[MOVES];
    memset(staged, 0, sizeof staged);
    int64_t bytes, at = 0;
    for (int32_t i = 0, end = 0; i < n; i++) {
        const kvs_move *m = &moves[i];
        uint64_t list = (uint64_t)m->n * sizeof *m->places;
        if (i == end) end = group_end(moves, n, i, kv->row_bytes, &bytes), at = 0;
        staged[i].side[0] = kvs_kv_rows(kv, kv->k, m->layer, m->head);
        staged[i].side[1] = kvs_kv_rows(kv, kv->v, m->layer, m->head);
        staged[i].kept = m->rows ? scratch + at : NULL;
        at += kept_bytes(m, kv->row_bytes);
        bool same = i > 0 && m->places == moves[i - 1].places && m->n == moves[i - 1].n; /* heads of a layer share them, mostly */
        staged[i].places = same ? staged[i - 1].places : (const int32_t *)kvs_cuda_stage(cu, m->places, list, list);
        staged[i].n = m->n;
        staged[i].n_rows = m->n_rows;
    }
    uint64_t all = (uint64_t)n * sizeof *staged;
    return (const staged_move *)kvs_cuda_stage(cu, staged, all, all);
}

/* Asks for all memory before anything moves: false, and the step has failed, if there is none. */
static bool prepare(kvs_cuda *cu, const kvs_kv *kv, const kvs_move *moves, int32_t n, move_args *a, uint8_t **scratch) {
    int64_t bytes, most = 1;
    for (int32_t i = 0; i < n; most = KVS_MAX(most, bytes)) i = group_end(moves, n, i, kv->row_bytes, &bytes);
    *scratch = kvs_cuda_scratch(cu, KVS_SCRATCH_OP, (uint64_t)most);
    a->moves = stage_moves(cu, kv, moves, n, *scratch);
    a->row_bytes = kv->row_bytes;
    return !cu->status;
}

static void move_some(kvs_cuda *cu, const kvs_kv *kv, const kvs_move *moves, int32_t n, bool back) {
    uint8_t *scratch;
    int64_t bytes;
    KVS_ARGS(move_args, a);
    a.back = back;
    if (!prepare(cu, kv, moves, n, &a, &scratch)) return;
    for (int32_t i = 0, end; i < n; i = end, a.moves += a.n) {
        end = group_end(moves, n, i, kv->row_bytes, &bytes);
        a.n = end - i;
        if (back) copy_kept(&cu->base, moves + i, a.n, kv->row_bytes, scratch, true);
        kvs_cuda_op<launch_move>(cu, &a);
        if (!back) copy_kept(&cu->base, moves + i, a.n, kv->row_bytes, scratch, false);
    }
}

/* Callers can't go on if this fails: kv_score has asked for the memory before rows leave. */
static void move_all(kvs_backend *be, const kvs_kv *kv, const kvs_move *moves, int32_t n, bool back) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (kvs_cuda_stopped(cu)) return;
    kvs_cuda_flush(cu);
    for (int32_t i = 0; i < n; i += MOVES) move_some(cu, kv, moves + i, KVS_MIN(n - i, (int32_t)MOVES), back);
}

void kvs_cuda_kv_gather(kvs_backend *be, const kvs_kv *kv, const kvs_move *moves, int32_t n) { move_all(be, kv, moves, n, false); }
void kvs_cuda_kv_scatter(kvs_backend *be, const kvs_kv *kv, const kvs_move *moves, int32_t n) { move_all(be, kv, moves, n, true); }

/* ---- kv_trim ---- */

/* A device has no pages that a part of an allocation could give back: what is behind the rows waits for those to come. */
void kvs_cuda_kv_trim(kvs_backend *be, const kvs_kv *kv, int32_t layer, int32_t n_rows) {
    (void)be;
    (void)kv;
    (void)layer;
    (void)n_rows;
}
