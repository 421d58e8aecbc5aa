/* mix.cu - kv_mix: rows of the cache become weighted sums of them, head by head. Rows are widened to float32 once and turned back if keys
 * are to be mixed without their positions; then warps sum panels of four columns (mix.h), and what comes out goes to the store, rounded
 * once. Sums are chains of fmaf in the order of the sources, as the CPU's vector kernels have them. */
#include "cuda.h"
#include "kv.cuh"

enum {
    WARPS = 8,
    THREADS = WARPS * KVS_WARP,
    COLUMNS = KVS_MIX_COLUMNS,
    TILE = 4 * KVS_WARP /* values of a row that a warp sums at once */
};

typedef struct mix_args {
    const kvs_kv *kv;      /* [dev] */
    const int32_t *target; /* and the three below: of a kvs_mix, [dev] */
    const int32_t *start, *source;
    const float *weight;
    const float *table; /* (rows of the step, n_rot / 2, 2) */
    float *x;           /* (n_sides, heads, n, width) */
    float gamma;
    int32_t n, n_panel, width, heads, n_sides, values_first; /* width: head_dim in whole fours */
    int32_t layer, row, index, exact_from, rope_pre, n_rot;
} mix_args;

/* Blocks along y go through the heads of K, then those of V, where both are wanted. */
KVS_DEVICE bool is_key(const mix_args &a) { return !a.values_first && (int32_t)blockIdx.y < a.heads; }

KVS_DEVICE uint8_t *stored_row(const mix_args &a, int32_t i) {
    const kvs_kv *kv = a.kv;
    uint8_t *rows = kvs_kv_rows(kv, is_key(a) ? kv->k : kv->v, a.layer, blockIdx.y % a.heads);
    return rows + ((int64_t)kvs_kv_place(kv, a.layer, a.index) + i) * kv->row_bytes;
}

KVS_DEVICE const float *angles_of(const mix_args &a, int32_t i) { return a.table + (int64_t)(a.row + i) * a.n_rot; }

/* One warp for each row of a head; zeros behind it. */
static __global__ void widen_kernel(mix_args a) {
    int32_t i = blockIdx.x * WARPS + threadIdx.x / KVS_WARP, lane = threadIdx.x % KVS_WARP;
    if (i >= a.n) return;
    int32_t type = a.kv->type, head_dim = a.kv->head_dim;
    const uint8_t *row = stored_row(a, i);
    float *x = a.x + ((int64_t)blockIdx.y * a.n + i) * a.width;
    bool turns = a.rope_pre && is_key(a);
    for (int32_t first = 0; first < a.width; first += KVS_WARP) {
        int32_t d = first + lane;
        float value = d < head_dim ? kvs_kv_get(type, row, d) : 0.0f;
        if (turns) value = kvs_turned(value, d, angles_of(a, i), a.n_rot, true);
        if (d < a.width) x[d] = value;
    }
}

/* Values first .. first + 32 of target j, one per lane: turned, mixed with what is stored, stored. */
KVS_DEVICE void store_mixed(const mix_args &a, int32_t j, int32_t first, float x) {
    const kvs_kv *kv = a.kv;
    bool key = is_key(a);
    int32_t d = first + (int32_t)(threadIdx.x % KVS_WARP), head_dim = kv->head_dim;
    uint8_t *row = stored_row(a, j);
    float *ring = key ? kv->exact_k : kv->exact_v;
    if (key && a.rope_pre) x = kvs_turned(x, d, angles_of(a, j), a.n_rot, false);
    if (a.gamma != 1.0f && d < head_dim) x = kvs_mul(a.gamma, x) + kvs_mul(1.0f - a.gamma, kvs_kv_get(kv->type, row, d));
    kvs_kv_put32(kv->type, row, head_dim, first, x); /* Q8_0: x of all lanes goes into the scale, so what they have read is still there */
    if (!ring || a.index + j < a.exact_from || d >= head_dim) return;
    ring[kvs_kv_exact(kv, a.layer, a.index + j, a.heads) + (int64_t)(blockIdx.y % a.heads) * head_dim + d] = x;
}

KVS_DEVICE void add_weighted(float4 *sum, float weight, float4 x) {
    sum->x = fmaf(weight, x.x, sum->x);
    sum->y = fmaf(weight, x.y, sum->y);
    sum->z = fmaf(weight, x.z, sum->z);
    sum->w = fmaf(weight, x.w, sum->w);
}

/* One warp for each panel of a head; a lane has four neighbouring values of each of its columns. Panels of a block are neighbours that need
 * nearly the same rows: they come from the first-level cache but once. */
