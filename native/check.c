#include "check.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

/* ---- comparing ---- */

void kvs_check_fail(kvs_check *c, const char *format, ...) {
    if (c->status) return;
    va_list args;
    va_start(args, format);
    vsnprintf(c->message, sizeof c->message, format, args);
    va_end(args);
    c->status = KVS_E_DEVICE;
}

bool kvs_check_enter(kvs_check *c) { return !c->status && !c->cpu->ops->status(c->cpu) && !c->device->ops->status(c->device); }

void *kvs_check_there(kvs_check *c, const void *address) {
    void *there = kvs_twins_use(&c->twins, KVS_DEVICE, address, 0, 0);
    if (!there && address && !c->status) c->status = KVS_E_MEMORY;
    return there;
}

static bool reserve_buffer(kvs_check *c, uint64_t bytes) {
    if (bytes <= c->buffer_bytes) return true;
    uint8_t *grown = kvs_realloc(c->buffer, bytes, 1);
    if (!grown) {
        if (!c->status) c->status = KVS_E_MEMORY;
        return false;
    }
    c->buffer = grown;
    c->buffer_bytes = bytes;
    return true;
}

const uint8_t *kvs_check_fetch(kvs_check *c, const void *address, uint64_t bytes) {
    const void *there = kvs_check_there(c, address);
    if (!there || !reserve_buffer(c, bytes)) return NULL;
    c->device->ops->download(c->device, c->buffer, there, bytes);
    return c->device->ops->status(c->device) ? NULL : c->buffer;
}

static bool same(float a, float b, float apart) { return a == b || (isnan(a) && isnan(b)) || fabsf(a - b) <= apart; }

/* Of finite values: where there are none, others must be the same. */
static float largest(const float *x, int64_t n) {
    float top = 0;
    for (int64_t i = 0; i < n; i++)
        if (isfinite(x[i])) top = KVS_MAX(top, fabsf(x[i]));
    return top;
}

bool kvs_check_compare(kvs_check *c, const char *op, const float *there, const float *here, int64_t rows, int64_t cols, float bound) {
    for (int64_t i = 0; i < rows; i++, there += cols, here += cols) {
        float top = largest(here, cols), apart = bound * top, most = -1;
        int64_t worst = -1;
        for (int64_t j = 0; j < cols; j++) {
            if (same(there[j], here[j], apart)) continue;
            float distance = isfinite(there[j] - here[j]) ? fabsf(there[j] - here[j]) : INFINITY;
            if (distance > most) most = distance, worst = j;
        }
        if (worst < 0) continue;
        kvs_check_fail(c, "%s: value %lld of row %lld (%lld x %lld) is %.9g on %s, and %.9g on the CPU: more than %.3g apart, %.1e of %.9g",
                       op, (long long)worst, (long long)i, (long long)rows, (long long)cols, (double)there[worst], c->device->name,
                       (double)here[worst], (double)apart, (double)bound, (double)top);
        return false;
    }
    return true;
}

void kvs_check_floats(kvs_check *c, const char *op, float *x, int64_t rows, int64_t cols, float bound) {
    if (!x || rows < 1 || cols < 1 || !kvs_check_enter(c)) return;
    uint64_t bytes = (uint64_t)rows * (uint64_t)cols * sizeof *x;
    const uint8_t *there = kvs_check_fetch(c, x, bytes);
    if (!there) return;
    kvs_check_compare(c, op, (const float *)(const void *)there, x, rows, cols, bound);
    memcpy(x, there, (size_t)bytes);
}

/* ---- memory: on both sides, always the same ---- */

static void *check_alloc(kvs_backend *be, uint64_t bytes) {
    kvs_check *c = (kvs_check *)be;
    void *block = kvs_twins_alloc(&c->twins, bytes);
    if (block && kvs_twins_use(&c->twins, KVS_DEVICE, block, 0, 0)) return block; /* now, not in a step */
    if (block) kvs_twins_release(&c->twins, block);
    return NULL;
}

static void *check_alloc_layers(kvs_backend *be, int32_t n_layer, uint64_t bytes_per_layer) {
    return kvs_twins_alloc_layers(&((kvs_check *)be)->twins, n_layer, 0, bytes_per_layer);
}

