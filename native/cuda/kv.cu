/* kv.cu - rows of the cache: storing them, multiplying them, remembering their entropies, and KVSmooth's mix. The strengths that
 * come out are ranks, and sessions go from device to device: products and sums are those of the CPU, one by one, and never an fmaf. */
#include "kv.cuh"

#include "../strength.h"
#include "ops.cuh"

#include <math.h>
#include <stdlib.h>

enum { WARPS = 4, THREADS = WARPS * KVS_WARP };

/* ---- what is staged once in a step ---- */

const void **kvs_cuda_once_slot(kvs_cuda *cu, const void *host, uint64_t bytes) {
    uint64_t hash = kvs_hash(0, host, bytes);
    for (int32_t i = 0; i < cu->n_once; i++)
        if (cu->once[i].host == host && cu->once[i].hash == hash) return &cu->once[i].device;
    kvs_cuda_once *slot = &cu->once[cu->n_once];
    if (cu->n_once < KVS_CUDA_ONCE) cu->n_once++;
    slot->host = host;
    slot->hash = hash;
    slot->device = NULL;
    return &slot->device;
}

/* ---- kv_put, kv_put_out ---- */

/* A slot of the ring of exact rows is shared by rows n_exact apart: only the newest of a step may write it. */
KVS_DEVICE bool newest_of_slot(const kvs_row *rows, int32_t n, int32_t i) {
    const kvs_kv *kv = rows[i].kv;
    int64_t next = (int64_t)i + kv->n_exact;
    return kv->n_exact > 0 && (next >= n || rows[next].kv != kv);
}

/* Where row i of a head of K or of V goes */
typedef struct row_place {
    uint8_t *stored;
    float *exact; /* or NULL */
    int32_t type, head_dim;
} row_place;

KVS_DEVICE row_place row_place_of(const kvs_put_args &a, int32_t i, int32_t head, bool key) {
    const kvs_row *row = &a.rows[i];
    const kvs_kv *kv = row->kv;
    row_place place = {kvs_kv_rows(kv, key ? kv->k : kv->v, a.layer, head) + kvs_kv_place(kv, a.layer, row->index) * kv->row_bytes,
                       key ? kv->exact_k : kv->exact_v, kv->type, kv->head_dim};
    if (!place.exact) return place;
    const int64_t offset = kvs_kv_exact(kv, a.layer, row->index, a.heads) + head * kv->head_dim;
    place.exact = newest_of_slot(a.rows, a.n, i) ? place.exact + offset : NULL;
    return place;
}

/* Values first .. first + 32, one in each lane of a warp */
KVS_DEVICE void put_values(const row_place &place, int32_t first, float value) {
    const int32_t d = first + (int32_t)(threadIdx.x % KVS_WARP);
    kvs_kv_put32(place.type, place.stored, place.head_dim, first, value);
    if (place.exact && d < place.head_dim) place.exact[d] = value;
}

/* One warp for each row of a head of K and of V. */
static __global__ void put_kernel(kvs_put_args a) {
    int64_t task = (int64_t)blockIdx.x * WARPS + threadIdx.x / KVS_WARP;
    int32_t head = (int32_t)(task / 2 % a.heads), i = (int32_t)(task / 2 / a.heads);
    if (i >= a.n) return;
    bool key = task % 2 == 0;
    int32_t head_dim = a.rows[i].kv->head_dim;
    const float *x = (key ? a.k : a.v) + ((int64_t)i * a.heads + head) * head_dim;
    const row_place place = row_place_of(a, i, head, key);
    for (int32_t first = 0; first < head_dim; first += KVS_WARP) {
        const int32_t d = first + (int32_t)(threadIdx.x % KVS_WARP);
        put_values(place, first, d < head_dim ? x[d] : 0.0f);
    }
}

static void launch_put(kvs_cuda *cu, const kvs_put_args *a) {
    int64_t blocks = kvs_ceil_div(2 * (int64_t)a->n * a->heads, WARPS);
    KVS_LAUNCH(cu, put_kernel, dim3((unsigned)blocks), dim3(THREADS), 0, *a);
}

