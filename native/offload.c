#include "offload.h"

#include "twin.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_RANGES = 8, MAX_JOBS = 8 };

typedef struct range { /* weights on the device */
    uintptr_t begin, end;
} range;

typedef struct offload {
    kvs_backend base; /* first: a kvs_backend * to it is an offload * */
    kvs_backend *cpu, *device;
    kvs_twins twins;
    range weights[MAX_RANGES]; /* (n_weights) */
    int32_t n_weights;
    /* between begin and end */
    const kvs_step *step;
    int32_t side;    /* where the last op ran */
    int32_t status;  /* a failure of our own, KVS_OK so far */
    int32_t failed;  /* the side that failed first, 0: none so far */
    uint64_t needed; /* bytes that the device did not have */
    kvs_step host_step, device_step;
    kvs_fault host_fault, device_fault;
    kvs_smooth_job smooth_jobs[MAX_JOBS]; /* at one address in every layer: what the device has staged for one serves all */
    kvs_mix_job mix_job;
    kvs_scale_job scale_job;
} offload;

static _Thread_local const offload *stepping; /* whose step this thread has begun */

static kvs_backend *child(const offload *o, int32_t side) { return side == KVS_HOST ? o->cpu : o->device; }

/* ---- memory ---- */

static void *offload_alloc(kvs_backend *be, uint64_t bytes) { return kvs_twins_alloc(&((offload *)be)->twins, bytes); }

static void *offload_alloc_layers(kvs_backend *be, int32_t n_layer, uint64_t bytes_per_layer) {
    return kvs_twins_alloc_layers(&((offload *)be)->twins, n_layer, be->host_layers, bytes_per_layer);
}

static uint64_t offload_free_memory(kvs_backend *be) {
    offload *o = (offload *)be;
    return o->device->ops->free_memory(o->device);
}

static int32_t side_of_block(offload *o, const void *block) { /* of memory that alloc_weights gave */
    for (int32_t i = 0; i < o->n_weights; i++)
        if ((uintptr_t)block >= o->weights[i].begin && (uintptr_t)block < o->weights[i].end) return KVS_DEVICE;
    return KVS_HOST;
}

static void offload_release(kvs_backend *be, void *block) {
    offload *o = (offload *)be;
    if (kvs_twins_find(&o->twins, block)) {
        kvs_twins_release(&o->twins, block);
        return;
    }
    kvs_backend *owner = child(o, side_of_block(o, block));
    owner->ops->release(owner, block);
    for (int32_t i = 0; i < o->n_weights; i++)
        if (o->weights[i].begin == (uintptr_t)block) o->weights[i] = o->weights[--o->n_weights];
}

/* ---- copies ---- */

static void put(offload *o, uint8_t *dst, const uint8_t *src, uint64_t bytes) { /* src: host, of nobody */
    kvs_twin *to = kvs_twins_find(&o->twins, dst);
    for (uint64_t n; bytes && to; dst += n, src += n, bytes -= n) {
        n = bytes;
        int32_t side = to->layers ? kvs_twin_where(to, dst, &n) : KVS_HOST;
        if (side == KVS_HOST)
            memcpy(dst, src, (size_t)n);
        else
            o->device->ops->upload(o->device, kvs_twin_on_device(to, dst), src, n);
        kvs_twin_wrote(&o->twins, to, side, dst, n);
    }
}

static void get(offload *o, uint8_t *dst, const uint8_t *src, uint64_t bytes) { /* dst: host, of nobody */
    const kvs_twin *from = kvs_twins_find(&o->twins, src);
    for (uint64_t n; bytes && from; dst += n, src += n, bytes -= n) {
        n = bytes;
        if (kvs_twin_where(from, src, &n) & KVS_HOST)
            memcpy(dst, src, (size_t)n);
        else
            o->device->ops->download(o->device, dst, kvs_twin_on_device(from, src), n);
    }
}

static void offload_upload(kvs_backend *be, void *dst, const void *src, uint64_t bytes) { put((offload *)be, dst, src, bytes); }

static void offload_download(kvs_backend *be, void *dst, const void *src, uint64_t bytes) { get((offload *)be, dst, src, bytes); }