static uint64_t check_free_memory(kvs_backend *be) {
    kvs_check *c = (kvs_check *)be;
    return c->device->ops->free_memory(c->device);
}

static void check_release(kvs_backend *be, void *block) {
    kvs_check *c = (kvs_check *)be;
    if (kvs_twins_find(&c->twins, block))
        kvs_twins_release(&c->twins, block);
    else
        c->device->ops->release(c->device, block); /* of weights */
}

static uint8_t *on_device(kvs_check *c, const void *address) { return kvs_twin_on_device(kvs_twins_find(&c->twins, address), address); }

static void check_upload(kvs_backend *be, void *dst, const void *src, uint64_t bytes) {
    kvs_check *c = (kvs_check *)be;
    c->device->ops->upload(c->device, on_device(c, dst), src, bytes);
    memcpy(dst, src, (size_t)bytes);
}

static void check_download(kvs_backend *be, void *dst, const void *src, uint64_t bytes) {
    kvs_check *c = (kvs_check *)be;
    c->device->ops->download(c->device, dst, on_device(c, src), bytes);
}

static void check_download_rows(kvs_backend *be, void *dst, const void *src, uint64_t bytes, uint64_t stride, int32_t n) {
    kvs_check *c = (kvs_check *)be;
    c->device->ops->download_rows(c->device, dst, on_device(c, src), bytes, stride, n);
}

static void check_copy(kvs_backend *be, void *dst, const void *src, uint64_t bytes) {
    kvs_check *c = (kvs_check *)be;
    c->device->ops->copy(c->device, on_device(c, dst), on_device(c, src), bytes);
    memmove(dst, src, (size_t)bytes);
}

/* ---- weights ---- */

static uint64_t check_weight_room(kvs_backend *be, const kvs_weight *w) {
    kvs_check *c = (kvs_check *)be;
    return c->device->ops->weight_room(c->device, w);
}

static void *check_alloc_weights(kvs_backend *be, uint64_t bytes, bool on_host) {
    kvs_check *c = (kvs_check *)be;
    return c->device->ops->alloc_weights(c->device, bytes, on_host);
}

static bool check_place(kvs_backend *be, kvs_weight *w, void *room, const int32_t *cancel) {
    kvs_check *c = (kvs_check *)be;
    kvs_check_weight both = {.here = *w};
    c->status = KVS_OK;
    if (c->n_weights == c->room_weights) {
        int32_t more = 2 * c->room_weights + 64;
        kvs_check_weight *grown = kvs_realloc(c->weights, (uint64_t)more, sizeof *grown);
        if (!grown) {
            c->status = KVS_E_MEMORY;
            return false;
        }
        c->weights = grown;
        c->room_weights = more;
    }
    if (!c->device->ops->place(c->device, w, room, cancel)) return false;
    both.there = w->data;
    c->weights[c->n_weights++] = both;
    return true;
}

static void check_end_place(kvs_backend *be) {
    kvs_check *c = (kvs_check *)be;
    c->device->ops->end_place(c->device);
}

static const kvs_weight *here(const kvs_check *c, const void *there) { /* what the file has; NULL: nothing that was placed */
    for (int32_t i = 0; i < c->n_weights; i++)
        if (c->weights[i].there == there) return &c->weights[i].here;
    return NULL;
}

static const float *vector_here(const kvs_check *c, const float *there) {
    const kvs_weight *w = there ? here(c, there) : NULL;
    return w ? w->data : there;
}

/* ---- steps ---- */

static void check_begin(kvs_backend *be, const kvs_step *step) {
    kvs_check *c = (kvs_check *)be;
    c->step = step;
    c->cpu_step = c->device_step = *step;
    c->cpu_step.fault = &c->cpu_fault;
    c->device_step.fault = &c->device_fault;
    c->device_step.rows = kvs_twins_rows(&c->twins, step);
    c->status = c->device_step.rows ? KVS_OK : KVS_E_MEMORY;
    if (c->status) c->device_step.n = 0;
    c->told_layers.n = 0;
    c->n_drawn = 0;
    c->cpu->ops->begin(c->cpu, &c->cpu_step);
    c->device->ops->begin(c->device, &c->device_step);
}

static int check_status(kvs_backend *be) {
    kvs_check *c = (kvs_check *)be;
    int status = c->device->ops->status(c->device);
    if (!status) status = c->status;
    return status ? status : c->cpu->ops->status(c->cpu);
}

