/* rows.cu - ops that go row by row or value by value: norms, angles and RoPE, sums and activations, and the search for values that may not
 * be. All are bound by memory, or by the time that a launch takes. */
#include "cuda.h"

#include <math.h>

enum { THREADS = 256, EACH = 4, RUN = 8 * KVS_WARP };

static bool aligned16(const void *p) { return (uintptr_t)p % 16 == 0; } /* NULL is */

/* ---- norms ---- */

typedef struct norm_args {
    float *y;
    const float *x, *w, *bias;
    float eps;
    int32_t n, cols;
    int32_t wide; /* rows, w and bias can be read by fours */
} norm_args;

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

/* Mean of value(x) over a row, for all threads of the block. As on the CPU runs are summed in float32 and their sums in double: the mean of a
 * row far from zero keeps its digits, and squares of a row as large as a row may be do not overflow. Few doubles: some GPUs are slow at
 * them. lines: KVS_WARP of shared memory. */
template <class F> KVS_DEVICE float row_mean(const float *x, int32_t cols, bool wide, double *lines, F value) {
    int32_t lane = threadIdx.x % KVS_WARP, warp = threadIdx.x / KVS_WARP, warps = blockDim.x / KVS_WARP;
    double sum = 0;
    for (int32_t first = warp * RUN; first < cols; first += warps * RUN) sum += (double)run_sum(x, first, cols, wide, value);
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

/* One block for each row. */
static __global__ void norm_kernel(norm_args a) {
    __shared__ double lines[KVS_WARP];
    const float *x = a.x + (int64_t)blockIdx.x * a.cols;
    float *y = a.y + (int64_t)blockIdx.x * a.cols;
    float mean = a.bias ? row_mean(x, a.cols, a.wide, lines, [](float v) { return v; }) : 0.0f;
    float square = row_mean(x, a.cols, a.wide, lines, [mean](float v) { return (v - mean) * (v - mean); });
    float scale = 1.0f / sqrtf(square + a.eps);
    if (!a.wide) {
        for (int32_t i = threadIdx.x; i < a.cols; i += blockDim.x) y[i] = (x[i] - mean) * scale * a.w[i] + (a.bias ? a.bias[i] : 0.0f);
        return;
    }
    for (int32_t i = 4 * threadIdx.x; i < a.cols; i += 4 * blockDim.x) {
        float4 v = kvs_load_float4(x + i), w = kvs_load_float4(a.w + i), b = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (a.bias) b = kvs_load_float4(a.bias + i);
        v.x = (v.x - mean) * scale * w.x + b.x;
        v.y = (v.y - mean) * scale * w.y + b.y;
        v.z = (v.z - mean) * scale * w.z + b.z;
        v.w = (v.w - mean) * scale * w.w + b.w;
        kvs_store_float4(y + i, v);
    }
}

static void launch_norm(kvs_cuda *cu, const norm_args *a) {
    int64_t warps = KVS_MIN(kvs_ceil_div(a->cols, RUN), (int64_t)KVS_WARP);
    KVS_LAUNCH(cu, norm_kernel, dim3((unsigned)a->n), dim3((unsigned)warps * KVS_WARP), 0, *a);
}

void kvs_cuda_norm(kvs_backend *be, float *y, const float *x, const float *w, const float *bias, float eps, int32_t n, int32_t cols) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (kvs_cuda_stopped(cu) || n < 1 || cols < 1) return;
    KVS_ARGS(norm_args, a);
    a.y = y;
    a.x = x;
    a.w = w;
    a.bias = bias;
    a.eps = eps;
    a.n = n;
    a.cols = cols;
    a.wide = cols % 4 == 0 && aligned16(x) && aligned16(y) && aligned16(w) && aligned16(bias);
    kvs_cuda_op<launch_norm>(cu, &a);
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

typedef struct rope_args {
    float *x;           /* (n, n_head, head_dim) */
    const float *table; /* (n, n_rot / 2, 2) */
    int32_t n, n_head, head_dim, n_rot;
} rope_args;

/* One pair for each thread; blocks along y are rows. */
static __global__ void rope_kernel(rope_args a) {
    int32_t half = a.n_rot / 2, i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.n_head * half) return;
    float *x = a.x + ((int64_t)blockIdx.y * a.n_head + i / half) * a.head_dim + i % half * 2;
    const float *angle = a.table + (int64_t)blockIdx.y * a.n_rot + i % half * 2;
    float c = angle[0], s = angle[1], x0 = x[0], x1 = x[1];
    x[0] = kvs_mul(x0, c) - kvs_mul(x1, s);
    x[1] = kvs_mul(x0, s) + kvs_mul(x1, c);
}

static void launch_rope(kvs_cuda *cu, const rope_args *a) {
    int64_t blocks = kvs_ceil_div((int64_t)a->n_head * (a->n_rot / 2), THREADS);
    KVS_LAUNCH(cu, rope_kernel, dim3((unsigned)blocks, (unsigned)a->n), dim3(THREADS), 0, *a);
}

void kvs_cuda_rope(kvs_backend *be, float *x, const kvs_rope *rope, int32_t n, int32_t n_head, int32_t head_dim) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (kvs_cuda_stopped(cu) || n < 1 || n_head < 1 || rope->n_rot < 2) return;
    KVS_ARGS(rope_args, a);
    a.x = x;
    a.table = rope->table;
    a.n = n;
    a.n_head = n_head;
    a.head_dim = head_dim;
    a.n_rot = rope->n_rot;
    kvs_cuda_op<launch_rope>(cu, &a);
}