void kvs_cuda_kv_put(kvs_backend *be, int32_t layer, const float *k, const float *v) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (kvs_cuda_stopped(cu) || cu->step->n < 1) return;
    KVS_ARGS(kvs_put_args, a);
    a.rows = cu->rows;
    a.k = k;
    a.v = v;
    a.layer = layer;
    a.n = cu->step->n;
    a.heads = cu->step->rows->kv->n_kv_head;
    kvs_cuda_op<launch_put, KVS_CUDA_PUT>(cu, &a);
}

/* HELD values of a lane are read before the first of them is used: a warp has some heads, and each would wait for memory again and again. */
enum { HELD = 4 };

KVS_DEVICE void hold(const float *x, int32_t first, int32_t dims, float values[HELD]) {
    const int32_t d = first + (int32_t)(threadIdx.x % KVS_WARP);
#pragma unroll
    for (int i = 0; i < HELD; i++) values[i] = d + i * KVS_WARP < dims ? x[d + i * KVS_WARP] : 0.0f;
}

/* use(first, value) for all runs of 32 values of a head, by a warp */
template <class F> KVS_DEVICE void each_run(const float *x, int32_t dims, F use) {
    for (int32_t first = 0; first < dims; first += HELD * KVS_WARP) {
        float values[HELD];
        hold(x, first, dims, values);
#pragma unroll
        for (int i = 0; i < HELD; i++)
            if (first + i * KVS_WARP < dims) use(first + i * KVS_WARP, values[i]);
    }
}

/* A row of a head of K or of V; first_bad: of the row, in shared memory */
KVS_DEVICE void turn_check_put(const kvs_keys_args &a, int32_t i, int32_t head, bool key, const kvs_row_check &check, int32_t *first_bad) {
    const int32_t lane = threadIdx.x % KVS_WARP, dims = a.q.head_dim, n_rot = key ? a.q.n_rot : 0;
    const float *angles = a.q.table + (int64_t)i * a.q.n_rot;
    const row_place place = row_place_of(a.put, i, head, key);
    float *x = (float *)(key ? a.put.k : a.put.v) + ((int64_t)i * a.put.heads + head) * dims;
    each_run(x, dims, [&](int32_t first, float value) {
        const int32_t d = first + lane;
        const float y = kvs_turned(value, d, angles, n_rot, false);
        if (d < n_rot) x[d] = y;
        if (check.wanted && d < dims && kvs_finite_beyond(y, check.limit)) atomicMin(first_bad, head * dims + d);
        put_values(place, first, y);
    });
}

/* One block for each row: its warps take heads of q, then those of K and of V. */
static __global__ void __launch_bounds__(KVS_WARP *KVS_WARP) keys_kernel(const __grid_constant__ kvs_keys_args a) {
    __shared__ int32_t first_bad[2]; /* of the row's K and V: the first value beyond its limit */
    const int32_t i = (int32_t)blockIdx.x, lane = threadIdx.x % KVS_WARP, dims = a.q.head_dim, n_rot = a.q.n_rot;
    const float *angles = a.q.table + (int64_t)i * n_rot;
    if (threadIdx.x < 2) first_bad[threadIdx.x] = INT32_MAX;
    __syncthreads();
    kvs_let_next_begin();
    kvs_await_previous();
    for (int32_t task = threadIdx.x / KVS_WARP; task < a.q.n_head + 2 * a.put.heads; task += blockDim.x / KVS_WARP) {
        const int32_t head = (task - a.q.n_head) / 2, value = (task - a.q.n_head) % 2;
        if (task < a.q.n_head) {
            float *x = a.q.x + ((int64_t)i * a.q.n_head + task) * dims;
            each_run(x, n_rot, [&](int32_t first, float value) {
                const float y = kvs_turned(value, first + lane, angles, n_rot, false);
                if (first + lane < n_rot) x[first + lane] = y;
            });
        } else {
            turn_check_put(a, i, head, !value, a.checks[i][value], &first_bad[value]);
        }
    }
    __syncthreads();
    const int32_t value = (int32_t)threadIdx.x;
    if (value > 1 || first_bad[value] == INT32_MAX) return;
    const float *x = (value ? a.put.v : a.put.k) + (int64_t)i * a.put.heads * dims;
    kvs_finite_report(a.fault, a.checks[i][value].place, a.checks[i][value].row, x[first_bad[value]]);
}

