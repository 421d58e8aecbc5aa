/* cuda.h - the CUDA backend's insides: what its files share, on the host's side. Kernels are written with device.cuh.
 *
 * An op describes itself as a function that launches its kernels and a plain struct of arguments, and hands both to kvs_cuda_op. Steps of
 * many rows launch at once. Steps of few rows are only noted down; end() compares the list with those it has met, and what it has met
 * is a captured graph that is launched as a whole. So arguments must be the same in every step of a kind: whatever changes from step to step
 * (rows, positions, queues) goes through kvs_cuda_stage, which gives it an address that does not change, and grids are chosen
 * from sizes that change rarely. Structs of arguments are zeroed first (KVS_ARGS): they are compared byte by byte. */
#ifndef KVS_CUDA_H
#define KVS_CUDA_H
#include "device.cuh"
#include "launch.cuh"

extern "C" {
#include "../backend.h"
}

/* Steps of more rows are not worth a graph: of a prompt, whose length is another one each time, and of sessions that step together, a row each */
enum { KVS_GRAPH_PROMPT_ROWS = 16, KVS_GRAPH_ROWS = 64 };

typedef struct kvs_cuda kvs_cuda;
typedef void (*kvs_cuda_launch)(kvs_cuda *cu, const void *args);

/* On the device, found by finite(): place << 52 | row << 32 | bits of the value, the least of a step; all ones: nothing. Places rise in a step,
 * but that each session of it has its keys and values checked under the same ones. */
typedef unsigned long long kvs_cuda_fault;
enum { KVS_CUDA_PLACES = 1 << 12, KVS_CUDA_FAULT_ROWS = 1 << 20 };

typedef struct
    kvs_cuda_chunk { /* of what is staged for a step, or reported by it: the same bytes in pinned host memory and on the device */
    uint8_t *host, *device;
    uint64_t bytes, used, sent;
    struct kvs_cuda_chunk *next;
} kvs_cuda_chunk;

typedef struct kvs_cuda_list { /* ops noted down, one after the other */
    uint8_t *bytes;
    uint64_t used, room;
} kvs_cuda_list;

/* Ops that fuse.cu knows, and does with their neighbours in one launch where it can: arguments in ops.cuh */
enum kvs_cuda_kind {
    KVS_CUDA_OTHER,
    KVS_CUDA_NORM,
    KVS_CUDA_EACH,
    KVS_CUDA_FINITE,
    KVS_CUDA_ROPE,
    KVS_CUDA_PUT,
    KVS_CUDA_ATTN,
    KVS_CUDA_RECORD,
    KVS_CUDA_SMOOTH,
    KVS_CUDA_MATVEC,
    KVS_CUDA_GEMM /* only known to leave caches alone */
};

typedef struct kvs_cuda_noted {
    kvs_cuda_launch launch;
    int32_t kind, bytes; /* of the arguments behind it, in whole words */
} kvs_cuda_noted;
static inline const void *kvs_cuda_noted_args(const kvs_cuda_noted *op) { return op + 1; }
static inline const kvs_cuda_noted *kvs_cuda_noted_next(const kvs_cuda_noted *op) {
    return (const kvs_cuda_noted *)((const uint8_t *)(op + 1) + op->bytes);
}
void kvs_cuda_launch_noted(kvs_cuda *cu); /* fuse.cu: cu->list */

typedef struct kvs_cuda_report { /* bytes that kernels write, and where they are in pinned memory once end() has waited */
    uint8_t *host, *device;
} kvs_cuda_report;

typedef struct kvs_cuda_delivery { /* from a report to the caller's memory, if the step has gone well */
    void *to;
    const uint8_t *from;
    uint64_t bytes;
} kvs_cuda_delivery;

enum { KVS_CUDA_ONCE = KVS_GRAPH_ROWS }; /* each session of a step that becomes a graph has one */

typedef struct kvs_cuda_once { /* what every layer of a step needs and is staged once: see kvs_cuda_once_slot */
    const void *host;
    uint64_t hash;
    const void *device;
} kvs_cuda_once;

enum { KVS_PIECE_BYTES = 8 << 20, KVS_LEAST_PIECE_BYTES = 1 << 16 };
typedef struct kvs_cuda_piece { /* of weights on their way: pinned, and on the device */
    uint8_t *host, *device;
} kvs_cuda_piece;

