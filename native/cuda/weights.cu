/* weights.cu - weights on their way to the device, where they lie in the order of types.cuh; rows of a table.
 *
 * A matrix comes in pieces of whole blocks: from the mapped file into pinned memory, from there to the device as it is, and a kernel puts it
 * in order. Two pieces are under way, so that the file is read while the bus and the kernel are at work. */
#include "cuda.h"
#include "pack.cuh"

enum { PACK_THREADS = 128 };

uint64_t kvs_cuda_weight_room(kvs_backend *be, const kvs_weight *w) {
    (void)be;
    return ((uint64_t)w->rows * (uint64_t)kvs_planes_at(w->type, w->cols).bytes + 255) / 256 * 256;
}

bool kvs_cuda_placed(kvs_cuda *cu, const kvs_weight *w) {
    return w->placed || kvs_cuda_check(cu, cudaErrorInvalidValue, "a weight that is not on the device");
}

/* ---- into order ---- */

typedef struct pack_args {
    const uint8_t *raw; /* (n) blocks of GGUF; values, where the type has no blocks */
    uint8_t *to;        /* the matrix */
    int64_t cols, row_bytes;
    int64_t first, n;    /* blocks of the matrix, counted through its rows */
    int32_t block_bytes; /* in GGUF */
} pack_args;

/* One thread per group */
template <int TYPE> static __global__ void __launch_bounds__(PACK_THREADS) pack_kernel(pack_args a) {
    constexpr int block = kvs_order_of(TYPE).block, groups = block / KVS_GROUP;
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.n * groups) return;
    const int64_t at = a.first + i / groups, row_blocks = a.cols / block;
    const int j = (int)(i % groups);
    kvs_pack_group<TYPE>(a.raw + i / groups * a.block_bytes, j, a.to + at / row_blocks * a.row_bytes, a.cols, at % row_blocks * groups + j);
}

/* One thread per value of T's size: only its place changes, and only if rows are padded. */
template <class T> static __global__ void __launch_bounds__(PACK_THREADS) pack_values_kernel(pack_args a) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= a.n) return;
    const int64_t at = a.first + i;
    T *row = (T *)(void *)(a.to + at / a.cols * a.row_bytes);
    row[at % a.cols] = ((const T *)(const void *)a.raw)[i];
}

template <int TYPE> struct pack_call {
    static void run(kvs_cuda *cu, const pack_args *a) {
        const int64_t n = a->n * (kvs_order_of(TYPE).block / KVS_GROUP);
        KVS_LAUNCH(cu, pack_kernel<TYPE>, (unsigned)kvs_ceil_div(n, PACK_THREADS), PACK_THREADS, 0, *a);
    }
};

static void launch_pack(kvs_cuda *cu, int32_t type, const pack_args *a) {
    const unsigned grid = (unsigned)kvs_ceil_div(a->n, PACK_THREADS);
    if (kvs_for_blocks<pack_call>(type, cu, a)) return;
    if (type == KVS_TYPE_F32)
        KVS_LAUNCH(cu, pack_values_kernel<uint32_t>, grid, PACK_THREADS, 0, *a);
    else
        KVS_LAUNCH(cu, pack_values_kernel<uint16_t>, grid, PACK_THREADS, 0, *a);
}

/* ---- pieces ---- */

void kvs_cuda_free_pieces(kvs_cuda *cu) {
    for (int i = 0; i < 2; i++) {
        if (cu->pieces[i].host) cudaFreeHost(cu->pieces[i].host);
        cudaFree(cu->pieces[i].device);
        cu->pieces[i].host = cu->pieces[i].device = NULL;
    }
    cu->piece_bytes = 0;
}

static cudaError_t allocate_pieces(kvs_cuda *cu, uint64_t bytes) {
    cudaError_t error = cudaSuccess;
    for (int i = 0; i < 2 && !error; i++) {
        error = kvs_cuda_malloc_host(&cu->pieces[i].host, bytes);
        if (!error) error = kvs_cuda_malloc(&cu->pieces[i].device, bytes);
    }
    if (error)
        kvs_cuda_free_pieces(cu);
    else
        cu->piece_bytes = bytes;
    return error;
}

/* Where the weights take nearly all that there is, smaller ones do. */
static bool reserve_pieces(kvs_cuda *cu) {
    if (cu->piece_bytes) return true;
    cudaError_t error = cudaErrorMemoryAllocation;
    for (uint64_t bytes = KVS_PIECE_BYTES; bytes >= KVS_LEAST_PIECE_BYTES && error == cudaErrorMemoryAllocation; bytes /= 2) {
        error = allocate_pieces(cu, bytes);
        if (error == cudaErrorMemoryAllocation) cudaGetLastError();
    }
    return kvs_cuda_check(cu, error, "memory for weights on their way");
}

/* Reads the file, which may take its time; everything else is only begun. */
static void send_piece(kvs_cuda *cu, const kvs_cuda_piece *piece, int32_t type, const void *from, const pack_args *a) {
    const uint64_t bytes = (uint64_t)a->n * (uint64_t)a->block_bytes;
    memcpy(piece->host, from, bytes);
    if (kvs_cuda_check(cu, cudaMemcpyAsync(piece->device, piece->host, bytes, cudaMemcpyHostToDevice, cu->stream), "a copy of weights"))
        launch_pack(cu, type, a);
}