/* Rows of an array of a cache that lie on the device go in one piece. */
static void offload_download_rows(kvs_backend *be, void *dst, const void *src, uint64_t bytes, uint64_t stride, int32_t n) {
    offload *o = (offload *)be;
    const kvs_twin *from = kvs_twins_find(&o->twins, src);
    int32_t i = 0;
    for (uint64_t there; from && i < n; i++) {
        const uint8_t *row = (const uint8_t *)src + (uint64_t)i * stride;
        there = UINT64_MAX;
        if (from->layers && kvs_twin_where(from, row, &there) == KVS_DEVICE) break;
        get(o, (uint8_t *)dst + (uint64_t)i * bytes, row, bytes);
    }
    if (from && i < n)
        o->device->ops->download_rows(o->device, (uint8_t *)dst + (uint64_t)i * bytes,
                                      kvs_twin_on_device(from, (const uint8_t *)src + (uint64_t)i * stride), bytes, stride, n - i);
}

/* Where a piece of a copy comes from: the side that it goes to if it is valid there, else where the last op ran, else any. */
static int32_t source_side(const offload *o, int32_t fresh, int32_t wanted) {
    if (fresh & wanted) return wanted;
    if (stepping == o && fresh & o->side) return o->side;
    return fresh & KVS_HOST ? KVS_HOST : KVS_DEVICE;
}

static void copy_piece(offload *o, kvs_twin *to, uint8_t *dst, const kvs_twin *from, const uint8_t *src, uint64_t n, int32_t fresh) {
    uint64_t all = n;
    int32_t wanted = to->layers ? kvs_twin_where(to, dst, &all) : 0, side = source_side(o, fresh, wanted), target = wanted ? wanted : side;
    if (target == KVS_DEVICE && !to->layers && !kvs_twins_use(&o->twins, KVS_DEVICE, dst, n, 0)) target = KVS_HOST; /* no room there */
    kvs_backend *device = o->device;
    if (side == KVS_HOST && target == KVS_HOST)
        memmove(dst, src, (size_t)n);
    else if (side == KVS_HOST)
        device->ops->upload(device, kvs_twin_on_device(to, dst), src, n);
    else if (target == KVS_HOST)
        device->ops->download(device, dst, kvs_twin_on_device(from, src), n);
    else
        device->ops->copy(device, kvs_twin_on_device(to, dst), kvs_twin_on_device(from, src), n);
    kvs_twin_wrote(&o->twins, to, target, dst, n);
}

static void offload_copy(kvs_backend *be, void *dst, const void *src, uint64_t bytes) {
    offload *o = (offload *)be;
    kvs_twin *to = kvs_twins_find(&o->twins, dst), *from = kvs_twins_find(&o->twins, src);
    uint8_t *d = dst;
    const uint8_t *s = src;
    for (uint64_t n; bytes && to && from; d += n, s += n, bytes -= n) {
        n = bytes;
        int32_t fresh = kvs_twin_where(from, s, &n);
        if (to->layers) kvs_twin_where(to, d, &n);
        copy_piece(o, to, d, from, s, n, fresh);
    }
}

/* ---- weights ---- */

static int32_t side_of(const kvs_weight *w) { return w->on_host ? KVS_HOST : KVS_DEVICE; }

static uint64_t offload_weight_room(kvs_backend *be, const kvs_weight *w) {
    kvs_backend *owner = child((offload *)be, side_of(w));
    return owner->ops->weight_room(owner, w);
}

static void *offload_alloc_weights(kvs_backend *be, uint64_t bytes, bool on_host) {
    offload *o = (offload *)be;
    kvs_backend *owner = on_host ? o->cpu : o->device;
    if (!on_host && o->n_weights == MAX_RANGES) return NULL;
    void *block = owner->ops->alloc_weights(owner, bytes, on_host);
    if (block && !on_host) o->weights[o->n_weights++] = (range){(uintptr_t)block, (uintptr_t)block + bytes};
    return block;
}

static bool offload_place(kvs_backend *be, kvs_weight *w, void *room, const int32_t *cancel) {
    kvs_backend *owner = child((offload *)be, side_of(w));
    return owner->ops->place(owner, w, room, cancel);
}