void kvs_keys_launch(kvs_cuda *cu, const kvs_keys_args *a) {
    const int32_t warps = KVS_MIN(a->q.n_head + 2 * a->put.heads, KVS_WARP);
    KVS_LAUNCH_EARLY(cu, keys_kernel, dim3((unsigned)a->put.n), dim3((unsigned)(warps * KVS_WARP)), 0, *a);
}

/* One block for each row. */
static __global__ void put_out_kernel(kvs_put_args a) {
    const kvs_row *row = &a.rows[blockIdx.x];
    const kvs_kv *kv = row->kv;
    if (!kv->exact_o || !newest_of_slot(a.rows, a.n, blockIdx.x)) return;
    int32_t width = a.heads * kv->head_dim;
    const float *x = a.k + (int64_t)blockIdx.x * width;
    float *exact = kv->exact_o + kvs_kv_exact(kv, a.layer, row->index, a.heads);
    for (int32_t d = threadIdx.x; d < width; d += blockDim.x) exact[d] = x[d];
}

static void launch_put_out(kvs_cuda *cu, const kvs_put_args *a) {
    KVS_LAUNCH(cu, put_out_kernel, dim3((unsigned)a->n), dim3(2 * THREADS), 0, *a);
}

void kvs_cuda_kv_put_out(kvs_backend *be, int32_t layer, const float *out) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (kvs_cuda_stopped(cu)) return;
    bool wanted = false; /* hardly ever */
    for (int32_t i = 0; i < cu->step->n && !wanted; i++) wanted = cu->step->rows[i].kv->exact_o != NULL;
    if (!wanted) return;
    KVS_ARGS(kvs_put_args, a);
    a.rows = cu->rows;
    a.k = out;
    a.layer = layer;
    a.n = cu->step->n;
    a.heads = cu->step->rows->kv->n_head;
    kvs_cuda_op<launch_put_out>(cu, &a);
}

/* ---- kv_scale ---- */

/* A kvs_scale_job as it is staged, all pointers [dev]: how many rows there are, and which, changes from step to step. */
typedef struct scale_args {
    const kvs_scale_job *job;
    int32_t layer, heads, n_sides, values_first, blocks; /* blocks: for the rows of a head */
} scale_args;

enum { SCALE_BLOCKS = 8 }; /* at most: rows are few, mostly, where room is that of a picture */

/* Row i of a head of K or of V, by a warp: what is stored and what is exact, each by itself. */
KVS_DEVICE void scale_row(const kvs_scale_job *job, int32_t layer, int32_t head, int32_t i, bool key) {
    const kvs_kv *kv = job->kv;
    const int32_t head_dim = kv->head_dim, lane = threadIdx.x % KVS_WARP;
    uint8_t *row = kvs_kv_rows(kv, key ? kv->k : kv->v, layer, head) + kvs_scale_place(job, head, i) * kv->row_bytes;
    float *ring = key ? kv->exact_k : kv->exact_v;
    for (int32_t first = 0; first < head_dim; first += KVS_WARP) {
        const int32_t d = first + lane;
        const float x = d < head_dim ? kvs_mul(job->factor, kvs_kv_get(kv->type, row, d)) : 0.0f;
        kvs_kv_put32(kv->type, row, head_dim, first, x);
    }
    if (!ring || job->indices[i] < job->exact_from) return;
    ring += kvs_kv_exact(kv, layer, job->indices[i], kv->n_kv_head) + (int64_t)head * head_dim;
    for (int32_t d = lane; d < head_dim; d += KVS_WARP) ring[d] = kvs_mul(job->factor, ring[d]);
}

