/* cpu.h - the CPU backend's insides: what its files share. */
#ifndef KVS_CPU_H
#define KVS_CPU_H
#include "../backend.h"
#include "../quant.h"
#include "pool.h"

/* Kernels come in two tables per instruction set; dots.c and rows.c are compiled once per set (KVS_ISA_AVX2, KVS_ISA_AVX512,
 * or none for base), and everything in them but the table is static. AMX is a table of AVX-512's dots.c. */

/* dots.c: products of weight rows with activation rows */
typedef struct kvs_dots kvs_dots; /* see dots.h */
extern const kvs_dots kvs_dots_base, kvs_dots_avx2, kvs_dots_avx512, kvs_dots_amx;

/* rows.c: everything else */
typedef struct kvs_attn_task { /* one KV head, n_q query rows that belong to it, keys 0..n_kv */
    int32_t kv_type, head_dim;
    int64_t row_bytes;
    const uint8_t *k, *v; /* (n_kv) rows of row_bytes */
    const uint8_t *next;  /* the keys that are read after this task, n_kv rows of them, or NULL */
    int64_t ahead;        /* kvs_isa_ahead() */
    int32_t n_q;
    const float *const *q;                            /* (n_q) pointers to head_dim values */
    float *const *out;                                /* (n_q) */
    float *const *entropy, *const *mass, *const *lse; /* (n_q) each, or NULL when nobody asks */
    const int32_t *n_visible;                         /* (n_q) keys that query i sees: 0..n_visible[i], its own the last */
    const kvs_range *spans;                           /* (n_spans) whose share mass is */
    int32_t n_spans;
    int32_t exclude_self;
    float scale;
    float *scratch; /* kvs_attn_scratch(head_dim, n_q) floats, the thread's own */
} kvs_attn_task;

typedef struct kvs_weigh_task { /* the query heads of one KV head, to be held against single keys */
    int32_t kv_type, head_dim, n_q;
    const float *q;   /* (n_q, head_dim) */
    const float *lse; /* (n_q) of all their scores */
    float scale;
} kvs_weigh_task;

/* 16 blocks of weights against grids d q + m, q whole and lo <= q <= hi; e: what is left of a value at the nearest q */
enum { KVS_FIT_BLOCKS = 16 };
#define KVS_FIT_TINY 1e-12f /* a smaller d gives q = 0 */
typedef struct kvs_fit {
    float lo, hi;
    float d[KVS_FIT_BLOCKS], m[KVS_FIT_BLOCKS];
    float ee[KVS_FIT_BLOCKS], e[KVS_FIT_BLOCKS], eq[KVS_FIT_BLOCKS], q[KVS_FIT_BLOCKS], qq[KVS_FIT_BLOCKS]; /* sums over a block, results */
} kvs_fit;

typedef struct kvs_rowops {
    const char *isa;
    void (*rms_norm)(float *y, const float *x, const float *w, float eps, int64_t n);
    void (*layer_norm)(float *y, const float *x, const float *w, const float *b, float eps, int64_t n);
    void (*rope)(float *x, const float *table, int32_t n_head, int32_t head_dim, int32_t n_rot); /* one row, adjacent pairs */
    void (*add)(float *y, const float *x, int64_t n);
    void (*gate)(float *g, const float *u, int64_t n);
    void (*unary)(int32_t kind, float *x, int64_t n);
    bool (*within)(const float *x, float limit, int64_t n); /* |x| <= limit, all of them; NaN is not */
    void (*attn)(const kvs_attn_task *task);
    void (*store)(int32_t type, void *row, const float *x, int32_t head_dim); /* one cache row of one head */
    void (*load)(int32_t type, const void *row, float *x, int32_t head_dim);  /* and back */
    /* e^(scale q.k - lse) of each query against the key in one cache row: weights (n_q) */
    void (*weigh)(const kvs_weigh_task *task, const uint8_t *row, float *weights);
    void (*mix)(float *y, const float *x, float weight_y, float weight_x, int64_t n); /* y = weight_y y + weight_x x */
    /* y (KVS_MIX_COLUMNS, width) = sum over n sources s of weight (n, KVS_MIX_COLUMNS) times x[source[s]] (width); width % 16 == 0 */
    void (*combine)(float *y, const float *x, int32_t width, const int32_t *source, const float *weight, int32_t n);
    void (*fit)(const float *x, int32_t n, kvs_fit *fit); /* x (n, KVS_FIT_BLOCKS): n values of each block */
} kvs_rowops;
extern const kvs_rowops kvs_rowops_base, kvs_rowops_avx2, kvs_rowops_avx512;
int64_t kvs_attn_scratch(int32_t head_dim, int32_t n_q); /* floats; rows.c of base defines it, equal for all */

typedef struct kvs_roof_loops kvs_roof_loops; /* see roofs.h */

typedef struct kvs_isa {
    const char *name;
    const kvs_dots *dots;
    const kvs_rowops *rows;
    const kvs_roof_loops *roofs;
} kvs_isa;
bool kvs_cpu_has(const char *feature);            /* as kvs_cpu_info names it */
typedef struct kvs_bf16 kvs_bf16;                 /* see dots.h */
const kvs_bf16 *kvs_isa_bf16(const kvs_isa *isa); /* NULL: these kernels have none, or not for this CPU */
int64_t kvs_isa_ahead(void); /* how many bytes before their use weights and cached rows are asked for; 0: as on Zen 4 */
/* name NULL: the best of this CPU, or what KVS_CPU forces. An unknown or impossible name: KVS_E_DEVICE with the reason. */
int kvs_isa_choose(const char *name, const kvs_isa **out, kvs_error *err);
const char *kvs_isa_why(void); /* "best of this CPU" | "forced by KVS_CPU": why name NULL gives what it gives */