static void send_all(kvs_cuda *cu, const kvs_weight *w, pack_args *a, int64_t n_blocks, const int32_t *cancel) {
    const int64_t most = (int64_t)cu->piece_bytes / a->block_bytes;
    for (int64_t i = 0; a->first < n_blocks && !cu->status; i++, a->first += a->n) {
        const kvs_cuda_piece *piece = &cu->pieces[i % 2];
        cudaEvent_t mark = cu->marks[i % 2];
        a->n = KVS_MIN(most, n_blocks - a->first);
        a->raw = piece->device;
        if (kvs_cancelled(cancel)) cu->status = KVS_E_CANCELLED;
        if (i >= 2 && !cu->status) kvs_cuda_check(cu, cudaEventSynchronize(mark), "weights on their way"); /* who used it before */
        if (cu->status) return;
        send_piece(cu, piece, w->type, (const uint8_t *)w->data + a->first * a->block_bytes, a);
        if (!cu->status) kvs_cuda_check(cu, cudaEventRecord(mark, cu->stream), "cudaEventRecord");
    }
}

/* Outside of a step: cu->status says afterwards why it was false. */
bool kvs_cuda_place(kvs_backend *be, kvs_weight *w, void *room, const int32_t *cancel) {
    kvs_cuda *cu = (kvs_cuda *)be;
    const kvs_type_traits *traits = kvs_type_get(w->type);
    KVS_ARGS(pack_args, a);
    a.to = (uint8_t *)room;
    a.cols = w->cols;
    a.row_bytes = kvs_planes_at(w->type, w->cols).bytes;
    a.block_bytes = traits->block_bytes;
    cu->status = kvs_cuda_failed(cu) ? KVS_E_DEVICE : KVS_OK;
    if (cu->status || !kvs_cuda_check(cu, cudaSetDevice(cu->device), "cudaSetDevice") || !reserve_pieces(cu)) return false;
    if (kvs_type_is_float(w->type) && w->cols % KVS_GROUP) /* what follows the values of a row is zero */
        kvs_cuda_check(cu, cudaMemsetAsync(room, 0, (uint64_t)(w->rows * a.row_bytes), cu->stream), "cudaMemsetAsync");
    send_all(cu, w, &a, w->rows * (w->cols / traits->block), cancel);
    /* Whether well or not, nothing is under way when the caller goes on: it may free the room, and this sees what kernels failed at. */
    if (!kvs_cuda_failed(cu)) kvs_cuda_check(cu, cudaStreamSynchronize(cu->stream), "cudaStreamSynchronize after weights");
    if (cu->status) return false;
    w->data = room;
    w->row_bytes = a.row_bytes;
    w->placed = true;
    return true;
}

/* ---- rows of a table ---- */

typedef struct rows_args {
    float *y;             /* (n, cols) */
    const uint8_t *table; /* (any, cols) */
    const int32_t *ids;   /* (n) */
    int64_t cols, row_bytes;
    int32_t n, type;
} rows_args;

/* One thread per group */
template <int TYPE> static __global__ void __launch_bounds__(PACK_THREADS) rows_kernel(rows_args a) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, groups = kvs_groups(a.cols);
    if (i >= a.n * groups) return;
    const int64_t row = i / groups, group = i % groups, first = group * KVS_GROUP;
    float values[32];
    kvs_group_floats<TYPE>(a.table + a.ids[row] * a.row_bytes, a.cols, group, values);
    float *y = a.y + row * a.cols + first;
#pragma unroll
    for (int k = 0; k < KVS_GROUP; k++)
        if (first + k < a.cols) y[k] = values[k];
}

template <int TYPE> struct rows_call {
    static void run(kvs_cuda *cu, const rows_args *a) {
        const int64_t n = a->n * kvs_groups(a->cols);
        KVS_LAUNCH(cu, rows_kernel<TYPE>, (unsigned)kvs_ceil_div(n, PACK_THREADS), PACK_THREADS, 0, *a);
    }
};

static void launch_rows(kvs_cuda *cu, const rows_args *a) { kvs_for_types<rows_call>(a->type, cu, a); }

void kvs_cuda_rows(kvs_backend *be, float *y, const kvs_weight *table, const int32_t *ids, int32_t n) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (n < 1 || kvs_cuda_stopped(cu) || !kvs_cuda_placed(cu, table)) return;
    KVS_ARGS(rows_args, a);
    a.y = y;
    a.table = (const uint8_t *)table->data;
    a.ids = (const int32_t *)kvs_cuda_stage(cu, ids, (uint64_t)n * sizeof *ids, (uint64_t)n * sizeof *ids);
    a.cols = table->cols;
    a.row_bytes = table->row_bytes;
    a.n = n;
    a.type = table->type;
    if (a.ids) kvs_cuda_op<launch_rows>(cu, &a);
}