/* Blocks along y go through the heads of K, then those of V, where both are wanted. */
static __global__ void scale_kernel(scale_args a) {
    const int32_t head = blockIdx.y % a.heads, warp = threadIdx.x / KVS_WARP;
    const bool key = !a.values_first && (int32_t)blockIdx.y < a.heads;
    for (int32_t i = blockIdx.x * WARPS + warp; i < a.job->n; i += a.blocks * WARPS)
        if (kvs_scale_place(a.job, head, i) >= 0) scale_row(a.job, a.layer, head, i, key);
}

static void launch_scale(kvs_cuda *cu, const scale_args *a) {
    KVS_LAUNCH(cu, scale_kernel, dim3((unsigned)a->blocks, (unsigned)(a->n_sides * a->heads)), dim3(THREADS), 0, *a);
}

/* Layers whose lists are the same share one job. */
static const kvs_scale_job *stage_scale(kvs_cuda *cu, const kvs_scale_job *job) {
    const void **device = kvs_cuda_once_slot(cu, job, sizeof *job);
    if (*device) return (const kvs_scale_job *)*device;
    const uint64_t n = (uint64_t)job->n * sizeof *job->places, room = (uint64_t)job->room * sizeof *job->places;
    const uint64_t sets = (uint64_t)KVS_MAX(job->n_sets, 1);
    kvs_scale_job staged = *job;
    staged.kv = (kvs_kv *)kvs_cuda_kv(cu, job->kv);
    staged.indices = (const int32_t *)kvs_cuda_stage(cu, job->indices, n, room);
    staged.places = (const int32_t *)kvs_cuda_stage(cu, job->places, (sets - 1) * room + n, sets * room);
    *device = kvs_cuda_stage(cu, &staged, sizeof staged, sizeof staged);
    return (const kvs_scale_job *)*device;
}

void kvs_cuda_kv_scale(kvs_backend *be, int32_t layer, const kvs_scale_job *job) {
    kvs_cuda *cu = (kvs_cuda *)be;
    const bool keys = job->target & KVS_TARGET_K, values = job->target & KVS_TARGET_V;
    if (kvs_cuda_stopped(cu) || job->n < 1 || job->factor == 1.0f || !(keys || values)) return;
    KVS_ARGS(scale_args, a);
    a.job = stage_scale(cu, job);
    a.layer = layer;
    a.heads = job->kv->n_kv_head;
    a.n_sides = keys && values ? 2 : 1;
    a.values_first = !keys;
    a.blocks = (int32_t)KVS_MIN(kvs_ceil_div(job->room, WARPS), (int64_t)SCALE_BLOCKS);
    if (a.job) kvs_cuda_op<launch_scale>(cu, &a); /* what fuse.cu has put off may mix these rows: of a kind that it does not pass by */
}

/* ---- kv_record ---- */

KVS_DEVICE float mean(const float *x, int32_t n) { /* in the CPU's order: it decides ranks */
    double sum = 0;
    for (int32_t i = 0; i < n; i++) sum += (double)x[i];
    return (float)(sum / n);
}

/* One block for each row (along x) of each layer (along y); a thread for the mean of each group, and one for the share of pictures. */
static __global__ void record_kernel(kvs_record_args a) {
    KVS_DYNAMIC_SHARED(float, entropy); /* (2, n_head): then come the shares of pictures */
    float *mass = entropy + a.n_head;
    const int32_t i = blockIdx.x, layer = a.layer + (int32_t)blockIdx.y;
    const int64_t taps = (int64_t)blockIdx.y * a.stride + (int64_t)i * a.n_head;
    const kvs_kv *kv = a.rows[i].kv;
    kvs_let_next_begin();
    kvs_await_previous();
    for (int32_t h = threadIdx.x; h < a.n_head; h += blockDim.x) {
        entropy[h] = a.entropy[taps + h];
        mass[h] = a.mass[taps + h];
    }
    __syncthreads();
    int64_t place = kvs_kv_history(kv, layer, a.rows[i].index);
    int32_t heads = a.n_head / kv->n_group; /* query heads of a KV head are neighbours */
    for (int32_t g = threadIdx.x; g <= kv->n_group; g += blockDim.x) {
        if (g == kv->n_group)
            kv->mass[kvs_kv_mass(kv, layer, a.rows[i].index)] = mean(mass, a.n_head);
        else {
            kv->entropy[place + g] = mean(entropy + g * heads, heads);
            kv->strength[place + g] = NAN;
        }
    }
    if (!kv->query || (i + 1 < a.n && a.rows[i + 1].kv == kv)) return;
    int32_t width = a.n_head * kv->head_dim;
    for (int32_t d = threadIdx.x; d < width; d += blockDim.x) kv->query[(int64_t)layer * width + d] = a.q[(int64_t)i * width + d];
    for (int32_t h = threadIdx.x; h < a.n_head; h += blockDim.x) kv->lse[layer * a.n_head + h] = a.lse[taps + h];
}

