/* backend.h - all that the model and cache code know about a device: a table of ops.
 *
 * Pointers marked [dev] are addresses on the device (on the CPU: plain memory); host code does pointer arithmetic on them
 * and never reads through them. Shapes are row-major. Activations are float32.
 *
 * Ops between begin and end return nothing: a failure or a cancellation makes the rest of the step do nothing, and end()
 * reports it, the first one of them. One step at a time per backend: the caller holds the model's lock from begin to end. */
#ifndef KVS_BACKEND_H
#define KVS_BACKEND_H
#include "mix.h"
#include "sampler.h"

#include <float.h>

enum { KVS_MAX_HEAD_DIM = 512 }; /* loaders refuse more: kernels have room for so many on their stacks */

typedef struct kvs_ops kvs_ops;

/* Of a device that has failed */
enum kvs_failed {
    KVS_FAILING = 1,    /* somebody is writing down why */
    KVS_FAILED,         /* models may be loaded again */
    KVS_FAILED_FOR_GOOD /* not by this process */
};

typedef struct kvs_backend { /* a device of this process; each device's own struct begins with it */
    const kvs_ops *ops;
    char name[32];                    /* "cpu", "cuda:0" */
    char reason[224];                 /* why this one, and which kernels */
    bool has_bf16;                    /* KVS_ROUND_BF16 is not just float32 here, */
    bool has_f16;                     /* and to halves, which keep more bits */
    bool host_memory;                 /* [dev] pointers are plain ones: weights can be read where the file is mapped */
    int32_t host_layers;              /* where a device and the CPU share a model: its first so many layers are the CPU's */
    bool whole_arrays;                /* alloc_layers is asked for all layers, also for those that are the CPU's */
    struct kvs_backend *device;       /* whose failure is this one's: of a backend over others; or NULL */
    int32_t failed;                   /* atomic; not 0: what it holds, and gave since then, is not to be used: kvs_device_check */
    char failure[256];                /* why, once failed is more than KVS_FAILING */
    int32_t threads, threads_missing; /* missing: of the default, they could not be started */
} kvs_backend;

typedef struct kvs_weight { /* a matrix of a model file, used as y = x W^T; a vector has rows = 1 */
    int32_t type;           /* kvs_type */
    int64_t rows, cols;
    int64_t row_bytes;
    const void *data; /* [dev] rows of GGUF blocks; NULL = absent */
    bool placed;      /* in the device's own order: for matmul with KVS_ROUND_INT8 alone */
    bool on_host;     /* where a device and the CPU share a model: one of the CPU's */
} kvs_weight;

enum kvs_rounding {                     /* of the operands of a product; sums are float32 */
                    KVS_ROUND_INT8 = 0, /* activations to int8 in blocks, where the weights' type has kernels for it; otherwise float32 */
                    KVS_ROUND_BF16, /* both to bf16, where the device multiplies those faster and the weights are not F32; otherwise float32 */
                    KVS_ROUND_NONE /* float32 */
};

typedef struct kvs_matmul { /* y (n, w->rows) = x (n, w->cols) W^T + bias */
    float *y;               /* [dev] */
    const kvs_weight *w;
    const float *bias; /* [dev] (w->rows), or NULL */
    int32_t rounding;
} kvs_matmul;

typedef struct kvs_range {
    int32_t first, n;
} kvs_range;

/* The cache of one session on its device: rows of K and V, and what policies remember of rows. Owned by cache.c.
 * A row has an index in the timeline, a position (for RoPE; the same number) and a physical place in each layer, which is less
 * than the index behind rows that were dropped there. */
