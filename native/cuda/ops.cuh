/* ops.cuh - arguments of the ops that fuse.cu knows, and the launches that do several of them at once. Each does what the ops do one after the
 * other, with the same operations in the same order: not a bit depends on whether a step was fused. */
#ifndef KVS_OPS_CUH
#define KVS_OPS_CUH
#include "attn.cuh"
#include "cuda.h"
#include "tiles.cuh"
#include "types.cuh"

/* ---- rows.cu ---- */

typedef struct kvs_norm_args {
    float *y;
    const float *x, *w, *bias;
    float eps;
    int32_t n, cols;
    int32_t wide; /* rows, w and bias can be read by fours */
} kvs_norm_args;

enum { KVS_OP_ADD = KVS_GELU_QUICK + 1, KVS_OP_GATE }; /* and the kinds of kvs_unary */

typedef struct kvs_each_args {
    float *y;
    const float *x; /* add: what is added, gate: u; or NULL */
    int64_t n;
    int32_t kind, wide;
} kvs_each_args;

typedef struct kvs_finite_args {
    kvs_cuda_fault *fault;
    const float *x;
    float limit;
    int32_t n, cols;
    int32_t place;
    int32_t wide;
} kvs_finite_args;

KVS_DEVICE bool kvs_finite_beyond(float x, float limit) { return !(fabsf(x) <= limit); } /* NaN is */
KVS_DEVICE void kvs_finite_report(kvs_cuda_fault *fault, int32_t place, int32_t row, float value) {
    const int32_t least = KVS_MIN(row, KVS_CUDA_FAULT_ROWS - 1);
    atomicMin(fault, (unsigned long long)place << 52 | (unsigned long long)least << 32 | kvs_float_bits(value));
}

typedef struct kvs_rope_args {
    float *x;           /* (n, n_head, head_dim) */
    const float *table; /* (n, n_rot / 2, 2) */
    int32_t n, n_head, head_dim, n_rot;
} kvs_rope_args;

/* Of rows x (n, cols), in this order: x += add; the search for values that may not be; norm.y = norm(x); norm.y as integers. Each may be
 * missing: add NULL, finite.fault NULL, norm.y NULL, tiles NULL. */
typedef struct kvs_row_args {
    float *x;
    const float *add;
    kvs_finite_args finite;
    kvs_norm_args norm;
    kvs_act_tiles tiles;
    int32_t n, cols;
} kvs_row_args;

bool kvs_row_fits(int32_t cols); /* a row whose values the threads of a block can hold, by fours */
void kvs_row_launch(kvs_cuda *cu, const kvs_row_args *a);

/* each->kind KVS_OP_GATE of rows of cols values, and the result as integers */
void kvs_gate_launch(kvs_cuda *cu, const kvs_each_args *each, int32_t cols, kvs_act_tiles tiles);

/* ---- kv.cu ---- */

typedef struct kvs_put_args {
    const kvs_row *rows;
    const float *k, *v; /* (n, n_kv_head * head_dim); kv_put_out: k (n, n_head * head_dim) */
    int32_t layer, n, heads;
} kvs_put_args;

typedef struct kvs_row_check { /* a row's part of a search */
    float limit;
    int32_t wanted, place, row; /* row: of those that the search looks at */
} kvs_row_check;

/* RoPE of q, and of put.k with the same angles, the search in put.k and put.v, and the rows of the cache */
typedef struct kvs_keys_args {
    kvs_rope_args q;
    kvs_put_args put;
    kvs_cuda_fault *fault;
    kvs_row_check checks[KVS_GRAPH_ROWS][2]; /* of K and of V */
} kvs_keys_args;
static_assert(sizeof(kvs_keys_args) <= KVS_KERNEL_ARGS, "arguments of a kernel");

void kvs_keys_launch(kvs_cuda *cu, const kvs_keys_args *a);

typedef struct kvs_record_args { /* of layers layer .. layer + n_layer - 1 */
    const kvs_row *rows;
    const float *q;                    /* (n, n_head * head_dim), of the one layer; not read if no row keeps queries */
    const float *entropy, *mass, *lse; /* (n, n_head); those of the next layer are stride floats behind */
    int32_t layer, n_layer, stride, n, n_head;
    int32_t keeps_queries;
} kvs_record_args;

void kvs_record_launch(kvs_cuda *cu, const kvs_record_args *a);

typedef struct kvs_smooth_args {
    const uint8_t *jobs; /* (n_jobs) of stride bytes */
    float *out;
    const float *inv_freq; /* NULL: no turns */
    int32_t stride, room, n_jobs, layer, n_rot, heads;
    int32_t writes_out; /* some job has the outputs for its target */
} kvs_smooth_args;

/* Jobs of any layers, none of which needs what another does; one of layers that follow each other is one entry */
enum { KVS_SMOOTH_JOBS = 128 };
typedef struct kvs_smooth_job_at {
    const uint8_t *job;
    int32_t room, layer, n_layer;
} kvs_smooth_job_at;
typedef struct kvs_smooth_batch {
    kvs_smooth_job_at jobs[KVS_SMOOTH_JOBS];
    float *out;
    const float *inv_freq;
    int32_t n_jobs, n_layer, n_rot, heads; /* n_layer: the most that a job has */
} kvs_smooth_batch;
static_assert(sizeof(kvs_smooth_batch) <= KVS_KERNEL_ARGS, "arguments of a kernel");

/* Takes jobs of a, from *done on, into batch while there is room; true: all are in. */
bool kvs_smooth_take(kvs_smooth_batch *batch, const kvs_smooth_args *a, int32_t *done);
void kvs_smooth_launch(kvs_cuda *cu, kvs_smooth_batch *batch); /* and empties it */

/* ---- matvec.cu ---- */

enum { KVS_MATVEC_JOBS = 4 };

typedef struct kvs_matvec_job {
    const uint8_t *w; /* (rows) in the order of types.cuh */
    int64_t row_bytes;
    float *y;          /* (n, rows) */
    const float *bias; /* (rows) or NULL */
    int32_t rows, type;
    int32_t first;    /* block of the grid */
    int32_t integers; /* activations as such */
} kvs_matvec_job;

typedef struct kvs_matvec_args {
    kvs_matvec_job jobs[KVS_MATVEC_JOBS];
    int32_t n_jobs, n;
    int32_t parts; /* of a row, a warp each: 1 or WARPS. Depends on columns alone, as the order of sums does */
    int32_t units; /* of the type that is launched: those of a row (what a lane takes at a time), */
    int32_t share; /* and those of a part, a multiple of KVS_WARP */
    int64_t cols;
    kvs_plane_offsets at; /* planes of a row */
    const float *x;       /* (n, cols) */
    kvs_act_tiles tiles;  /* none: no job wants integers */
    float *padded;        /* (n, cols rounded up to groups): x that float kernels can load 16 bytes at a time; NULL: x itself is so */
} kvs_matvec_args;

void kvs_matvec_launch_products(kvs_cuda *cu, const kvs_matvec_args *a); /* the tiles are there */
#endif