/* One of them may have been cancelled before it came to what the other found. */
static void compare_faults(kvs_check *c, int cpu, int device) {
    const kvs_fault *a = &c->device_fault, *b = &c->cpu_fault;
    if (device == KVS_E_NUMERIC && !cpu)
        kvs_check_fail(c, "finite: %s finds %g in row %d at place %d, and the CPU nothing", c->device->name, (double)a->value, a->row,
                       a->place);
    else if (!device && cpu == KVS_E_NUMERIC)
        kvs_check_fail(c, "finite: the CPU finds %g in row %d at place %d, and %s nothing", (double)b->value, b->row, b->place,
                       c->device->name);
    else if (device == KVS_E_NUMERIC && cpu == KVS_E_NUMERIC && (a->place != b->place || a->row != b->row))
        kvs_check_fail(c, "finite: %s finds row %d at place %d, and the CPU row %d at place %d", c->device->name, a->row, a->place, b->row,
                       b->place);
}

static int check_end(kvs_backend *be, kvs_error *err) {
    kvs_check *c = (kvs_check *)be;
    kvs_error of_cpu = {.struct_size = sizeof of_cpu}, of_device = {.struct_size = sizeof of_device};
    int cpu = c->cpu->ops->end(c->cpu, &of_cpu), device = c->device->ops->end(c->device, &of_device);
    compare_faults(c, cpu, device);
    if (!device && !cpu && !c->status) kvs_check_ended(c);
    int status = c->status;
    c->status = KVS_OK;
    if (device == KVS_E_NUMERIC && c->step->fault) *c->step->fault = c->device_fault;
    c->step = NULL;
    if (status == KVS_E_DEVICE) return kvs_fail(err, status, "KVS_CHECK: %s", c->message);
    if (status) return kvs_fail_room(c->device, err, 0, "a comparison");
    if (!device && !cpu) return KVS_OK;
    if (err) *err = device ? of_device : of_cpu;
    return device ? device : cpu;
}

/* ---- dense ops ---- */

#define THERE(x) kvs_check_there(c, x)

static void check_rows(kvs_backend *be, float *y, const kvs_weight *table, const int32_t *ids, int32_t n) {
    kvs_check *c = (kvs_check *)be;
    const kvs_weight *of_file = here(c, table->data);
    float *y_there = THERE(y);
    if (!kvs_check_enter(c)) return;
    c->device->ops->rows(c->device, y_there, table, ids, n);
    c->cpu->ops->rows(c->cpu, y, of_file ? of_file : table, ids, n);
    kvs_check_floats(c, "rows", y, n, table->cols, KVS_CHECK_FLOAT);
}

/* The CPU multiplies in float32 whatever is asked for: two roundings would hide each other. */
static void multiply_here(kvs_check *c, const kvs_matmul *job, const float *x, int32_t n) {
    const kvs_weight *of_file = here(c, job->w->data);
    kvs_matmul exact = {job->y, of_file ? of_file : job->w, vector_here(c, job->bias), KVS_ROUND_NONE};
    float bound = job->rounding == KVS_ROUND_NONE || job->w->type == KVS_TYPE_F32 ? KVS_CHECK_FLOAT
                  : job->rounding == KVS_ROUND_BF16                               ? KVS_CHECK_BF16
                                                                                  : KVS_CHECK_INT8;
    c->cpu->ops->matmul(c->cpu, &exact, 1, x, n);
    kvs_check_floats(c, "matmul", job->y, n, job->w->rows, bound);
}

static void check_matmul(kvs_backend *be, const kvs_matmul *jobs, int32_t n_jobs, const float *x, int32_t n) {
    enum { MAX_JOBS = 8 };
    kvs_check *c = (kvs_check *)be;
    kvs_matmul there[MAX_JOBS];
    for (; n_jobs > MAX_JOBS; jobs += MAX_JOBS, n_jobs -= MAX_JOBS) check_matmul(be, jobs, MAX_JOBS, x, n);
    for (int32_t i = 0; i < n_jobs; i++) there[i] = jobs[i], there[i].y = THERE(jobs[i].y);
    const float *x_there = THERE(x);
    if (!kvs_check_enter(c)) return;
    c->device->ops->matmul(c->device, there, n_jobs, x_there, n);
    for (int32_t i = 0; i < n_jobs; i++) multiply_here(c, &jobs[i], x, n);
}

