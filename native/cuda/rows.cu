/* rows.cu - ops that go row by row or value by value: norms, angles and RoPE, sums and activations, and the search for values that may not
 * be. All are bound by memory, or by the time that a launch takes. */
#include "ops.cuh"

#include <math.h>

enum { THREADS = 256, EACH = 4, RUN = 8 * KVS_WARP };

static bool aligned16(const void *p) { return (uintptr_t)p % 16 == 0; } /* NULL is */

/* ---- norms ---- */

/* Of value(x) over RUN values from first on, by one warp; in float32. */
template <class F> KVS_DEVICE float run_sum(const float *x, int32_t first, int32_t cols, bool wide, F value) {
    float sum = 0.0f;
    int32_t lane = threadIdx.x % KVS_WARP;
    if (wide) {
        for (int32_t i = first + 4 * lane; i < first + RUN && i < cols; i += 4 * KVS_WARP) {
            float4 v = kvs_load_float4(x + i);
            sum += (value(v.x) + value(v.y)) + (value(v.z) + value(v.w));
        }
    } else
        for (int32_t i = first + lane; i < first + RUN && i < cols; i += KVS_WARP) sum += value(x[i]);
    return kvs_warp_sum(sum);
}

/* Mean over a row, for all threads of the block, of what each warp has the sum of. lines: KVS_WARP of shared memory. */
KVS_DEVICE float block_mean(double sum, int32_t cols, double *lines) {
    int32_t lane = threadIdx.x % KVS_WARP, warp = threadIdx.x / KVS_WARP, warps = blockDim.x / KVS_WARP;
    __syncthreads(); /* who read lines before has done so */
    if (!lane) lines[warp] = sum;
    __syncthreads();
    if (!warp) {
        sum = lane < warps ? lines[lane] : 0;
        for (int32_t d = KVS_WARP / 2; d; d /= 2) sum += __shfl_xor_sync(KVS_ALL_LANES, sum, d);
        if (!lane) lines[0] = sum / cols; /* lane 0 has read it */
    }
    __syncthreads();
    return (float)lines[0];
}

/* Mean of value(x) over a row, for all threads of the block. As on the CPU runs are summed in float32 and their sums in double: the mean of a
 * row far from zero keeps its digits, and squares of a row as large as a row may be do not overflow. Few doubles: some GPUs are slow at
 * them. */
template <class F> KVS_DEVICE float row_mean(const float *x, int32_t cols, bool wide, double *lines, F value) {
    int32_t warp = threadIdx.x / KVS_WARP, warps = blockDim.x / KVS_WARP;
    double sum = 0;
    for (int32_t first = warp * RUN; first < cols; first += warps * RUN) sum += (double)run_sum(x, first, cols, wide, value);
    return block_mean(sum, cols, lines);
}

/* Spelled out, here and below: row_kernel gives the same bits. */
KVS_DEVICE float square_of(float x, float mean) { return kvs_mul(x - mean, x - mean); }
KVS_DEVICE float normed(float x, float mean, float scale, float w, float bias) { return fmaf(kvs_mul(x - mean, scale), w, bias); }

/* One block for each row. */
static __global__ void norm_kernel(kvs_norm_args a) {
    __shared__ double lines[KVS_WARP];
    const float *x = a.x + (int64_t)blockIdx.x * a.cols;
    float *y = a.y + (int64_t)blockIdx.x * a.cols;
    float mean = a.bias ? row_mean(x, a.cols, a.wide, lines, [](float v) { return v; }) : 0.0f;
    float square = row_mean(x, a.cols, a.wide, lines, [mean](float v) { return square_of(v, mean); });
    float scale = 1.0f / sqrtf(square + a.eps);
    for (int32_t i = threadIdx.x; i < a.cols; i += blockDim.x) y[i] = normed(x[i], mean, scale, a.w[i], a.bias ? a.bias[i] : 0.0f);
}

static void launch_norm(kvs_cuda *cu, const kvs_norm_args *a) {
    if (a->wide && kvs_row_fits(a->cols)) {
        const kvs_row_args row = {(float *)a->x, NULL, {}, *a, {}, a->n, a->cols}; /* x is only read */
        kvs_row_launch(cu, &row);
        return;
    }
    int64_t warps = KVS_MIN(kvs_ceil_div(a->cols, RUN), (int64_t)KVS_WARP);
    KVS_LAUNCH(cu, norm_kernel, dim3((unsigned)a->n), dim3((unsigned)warps * KVS_WARP), 0, *a);
}