enum { KVS_CUDA_GRAPHS = 8 };

typedef struct kvs_cuda_graph {
    kvs_cuda_list list; /* what it does */
    cudaGraphExec_t exec;
    const char *last_kernel;
    uint64_t last_use;
} kvs_cuda_graph;

/* Working space of one op, until the next op asks; activations in int8 and what attention tells have their own, since other ops may write
 * them and read them (fuse.cu). */
enum { KVS_SCRATCH_OP, KVS_SCRATCH_TILES, KVS_SCRATCH_TAPS, KVS_CUDA_SCRATCHES };
typedef struct kvs_cuda_scratch_block {
    uint8_t *p; /* [dev] */
    uint64_t bytes;
} kvs_cuda_scratch_block;

enum { KVS_CUDA_ANY_TILE = -1 };

struct kvs_cuda {
    kvs_backend base;                     /* first: a kvs_backend * to it is a kvs_cuda * */
    int32_t device, sm, n_sm, max_shared; /* sm: 90 for 9.0; max_shared: bytes of a block that asks for them */
    bool fuses;                           /* neighbours in one launch, where fuse.cu can */
    bool overlaps;                        /* kernels of a graph may begin early */
    bool waits;                           /* for each kernel, so that one that fails is named: KVS_CUDA_SYNC */
    const char *last_kernel;              /* atomic; that was launched */
    int32_t tile;                         /* of products of many rows: KVS_CUDA_ANY_TILE, or what gemm.cu is to take, 128, 64 or 0 */
    cudaStream_t stream;
    /* between begin and end */
    const kvs_step *step;
    const kvs_row *rows; /* [dev] of the step; their kv points to copies on the device, too: the functions of backend.h work there */
    const int32_t *cancel;
    int32_t status;     /* first failure of the step, KVS_OK so far */
    bool noting;        /* ops are noted down, not launched */
    bool capturing;     /* launches become a graph that overlaps them */
    bool behind_kernel; /* and the last one was a kernel's: the next kernel may begin early */
    kvs_cuda_list list;
    kvs_cuda_chunk *chunks, *reports;
    kvs_cuda_delivery *deliveries; /* (n_deliveries) */
    int32_t n_deliveries, room_deliveries;
    const kvs_kv **kvs; /* (n_kvs) host structs that are staged, and where */
    const kvs_kv **kvs_device;
    int32_t n_kvs, room_kvs;
    kvs_cuda_once once[KVS_CUDA_ONCE + 1]; /* the last one is for what finds no place */
    int32_t n_once;                        /* since begin */
    kvs_cuda_report fault;                 /* a kvs_cuda_fault, at one address in every step */
    int32_t n_launched;                    /* ops since begin: now and then the host waits for them, so that a cancellation is seen soon */
    cudaEvent_t marks[2];
    /* that outlive a step */
    kvs_cuda_graph graphs[KVS_CUDA_GRAPHS];
    uint64_t n_steps;
    kvs_cuda_piece pieces[2]; /* of piece_bytes, from the first weight on, until end_place; piece_bytes 0: they are not there */
    uint64_t piece_bytes;
    kvs_cuda_scratch_block scratch[KVS_CUDA_SCRATCHES];
    void **retired; /* (n_retired) scratch that grew while ops still had its address */
    int32_t n_retired;
};

static inline bool kvs_cuda_failed(const kvs_cuda *cu) { return __atomic_load_n(&cu->base.failed, __ATOMIC_ACQUIRE) != 0; }

#define KVS_ARGS(type, name)                                                                                                               \
    type name;                                                                                                                             \
    memset(&name, 0, sizeof name)

/* Every op begins with: if (kvs_cuda_stopped(cu)) return; */
static inline bool kvs_cuda_stopped(kvs_cuda *cu) {
    if (!cu->status && kvs_cancelled(cu->cancel)) cu->status = KVS_E_CANCELLED;
    return cu->status != KVS_OK;
}

/* Launches now or notes down; launch must do nothing but KVS_LAUNCH and asynchronous copies on cu->stream. */
void kvs_cuda_do(kvs_cuda *cu, int32_t kind, kvs_cuda_launch launch, const void *args, uint64_t bytes);
template <auto launch, int KIND = KVS_CUDA_OTHER, class A> static inline void kvs_cuda_op(kvs_cuda *cu, const A *args) {
    kvs_cuda_do(
        cu, KIND, [](kvs_cuda *at, const void *a) { launch(at, (const A *)a); }, args, sizeof *args);
}