static void check_norm(kvs_backend *be, float *y, const float *x, const float *w, const float *bias, float eps, int32_t n, int32_t cols) {
    kvs_check *c = (kvs_check *)be;
    float *y_there = THERE(y), *x_there = THERE(x);
    if (!kvs_check_enter(c)) return;
    c->device->ops->norm(c->device, y_there, x_there, w, bias, eps, n, cols);
    c->cpu->ops->norm(c->cpu, y, x, vector_here(c, w), vector_here(c, bias), eps, n, cols);
    kvs_check_floats(c, "norm", y, n, cols, KVS_CHECK_FLOAT);
}

static kvs_rope rope_there(kvs_check *c, const kvs_rope *rope) {
    return (kvs_rope){.n_rot = rope->n_rot, .inv_freq = THERE(rope->inv_freq), .table = THERE(rope->table)};
}

static void check_angles(kvs_backend *be, const kvs_rope *rope) {
    kvs_check *c = (kvs_check *)be;
    kvs_rope there = rope_there(c, rope);
    if (!kvs_check_enter(c)) return;
    c->device->ops->angles(c->device, &there);
    c->cpu->ops->angles(c->cpu, rope);
    kvs_check_floats(c, "angles", rope->table, c->step->n, rope->n_rot, KVS_CHECK_FLOAT);
}

static void check_rope(kvs_backend *be, float *x, const kvs_rope *rope, int32_t n, int32_t n_head, int32_t head_dim) {
    kvs_check *c = (kvs_check *)be;
    kvs_rope there = rope_there(c, rope);
    float *x_there = THERE(x);
    if (!kvs_check_enter(c)) return;
    c->device->ops->rope(c->device, x_there, &there, n, n_head, head_dim);
    c->cpu->ops->rope(c->cpu, x, rope, n, n_head, head_dim);
    kvs_check_floats(c, "rope", x, (int64_t)n * n_head, head_dim, KVS_CHECK_FLOAT);
}

/* Values that belong to no row are compared as one. */
static void check_add(kvs_backend *be, float *y, const float *x, int64_t n) {
    kvs_check *c = (kvs_check *)be;
    float *y_there = THERE(y), *x_there = THERE(x);
    if (!kvs_check_enter(c)) return;
    c->device->ops->add(c->device, y_there, x_there, n);
    c->cpu->ops->add(c->cpu, y, x, n);
    kvs_check_floats(c, "add", y, 1, n, KVS_CHECK_EXACT);
}

static void check_gate(kvs_backend *be, float *g, const float *u, int64_t n) {
    kvs_check *c = (kvs_check *)be;
    float *g_there = THERE(g), *u_there = THERE(u);
    if (!kvs_check_enter(c)) return;
    c->device->ops->gate(c->device, g_there, u_there, n);
    c->cpu->ops->gate(c->cpu, g, u, n);
    kvs_check_floats(c, "gate", g, 1, n, KVS_CHECK_FLOAT);
}

static void check_unary(kvs_backend *be, int32_t kind, float *x, int64_t n) {
    kvs_check *c = (kvs_check *)be;
    float *x_there = THERE(x);
    if (!kvs_check_enter(c)) return;
    c->device->ops->unary(c->device, kind, x_there, n);
    c->cpu->ops->unary(c->cpu, kind, x, n);
    kvs_check_floats(c, "unary", x, 1, n, KVS_CHECK_FLOAT);
}

static void check_scatter(kvs_backend *be, float *const *y, const float *x, int32_t n, int32_t cols) {
    kvs_check *c = (kvs_check *)be;
    const float *x_there = THERE(x);
    for (int32_t i = 0; i < n; i++) {
        float *row = THERE(y[i]);
        if (!kvs_check_enter(c)) return;
        c->device->ops->scatter(c->device, &row, x_there + (int64_t)i * cols, 1, cols);
        c->cpu->ops->scatter(c->cpu, y + i, x + (int64_t)i * cols, 1, cols);
        kvs_check_floats(c, "scatter", y[i], 1, cols, KVS_CHECK_EXACT);
    }
}