static void offload_end_place(kvs_backend *be) {
    offload *o = (offload *)be;
    o->device->ops->end_place(o->device);
    o->cpu->ops->end_place(o->cpu);
}

/* ---- steps ---- */

/* NULL: the step has failed. */
static kvs_kv *kv_of(offload *o, int32_t side, const kvs_kv *kv) {
    kvs_kv *there = side == KVS_HOST ? (kvs_kv *)kv : kvs_twins_kv(&o->twins, kv);
    if (!there) o->status = KVS_E_MEMORY;
    return there;
}

static void offload_begin(kvs_backend *be, const kvs_step *step) {
    offload *o = (offload *)be;
    stepping = o;
    o->step = step;
    o->side = be->host_layers ? KVS_HOST : KVS_DEVICE;
    o->failed = 0;
    o->needed = 0;
    const kvs_row *rows = kvs_twins_rows(&o->twins, step);
    o->status = rows ? KVS_OK : KVS_E_MEMORY;
    o->host_step = *step;
    o->host_step.fault = &o->host_fault;
    o->device_step = (kvs_step){.rows = rows, .n = rows ? step->n : 0, .cancel = step->cancel, .fault = &o->device_fault};
    o->cpu->ops->begin(o->cpu, &o->host_step);
    o->device->ops->begin(o->device, &o->device_step);
}

/* Where the first failure was. */
static void find_failure(offload *o) {
    if (!o->failed && o->cpu->ops->status(o->cpu)) o->failed = KVS_HOST;
    if (!o->failed && o->device->ops->status(o->device)) o->failed = KVS_DEVICE;
}

static int offload_status(kvs_backend *be) {
    offload *o = (offload *)be;
    find_failure(o);
    if (o->failed) return child(o, o->failed)->ops->status(child(o, o->failed));
    return o->status;
}

static int offload_end(kvs_backend *be, kvs_error *err) {
    offload *o = (offload *)be;
    kvs_error of_host = {.struct_size = sizeof of_host}, of_device = {.struct_size = sizeof of_device};
    find_failure(o);
    int host = o->cpu->ops->end(o->cpu, &of_host), device = o->device->ops->end(o->device, &of_device);
    bool host_first = o->failed ? o->failed == KVS_HOST : host != KVS_OK;
    int status = host_first ? host : device; /* the device's may be known only now */
    const kvs_fault *fault = host_first ? &o->host_fault : &o->device_fault;
    if (status == KVS_E_NUMERIC && o->step->fault) *o->step->fault = *fault;
    if (status && err) *err = host_first ? of_host : of_device;
    if (!status && o->status) status = kvs_fail_room(o->device, err, o->needed, "the working space of a step");
    o->step = NULL;
    o->status = KVS_OK;
    o->failed = 0;
    stepping = NULL;
    return status;
}

/* ---- ops: each says on which side it runs, and which bytes it uses there ---- */

static int32_t side_of_layer(const offload *o, int32_t layer) { return layer < o->base.host_layers ? KVS_HOST : KVS_DEVICE; }

/* false: the step has failed, here or there. */
static bool enter(offload *o, int32_t side) {
    find_failure(o);
    o->side = side;
    return !o->failed && !o->status;
}

static float *use(offload *o, const float *x, int64_t n, int32_t access) {
    uint64_t bytes = (uint64_t)n * sizeof *x;
    float *there = kvs_twins_use(&o->twins, o->side, x, bytes, access);
    if (there || !x) return there;
    o->status = KVS_E_MEMORY;
    o->needed = bytes;
    return NULL;
}

static int32_t side_of_value(offload *o, const float *x) { /* where it is; both: the device */
    uint64_t bytes = sizeof *x;
    const kvs_twin *twin = kvs_twins_find(&o->twins, x);
    return twin && kvs_twin_where(twin, x, &bytes) & KVS_DEVICE ? KVS_DEVICE : KVS_HOST;
}

/* rows of its table; 0: it is not looked at */
static kvs_rope use_rope(offload *o, const kvs_rope *rope, int64_t rows, int32_t access) {
    kvs_rope there = *rope;
    there.inv_freq = use(o, rope->inv_freq, rope->n_rot / 2, KVS_READ);
    there.table = rows ? use(o, rope->table, rows * rope->n_rot, access) : NULL;
    return there;
}