typedef struct kvs_kv {
    int32_t type, n_layer, n_head, n_kv_head, head_dim, n_ctx;
    int64_t row_bytes; /* one row of one head: kvs_kv_row_bytes(type, head_dim) */
    uint8_t *k, *v;    /* [dev] (n_layer, n_kv_head, n_ctx) rows, K after RoPE in the file's interleaved order */
    /* History by index; entropy and strength are per group: 1, or n_kv_head with one strength per KV head */
    int32_t n_group;
    float *entropy;       /* [dev] (n_layer, n_ctx, n_group) row entropy in nats of every row */
    float *strength;      /* [dev] (n_layer, n_ctx, n_group) lambda; NaN where a row was not smoothed */
    int32_t exclude_self; /* entropies leave the newest key out */
    float *mass;          /* [dev] (n_layer, n_ctx) share of attention that goes to rows of pictures, mean over heads */
    /* Where rows of pictures are and where they are missing; host memory. One list for all layers if dropped is NULL, else n_sets
     * for each: 1, or n_kv_head where the heads of a layer keep different rows (equally many). */
    int32_t n_sets, n_spans, room_spans;
    kvs_range *spans;       /* (lists, room_spans) places, rising; the first n_spans */
    const int32_t *dropped; /* (n_layer) rows that are gone, all of them before any row that is still to run; NULL = none */
    /* Only under pruning: of the newest row that ran */
    float *query, *lse; /* [dev] (n_layer, n_head * head_dim) after RoPE, and (n_layer, n_head) log-sum-exp of its scores; or NULL */
    /* Only under smoothing: exact rows as the next mix wants them, slot = index % n_exact */
    int32_t n_exact;
    float *exact_k, *exact_v; /* [dev] (n_layer, n_exact, n_kv_head * head_dim) or NULL */
    float *exact_o;           /* [dev] (n_layer, n_exact, n_head * head_dim) attention outputs, or NULL */
} kvs_kv;

typedef struct kvs_row { /* one new row of a step */
    kvs_kv *kv;          /* whose cache; rows of one session are neighbours and in order */
    int32_t index, pos;  /* it sees the places up to its own: kvs_kv_place */
} kvs_row;

typedef struct kvs_fault { /* where finite() first found a value that may not be */
    int32_t place, row;    /* as it was called there */
    float value;           /* the first such value of the row */
} kvs_fault;

typedef struct kvs_step {
    const kvs_row *rows; /* host memory, valid until end */
    int32_t n;
    const int32_t *cancel; /* polled every few milliseconds; may be NULL */
    kvs_fault *fault;      /* filled by end() when it gives KVS_E_NUMERIC; NULL where finite() is not called */
} kvs_step;

typedef struct kvs_smooth_job {      /* KVSmooth on one generated row of a step: arXiv 2602.04268, eq. 5 and 13-15 */
    const kvs_smooth_params *params; /* host memory */
    kvs_kv *kv;
    int32_t row; /* in the step: where its attention output is */
    int32_t index;
    int32_t prev;         /* index of the row to mix with; -1 = rank only, mix nothing */
    int32_t pos_delta;    /* position of this row minus position of prev, for rope_relative */
    const int32_t *queue; /* host: (n_queue) indices of the rows in its queue, itself last */
    int32_t n_queue;
    const int32_t *missing; /* host: (n_queue) rows that layers with dropped rows lacked when those rows ran; NULL = none */
} kvs_smooth_job;

typedef struct kvs_taps { /* what attention tells of its rows; [dev] (n, n_head) each, or NULL */
    float *entropy;       /* in nats */
    float *mass;          /* share of rows of pictures */
    float *lse;           /* ln sum e^score */
} kvs_taps;

typedef struct kvs_move { /* rows of one head that leave the store or come back */
    int32_t layer, head;
    const int32_t *places; /* host: (n) places that they had before they left, rising */
    int32_t n, n_rows;     /* n_rows: of the head while they are there */
    uint8_t *rows;         /* host: (2, n, row_bytes) K, then V; NULL = nobody wants them back */
} kvs_move;
typedef struct kvs_mix_job { /* rows of a cache become weighted sums of them, DSCR: docs/methods.md */
    kvs_kv *kv;
    const kvs_mix *mix; /* host memory */
    int32_t row;        /* in the step: of the first of its rows, where their angles are */
    int32_t index;      /* of that row; the others follow it, in the timeline and in their places */
    int32_t exact_from; /* the ring of exact rows holds the rows from this index on, and takes their new values */
    float gamma;        /* x <- (1 - gamma) x + gamma x_hat */
    int32_t target;     /* KVS_TARGET_K | KVS_TARGET_V */
    int32_t rope_pre;   /* keys are turned back by their positions, mixed, and turned again */
} kvs_mix_job;