void kvs_cuda_norm(kvs_backend *be, float *y, const float *x, const float *w, const float *bias, float eps, int32_t n, int32_t cols) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (kvs_cuda_stopped(cu) || n < 1 || cols < 1) return;
    KVS_ARGS(kvs_norm_args, a);
    a.y = y;
    a.x = x;
    a.w = w;
    a.bias = bias;
    a.eps = eps;
    a.n = n;
    a.cols = cols;
    a.wide = cols % 4 == 0 && aligned16(x) && aligned16(y) && aligned16(w) && aligned16(bias);
    kvs_cuda_op<launch_norm, KVS_CUDA_NORM>(cu, &a);
}

/* ---- angles, RoPE ---- */

typedef struct angles_args {
    float *table;
    const float *inv_freq;
    const kvs_row *rows;
    int32_t n, n_rot;
} angles_args;

/* The product in float32, as transformers has it; cosine and sine in double, as on the CPU. */
static __global__ void angles_kernel(angles_args a) {
    int32_t half = a.n_rot / 2;
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (int64_t)a.n * half) return;
    double angle = (double)kvs_mul((float)a.rows[i / half].pos, a.inv_freq[i % half]);
    a.table[2 * i] = (float)cos(angle);
    a.table[2 * i + 1] = (float)sin(angle);
}

static void launch_angles(kvs_cuda *cu, const angles_args *a) {
    int64_t blocks = kvs_ceil_div((int64_t)a->n * (a->n_rot / 2), THREADS);
    KVS_LAUNCH(cu, angles_kernel, dim3((unsigned)blocks), dim3(THREADS), 0, *a);
}

void kvs_cuda_angles(kvs_backend *be, const kvs_rope *rope) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (kvs_cuda_stopped(cu) || cu->step->n < 1 || rope->n_rot < 2) return;
    KVS_ARGS(angles_args, a);
    a.table = rope->table;
    a.inv_freq = rope->inv_freq;
    a.rows = cu->rows;
    a.n = cu->step->n;
    a.n_rot = rope->n_rot;
    kvs_cuda_op<launch_angles>(cu, &a);
}

/* One pair for each thread; blocks along y are rows. */
static __global__ void rope_kernel(kvs_rope_args a) {
    int32_t half = a.n_rot / 2, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.n_head * half) return;
    float *x = a.x + ((int64_t)blockIdx.y * a.n_head + i / half) * a.head_dim + i % half * 2;
    const float *angle = a.table + (int64_t)blockIdx.y * a.n_rot + i % half * 2;
    float c = angle[0], s = angle[1], x0 = x[0], x1 = x[1];
    x[0] = kvs_mul(x0, c) - kvs_mul(x1, s);
    x[1] = kvs_mul(x0, s) + kvs_mul(x1, c);
}

static void launch_rope(kvs_cuda *cu, const kvs_rope_args *a) {
    int64_t blocks = kvs_ceil_div((int64_t)a->n_head * (a->n_rot / 2), THREADS);
    KVS_LAUNCH(cu, rope_kernel, dim3((unsigned)blocks, (unsigned)a->n), dim3(THREADS), 0, *a);
}

void kvs_cuda_rope(kvs_backend *be, float *x, const kvs_rope *rope, int32_t n, int32_t n_head, int32_t head_dim) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (kvs_cuda_stopped(cu) || n < 1 || n_head < 1 || rope->n_rot < 2) return;
    KVS_ARGS(kvs_rope_args, a);
    a.x = x;
    a.table = rope->table;
    a.n = n;
    a.n_head = n_head;
    a.head_dim = head_dim;
    a.n_rot = rope->n_rot;
    kvs_cuda_op<launch_rope, KVS_CUDA_ROPE>(cu, &a);
}

/* ---- value by value ---- */

KVS_DEVICE float logistic(float x) { return 1.0f / __fadd_rn(1.0f, expf(-x)); }