void kvs_record_launch(kvs_cuda *cu, const kvs_record_args *a) {
    const dim3 grid((unsigned)a->n, (unsigned)a->n_layer);
    KVS_LAUNCH_EARLY(cu, record_kernel, grid, dim3(THREADS), 2 * (size_t)a->n_head * sizeof(float), *a);
}

void kvs_cuda_kv_record(kvs_backend *be, int32_t layer, const float *q, const kvs_taps *taps) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (kvs_cuda_stopped(cu) || cu->step->n < 1) return;
    KVS_ARGS(kvs_record_args, a);
    a.rows = cu->rows;
    a.q = q;
    a.entropy = taps->entropy;
    a.mass = taps->mass;
    a.lse = taps->lse;
    a.layer = layer;
    a.n_layer = 1;
    a.n = cu->step->n;
    a.n_head = cu->step->rows->kv->n_head;
    for (int32_t i = 0; i < a.n; i++) a.keeps_queries |= cu->step->rows[i].kv->query != NULL;
    kvs_cuda_op<kvs_record_launch, KVS_CUDA_RECORD>(cu, &a);
}

/* ---- kv_tell ---- */

typedef struct tell_args {
    const kvs_row *rows;
    float *told; /* (n, 3, layers.n) */
    int32_t n;
    kvs_range layers;
} tell_args;

/* A thread for each row and layer. */
static __global__ void tell_kernel(tell_args a) {
    int32_t task = blockIdx.x * blockDim.x + threadIdx.x, i = task / a.layers.n, at = task % a.layers.n;
    if (i >= a.n) return;
    const kvs_kv *kv = a.rows[i].kv;
    int32_t layer = a.layers.first + at, index = a.rows[i].index;
    int64_t place = kvs_kv_history(kv, layer, index);
    float *told = a.told + (int64_t)i * 3 * a.layers.n + at;
    told[0] = mean(kv->entropy + place, kv->n_group);
    told[a.layers.n] = mean(kv->strength + place, kv->n_group);
    told[2 * a.layers.n] = kv->mass[kvs_kv_mass(kv, layer, index)];
}

static void launch_tell(kvs_cuda *cu, const tell_args *a) {
    KVS_LAUNCH(cu, tell_kernel, dim3((unsigned)kvs_ceil_div((int64_t)a->n * a->layers.n, THREADS)), dim3(THREADS), 0, *a);
}

void kvs_cuda_kv_tell(kvs_backend *be, kvs_range layers, float *const *told) {
    kvs_cuda *cu = (kvs_cuda *)be;
    int32_t n = cu->step->n;
    if (kvs_cuda_stopped(cu) || n < 1 || layers.n < 1) return;
    uint64_t bytes = (uint64_t)layers.n * sizeof(float);
    kvs_cuda_report report = kvs_cuda_reserve_report(cu, 3 * (uint64_t)n * bytes);
    if (!report.host) return;
    KVS_ARGS(tell_args, a);
    a.rows = cu->rows;
    a.told = (float *)report.device;
    a.n = n;
    a.layers = layers;
    kvs_cuda_op<launch_tell>(cu, &a);
    for (int32_t i = 0; i < n; i++)
        for (int32_t what = 0; what < 3 && told[i]; what++)
            kvs_cuda_deliver(cu, told[i] + (int64_t)what * cu->step->rows[i].kv->n_layer + layers.first,
                             report.host + (3 * (uint64_t)i + what) * bytes, bytes);
}