typedef struct kvs_scale_job { /* rows of a cache are multiplied where they stand, as SPARC (ICML 2025) does with values of patches */
    kvs_kv *kv;
    /* Host, and not to change until end. The first n of a list: rows by index, none of them twice, and their places in the layer, less than
     * 0: they are not there. One list for all KV heads, or n_sets = n_kv_head of them; where nothing was dropped, indices itself. */
    const int32_t *indices;  /* (room) */
    const int32_t *places;   /* (n_sets, room) */
    int32_t n, room, n_sets; /* room: the most that n is in a step of this kind; on a GPU they are one graph, then */
    int32_t exact_from;      /* the ring of exact rows holds the rows from this index on: they are multiplied there, too */
    float factor;
    int32_t target; /* KVS_TARGET_K | KVS_TARGET_V */
} kvs_scale_job;

typedef struct kvs_rope {
    int32_t n_rot;         /* leading dimensions of a head that turn, even */
    const float *inv_freq; /* [dev] (n_rot / 2), scaling applied */
    float *table;          /* [dev] (max rows, n_rot / 2, 2): cos and sin, filled by angles() */
} kvs_rope;

enum kvs_unary { KVS_GELU, KVS_GELU_TANH, KVS_GELU_QUICK };

struct kvs_ops {
    void (*close)(kvs_backend *be);
    /* memory: alloc gives zeroed memory or NULL; copies are synchronous */
    void *(*alloc)(kvs_backend *be, uint64_t bytes);
    /* an array of a cache, n_layer pieces of bytes_per_layer: what of a layer is only used by ops of that layer, and by copies */
    void *(*alloc_layers)(kvs_backend *be, int32_t n_layer, uint64_t bytes_per_layer);
    uint64_t (*free_memory)(kvs_backend *be); /* bytes that alloc still has, about; 0 = unknown: the system's */
    void (*release)(kvs_backend *be, void *block);
    void (*upload)(kvs_backend *be, void *dst, const void *src, uint64_t bytes);
    void (*download)(kvs_backend *be, void *dst, const void *src, uint64_t bytes);
    /* n pieces of bytes that lie stride bytes apart, to dst one behind the other */
    void (*download_rows)(kvs_backend *be, void *dst, const void *src, uint64_t bytes, uint64_t stride, int32_t n);
    void (*copy)(kvs_backend *be, void *dst, const void *src, uint64_t bytes); /* inside the device */
    /* weights that are only multiplied by: bytes that place() wants for one, 0 = it is best read where it is; memory for the sum of them,
     * to be released like any other; place() copies w there; false: it was cancelled, or status says what else */
    uint64_t (*weight_room)(kvs_backend *be, const kvs_weight *w);
    void *(*alloc_weights)(kvs_backend *be, uint64_t bytes, bool on_host); /* on_host: as those weights say */
    bool (*place)(kvs_backend *be, kvs_weight *w, void *room, const int32_t *cancel);
    void (*end_place)(kvs_backend *be); /* what place() needed for itself goes; it may come again */
    /* step: end gives KVS_OK, KVS_E_CANCELLED, KVS_E_MEMORY, KVS_E_NUMERIC or KVS_E_DEVICE, and fills err */
    void (*begin)(kvs_backend *be, const kvs_step *step);
    int (*status)(kvs_backend *be); /* of the step so far, as far as the host knows: what end would give */
    int (*end)(kvs_backend *be, kvs_error *err);
    /* dense; n rows each */
    void (*rows)(kvs_backend *be, float *y, const kvs_weight *table, const int32_t *ids, int32_t n);    /* ids: host */
    void (*matmul)(kvs_backend *be, const kvs_matmul *jobs, int32_t n_jobs, const float *x, int32_t n); /* all jobs share x */
    void (*norm)(kvs_backend *be, float *y, const float *x, const float *w, const float *bias, float eps, int32_t n,
                 int32_t cols);                            /* bias NULL: RMS, else LayerNorm */
    void (*angles)(kvs_backend *be, const kvs_rope *rope); /* of the step's positions */
    void (*rope)(kvs_backend *be, float *x, const kvs_rope *rope, int32_t n, int32_t n_head, int32_t head_dim);
    void (*add)(kvs_backend *be, float *y, const float *x, int64_t n);  /* y += x */
    void (*gate)(kvs_backend *be, float *g, const float *u, int64_t n); /* g = silu(g) u */
    void (*unary)(kvs_backend *be, int32_t kind, float *x, int64_t n);  /* kvs_unary, in place */
    /* Row i of x (n, cols) to y[i]; y: host, (n) of [dev] rows, others in each step */
    void (*scatter)(kvs_backend *be, float *const *y, const float *x, int32_t n, int32_t cols);
    /* A value of x (n, cols) beyond limit in magnitude, or NaN, fails the step: its place, a name of the caller's, and the first such row */
    void (*finite)(kvs_backend *be, const float *x, int32_t n, int32_t cols, float limit, int32_t place);
    /* attention: scores scaled by 1/sqrt(head_dim); out (n, n_head, head_dim) */
    void (*attn)(kvs_backend *be, int32_t layer, const float *q, float *out, const kvs_taps *taps);
    void (*attn_full)(kvs_backend *be, const float *q, const float *k, const float *v, float *out, int32_t n, int32_t n_head,
                      int32_t head_dim, int32_t rounding); /* every row sees all n */
    /* cache rows of the step; k, v (n, n_kv_head * head_dim) */
    void (*kv_put)(kvs_backend *be, int32_t layer, const float *k, const float *v); /* store, and into exact_k, exact_v */
    /* means into kv->entropy and kv->mass; strength = NaN; the newest row's q (n, n_head * head_dim) and lse where kv->query is */
    void (*kv_record)(kvs_backend *be, int32_t layer, const float *q, const kvs_taps *taps);
    /* rank, strength, EMA: from exact rows in float32 to the store and to the exact rows; target O mixes out and exact_o */
    void (*kv_smooth)(kvs_backend *be, int32_t layer, const kvs_smooth_job *jobs, int32_t n_jobs, const kvs_rope *rope, float *out);
    /* read as stored, mixed in float32, stored once; rope->table holds the angles of the step's rows */
    void (*kv_mix)(kvs_backend *be, int32_t layer, const kvs_mix_job *job, const kvs_rope *rope);
    /* read as stored, multiplied in float32, stored once; exact rows stay exact; a factor of 1 changes no bit. Products beyond the limit of
     * the cache become what kv_put makes of such values: Q8_0's largest, or infinities, which finite() finds behind attention. No policy
     * uses it yet: SPARC will. */
    void (*kv_scale)(kvs_backend *be, int32_t layer, const kvs_scale_job *job);
    /* attention outputs of prompt rows into exact_o, where a cache has one */
    void (*kv_put_out)(kvs_backend *be, int32_t layer, const float *out);
    /* What the history has of the step's rows in some layers: means over groups of entropy and of strength, and mass. told: host, for each row
     * NULL or room for (3, kv->n_layer), of which these layers' are there once end() has given KVS_OK. */
    void (*kv_tell)(kvs_backend *be, kvs_range layers, float *const *told);
    /* One id from each of n rows of logits (n_vocab), as sampler.c has it; logits: host, (n) of [dev] rows; draws: host, (n) until end;
     * out: host, (n), and there once end() has given KVS_OK */
    void (*sample)(kvs_backend *be, const float *const *logits, int32_t n_vocab, const kvs_draw *draws, kvs_drawn *out, int32_t n);
    /* pruning, between begin and end: attention of the newest row on each row of a picture, span by span, mean (or maximum) over the
     * query heads of a KV head: scores [dev] (n_kv_head, rows of spans) */
    void (*kv_score)(kvs_backend *be, const kvs_kv *kv, int32_t layer, int32_t maximum, float *scores);
    void (*kv_gather)(kvs_backend *be, const kvs_kv *kv, const kvs_move *moves, int32_t n);  /* rows leave, those behind slide down */
    void (*kv_scatter)(kvs_backend *be, const kvs_kv *kv, const kvs_move *moves, int32_t n); /* rows come back to where they were */
    void (*kv_trim)(kvs_backend *be, const kvs_kv *kv, int32_t layer, int32_t n_rows); /* memory behind the rows, back to the system */
};