/* Bytes of host memory as they will be on the device when the op runs that is described next; NULL: the step has failed. room: the most
 * that they will ever be in a step of this kind, so that what comes after them keeps its address; at least bytes. */
void *kvs_cuda_stage(kvs_cuda *cu, const void *host, uint64_t bytes, uint64_t room);
/* Room for what kernels of the step tell the host: all of it comes with the one wait at its end, and deliver says where to. Addresses are
 * the same in every step of a kind. NULLs: the step has failed. */
kvs_cuda_report kvs_cuda_reserve_report(kvs_cuda *cu, uint64_t bytes);
void kvs_cuda_deliver(kvs_cuda *cu, void *to, const uint8_t *from, uint64_t bytes); /* from: in a report's pinned memory */
const kvs_kv *kvs_cuda_kv(kvs_cuda *cu, const kvs_kv *kv);                          /* [dev] copy, its spans and dropped rows, too */

/* cudaMalloc and cudaMallocHost, which tests can refuse. */
static inline cudaError_t kvs_cuda_malloc(uint8_t **block, uint64_t bytes) {
    return kvs_refused() ? cudaErrorMemoryAllocation : cudaMalloc((void **)block, bytes);
}
static inline cudaError_t kvs_cuda_malloc_host(uint8_t **block, uint64_t bytes) {
    return kvs_refused() ? cudaErrorMemoryAllocation : cudaMallocHost((void **)block, bytes);
}

uint8_t *kvs_cuda_scratch(kvs_cuda *cu, int32_t which, uint64_t bytes); /* NULL: the step has failed */

/* Launches all that is noted down, and from now on at once: for ops that must see results, or move host memory. Waits for nothing. */
void kvs_cuda_flush(kvs_cuda *cu);
void kvs_cuda_wait(kvs_cuda *cu); /* flush, then until all is done */

bool kvs_cuda_lasts(cudaError_t error); /* the process can't use CUDA any more */
/* kvs_device_fail, with the error in words. One that lasts is of some kernel before, and is seen where the host asks next: the last one is named. */
void kvs_cuda_fail(kvs_cuda *cu, cudaError_t error, const char *what);
void kvs_cuda_launched(kvs_cuda *cu, const char *kernel); /* a literal */
/* true if the call went well; else the step has failed, and "what" is named. Errors that stick make the model unusable. */
bool kvs_cuda_check(kvs_cuda *cu, cudaError_t error, const char *what);

/* KVS_LAUNCH(cu, kernel, grid, threads, bytes of dynamic shared memory, arguments...); a template with commas stands in parentheses. More
 * than 48 KiB of shared memory are asked for as needed. KVS_LAUNCH_EARLY: the same of a kernel that calls kvs_await_previous. */
#define KVS_LAUNCH(cu, kernel, grid, block, shared, ...)       kvs_cuda_start(cu, #kernel, false, kernel, grid, block, shared, __VA_ARGS__)
#define KVS_LAUNCH_EARLY(cu, kernel, grid, block, shared, ...) kvs_cuda_start(cu, #kernel, true, kernel, grid, block, shared, __VA_ARGS__)
template <class... P, class... A>
static inline void kvs_cuda_start(kvs_cuda *cu, const char *name, bool awaits, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared,
                                  A... args) {
    if (cu->status) return;
    const bool early = awaits && cu->behind_kernel;
    cu->behind_kernel = cu->capturing;
#ifndef KVS_SHIM
    if (shared > 48 * 1024 &&
        !kvs_cuda_check(cu, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared), name))
        return;
#endif
    if (kvs_cuda_check(cu, kvs_launch_kernel(name, kernel, grid, block, shared, cu->stream, awaits, early, args...), name))
        kvs_cuda_launched(cu, name);
}

void kvs_cuda_begin(kvs_backend *be, const kvs_step *step); /* step.cu */
int kvs_cuda_end(kvs_backend *be, kvs_error *err);
void kvs_cuda_free_steps(kvs_cuda *cu);