/* What the rows of the step are wide: 0 without rows. */
static int64_t q_size(const offload *o) {
    const kvs_kv *kv = o->step->n ? o->step->rows->kv : NULL;
    return kv ? (int64_t)o->step->n * kv->n_head * kv->head_dim : 0;
}

static int64_t kv_size(const offload *o) {
    const kvs_kv *kv = o->step->n ? o->step->rows->kv : NULL;
    return kv ? (int64_t)o->step->n * kv->n_kv_head * kv->head_dim : 0;
}

static kvs_taps use_taps(offload *o, const kvs_taps *taps, int32_t access) {
    int64_t n = o->step->n ? (int64_t)o->step->n * o->step->rows->kv->n_head : 0;
    return (kvs_taps){use(o, taps->entropy, n, access), use(o, taps->mass, n, access), use(o, taps->lse, n, access)};
}

static void offload_rows(kvs_backend *be, float *y, const kvs_weight *table, const int32_t *ids, int32_t n) {
    offload *o = (offload *)be;
    if (!enter(o, side_of(table))) return;
    kvs_backend *c = child(o, o->side);
    y = use(o, y, n * table->cols, KVS_WRITE);
    if (!o->status) c->ops->rows(c, y, table, ids, n);
}

static void multiply(offload *o, const kvs_matmul *jobs, int32_t n_jobs, const float *x, int32_t n) {
    kvs_matmul there[MAX_JOBS];
    kvs_backend *c = child(o, o->side);
    x = use(o, x, n * jobs->w->cols, KVS_READ);
    for (int32_t i = 0; i < n_jobs; i++) {
        there[i] = jobs[i];
        there[i].y = use(o, jobs[i].y, n * jobs[i].w->rows, KVS_WRITE);
    }
    if (!o->status) c->ops->matmul(c, there, n_jobs, x, n);
}

static void offload_matmul(kvs_backend *be, const kvs_matmul *jobs, int32_t n_jobs, const float *x, int32_t n) {
    offload *o = (offload *)be;
    for (int32_t i = 0, run = 1; i < n_jobs; i += run) {
        int32_t side = side_of(jobs[i].w);
        for (run = 1; i + run < n_jobs && run < MAX_JOBS && side_of(jobs[i + run].w) == side;) run++;
        if (enter(o, side)) multiply(o, jobs + i, run, x, n);
    }
}

static void offload_norm(kvs_backend *be, float *y, const float *x, const float *w, const float *bias, float eps, int32_t n, int32_t cols) {
    offload *o = (offload *)be;
    if (!enter(o, side_of_block(o, w))) return;
    kvs_backend *c = child(o, o->side);
    x = use(o, x, (int64_t)n * cols, KVS_READ);
    y = use(o, y, (int64_t)n * cols, KVS_WRITE);
    if (!o->status) c->ops->norm(c, y, x, w, bias, eps, n, cols);
}

static void offload_angles(kvs_backend *be, const kvs_rope *rope) {
    offload *o = (offload *)be;
    if (!enter(o, o->side)) return;
    kvs_backend *c = child(o, o->side);
    kvs_rope there = use_rope(o, rope, o->step->n, KVS_WRITE);
    if (!o->status) c->ops->angles(c, &there);
}

static void offload_rope(kvs_backend *be, float *x, const kvs_rope *rope, int32_t n, int32_t n_head, int32_t head_dim) {
    offload *o = (offload *)be;
    if (!enter(o, o->side)) return;
    kvs_backend *c = child(o, o->side);
    kvs_rope there = use_rope(o, rope, n, KVS_READ);
    x = use(o, x, (int64_t)n * n_head * head_dim, KVS_READ | KVS_WRITE);
    if (!o->status) c->ops->rope(c, x, &there, n, n_head, head_dim);
}

static void offload_add(kvs_backend *be, float *y, const float *x, int64_t n) {
    offload *o = (offload *)be;
    if (!enter(o, o->side)) return;
    kvs_backend *c = child(o, o->side);
    x = use(o, x, n, KVS_READ);
    y = use(o, y, n, KVS_READ | KVS_WRITE);
    if (!o->status) c->ops->add(c, y, x, n);
}