static __global__ void mix_kernel(mix_args a) {
    __shared__ __align__(16) float sums[WARPS][COLUMNS][TILE];
    int32_t warp = threadIdx.x / KVS_WARP, lane = threadIdx.x % KVS_WARP, panel = blockIdx.x * WARPS + warp;
    if (panel >= a.n_panel) return;
    int32_t head_dim = a.kv->head_dim, begin = a.start[panel], end = a.start[panel + 1];
    for (int32_t tile = 0; tile < a.width; tile += TILE) {
        bool inside = tile + 4 * lane < a.width;
        const float *x = a.x + (int64_t)blockIdx.y * a.n * a.width + tile + 4 * lane;
        float4 sum[COLUMNS];
        for (int c = 0; c < COLUMNS; c++) sum[c] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
        for (int32_t s = begin; s < end && inside; s++) {
            float4 part = kvs_load_float4(x + (int64_t)a.source[s] * a.width), w = kvs_load_float4(a.weight + (int64_t)s * COLUMNS);
            add_weighted(&sum[0], w.x, part);
            add_weighted(&sum[1], w.y, part);
            add_weighted(&sum[2], w.z, part);
            add_weighted(&sum[3], w.w, part);
        }
        __syncwarp(); /* the tile before this one has been read */
        for (int c = 0; c < COLUMNS; c++) kvs_store_float4(&sums[warp][c][4 * lane], sum[c]);
        __syncwarp();
        for (int c = 0; c < COLUMNS; c++) {
            int32_t j = a.target[panel * COLUMNS + c];
            for (int32_t first = 0; j >= 0 && first < TILE && tile + first < head_dim; first += KVS_WARP)
                store_mixed(a, j, tile + first, sums[warp][c][first + lane]);
        }
    }
}

static void launch_mix(kvs_cuda *cu, const mix_args *a) {
    unsigned lists = (unsigned)(a->n_sides * a->heads);
    KVS_LAUNCH(cu, widen_kernel, dim3((unsigned)kvs_ceil_div(a->n, WARPS), lists), dim3(THREADS), 0, *a);
    KVS_LAUNCH(cu, mix_kernel, dim3((unsigned)kvs_ceil_div(a->n_panel, WARPS), lists), dim3(THREADS), 0, *a);
}

/* The lists of a mix are the same in every layer of a step. */
static const void *stage_list(kvs_cuda *cu, const void *list, uint64_t bytes) {
    const void **device = kvs_cuda_once_slot(cu, list, KVS_MIN(bytes, (uint64_t)64));
    if (!*device) *device = kvs_cuda_stage(cu, list, bytes, bytes);
    return *device;
}

static void stage_mix(kvs_cuda *cu, const kvs_mix *mix, mix_args *a) {
    uint64_t panels = (uint64_t)mix->n_panel, entries = (uint64_t)mix->start[mix->n_panel];
    a->target = (const int32_t *)stage_list(cu, mix->target, panels * COLUMNS * sizeof *a->target);
    a->start = (const int32_t *)stage_list(cu, mix->start, (panels + 1) * sizeof *a->start);
    a->source = (const int32_t *)stage_list(cu, mix->source, entries * sizeof *a->source);
    a->weight = (const float *)stage_list(cu, mix->weight, entries * COLUMNS * sizeof *a->weight);
    a->n = mix->n;
    a->n_panel = mix->n_panel;
}

void kvs_cuda_kv_mix(kvs_backend *be, int32_t layer, const kvs_mix_job *job, const kvs_rope *rope) {
    kvs_cuda *cu = (kvs_cuda *)be;
    bool keys = job->target & KVS_TARGET_K, values = job->target & KVS_TARGET_V;
    if (kvs_cuda_stopped(cu) || job->mix->n_panel < 1 || !(keys || values)) return;
    KVS_ARGS(mix_args, a);
    a.kv = kvs_cuda_kv(cu, job->kv);
    stage_mix(cu, job->mix, &a);
    a.table = rope->table;
    a.gamma = job->gamma;
    a.width = (job->kv->head_dim + 3) / 4 * 4;
    a.heads = job->kv->n_kv_head;
    a.n_sides = keys && values ? 2 : 1;
    a.values_first = !keys;
    a.layer = layer;
    a.row = job->row;
    a.index = job->index;
    a.exact_from = job->exact_from;
    a.rope_pre = job->rope_pre;
    a.n_rot = rope->n_rot;
    a.x = (float *)kvs_cuda_scratch(cu, KVS_SCRATCH_OP,
                                    (uint64_t)a.n_sides * (uint64_t)a.heads * (uint64_t)a.n * (uint64_t)a.width * sizeof *a.x);
    if (a.x) kvs_cuda_op<launch_mix>(cu, &a);
}