/* ---- kv_smooth ---- */

/* A kvs_smooth_job as it is staged; room entries of its queue follow, then as many of missing. */
typedef struct staged_job {
    const kvs_kv *kv;         /* [dev] */
    kvs_smooth_params params; /* without its lists */
    int32_t row, index, prev, pos_delta, n_queue, has_missing;
} staged_job;

typedef struct smoother { /* one KV head of one job on one layer */
    const staged_job *job;
    const kvs_kv *kv;
    const int32_t *queue, *missing;
    const float *turn; /* (n_rot / 2, 2); n_rot: of the turn that brings the previous key here, 0 = it stays as it is */
    int32_t n_rot, layer, head;
    float lambda;
} smoother;

/* What is ranked: the entropy of a row, divided by the most that it could be where norm_log_len asks for that. */
KVS_DEVICE float score(const smoother &s, int32_t entry, int32_t group) {
    int32_t index = s.queue[entry];
    float z = s.kv->entropy[kvs_kv_history(s.kv, s.layer, index) + group];
    if (!s.job->params.norm_log_len) return z;
    bool dropped = s.job->has_missing && s.kv->dropped && s.kv->dropped[s.layer];
    int32_t seen = index + 1 - (s.kv->exclude_self ? 1 : 0) - (dropped ? s.missing[entry] : 0);
    return z / logf((float)KVS_MAX(seen, 2));
}

/* For all threads of the block, which count the entries of the queue together. */
KVS_DEVICE float find_strength(const smoother &s, int32_t group, float *lines) {
    const kvs_smooth_params *p = &s.job->params;
    int32_t n = s.job->n_queue, smaller = 0, equal = 0;
    float self = score(s, n - 1, group);
    for (int32_t i = threadIdx.x; i + 1 < n; i += blockDim.x) {
        float z = score(s, i, group);
        smaller += z < self;
        equal += z == self;
    }
    smaller = (int32_t)kvs_block_sum((float)smaller, lines); /* small whole numbers: exact */
    equal = (int32_t)kvs_block_sum((float)equal, lines);
    return kvs_strength(kvs_rank(smaller, equal, p->midrank), n, p->window, p->den_capacity, p->lambda_ref, p->half_width, p->lambda_max,
                        p->lambda_fixed);
}

/* By all threads of the block; the barrier is the caller's. */
KVS_DEVICE int32_t set_turn(const kvs_smooth_batch &a, const staged_job *job, float *turn) {
    const kvs_smooth_params *p = &job->params;
    if (!p->rope_relative || !(p->target & KVS_TARGET_K) || !job->pos_delta || !a.inv_freq) return 0;
    for (int32_t i = threadIdx.x; i < a.n_rot / 2; i += blockDim.x) {
        double angle = (double)job->pos_delta * (double)a.inv_freq[i];
        turn[2 * i] = (float)cos(angle);
        turn[2 * i + 1] = (float)sin(angle);
    }
    return a.n_rot;
}

/* (1 - lambda) x + lambda previous, or only the first half of it */
KVS_DEVICE float mixed(const smoother &s, float x, float previous) {
    float keep = kvs_mul(1.0f - s.lambda, x);
    return s.job->params.damp ? keep + kvs_mul(0.0f, x) : keep + kvs_mul(s.lambda, previous);
}

/* One of K and V: from exact rows to the store, quantized once, and back into the exact row for the next mix. */
KVS_DEVICE void smooth_rows(const smoother &s, uint8_t *base, float *exact, int32_t n_rot) {
    const kvs_kv *kv = s.kv;
    int32_t n = kv->head_dim, lane = threadIdx.x % KVS_WARP, offset = s.head * n;
    float *self = exact + kvs_kv_exact(kv, s.layer, s.job->index, kv->n_kv_head) + offset;
    const float *previous = exact + kvs_kv_exact(kv, s.layer, s.job->prev, kv->n_kv_head) + offset;
    uint8_t *row = kvs_kv_rows(kv, base, s.layer, s.head) + kvs_kv_place(kv, s.layer, s.job->index) * kv->row_bytes;
    for (int32_t first = threadIdx.x - lane; first < n; first += blockDim.x) {
        int32_t i = first + lane;
        float turned = kvs_turned(i < n ? previous[i] : 0.0f, i, s.turn, n_rot, false);
        float x = i < n ? mixed(s, self[i], turned) : 0.0f;
        kvs_kv_put32(kv->type, row, n, first, x);
        if (i < n && !s.job->params.ema_one_step) self[i] = x;
    }
}