template <int KIND> KVS_DEVICE float apply(float y, float x) {
    if (KIND == KVS_OP_ADD) return y + x;
    if (KIND == KVS_OP_GATE) return kvs_mul(kvs_mul(y, logistic(y)), x);
    if (KIND == KVS_GELU) return 0.5f * y * erfcf(-0.70710678f * y); /* y Phi(y): nothing cancels in the tail */
    if (KIND == KVS_GELU_TANH) return y * logistic(2 * 0.79788456f * (y * fmaf(0.044715f, y * y, 1.0f)));
    return y * logistic(1.702f * y);
}

/* EACH values for each thread. */
template <int KIND> static __global__ void each_kernel(kvs_each_args a) {
    kvs_let_next_begin();
    kvs_await_previous();
    int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * EACH;
    bool two = KIND == KVS_OP_ADD || KIND == KVS_OP_GATE;
    if (a.wide && i + EACH <= a.n) {
        float4 y = kvs_load_float4(a.y + i), x = two ? kvs_load_float4(a.x + i) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        y.x = apply<KIND>(y.x, x.x);
        y.y = apply<KIND>(y.y, x.y);
        y.z = apply<KIND>(y.z, x.z);
        y.w = apply<KIND>(y.w, x.w);
        kvs_store_float4(a.y + i, y);
    } else
        for (int64_t end = i + EACH; i < end && i < a.n; i++) a.y[i] = apply<KIND>(a.y[i], two ? a.x[i] : 0.0f);
}

template <int KIND> static void launch_kind(kvs_cuda *cu, const kvs_each_args *a) {
    KVS_LAUNCH_EARLY(cu, each_kernel<KIND>, dim3((unsigned)kvs_ceil_div(a->n, THREADS * EACH)), dim3(THREADS), 0, *a);
}

static void launch_each(kvs_cuda *cu, const kvs_each_args *a) {
    if (a->kind == KVS_OP_ADD)
        launch_kind<KVS_OP_ADD>(cu, a);
    else if (a->kind == KVS_OP_GATE)
        launch_kind<KVS_OP_GATE>(cu, a);
    else if (a->kind == KVS_GELU)
        launch_kind<KVS_GELU>(cu, a);
    else if (a->kind == KVS_GELU_TANH)
        launch_kind<KVS_GELU_TANH>(cu, a);
    else
        launch_kind<KVS_GELU_QUICK>(cu, a);
}

static void each(kvs_backend *be, int32_t kind, float *y, const float *x, int64_t n) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (kvs_cuda_stopped(cu) || n < 1) return;
    KVS_ARGS(kvs_each_args, a);
    a.y = y;
    a.x = x;
    a.n = n;
    a.kind = kind;
    a.wide = aligned16(y) && aligned16(x);
    kvs_cuda_op<launch_each, KVS_CUDA_EACH>(cu, &a);
}

void kvs_cuda_add(kvs_backend *be, float *y, const float *x, int64_t n) { each(be, KVS_OP_ADD, y, x, n); }
void kvs_cuda_gate(kvs_backend *be, float *g, const float *u, int64_t n) { each(be, KVS_OP_GATE, g, u, n); }
void kvs_cuda_unary(kvs_backend *be, int32_t kind, float *x, int64_t n) { each(be, kind, x, NULL, n); }

/* ---- scatter ---- */

typedef struct scatter_args {
    float *const *y; /* (n) */
    const float *x;  /* (n, cols) */
    int32_t n, cols;
} scatter_args;

/* Blocks along y are rows. */
static __global__ void scatter_kernel(scatter_args a) {
    const float *x = a.x + (int64_t)blockIdx.y * a.cols;
    float *y = a.y[blockIdx.y];
    int32_t i = blockIdx.x * THREADS * EACH + threadIdx.x;
    for (int k = 0; k < EACH && i < a.cols; k++, i += THREADS) y[i] = x[i];
}

static void launch_scatter(kvs_cuda *cu, const scatter_args *a) {
    KVS_LAUNCH(cu, scatter_kernel, dim3((unsigned)kvs_ceil_div(a->cols, THREADS * EACH), (unsigned)a->n), dim3(THREADS), 0, *a);
}