static void offload_gate(kvs_backend *be, float *g, const float *u, int64_t n) {
    offload *o = (offload *)be;
    if (!enter(o, o->side)) return;
    kvs_backend *c = child(o, o->side);
    u = use(o, u, n, KVS_READ);
    g = use(o, g, n, KVS_READ | KVS_WRITE);
    if (!o->status) c->ops->gate(c, g, u, n);
}

static void offload_unary(kvs_backend *be, int32_t kind, float *x, int64_t n) {
    offload *o = (offload *)be;
    if (!enter(o, o->side)) return;
    kvs_backend *c = child(o, o->side);
    x = use(o, x, n, KVS_READ | KVS_WRITE);
    if (!o->status) c->ops->unary(c, kind, x, n);
}

/* Each row goes to memory of the side where x is. */
static void offload_scatter(kvs_backend *be, float *const *y, const float *x, int32_t n, int32_t cols) {
    enum { RUN = 64 };
    float *there[RUN];
    offload *o = (offload *)be;
    for (int32_t first = 0, run; first < n && enter(o, side_of_value(o, x)); first += run) {
        kvs_backend *c = child(o, o->side);
        run = KVS_MIN(n - first, (int32_t)RUN);
        const float *rows = use(o, x + (int64_t)first * cols, (int64_t)run * cols, KVS_READ);
        for (int32_t i = 0; i < run; i++) there[i] = use(o, y[first + i], cols, KVS_WRITE);
        if (!o->status) c->ops->scatter(c, there, rows, run, cols);
    }
}

/* Each row where it is, neighbours that lie on one side at once: logits that a file had are on the host. */
static void offload_sample(kvs_backend *be, const float *const *logits, int32_t n_vocab, const kvs_draw *draws, kvs_drawn *out, int32_t n) {
    enum { RUN = 64 };
    const float *there[RUN];
    offload *o = (offload *)be;
    for (int32_t first = 0, run; first < n && enter(o, side_of_value(o, logits[first])); first += run) {
        kvs_backend *c = child(o, o->side);
        for (run = 0; run < RUN && first + run < n && side_of_value(o, logits[first + run]) == o->side; run++)
            there[run] = use(o, logits[first + run], n_vocab, KVS_READ);
        if (!o->status) c->ops->sample(c, there, n_vocab, draws + first, out + first, run);
    }
}

static void offload_finite(kvs_backend *be, const float *x, int32_t n, int32_t cols, float limit, int32_t place) {
    offload *o = (offload *)be;
    if (!enter(o, o->side)) return;
    kvs_backend *c = child(o, o->side);
    x = use(o, x, (int64_t)n * cols, KVS_READ);
    if (!o->status) c->ops->finite(c, x, n, cols, limit, place);
}

static void offload_attn(kvs_backend *be, int32_t layer, const float *q, float *out, const kvs_taps *taps) {
    offload *o = (offload *)be;
    if (!enter(o, side_of_layer(o, layer))) return;
    kvs_backend *c = child(o, o->side);
    q = use(o, q, q_size(o), KVS_READ);
    out = use(o, out, q_size(o), KVS_WRITE);
    kvs_taps there = use_taps(o, taps, KVS_WRITE);
    if (!o->status) c->ops->attn(c, layer, q, out, &there);
}

static void offload_attn_full(kvs_backend *be, const float *q, const float *k, const float *v, float *out, int32_t n, int32_t n_head,
                              int32_t head_dim, int32_t rounding) {
    offload *o = (offload *)be;
    if (!enter(o, o->side)) return;
    kvs_backend *c = child(o, o->side);
    int64_t size = (int64_t)n * n_head * head_dim;
    q = use(o, q, size, KVS_READ);
    k = use(o, k, size, KVS_READ);
    v = use(o, v, size, KVS_READ);
    out = use(o, out, size, KVS_WRITE);
    if (!o->status) c->ops->attn_full(c, q, k, v, out, n, n_head, head_dim, rounding);
}

/* ---- caches ---- */

static void offload_kv_put(kvs_backend *be, int32_t layer, const float *k, const float *v) {
    offload *o = (offload *)be;
    if (!enter(o, side_of_layer(o, layer))) return;
    kvs_backend *c = child(o, o->side);
    k = use(o, k, kv_size(o), KVS_READ);
    v = use(o, v, kv_size(o), KVS_READ);
    if (!o->status) c->ops->kv_put(c, layer, k, v);
}