/* The outputs of the query heads that belong to the KV head. */
KVS_DEVICE void smooth_outputs(const smoother &s, float *out) {
    const kvs_kv *kv = s.kv;
    int32_t heads = kv->n_head / kv->n_kv_head, width = heads * kv->head_dim;
    int64_t offset = (int64_t)s.head * width;
    float *row = out + (int64_t)s.job->row * kv->n_head * kv->head_dim + offset;
    float *self = kv->exact_o + kvs_kv_exact(kv, s.layer, s.job->index, kv->n_head) + offset;
    const float *previous = kv->exact_o + kvs_kv_exact(kv, s.layer, KVS_MAX(s.job->prev, 0), kv->n_head) + offset;
    bool mixes = s.job->prev >= 0 && s.lambda != 0.0f;
    for (int32_t i = threadIdx.x; i < width; i += blockDim.x) {
        float x = row[i], y = mixes ? mixed(s, x, previous[i]) : x;
        if (mixes) row[i] = y;
        self[i] = s.job->params.ema_one_step ? x : y;
    }
}

/* One block for each KV head (along x) of each job (along y) of each of its layers (along z). Each finds the strength for itself. */
static __global__ void smooth_kernel(const __grid_constant__ kvs_smooth_batch a) {
    __shared__ float lines[KVS_WARP], turn[KVS_MAX_HEAD_DIM];
    const kvs_smooth_job_at at = a.jobs[blockIdx.y];
    const int32_t layer = at.layer + (int32_t)blockIdx.z;
    if (layer >= at.layer + at.n_layer) return;
    const staged_job *job = (const staged_job *)at.job;
    const kvs_kv *kv = job->kv;
    const int32_t *queue = (const int32_t *)(job + 1);
    int32_t head = blockIdx.x, target = job->params.target, group = kv->n_group > 1 ? head : 0;
    smoother s = {job, kv, queue, queue + at.room, turn, 0, layer, head, 0.0f};
    kvs_let_next_begin();
    kvs_await_previous();
    if (job->prev >= 0) {
        s.lambda = find_strength(s, group, lines);
        s.n_rot = set_turn(a, job, turn);
        __syncthreads();
        if (!threadIdx.x && head == group) kv->strength[kvs_kv_history(kv, layer, job->index) + group] = s.lambda;
        bool mixes = s.lambda != 0.0f; /* else not a bit may change */
        if (mixes && (target & KVS_TARGET_K) && kv->exact_k) smooth_rows(s, kv->k, kv->exact_k, s.n_rot);
        if (mixes && (target & KVS_TARGET_V) && kv->exact_v) smooth_rows(s, kv->v, kv->exact_v, 0);
    }
    if ((target & KVS_TARGET_O) && kv->exact_o && a.out) smooth_outputs(s, a.out);
}

bool kvs_smooth_take(kvs_smooth_batch *batch, const kvs_smooth_args *a, int32_t *done) {
    if (batch->n_jobs && (batch->out != a->out || batch->inv_freq != a->inv_freq || batch->n_rot != a->n_rot || batch->heads != a->heads))
        return false;
    batch->out = a->out;
    batch->inv_freq = a->inv_freq;
    batch->n_rot = a->n_rot;
    batch->heads = a->heads;
    for (; *done < a->n_jobs; (*done)++) {
        const uint8_t *job = a->jobs + (int64_t)*done * a->stride;
        kvs_smooth_job_at *at = batch->jobs, *end = at + batch->n_jobs;
        while (at < end && (at->job != job || at->layer + at->n_layer != a->layer)) at++;
        if (at == batch->jobs + KVS_SMOOTH_JOBS) return false;
        if (at == end) *at = {job, a->room, a->layer, 0}, batch->n_jobs++;
        at->n_layer++;
        batch->n_layer = KVS_MAX(batch->n_layer, at->n_layer);
    }
    return true;
}

