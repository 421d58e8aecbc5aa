/* cpu.c - the CPU backend: memory, steps, and the dense ops that are loops over rows.c. */
#include "cpu.h"
#include "../cgroup.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { PIECE = 16384 }; /* elements that are worth a thread's while */

/* ---- memory ---- */

static void *cpu_alloc(kvs_backend *be, uint64_t bytes) {
    (void)be;
    return kvs_calloc_aligned(bytes, 1);
}

/* A cache on huge pages is read 1 to 4 % of a token faster, but its first rows make all of it resident, since each head has room for
 * n_ctx rows. So only while what lies on huge pages, weights too, is at most half of the memory that this process may have. */
static bool cache_may_be_huge(uint64_t bytes) {
    long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    double memory = pages > 0 && page > 0 ? (double)pages * (double)page : 0, limit = kvs_cgroup_limit(KVS_CGROUP_BYTES);
    if (limit > 0) memory = KVS_MIN(memory, limit);
    return (double)kvs_huge_bytes() + (double)bytes <= memory / 2;
}

static void *cpu_alloc_layers(kvs_backend *be, int32_t n_layer, uint64_t bytes_per_layer) {
    uint64_t bytes;
    if (!kvs_mul_u64((uint64_t)n_layer, bytes_per_layer, &bytes)) return NULL;
    return cache_may_be_huge(bytes) ? kvs_calloc_huge(bytes) : cpu_alloc(be, bytes);
}

static void cpu_end_place(kvs_backend *be) { (void)be; }

static uint64_t cpu_free_memory(kvs_backend *be) {
    (void)be;
    return 0;
}

static void cpu_release(kvs_backend *be, void *block) {
    (void)be;
    kvs_free_aligned(block);
}

static void cpu_copy(kvs_backend *be, void *dst, const void *src, uint64_t bytes) {
    (void)be;
    memmove(dst, src, (size_t)bytes);
}

static void cpu_download_rows(kvs_backend *be, void *dst, const void *src, uint64_t bytes, uint64_t stride, int32_t n) {
    (void)be;
    for (int32_t i = 0; i < n; i++)
        memcpy((uint8_t *)dst + (uint64_t)i * bytes, (const uint8_t *)src + (uint64_t)i * stride, (size_t)bytes);
}

float *kvs_cpu_scratch(kvs_cpu *cpu, int64_t floats_per_thread) {
    uint64_t floats = (uint64_t)floats_per_thread * (uint64_t)kvs_pool_threads(cpu->pool);
    if (floats <= cpu->thread_scratch_floats) return cpu->thread_scratch;
    kvs_free_aligned(cpu->thread_scratch);
    cpu->thread_scratch = kvs_calloc_aligned(floats, sizeof(float));
    cpu->thread_scratch_floats = cpu->thread_scratch ? floats : 0;
    if (!cpu->thread_scratch) cpu->status = KVS_E_MEMORY;
    return cpu->thread_scratch;
}

/* ---- steps ---- */

static void cpu_begin(kvs_backend *be, const kvs_step *step) {
    kvs_cpu *cpu = (kvs_cpu *)be;
    cpu->step = step;
    cpu->cancel = step->cancel;
    cpu->status = KVS_OK;
}

static int cpu_status(kvs_backend *be) { return ((kvs_cpu *)be)->status; }

static int cpu_end(kvs_backend *be, kvs_error *err) {
    kvs_cpu *cpu = (kvs_cpu *)be;
    int status = cpu->status;
    if (status == KVS_E_NUMERIC && cpu->step->fault) *cpu->step->fault = cpu->fault;
    cpu->step = NULL;
    cpu->cancel = NULL;
    cpu->status = KVS_OK;
    if (status == KVS_E_CANCELLED) return kvs_fail(err, status, "cancelled");
    if (status == KVS_E_MEMORY) return kvs_fail(err, status, "out of memory: no room for the working space of a step");
    if (status == KVS_E_NUMERIC) return kvs_fail(err, status, "values that are not finite");
    if (status) return kvs_fail(err, status, "a step failed on the CPU (status %d)", status);
    return KVS_OK;
}

/* ---- dense ops ---- */

typedef struct dense { /* arguments of any of them */
    const kvs_rowops *ops;
    float *y;
    const float *x, *w, *bias;
    float eps;
    int32_t kind, n_head, head_dim, n_rot;
    int64_t cols;
    const kvs_row *rows;
    const kvs_rope *rope;
} dense;

static void run(kvs_backend *be, kvs_task task, dense *args, int64_t n, int64_t row_size) {
    kvs_cpu *cpu = (kvs_cpu *)be;
    if (kvs_cpu_stopped(cpu)) return;
    args->ops = cpu->isa->rows;
    kvs_cpu_loop(cpu, task, args, n, KVS_MAX(PIECE / KVS_MAX(row_size, 1), 1));
}