static inline int64_t kvs_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/* What the op table points to, by file. rows.cu: row by row and value by value */
void kvs_cuda_norm(kvs_backend *be, float *y, const float *x, const float *w, const float *bias, float eps, int32_t n, int32_t cols);
void kvs_cuda_angles(kvs_backend *be, const kvs_rope *rope);
void kvs_cuda_rope(kvs_backend *be, float *x, const kvs_rope *rope, int32_t n, int32_t n_head, int32_t head_dim);
void kvs_cuda_add(kvs_backend *be, float *y, const float *x, int64_t n);
void kvs_cuda_gate(kvs_backend *be, float *g, const float *u, int64_t n);
void kvs_cuda_unary(kvs_backend *be, int32_t kind, float *x, int64_t n);
void kvs_cuda_scatter(kvs_backend *be, float *const *y, const float *x, int32_t n, int32_t cols);
void kvs_cuda_finite(kvs_backend *be, const float *x, int32_t n, int32_t cols, float limit, int32_t place);
/* weights.cu: the order of weights on the device (types.cuh), and rows of a table */
uint64_t kvs_cuda_weight_room(kvs_backend *be, const kvs_weight *w);
bool kvs_cuda_place(kvs_backend *be, kvs_weight *w, void *room, const int32_t *cancel);
bool kvs_cuda_placed(kvs_cuda *cu, const kvs_weight *w); /* else the step fails: the loader places all, a device can't read the file */
void kvs_cuda_free_pieces(kvs_cuda *cu);
void kvs_cuda_rows(kvs_backend *be, float *y, const kvs_weight *table, const int32_t *ids, int32_t n);
/* matmul.cu: which of the two; matvec.cu: few rows; gemm.cu: many, on tensor cores or in float32 */
void kvs_cuda_matmul(kvs_backend *be, const kvs_matmul *jobs, int32_t n_jobs, const float *x, int32_t n);
void kvs_cuda_matvec(kvs_cuda *cu, const kvs_matmul *jobs, int32_t n_jobs, const float *x, int32_t n);
void kvs_cuda_gemm(kvs_cuda *cu, const kvs_matmul *jobs, int32_t n_jobs, const float *x, int32_t n);
/* attention.cu */
void kvs_cuda_attn(kvs_backend *be, int32_t layer, const float *q, float *out, const kvs_taps *taps);
void kvs_cuda_attn_full(kvs_backend *be, const float *q, const float *k, const float *v, float *out, int32_t n, int32_t n_head,
                        int32_t head_dim, int32_t rounding);
/* kv.cu */
/* Where the device's copy of a host struct is remembered until the step ends: NULL there if it is to be staged now. What its pointers
 * point to doesn't change in a step. With more structs than KVS_CUDA_ONCE the later ones are staged each time. */
const void **kvs_cuda_once_slot(kvs_cuda *cu, const void *host, uint64_t bytes);
void kvs_cuda_kv_put(kvs_backend *be, int32_t layer, const float *k, const float *v);
void kvs_cuda_kv_record(kvs_backend *be, int32_t layer, const float *q, const kvs_taps *taps);
void kvs_cuda_kv_smooth(kvs_backend *be, int32_t layer, const kvs_smooth_job *jobs, int32_t n_jobs, const kvs_rope *rope, float *out);
void kvs_cuda_kv_scale(kvs_backend *be, int32_t layer, const kvs_scale_job *job);
void kvs_cuda_kv_put_out(kvs_backend *be, int32_t layer, const float *out);
void kvs_cuda_kv_tell(kvs_backend *be, kvs_range layers, float *const *told);
/* sample.cu */
void kvs_cuda_sample(kvs_backend *be, const float *const *logits, int32_t n_vocab, const kvs_draw *draws, kvs_drawn *out, int32_t n);
/* mix.cu */
void kvs_cuda_kv_mix(kvs_backend *be, int32_t layer, const kvs_mix_job *job, const kvs_rope *rope);
/* prune.cu */
void kvs_cuda_kv_score(kvs_backend *be, const kvs_kv *kv, int32_t layer, int32_t maximum, float *scores);
void kvs_cuda_kv_gather(kvs_backend *be, const kvs_kv *kv, const kvs_move *moves, int32_t n);
void kvs_cuda_kv_scatter(kvs_backend *be, const kvs_kv *kv, const kvs_move *moves, int32_t n);
void kvs_cuda_kv_trim(kvs_backend *be, const kvs_kv *kv, int32_t layer, int32_t n_rows);
#endif