/* ---- value by value ---- */

enum { OP_ADD = KVS_GELU_QUICK + 1, OP_GATE }; /* and the kinds of kvs_unary */

typedef struct each_args {
    float *y;
    const float *x; /* add: what is added, gate: u; or NULL */
    int64_t n;
    int32_t kind, wide;
} each_args;

KVS_DEVICE float logistic(float x) { return 1.0f / (1.0f + expf(-x)); }

template <int KIND> KVS_DEVICE float apply(float y, float x) {
    if (KIND == OP_ADD) return y + x;
    if (KIND == OP_GATE) return kvs_mul(kvs_mul(y, logistic(y)), x);
    if (KIND == KVS_GELU) return 0.5f * y * erfcf(-0.70710678f * y); /* y Phi(y): nothing cancels in the tail */
    if (KIND == KVS_GELU_TANH) return y * logistic(2 * 0.79788456f * (y * fmaf(0.044715f, y * y, 1.0f)));
    return y * logistic(1.702f * y);
}

/* EACH values for each thread. */
template <int KIND> static __global__ void each_kernel(each_args a) {
    int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * EACH;
    bool two = KIND == OP_ADD || KIND == OP_GATE;
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

template <int KIND> static void launch_kind(kvs_cuda *cu, const each_args *a) {
    KVS_LAUNCH(cu, each_kernel<KIND>, dim3((unsigned)kvs_ceil_div(a->n, THREADS * EACH)), dim3(THREADS), 0, *a);
}

static void launch_each(kvs_cuda *cu, const each_args *a) {
    if (a->kind == OP_ADD)
        launch_kind<OP_ADD>(cu, a);
    else if (a->kind == OP_GATE)
        launch_kind<OP_GATE>(cu, a);
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
    KVS_ARGS(each_args, a);
    a.y = y;
    a.x = x;
    a.n = n;
    a.kind = kind;
    a.wide = aligned16(y) && aligned16(x);
    kvs_cuda_op<launch_each>(cu, &a);
}

void kvs_cuda_add(kvs_backend *be, float *y, const float *x, int64_t n) { each(be, OP_ADD, y, x, n); }
void kvs_cuda_gate(kvs_backend *be, float *g, const float *u, int64_t n) { each(be, OP_GATE, g, u, n); }
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

typedef struct finite_args {
    kvs_cuda_fault *fault;
    const float *x;
    float limit;
    int32_t n, cols, place, wide;
    int32_t call; /* its number in the step, from 1 on */
} finite_args;

KVS_DEVICE bool beyond(float x, float limit) { return !(fabsf(x) <= limit); } /* NaN is */

/* The first call of a step wins: blocks of one call meet under its number, later ones find another's. Of a call the least row wins. */
KVS_DEVICE void report(const finite_args *a, int32_t row, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    int32_t found = atomicCAS(&a->fault->found, 0, a->call);
    if (found && found != a->call) return;
    a->fault->place = a->place; /* all blocks that come here write the same */
    atomicMin(&a->fault->first, (unsigned long long)row << 32 | bits);
}

/* One block for each row. */
static __global__ void finite_kernel(finite_args a) {
    __shared__ int first;
    const float *x = a.x + (int64_t)blockIdx.x * a.cols;
    int32_t bad = INT32_MAX; /* this thread's first */
    if (!threadIdx.x) first = INT32_MAX;
    __syncthreads();
    if (a.wide) {
        for (int32_t i = 4 * threadIdx.x; i < a.cols; i += 4 * blockDim.x) {
            float4 v = kvs_load_float4(x + i);
            int32_t at = beyond(v.x, a.limit) ? 0 : beyond(v.y, a.limit) ? 1 : beyond(v.z, a.limit) ? 2 : beyond(v.w, a.limit) ? 3 : 4;
            if (at < 4) bad = KVS_MIN(bad, i + at);
        }
    } else
        for (int32_t i = threadIdx.x; i < a.cols; i += blockDim.x)
            if (beyond(x[i], a.limit)) bad = KVS_MIN(bad, i);
    if (bad < INT32_MAX) atomicMin(&first, bad);
    __syncthreads();
    if (!threadIdx.x && first < INT32_MAX) report(&a, blockIdx.x, x[first]);
}

static void launch_finite(kvs_cuda *cu, const finite_args *a) {
    int32_t threads = a->cols > 8192 ? 1024 : THREADS;
    KVS_LAUNCH(cu, finite_kernel, dim3((unsigned)a->n), dim3((unsigned)threads), 0, *a);
}

void kvs_cuda_finite(kvs_backend *be, const float *x, int32_t n, int32_t cols, float limit, int32_t place) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (kvs_cuda_stopped(cu) || n < 1 || cols < 1) return;
    KVS_ARGS(finite_args, a);
    a.fault = (kvs_cuda_fault *)cu->fault.device;
    a.x = x;
    a.limit = limit;
    a.n = n;
    a.cols = cols;
    a.place = place;
    a.wide = cols % 4 == 0 && aligned16(x);
    a.call = ++cu->n_finite;
    kvs_cuda_op<launch_finite>(cu, &a);
}