static void norm_rows(void *arg, int64_t begin, int64_t end, int32_t thread) {
    const dense *a = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        float *y = a->y + i * a->cols;
        const float *x = a->x + i * a->cols;
        if (a->bias)
            a->ops->layer_norm(y, x, a->w, a->bias, a->eps, a->cols);
        else
            a->ops->rms_norm(y, x, a->w, a->eps, a->cols);
    }
}

static void cpu_norm(kvs_backend *be, float *y, const float *x, const float *w, const float *bias, float eps, int32_t n, int32_t cols) {
    dense args = {.y = y, .x = x, .w = w, .bias = bias, .eps = eps, .cols = cols};
    run(be, norm_rows, &args, n, cols);
}

/* The product in float32, as transformers has it in all its models: it is 1e-4 rad off at position 4000, and that is seen in K. */
static void angle_rows(void *arg, int64_t begin, int64_t end, int32_t thread) {
    const dense *a = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        float *table = a->rope->table + i * a->rope->n_rot;
        for (int32_t j = 0; j < a->rope->n_rot / 2; j++) {
            double angle = (double)((float)a->rows[i].pos * a->rope->inv_freq[j]);
            table[2 * j] = (float)cos(angle);
            table[2 * j + 1] = (float)sin(angle);
        }
    }
}

static void cpu_angles(kvs_backend *be, const kvs_rope *rope) {
    const kvs_step *step = ((kvs_cpu *)be)->step;
    dense args = {.rope = rope, .rows = step->rows};
    run(be, angle_rows, &args, step->n, 16 * (int64_t)rope->n_rot);
}

static void rope_rows(void *arg, int64_t begin, int64_t end, int32_t thread) {
    const dense *a = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++)
        a->ops->rope(a->y + i * a->cols, a->rope->table + i * a->rope->n_rot, a->n_head, a->head_dim, a->rope->n_rot);
}

static void cpu_rope(kvs_backend *be, float *x, const kvs_rope *rope, int32_t n, int32_t n_head, int32_t head_dim) {
    dense args = {.y = x, .rope = rope, .n_head = n_head, .head_dim = head_dim, .cols = (int64_t)n_head * head_dim};
    run(be, rope_rows, &args, n, args.cols);
}

static void add_piece(void *arg, int64_t begin, int64_t end, int32_t thread) {
    const dense *a = arg;
    (void)thread;
    a->ops->add(a->y + begin, a->x + begin, end - begin);
}

static void cpu_add(kvs_backend *be, float *y, const float *x, int64_t n) {
    dense args = {.y = y, .x = x};
    run(be, add_piece, &args, n, 1);
}

static void gate_piece(void *arg, int64_t begin, int64_t end, int32_t thread) {
    const dense *a = arg;
    (void)thread;
    a->ops->gate(a->y + begin, a->x + begin, end - begin);
}

static void cpu_gate(kvs_backend *be, float *g, const float *u, int64_t n) {
    dense args = {.y = g, .x = u};
    run(be, gate_piece, &args, n, 2);
}

static void unary_piece(void *arg, int64_t begin, int64_t end, int32_t thread) {
    const dense *a = arg;
    (void)thread;
    a->ops->unary(a->kind, a->y + begin, end - begin);
}

static void cpu_unary(kvs_backend *be, int32_t kind, float *x, int64_t n) {
    dense args = {.y = x, .kind = kind};
    run(be, unary_piece, &args, n, 2);
}

static void cpu_scatter(kvs_backend *be, float *const *y, const float *x, int32_t n, int32_t cols) {
    if (kvs_cpu_stopped((kvs_cpu *)be)) return;
    for (int32_t i = 0; i < n; i++) memcpy(y[i], x + (int64_t)i * cols, (size_t)cols * sizeof *x);
}

typedef struct sample_args {
    const float *const *logits;
    const kvs_draw *draws;
    kvs_drawn *out;
    int32_t n_vocab;
    int32_t status; /* atomic */
} sample_args;

static void sample_rows(void *arg, int64_t begin, int64_t end, int32_t thread) {
    sample_args *a = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        int status = kvs_sampler_draw(a->logits[i], a->n_vocab, &a->draws[i], &a->out[i], NULL);
        if (status) __atomic_store_n(&a->status, status, __ATOMIC_RELAXED);
    }
}

static void cpu_sample(kvs_backend *be, const float *const *logits, int32_t n_vocab, const kvs_draw *draws, kvs_drawn *out, int32_t n) {
    enum { LIKE = 8 }; /* an exponential in double is like so many elements */
    kvs_cpu *cpu = (kvs_cpu *)be;
    if (kvs_cpu_stopped(cpu)) return;
    sample_args args = {logits, draws, out, n_vocab, KVS_OK};
    kvs_cpu_loop(cpu, sample_rows, &args, n, KVS_MAX(PIECE / LIKE / KVS_MAX(n_vocab, 1), 1));
    if (!cpu->status) cpu->status = args.status;
}