void kvs_smooth_launch(kvs_cuda *cu, kvs_smooth_batch *batch) {
    const dim3 grid((unsigned)batch->heads, (unsigned)batch->n_jobs, (unsigned)batch->n_layer);
    if (batch->n_jobs) KVS_LAUNCH_EARLY(cu, smooth_kernel, grid, dim3(THREADS), 0, *batch);
    batch->n_jobs = batch->n_layer = 0;
}

static void launch_smooth(kvs_cuda *cu, const kvs_smooth_args *a) {
    kvs_smooth_batch batch = {};
    for (int32_t done = 0; done < a->n_jobs; kvs_smooth_launch(cu, &batch)) kvs_smooth_take(&batch, a, &done);
}

static void fill_job(kvs_cuda *cu, const kvs_smooth_job *job, int32_t room, uint8_t *to) {
    staged_job *staged = (staged_job *)to;
    int32_t *queue = (int32_t *)(staged + 1);
    staged->kv = kvs_cuda_kv(cu, job->kv);
    staged->params = *job->params;
    staged->params.layers = staged->params.skip_ids = NULL;
    staged->row = job->row;
    staged->index = job->index;
    staged->prev = job->prev;
    staged->pos_delta = job->pos_delta;
    staged->n_queue = job->n_queue;
    staged->has_missing = job->missing != NULL;
    memcpy(queue, job->queue, (size_t)job->n_queue * sizeof *queue);
    if (job->missing) memcpy(queue + room, job->missing, (size_t)job->n_queue * sizeof *queue);
}

/* Room for whole windows: a queue grows from step to step, and nothing else may change its address for that. */
static const uint8_t *stage_jobs(kvs_cuda *cu, const kvs_smooth_job *jobs, int32_t n_jobs, kvs_smooth_args *a) {
    for (int32_t i = 0; i < n_jobs; i++) a->room = KVS_MAX(a->room, KVS_MAX(jobs[i].params->window, jobs[i].n_queue));
    a->room = (a->room + 3) / 4 * 4;
    a->stride = (int32_t)sizeof(staged_job) + 2 * a->room * (int32_t)sizeof *jobs->queue;
    const void **device = kvs_cuda_once_slot(cu, jobs, (uint64_t)n_jobs * sizeof *jobs);
    if (*device) return (const uint8_t *)*device;
    uint64_t bytes = (uint64_t)n_jobs * (uint64_t)a->stride;
    uint8_t *host = (uint8_t *)kvs_calloc(bytes, 1);
    if (!host) {
        cu->status = KVS_E_MEMORY;
        return NULL;
    }
    for (int32_t i = 0; i < n_jobs; i++) fill_job(cu, &jobs[i], a->room, host + (int64_t)i * a->stride);
    *device = kvs_cuda_stage(cu, host, bytes, bytes);
    free(host);
    return (const uint8_t *)*device;
}

void kvs_cuda_kv_smooth(kvs_backend *be, int32_t layer, const kvs_smooth_job *jobs, int32_t n_jobs, const kvs_rope *rope, float *out) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (kvs_cuda_stopped(cu) || n_jobs < 1) return;
    KVS_ARGS(kvs_smooth_args, a);
    a.jobs = stage_jobs(cu, jobs, n_jobs, &a);
    a.out = out;
    a.inv_freq = rope ? rope->inv_freq : NULL;
    a.n_jobs = n_jobs;
    a.layer = layer;
    a.n_rot = rope ? rope->n_rot : 0;
    a.heads = jobs->kv->n_kv_head;
    for (int32_t i = 0; i < n_jobs; i++) a.writes_out |= (jobs[i].params->target & KVS_TARGET_O) != 0;
    if (a.jobs) kvs_cuda_op<launch_smooth, KVS_CUDA_SMOOTH>(cu, &a);
}