void kvs_cuda_scatter(kvs_backend *be, float *const *y, const float *x, int32_t n, int32_t cols) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (kvs_cuda_stopped(cu) || n < 1 || cols < 1) return;
    KVS_ARGS(scatter_args, a);
    a.y = (float *const *)kvs_cuda_stage(cu, y, (uint64_t)n * sizeof *y, (uint64_t)n * sizeof *y);
    a.x = x;
    a.n = n;
    a.cols = cols;
    kvs_cuda_op<launch_scatter>(cu, &a);
}

/* ---- finite ---- */

/* One block for each row. */
static __global__ void finite_kernel(kvs_finite_args a) {
    __shared__ int first;
    const float *x = a.x + (int64_t)blockIdx.x * a.cols;
    int32_t bad = INT32_MAX; /* this thread's first */
    if (!threadIdx.x) first = INT32_MAX;
    __syncthreads();
    if (a.wide) {
        for (int32_t i = 4 * threadIdx.x; i < a.cols; i += 4 * blockDim.x) {
            float4 v = kvs_load_float4(x + i);
            int32_t at = kvs_finite_beyond(v.x, a.limit)   ? 0
                         : kvs_finite_beyond(v.y, a.limit) ? 1
                         : kvs_finite_beyond(v.z, a.limit) ? 2
                         : kvs_finite_beyond(v.w, a.limit) ? 3
                                                           : 4;
            if (at < 4) bad = KVS_MIN(bad, i + at);
        }
    } else
        for (int32_t i = threadIdx.x; i < a.cols; i += blockDim.x)
            if (kvs_finite_beyond(x[i], a.limit)) bad = KVS_MIN(bad, i);
    if (bad < INT32_MAX) atomicMin(&first, bad);
    __syncthreads();
    if (!threadIdx.x && first < INT32_MAX) kvs_finite_report(a.fault, a.place, blockIdx.x, x[first]);
}

static void launch_finite(kvs_cuda *cu, const kvs_finite_args *a) {
    int32_t threads = a->cols > 8192 ? 1024 : THREADS;
    KVS_LAUNCH(cu, finite_kernel, dim3((unsigned)a->n), dim3((unsigned)threads), 0, *a);
}

void kvs_cuda_finite(kvs_backend *be, const float *x, int32_t n, int32_t cols, float limit, int32_t place) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (kvs_cuda_stopped(cu) || n < 1 || cols < 1) return;
    KVS_ARGS(kvs_finite_args, a);
    a.fault = (kvs_cuda_fault *)cu->fault.device;
    a.x = x;
    a.limit = limit;
    a.n = n;
    a.cols = cols;
    a.wide = cols % 4 == 0 && aligned16(x);
    a.place = KVS_MIN(place, KVS_CUDA_PLACES - 1); /* layers are 1024 at most, of three places each */
    kvs_cuda_op<launch_finite, KVS_CUDA_FINITE>(cu, &a);
}

/* ---- several of them at once ---- */

enum { HELD = RUN / (4 * KVS_WARP) }; /* fours of a thread: a warp has a run */

bool kvs_row_fits(int32_t cols) { return cols % 4 == 0 && cols <= KVS_WARP * RUN; }

/* The row's first value beyond the limit; first: of shared memory. For all threads of the block, v are their values. */
KVS_DEVICE void search_row(const kvs_finite_args &a, const float4 v[HELD], int32_t begin, int32_t *first) {
    int32_t bad = INT32_MAX; /* this thread's first */
    float value = 0.0f;
    if (!threadIdx.x) *first = INT32_MAX;
    __syncthreads();
#pragma unroll
    for (int i = 4 * HELD - 1; i >= 0; i--) {
        const float4 &four = v[i / 4];
        const float x = i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
        if (kvs_finite_beyond(x, a.limit)) bad = begin + i / 4 * 4 * KVS_WARP + i % 4, value = x;
    }
    if (bad < INT32_MAX) atomicMin(first, bad);
    __syncthreads();
    if (bad < INT32_MAX && *first == bad) kvs_finite_report(a.fault, a.place, blockIdx.x, value);
}