static void offload_kv_record(kvs_backend *be, int32_t layer, const float *q, const kvs_taps *taps) {
    offload *o = (offload *)be;
    if (!enter(o, side_of_layer(o, layer))) return;
    kvs_backend *c = child(o, o->side);
    q = use(o, q, q_size(o), KVS_READ);
    kvs_taps there = use_taps(o, taps, KVS_READ);
    if (!o->status) c->ops->kv_record(c, layer, q, &there);
}

static void offload_kv_put_out(kvs_backend *be, int32_t layer, const float *out) {
    offload *o = (offload *)be;
    if (!enter(o, side_of_layer(o, layer))) return;
    kvs_backend *c = child(o, o->side);
    out = use(o, out, q_size(o), KVS_READ);
    if (!o->status) c->ops->kv_put_out(c, layer, out);
}

static void offload_kv_tell(kvs_backend *be, kvs_range layers, float *const *told) {
    offload *o = (offload *)be;
    int32_t end = layers.first + layers.n, cut = KVS_MIN(KVS_MAX(be->host_layers, layers.first), end);
    kvs_range here = {layers.first, cut - layers.first}, there = {cut, end - cut};
    if (here.n && enter(o, KVS_HOST)) o->cpu->ops->kv_tell(o->cpu, here, told);
    if (there.n && enter(o, KVS_DEVICE)) o->device->ops->kv_tell(o->device, there, told);
}

static void offload_kv_smooth(kvs_backend *be, int32_t layer, const kvs_smooth_job *jobs, int32_t n_jobs, const kvs_rope *rope,
                              float *out) {
    offload *o = (offload *)be;
    for (int32_t first = 0, n; first < n_jobs && enter(o, side_of_layer(o, layer)); first += n) {
        kvs_backend *c = child(o, o->side);
        n = KVS_MIN(n_jobs - first, (int32_t)MAX_JOBS);
        float *out_there = use(o, out, q_size(o), KVS_READ | KVS_WRITE);
        kvs_rope there = rope ? use_rope(o, rope, 0, 0) : (kvs_rope){0};
        for (int32_t i = 0; i < n; i++) {
            o->smooth_jobs[i] = jobs[first + i];
            o->smooth_jobs[i].kv = kv_of(o, o->side, jobs[first + i].kv);
        }
        if (!o->status) c->ops->kv_smooth(c, layer, o->smooth_jobs, n, rope ? &there : NULL, out_there);
    }
}

static void offload_kv_mix(kvs_backend *be, int32_t layer, const kvs_mix_job *job, const kvs_rope *rope) {
    offload *o = (offload *)be;
    if (!enter(o, side_of_layer(o, layer))) return;
    kvs_backend *c = child(o, o->side);
    kvs_rope there = use_rope(o, rope, job->rope_pre ? job->row + job->mix->n : 0, KVS_READ);
    o->mix_job = *job;
    o->mix_job.kv = kv_of(o, o->side, job->kv);
    if (!o->status) c->ops->kv_mix(c, layer, &o->mix_job, &there);
}

static void offload_kv_scale(kvs_backend *be, int32_t layer, const kvs_scale_job *job) {
    offload *o = (offload *)be;
    if (!enter(o, side_of_layer(o, layer))) return;
    kvs_backend *c = child(o, o->side);
    o->scale_job = *job;
    o->scale_job.kv = kv_of(o, o->side, job->kv);
    if (!o->status) c->ops->kv_scale(c, layer, &o->scale_job);
}

static void offload_kv_score(kvs_backend *be, const kvs_kv *kv, int32_t layer, int32_t maximum, float *scores) {
    offload *o = (offload *)be;
    if (!enter(o, side_of_layer(o, layer))) return;
    kvs_backend *c = child(o, o->side);
    const kvs_range *spans = kvs_kv_spans(kv, layer, 0);
    int64_t rows = 0;
    for (int32_t i = 0; i < kv->n_spans; i++) rows += spans[i].n;
    scores = use(o, scores, rows * kv->n_kv_head, KVS_WRITE);
    const kvs_kv *there = kv_of(o, o->side, kv);
    if (!o->status) c->ops->kv_score(c, there, layer, maximum, scores);
}