static void check_finite(kvs_backend *be, const float *x, int32_t n, int32_t cols, float limit, int32_t place) {
    kvs_check *c = (kvs_check *)be;
    const float *x_there = THERE(x);
    if (!kvs_check_enter(c)) return;
    c->device->ops->finite(c->device, x_there, n, cols, limit, place);
    c->cpu->ops->finite(c->cpu, x, n, cols, limit, place);
}

static void check_attn_full(kvs_backend *be, const float *q, const float *k, const float *v, float *out, int32_t n, int32_t n_head,
                            int32_t head_dim, int32_t rounding) {
    kvs_check *c = (kvs_check *)be;
    const float *q_there = THERE(q), *k_there = THERE(k), *v_there = THERE(v);
    float *out_there = THERE(out);
    if (!kvs_check_enter(c)) return;
    c->device->ops->attn_full(c->device, q_there, k_there, v_there, out_there, n, n_head, head_dim, rounding);
    c->cpu->ops->attn_full(c->cpu, q, k, v, out, n, n_head, head_dim, KVS_ROUND_NONE);
    kvs_check_floats(c, "attn_full", out, n, (int64_t)n_head * head_dim, rounding == KVS_ROUND_NONE ? KVS_CHECK_SUMS : KVS_CHECK_BF16);
}

/* ---- open and close ---- */

static void check_close(kvs_backend *be) {
    kvs_check *c = (kvs_check *)be;
    kvs_twins_free(&c->twins);
    c->device->ops->close(c->device);
    c->cpu->ops->close(c->cpu);
    free(c->weights);
    free(c->buffer);
    free(c->smooth_jobs);
    free(c->told);
    free(c->told_here);
    free(c->drawn_here);
    free(c);
}

static const kvs_ops check_ops = {
    .close = check_close,
    .alloc = check_alloc,
    .alloc_layers = check_alloc_layers,
    .free_memory = check_free_memory,
    .release = check_release,
    .upload = check_upload,
    .download = check_download,
    .download_rows = check_download_rows,
    .copy = check_copy,
    .weight_room = check_weight_room,
    .alloc_weights = check_alloc_weights,
    .place = check_place,
    .end_place = check_end_place,
    .begin = check_begin,
    .status = check_status,
    .end = check_end,
    .rows = check_rows,
    .matmul = check_matmul,
    .norm = check_norm,
    .angles = check_angles,
    .rope = check_rope,
    .add = check_add,
    .gate = check_gate,
    .unary = check_unary,
    .scatter = check_scatter,
    .finite = check_finite,
    .attn = kvs_check_attn,
    .attn_full = check_attn_full,
    .kv_put = kvs_check_kv_put,
    .kv_record = kvs_check_kv_record,
    .kv_smooth = kvs_check_kv_smooth,
    .kv_mix = kvs_check_kv_mix,
    .kv_scale = kvs_check_kv_scale,
    .kv_put_out = kvs_check_kv_put_out,
    .kv_tell = kvs_check_kv_tell,
    .sample = kvs_check_sample,
    .kv_score = kvs_check_kv_score,
    .kv_gather = kvs_check_kv_gather,
    .kv_scatter = kvs_check_kv_scatter,
    .kv_trim = kvs_check_kv_trim,
};

bool kvs_check_wanted(void) {
    const char *wish = getenv("KVS_CHECK");
    return wish && !strcmp(wish, "1");
}

int kvs_check_open(kvs_backend *device, kvs_backend *cpu, kvs_backend **out, kvs_error *err) {
    *out = NULL;
    kvs_check *c = kvs_calloc(1, sizeof *c);
    if (!c) return kvs_fail_memory(err, sizeof *c, "a backend");
    if (!kvs_twins_init(&c->twins, cpu, device)) {
        free(c);
        return kvs_fail_memory(err, sizeof(kvs_kv), "the list of a backend");
    }
    c->cpu = cpu;
    c->device = device;
    c->base.ops = &check_ops;
    c->base.device = device;
    c->base.has_bf16 = device->has_bf16;
    c->base.has_f16 = device->has_f16;
    c->base.whole_arrays = true;
    memcpy(c->base.name, device->name, sizeof c->base.name);
    snprintf(c->base.reason, sizeof c->base.reason, "checked by the CPU; %.190s", device->reason);
    *out = &c->base;
    return KVS_OK;
}