typedef struct kvs_cpu {
    kvs_backend base; /* first: a kvs_backend * to it is a kvs_cpu * */
    kvs_pool *pool;
    const kvs_isa *isa;
    const kvs_bf16 *bf16; /* kvs_isa_bf16(isa) */
    int64_t ahead;        /* kvs_isa_ahead() */
    const kvs_step *step; /* between begin and end */
    const int32_t *cancel;
    int32_t status;  /* first failure of the step, KVS_OK so far */
    kvs_fault fault; /* where it is KVS_E_NUMERIC */
    void *x_scratch; /* prepared activations of a matmul, grown as needed (matmul.c) */
    uint64_t x_scratch_bytes;
    float *thread_scratch; /* of all threads, grown as needed: kvs_cpu_scratch */
    uint64_t thread_scratch_floats;
} kvs_cpu;

/* Every op begins with: if (kvs_cpu_stopped(cpu)) return; - a failure or a cancellation, once seen, stands until end(). */
static inline bool kvs_cpu_stopped(kvs_cpu *cpu) {
    if (!cpu->status && kvs_cancelled(cpu->cancel)) cpu->status = KVS_E_CANCELLED;
    return cpu->status != KVS_OK;
}

/* The loop of an op. Pieces that were left out make the step a cancelled one, even if the flag goes back to 0. */
static inline void kvs_cpu_loop(kvs_cpu *cpu, kvs_task fn, void *arg, int64_t n, int64_t grain) {
    if (!kvs_pool_run(cpu->pool, fn, arg, n, grain, cpu->cancel)) cpu->status = KVS_E_CANCELLED;
}

/* floats_per_thread of scratch for every thread, one after the other, 64-byte lines apart; NULL: the step has failed. */
float *kvs_cpu_scratch(kvs_cpu *cpu, int64_t floats_per_thread);

uint8_t *kvs_cpu_reserve(kvs_cpu *cpu, uint64_t bytes); /* x_scratch, so long at least; what was in it may be gone; NULL: no memory */

/* What cpu.c's op table points to, by file: matmul.c */
void kvs_cpu_matmul(kvs_backend *be, const kvs_matmul *jobs, int32_t n_jobs, const float *x, int32_t n);
void kvs_cpu_rows(kvs_backend *be, float *y, const kvs_weight *table, const int32_t *ids, int32_t n);
/* place.c */
uint64_t kvs_cpu_weight_room(kvs_backend *be, const kvs_weight *w);
void *kvs_cpu_alloc_weights(kvs_backend *be, uint64_t bytes, bool on_host);
bool kvs_cpu_place(kvs_backend *be, kvs_weight *w, void *room, const int32_t *cancel);
/* attention.c */
void kvs_cpu_attn(kvs_backend *be, int32_t layer, const float *q, float *out, const kvs_taps *taps);
void kvs_cpu_attn_full(kvs_backend *be, const float *q, const float *k, const float *v, float *out, int32_t n, int32_t n_head,
                       int32_t head_dim, int32_t rounding);
/* bf16.c: the same with operands rounded to bf16 */
void kvs_cpu_matmul_bf16(kvs_cpu *cpu, const kvs_matmul *jobs, int32_t n_jobs, const float *x, int32_t n);
void kvs_cpu_attn_full_bf16(kvs_cpu *cpu, const float *q, const float *k, const float *v, float *out, int32_t n, int32_t n_head,
                            int32_t head_dim);
/* kv.c */
void kvs_cpu_kv_put(kvs_backend *be, int32_t layer, const float *k, const float *v);
void kvs_cpu_kv_record(kvs_backend *be, int32_t layer, const float *q, const kvs_taps *taps);
void kvs_cpu_kv_smooth(kvs_backend *be, int32_t layer, const kvs_smooth_job *jobs, int32_t n_jobs, const kvs_rope *rope, float *out);
void kvs_cpu_kv_scale(kvs_backend *be, int32_t layer, const kvs_scale_job *job);
void kvs_cpu_kv_put_out(kvs_backend *be, int32_t layer, const float *out);
void kvs_cpu_kv_tell(kvs_backend *be, kvs_range layers, float *const *told);
/* prune.c */
void kvs_cpu_kv_score(kvs_backend *be, const kvs_kv *kv, int32_t layer, int32_t maximum, float *scores);
void kvs_cpu_kv_gather(kvs_backend *be, const kvs_kv *kv, const kvs_move *moves, int32_t n);
void kvs_cpu_kv_scatter(kvs_backend *be, const kvs_kv *kv, const kvs_move *moves, int32_t n);
void kvs_cpu_kv_trim(kvs_backend *be, const kvs_kv *kv, int32_t layer, int32_t n_rows);
/* mix.c */
void kvs_cpu_kv_mix(kvs_backend *be, int32_t layer, const kvs_mix_job *job, const kvs_rope *rope);
/* cpu.c: dense ops that only loop over rows.c, memory, step, open, close */
#endif