typedef struct finite_args {
    const kvs_rowops *ops;
    const float *x;
    int64_t cols;
    float limit;
    int64_t first; /* bad row, atomic; n = none */
} finite_args;

static void finite_rows(void *arg, int64_t begin, int64_t end, int32_t thread) {
    finite_args *a = arg;
    (void)thread;
    int64_t row = begin;
    while (row < end && a->ops->within(a->x + row * a->cols, a->limit, a->cols)) row++;
    int64_t first = __atomic_load_n(&a->first, __ATOMIC_RELAXED);
    while (row < end && row < first && !__atomic_compare_exchange_n(&a->first, &first, row, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}

static void cpu_finite(kvs_backend *be, const float *x, int32_t n, int32_t cols, float limit, int32_t place) {
    kvs_cpu *cpu = (kvs_cpu *)be;
    if (kvs_cpu_stopped(cpu)) return;
    finite_args args = {cpu->isa->rows, x, cols, limit, n};
    kvs_cpu_loop(cpu, finite_rows, &args, n, KVS_MAX(4 * PIECE / KVS_MAX(cols, 1), 1));
    if (cpu->status || args.first == n) return;
    const float *value = x + args.first * cols;
    while (fabsf(*value) <= limit) value++;
    cpu->status = KVS_E_NUMERIC;
    cpu->fault = (kvs_fault){place, (int32_t)args.first, *value};
}

/* ---- open and close ---- */

static void cpu_close(kvs_backend *be) {
    kvs_cpu *cpu = (kvs_cpu *)be;
    if (!cpu) return;
    kvs_pool_free(cpu->pool);
    kvs_free_aligned(cpu->x_scratch);
    kvs_free_aligned(cpu->thread_scratch);
    free(cpu);
}

static const kvs_ops cpu_ops = {
    .close = cpu_close,
    .alloc = cpu_alloc,
    .alloc_layers = cpu_alloc_layers,
    .free_memory = cpu_free_memory,
    .release = cpu_release,
    .upload = cpu_copy,
    .download = cpu_copy,
    .download_rows = cpu_download_rows,
    .copy = cpu_copy,
    .weight_room = kvs_cpu_weight_room,
    .alloc_weights = kvs_cpu_alloc_weights,
    .place = kvs_cpu_place,
    .end_place = cpu_end_place,
    .begin = cpu_begin,
    .status = cpu_status,
    .end = cpu_end,
    .rows = kvs_cpu_rows,
    .matmul = kvs_cpu_matmul,
    .norm = cpu_norm,
    .angles = cpu_angles,
    .rope = cpu_rope,
    .add = cpu_add,
    .gate = cpu_gate,
    .unary = cpu_unary,
    .scatter = cpu_scatter,
    .finite = cpu_finite,
    .attn = kvs_cpu_attn,
    .attn_full = kvs_cpu_attn_full,
    .kv_put = kvs_cpu_kv_put,
    .kv_record = kvs_cpu_kv_record,
    .kv_smooth = kvs_cpu_kv_smooth,
    .kv_mix = kvs_cpu_kv_mix,
    .kv_scale = kvs_cpu_kv_scale,
    .kv_put_out = kvs_cpu_kv_put_out,
    .kv_tell = kvs_cpu_kv_tell,
    .sample = cpu_sample,
    .kv_score = kvs_cpu_kv_score,
    .kv_gather = kvs_cpu_kv_gather,
    .kv_scatter = kvs_cpu_kv_scatter,
    .kv_trim = kvs_cpu_kv_trim,
};

int kvs_cpu_open(int32_t threads, kvs_backend **out, kvs_error *err) { return kvs_cpu_open_isa(NULL, threads, out, err); }

int kvs_cpu_open_isa(const char *name, int32_t threads, kvs_backend **out, kvs_error *err) {
    *out = NULL;
    const kvs_isa *isa;
    int status = kvs_isa_choose(name, &isa, err);
    if (status) return status;
    kvs_cpu *cpu = kvs_calloc(1, sizeof *cpu);
    if (!cpu) return kvs_fail_memory(err, sizeof *cpu, "the CPU backend");
    status = kvs_pool_new(threads, &cpu->pool, err);
    if (status) {
        free(cpu);
        return status;
    }
    cpu->isa = isa;
    cpu->bf16 = kvs_isa_bf16(isa);
    cpu->ahead = kvs_isa_ahead();
    cpu->base.ops = &cpu_ops;
    cpu->base.host_memory = true;
    cpu->base.has_bf16 = cpu->bf16 != NULL;
    cpu->base.threads = kvs_pool_threads(cpu->pool);
    cpu->base.threads_missing = kvs_pool_missing(cpu->pool);
    snprintf(cpu->base.name, sizeof cpu->base.name, "cpu");
    snprintf(cpu->base.reason, sizeof cpu->base.reason, "kernels: %s (%s)", isa->name, kvs_isa_why());
    *out = &cpu->base;
    return KVS_OK;
}