static void move_rows(offload *o, const kvs_kv *kv, const kvs_move *moves, int32_t n, bool back) {
    for (int32_t i = 0, run = 1; i < n; i += run) {
        int32_t side = side_of_layer(o, moves[i].layer);
        for (run = 1; i + run < n && side_of_layer(o, moves[i + run].layer) == side;) run++;
        if (!enter(o, side)) return;
        kvs_backend *c = child(o, side);
        const kvs_kv *there = kv_of(o, side, kv);
        if (!o->status) (back ? c->ops->kv_scatter : c->ops->kv_gather)(c, there, moves + i, run);
    }
}

static void offload_kv_gather(kvs_backend *be, const kvs_kv *kv, const kvs_move *moves, int32_t n) {
    move_rows((offload *)be, kv, moves, n, false);
}

static void offload_kv_scatter(kvs_backend *be, const kvs_kv *kv, const kvs_move *moves, int32_t n) {
    move_rows((offload *)be, kv, moves, n, true);
}

static void offload_kv_trim(kvs_backend *be, const kvs_kv *kv, int32_t layer, int32_t n_rows) {
    offload *o = (offload *)be;
    if (!enter(o, side_of_layer(o, layer))) return;
    kvs_backend *c = child(o, o->side);
    const kvs_kv *there = kv_of(o, o->side, kv);
    if (!o->status) c->ops->kv_trim(c, there, layer, n_rows);
}

/* ---- open and close ---- */

static void offload_close(kvs_backend *be) {
    offload *o = (offload *)be;
    kvs_twins_free(&o->twins);
    o->device->ops->close(o->device);
    o->cpu->ops->close(o->cpu);
    free(o);
}

static const kvs_ops offload_ops = {
    .close = offload_close,
    .alloc = offload_alloc,
    .alloc_layers = offload_alloc_layers,
    .free_memory = offload_free_memory,
    .release = offload_release,
    .upload = offload_upload,
    .download = offload_download,
    .download_rows = offload_download_rows,
    .copy = offload_copy,
    .weight_room = offload_weight_room,
    .alloc_weights = offload_alloc_weights,
    .place = offload_place,
    .end_place = offload_end_place,
    .begin = offload_begin,
    .status = offload_status,
    .end = offload_end,
    .rows = offload_rows,
    .matmul = offload_matmul,
    .norm = offload_norm,
    .angles = offload_angles,
    .rope = offload_rope,
    .add = offload_add,
    .gate = offload_gate,
    .unary = offload_unary,
    .scatter = offload_scatter,
    .finite = offload_finite,
    .attn = offload_attn,
    .attn_full = offload_attn_full,
    .kv_put = offload_kv_put,
    .kv_record = offload_kv_record,
    .kv_smooth = offload_kv_smooth,
    .kv_mix = offload_kv_mix,
    .kv_scale = offload_kv_scale,
    .kv_put_out = offload_kv_put_out,
    .kv_tell = offload_kv_tell,
    .sample = offload_sample,
    .kv_score = offload_kv_score,
    .kv_gather = offload_kv_gather,
    .kv_scatter = offload_kv_scatter,
    .kv_trim = offload_kv_trim,
};

int kvs_offload_open(kvs_backend *device, kvs_backend *cpu, int32_t host_layers, kvs_backend **out, kvs_error *err) {
    *out = NULL;
    offload *o = kvs_calloc(1, sizeof *o);
    if (!o) return kvs_fail_memory(err, sizeof *o, "a backend");
    if (!kvs_twins_init(&o->twins, cpu, device)) {
        free(o);
        return kvs_fail_memory(err, sizeof(kvs_kv), "the list of a backend");
    }
    o->cpu = cpu;
    o->device = device;
    o->base.ops = &offload_ops;
    o->base.device = device;
    o->base.host_layers = host_layers;
    o->base.threads = cpu->threads;
    o->base.threads_missing = cpu->threads_missing;
    memcpy(o->base.name, device->name, sizeof o->base.name);
    *out = &o->base;
    return KVS_OK;
}