KVS_SHARED int64_t kvs_kv_row_bytes(int32_t type, int32_t head_dim) { /* Q8_0: the last block may be part empty */
    return type == KVS_TYPE_F32   ? 4 * (int64_t)head_dim
           : type == KVS_TYPE_F16 ? 2 * (int64_t)head_dim
                                  : 34 * (((int64_t)head_dim + 31) / 32);
}
KVS_SHARED float kvs_kv_limit(int32_t type) { /* the largest magnitude that a row of the cache holds */
    return type == KVS_TYPE_F32 ? FLT_MAX : type == KVS_TYPE_F16 ? 65504.0f : 127 * 65504.0f;
}
KVS_SHARED uint8_t *kvs_kv_rows(const kvs_kv *kv, uint8_t *base, int32_t layer, int32_t head) { /* base: kv->k or kv->v */
    return base + ((int64_t)layer * kv->n_kv_head + head) * kv->n_ctx * kv->row_bytes;
}
KVS_SHARED int32_t kvs_kv_place(const kvs_kv *kv, int32_t layer, int32_t index) { /* of a row behind all dropped ones */
    return index - (kv->dropped ? kv->dropped[layer] : 0);
}
KVS_SHARED const kvs_range *kvs_kv_spans(const kvs_kv *kv, int32_t layer, int32_t head) { /* (n_spans) of a KV head */
    int64_t list = kv->dropped ? (int64_t)layer * kv->n_sets + (kv->n_sets > 1 ? head : 0) : 0;
    return kv->spans ? kv->spans + list * kv->room_spans : NULL; /* no picture yet */
}
KVS_SHARED int64_t kvs_kv_history(const kvs_kv *kv, int32_t layer, int32_t index) { /* into entropy and strength */
    return ((int64_t)layer * kv->n_ctx + index) * kv->n_group;
}
KVS_SHARED int64_t kvs_kv_mass(const kvs_kv *kv, int32_t layer, int32_t index) { return (int64_t)layer * kv->n_ctx + index; }
KVS_SHARED int64_t kvs_kv_exact(const kvs_kv *kv, int32_t layer, int32_t index, int32_t n_head) { /* n_head: of what the ring holds */
    return ((int64_t)layer * kv->n_exact + index % kv->n_exact) * n_head * kv->head_dim;
}
KVS_SHARED int32_t kvs_scale_place(const kvs_scale_job *job, int32_t head, int32_t i) { /* of a KV head */
    return job->places[(job->n_sets > 1 ? (int64_t)head * job->room : 0) + i];
}

/* threads: 0 = what affinity and cgroup quota allow */
int kvs_cpu_open(int32_t threads, kvs_backend **out, kvs_error *err);
/* With these kernels, for tests: KVS_E_DEVICE where there are none of that name, or not for this CPU; NULL: the best. */
int kvs_cpu_open_isa(const char *name, int32_t threads, kvs_backend **out, kvs_error *err);
/* backend.c. KVS_E_DEVICE once the device has failed: after copies, which return nothing, and whatever else came from there. */
int kvs_device_check(const kvs_backend *be, kvs_error *err);
/* The device is not used again: the first failure of them all is what is told. for_good: nor can another model of this process. Any thread. */
void kvs_device_fail(kvs_backend *be, bool for_good, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* KVS_E_MEMORY, with what the device has left if that is known. */
int kvs_fail_room(kvs_backend *be, kvs_error *err, uint64_t needed, const char *what);
int32_t kvs_cuda_index(const char *device);                          /* of "cuda" or "cuda:N", N below 100; else -1 */
int kvs_cuda_open(int32_t index, kvs_backend **out, kvs_error *err); /* cuda:index, or KVS_E_DEVICE with the reason */
#endif