/* As row_mean: the sum of a run by its warp, the runs' sums in double. There is one run for each warp. */
template <class F> KVS_DEVICE float held_mean(const float4 v[HELD], const bool inside[HELD], int32_t cols, double *lines, F value) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++)
        if (inside[i]) sum += (value(v[i].x) + value(v[i].y)) + (value(v[i].z) + value(v[i].w));
    return block_mean((double)kvs_warp_sum(sum), cols, lines);
}

/* One block for each row, which its threads hold from beginning to end. */
static __global__ void __launch_bounds__(KVS_WARP *KVS_WARP) row_kernel(kvs_row_args a) {
    __shared__ double lines[KVS_WARP];
    __shared__ int32_t first;
    const int32_t begin = (int32_t)threadIdx.x / KVS_WARP * RUN + 4 * (int32_t)(threadIdx.x % KVS_WARP);
    const int64_t row = (int64_t)blockIdx.x * a.cols;
    float4 v[HELD];
    bool inside[HELD];
    kvs_let_next_begin();
    kvs_await_previous();
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int32_t at = begin + 4 * KVS_WARP * i;
        inside[i] = at < a.cols;
        v[i] = inside[i] ? kvs_load_float4(a.x + row + at) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (!a.add || !inside[i]) continue;
        const float4 other = kvs_load_float4(a.add + row + at);
        v[i] = make_float4(v[i].x + other.x, v[i].y + other.y, v[i].z + other.z, v[i].w + other.w);
        kvs_store_float4(a.x + row + at, v[i]);
    }
    if (a.finite.fault) search_row(a.finite, v, begin, &first);
    if (!a.norm.y) return;
    const float mean = a.norm.bias ? held_mean(v, inside, a.cols, lines, [](float x) { return x; }) : 0.0f;
    const float square = held_mean(v, inside, a.cols, lines, [mean](float x) { return square_of(x, mean); });
    const float scale = 1.0f / sqrtf(square + a.norm.eps);
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int32_t at = begin + 4 * KVS_WARP * i;
        float4 y = make_float4(0.0f, 0.0f, 0.0f, 0.0f), b = y;
        if (inside[i]) {
            const float4 w = kvs_load_float4(a.norm.w + at);
            if (a.norm.bias) b = kvs_load_float4(a.norm.bias + at);
            y = make_float4(normed(v[i].x, mean, scale, w.x, b.x), normed(v[i].y, mean, scale, w.y, b.y),
                            normed(v[i].z, mean, scale, w.z, b.z), normed(v[i].w, mean, scale, w.w, b.w));
            kvs_store_float4(a.norm.y + row + at, y);
        }
        if (a.tiles.p) kvs_act_put_four(a.tiles, blockIdx.x, at, y, inside[i]);
    }
}

void kvs_row_launch(kvs_cuda *cu, const kvs_row_args *a) {
    KVS_LAUNCH_EARLY(cu, row_kernel, dim3((unsigned)a->n), dim3((unsigned)kvs_ceil_div(a->cols, RUN) * KVS_WARP), 0, *a);
}

typedef struct gate_args {
    float *y;
    const float *x;
    int64_t n, cols;
    kvs_act_tiles tiles;
} gate_args;

/* EACH values for each thread. */
static __global__ void __launch_bounds__(THREADS) gate_kernel(gate_args a) {
    kvs_let_next_begin();
    kvs_await_previous();
    const int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * EACH;
    const bool inside = i < a.n;
    float4 y = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (inside) {
        const float4 x = kvs_load_float4(a.x + i);
        y = kvs_load_float4(a.y + i);
        y = make_float4(apply<KVS_OP_GATE>(y.x, x.x), apply<KVS_OP_GATE>(y.y, x.y), apply<KVS_OP_GATE>(y.z, x.z),
                        apply<KVS_OP_GATE>(y.w, x.w));
        kvs_store_float4(a.y + i, y);
    }
    kvs_act_put_four(a.tiles, i / a.cols, i % a.cols, y, inside);
}

void kvs_gate_launch(kvs_cuda *cu, const kvs_each_args *each, int32_t cols, kvs_act_tiles tiles) {
    const gate_args a = {each->y, each->x, each->n, cols, tiles};
    KVS_LAUNCH_EARLY(cu, gate_kernel, dim3((unsigned)kvs_ceil_div(each->n, THREADS * EACH)), dim3(THREADS), 0, a);
}
