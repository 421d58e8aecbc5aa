/* kv.c - rows of the cache: storing them, multiplying them, remembering their entropies, and KVSmooth's mix. */
#include "../strength.h"
#include "cpu.h"

#include <math.h>
#include <string.h>

/* ---- kv_put, kv_put_out ---- */

typedef struct put_job {
    kvs_cpu *cpu;
    int32_t layer;
    const float *k, *v;
} put_job;

/* A slot of the ring of exact rows is shared by rows n_exact apart: only the newest of a step may write it. */
static bool newest_of_slot(const kvs_step *step, int32_t i) {
    const kvs_kv *kv = step->rows[i].kv;
    int64_t next = (int64_t)i + kv->n_exact;
    return kv->n_exact > 0 && (next >= step->n || step->rows[next].kv != kv);
}

static void put_row(const put_job *job, int32_t i, const float *x, uint8_t *base, float *exact) {
    const kvs_row *row = &job->cpu->step->rows[i];
    const kvs_kv *kv = row->kv;
    int64_t width = (int64_t)kv->n_kv_head * kv->head_dim, place = kvs_kv_place(kv, job->layer, row->index);
    x += i * width;
    for (int32_t h = 0; h < kv->n_kv_head; h++)
        job->cpu->isa->rows->store(kv->type, kvs_kv_rows(kv, base, job->layer, h) + place * kv->row_bytes, x + h * kv->head_dim,
                                   kv->head_dim);
    if (exact && newest_of_slot(job->cpu->step, i))
        memcpy(exact + kvs_kv_exact(kv, job->layer, row->index, kv->n_kv_head), x, (size_t)width * sizeof *x);
}

static void put_rows(void *arg, int64_t begin, int64_t end, int32_t thread) {
    const put_job *job = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const kvs_kv *kv = job->cpu->step->rows[i].kv;
        put_row(job, (int32_t)i, job->k, kv->k, kv->exact_k);
        put_row(job, (int32_t)i, job->v, kv->v, kv->exact_v);
    }
}

void kvs_cpu_kv_put(kvs_backend *be, int32_t layer, const float *k, const float *v) {
    kvs_cpu *cpu = (kvs_cpu *)be;
    if (kvs_cpu_stopped(cpu)) return;
    put_job job = {.cpu = cpu, .layer = layer, .k = k, .v = v};
    kvs_cpu_loop(cpu, put_rows, &job, cpu->step->n, 4);
}

void kvs_cpu_kv_put_out(kvs_backend *be, int32_t layer, const float *out) {
    kvs_cpu *cpu = (kvs_cpu *)be;
    if (kvs_cpu_stopped(cpu)) return;
    for (int32_t i = 0; i < cpu->step->n; i++) {
        const kvs_row *row = &cpu->step->rows[i];
        const kvs_kv *kv = row->kv;
        int64_t width = (int64_t)kv->n_head * kv->head_dim;
        if (kv->exact_o && newest_of_slot(cpu->step, i))
            memcpy(kv->exact_o + kvs_kv_exact(kv, layer, row->index, kv->n_head), out + i * width, (size_t)width * sizeof *out);
    }
}

/* ---- kv_scale ---- */

typedef struct scaler {
    const kvs_rowops *ops;
    const kvs_scale_job *job;
    int32_t layer;
} scaler;

static void multiply(float *x, float factor, int32_t n) {
    for (int32_t i = 0; i < n; i++) x[i] *= factor;
}

/* One of K and V, row i of a head: what is stored and what is exact, each by itself. */
static void scale_row(const scaler *s, int32_t head, int32_t i, uint8_t *base, float *exact) {
    const kvs_scale_job *job = s->job;
    const kvs_kv *kv = job->kv;
    uint8_t *row = kvs_kv_rows(kv, base, s->layer, head) + kvs_scale_place(job, head, i) * kv->row_bytes;
    float x[KVS_MAX_HEAD_DIM];
    s->ops->load(kv->type, row, x, kv->head_dim);
    multiply(x, job->factor, kv->head_dim);
    s->ops->store(kv->type, row, x, kv->head_dim);
    if (!exact || job->indices[i] < job->exact_from) return;
    exact += kvs_kv_exact(kv, s->layer, job->indices[i], kv->n_kv_head) + (int64_t)head * kv->head_dim;
    multiply(exact, job->factor, kv->head_dim);
}

static void scale_some(void *arg, int64_t begin, int64_t end, int32_t thread) {
    const scaler *s = arg;
    const kvs_scale_job *job = s->job;
    (void)thread;
    for (int64_t at = begin; at < end; at++) {
        int32_t head = (int32_t)(at / job->n), i = (int32_t)(at % job->n);
        if (kvs_scale_place(job, head, i) < 0) continue;
        if (job->target & KVS_TARGET_K) scale_row(s, head, i, job->kv->k, job->kv->exact_k);
        if (job->target & KVS_TARGET_V) scale_row(s, head, i, job->kv->v, job->kv->exact_v);
    }
}

void kvs_cpu_kv_scale(kvs_backend *be, int32_t layer, const kvs_scale_job *job) {
    kvs_cpu *cpu = (kvs_cpu *)be;
    if (kvs_cpu_stopped(cpu) || job->factor == 1.0f) return;
    scaler s = {.ops = cpu->isa->rows, .job = job, .layer = layer};
    kvs_cpu_loop(cpu, scale_some, &s, (int64_t)job->n * job->kv->n_kv_head, 64);
}

/* ---- kv_record ---- */

static float mean(const float *x, int32_t n) {
    double sum = 0;
    for (int32_t i = 0; i < n; i++) sum += (double)x[i];
    return (float)(sum / n);
}

static void keep_query(const kvs_kv *kv, int32_t layer, const float *q, const float *lse) {
    int64_t width = (int64_t)kv->n_head * kv->head_dim;
    memcpy(kv->query + layer * width, q, (size_t)width * sizeof *q);
    memcpy(kv->lse + (int64_t)layer * kv->n_head, lse, (size_t)kv->n_head * sizeof *lse);
}

void kvs_cpu_kv_record(kvs_backend *be, int32_t layer, const float *q, const kvs_taps *taps) {
    kvs_cpu *cpu = (kvs_cpu *)be;
    if (kvs_cpu_stopped(cpu)) return;
    for (int32_t i = 0; i < cpu->step->n; i++) {
        const kvs_row *row = &cpu->step->rows[i];
        const kvs_kv *kv = row->kv;
        int64_t place = kvs_kv_history(kv, layer, row->index);
        int32_t heads = kv->n_head / kv->n_group; /* query heads of a KV head are neighbours */
        for (int32_t g = 0; g < kv->n_group; g++) {
            kv->entropy[place + g] = mean(taps->entropy + (int64_t)i * kv->n_head + g * heads, heads);
            kv->strength[place + g] = NAN;
        }
        kv->mass[kvs_kv_mass(kv, layer, row->index)] = mean(taps->mass + (int64_t)i * kv->n_head, kv->n_head);
        bool newest = i + 1 == cpu->step->n || cpu->step->rows[i + 1].kv != kv;
        if (kv->query && newest) keep_query(kv, layer, q + (int64_t)i * kv->n_head * kv->head_dim, taps->lse + (int64_t)i * kv->n_head);
    }
}

/* ---- kv_tell ---- */

void kvs_cpu_kv_tell(kvs_backend *be, kvs_range layers, float *const *told) {
    kvs_cpu *cpu = (kvs_cpu *)be;
    if (kvs_cpu_stopped(cpu)) return;
    for (int32_t i = 0; i < cpu->step->n; i++) {
        const kvs_row *row = &cpu->step->rows[i];
        const kvs_kv *kv = row->kv;
        for (int32_t layer = layers.first; layer < layers.first + layers.n && told[i]; layer++) {
            int64_t place = kvs_kv_history(kv, layer, row->index);
            told[i][layer] = mean(kv->entropy + place, kv->n_group);
            told[i][kv->n_layer + layer] = mean(kv->strength + place, kv->n_group);
            told[i][2 * kv->n_layer + layer] = kv->mass[kvs_kv_mass(kv, layer, row->index)];
        }
    }
}

/* ---- kv_smooth ---- */

typedef struct smoother { /* one job on one layer */
    const kvs_rowops *ops;
    const kvs_smooth_job *job;
    const kvs_smooth_params *params;
    const kvs_kv *kv;
    int32_t layer;
    int32_t n_rot;         /* of the turn that brings the previous key here; 0 = it stays as it is */
    float *turn;           /* (n_rot / 2, 2) */
    const float *strength; /* (n_group) of this row */
} smoother;

/* What is ranked: the entropy of a row, divided by the most that it could be where norm_log_len asks for that. */
static float score(const smoother *s, int32_t entry, int32_t group) {
    int32_t index = s->job->queue[entry];
    float z = s->kv->entropy[kvs_kv_history(s->kv, s->layer, index) + group];
    if (!s->params->norm_log_len) return z;
    bool dropped = s->job->missing && s->kv->dropped && s->kv->dropped[s->layer];
    int32_t seen = index + 1 - (s->kv->exclude_self ? 1 : 0) - (dropped ? s->job->missing[entry] : 0);
    return z / logf((float)KVS_MAX(seen, 2));
}

static float find_strength(const smoother *s, int32_t group) {
    const kvs_smooth_params *p = s->params;
    int32_t n = s->job->n_queue, smaller = 0, equal = 0;
    float self = score(s, n - 1, group);
    for (int32_t i = 0; i + 1 < n; i++) {
        float z = score(s, i, group);
        smaller += z < self;
        equal += z == self;
    }
    return kvs_strength(kvs_rank(smaller, equal, p->midrank), n, p->window, p->den_capacity, p->lambda_ref, p->half_width, p->lambda_max,
                        p->lambda_fixed);
}

static void set_turn(smoother *s, const kvs_rope *rope) {
    if (!s->params->rope_relative || !(s->params->target & KVS_TARGET_K) || !s->job->pos_delta || !rope) return;
    s->n_rot = rope->n_rot;
    for (int32_t i = 0; i < rope->n_rot / 2; i++) {
        double angle = (double)s->job->pos_delta * (double)rope->inv_freq[i];
        s->turn[2 * i] = (float)cos(angle);
        s->turn[2 * i + 1] = (float)sin(angle);
    }
}

/* x = (1 - lambda) x + lambda previous, or only the first half of it */
static void mix_head(const smoother *s, float *x, const float *previous, float lambda, bool turn) {
    int32_t n = s->kv->head_dim;
    float turned[KVS_MAX_HEAD_DIM];
    if (s->params->damp) {
        s->ops->mix(x, x, 1.0f - lambda, 0.0f, n);
        return;
    }
    if (turn) {
        memcpy(turned, previous, (size_t)n * sizeof *turned);
        s->ops->rope(turned, s->turn, 1, n, s->n_rot);
        previous = turned;
    }
    s->ops->mix(x, previous, 1.0f - lambda, lambda, n);
}

/* One of K and V: from exact rows to the store, quantized once, and back into the exact row for the next mix. */
static void smooth_rows(const smoother *s, uint8_t *base, float *exact, bool turn) {
    const kvs_kv *kv = s->kv;
    float *self = exact + kvs_kv_exact(kv, s->layer, s->job->index, kv->n_kv_head);
    int64_t place = kvs_kv_place(kv, s->layer, s->job->index);
    const float *previous = exact + kvs_kv_exact(kv, s->layer, s->job->prev, kv->n_kv_head);
    for (int32_t h = 0; h < kv->n_kv_head; h++, self += kv->head_dim, previous += kv->head_dim) {
        float lambda = s->strength[kv->n_group > 1 ? h : 0], mixed[KVS_MAX_HEAD_DIM];
        if (lambda == 0.0f) continue; /* not a bit may change */
        memcpy(mixed, self, (size_t)kv->head_dim * sizeof *mixed);
        mix_head(s, mixed, previous, lambda, turn);
        s->ops->store(kv->type, kvs_kv_rows(kv, base, s->layer, h) + place * kv->row_bytes, mixed, kv->head_dim);
        if (!s->params->ema_one_step) memcpy(self, mixed, (size_t)kv->head_dim * sizeof *mixed);
    }
}

static void smooth_outputs(const smoother *s, float *out) {
    const kvs_kv *kv = s->kv;
    int64_t width = (int64_t)kv->n_head * kv->head_dim;
    float *row = out + s->job->row * width, *self = kv->exact_o + kvs_kv_exact(kv, s->layer, s->job->index, kv->n_head);
    const float *previous = kv->exact_o + kvs_kv_exact(kv, s->layer, s->job->prev < 0 ? 0 : s->job->prev, kv->n_head);
    int32_t group = kv->n_head / kv->n_group;
    if (s->params->ema_one_step) memcpy(self, row, (size_t)width * sizeof *row);
    for (int32_t h = 0; h < kv->n_head && s->job->prev >= 0; h++) {
        float lambda = s->strength[h / group];
        int64_t place = (int64_t)h * kv->head_dim;
        if (lambda != 0.0f) mix_head(s, row + place, previous + place, lambda, false);
    }
    if (!s->params->ema_one_step) memcpy(self, row, (size_t)width * sizeof *row);
}

static void smooth(const kvs_cpu *cpu, int32_t layer, const kvs_smooth_job *job, const kvs_rope *rope, float *out) {
    const kvs_kv *kv = job->kv;
    float turn[KVS_MAX_HEAD_DIM], *strength = kv->strength + kvs_kv_history(kv, layer, job->index);
    smoother s = {.ops = cpu->isa->rows, .job = job, .params = job->params, .kv = kv, .layer = layer, .turn = turn, .strength = strength};
    int32_t target = job->params->target;
    if (job->prev >= 0) {
        for (int32_t g = 0; g < kv->n_group; g++) strength[g] = find_strength(&s, g);
        set_turn(&s, rope);
        if ((target & KVS_TARGET_K) && kv->exact_k) smooth_rows(&s, kv->k, kv->exact_k, s.n_rot > 0);
        if ((target & KVS_TARGET_V) && kv->exact_v) smooth_rows(&s, kv->v, kv->exact_v, false);
    }
    if ((target & KVS_TARGET_O) && kv->exact_o && out) smooth_outputs(&s, out);
}

typedef struct smooth_jobs {
    const kvs_cpu *cpu;
    int32_t layer;
    const kvs_smooth_job *jobs;
    const kvs_rope *rope;
    float *out;
} smooth_jobs;

static void smooth_some(void *arg, int64_t begin, int64_t end, int32_t thread) {
    const smooth_jobs *all = arg;
    (void)thread;
    for (int64_t i = begin; i < end; i++) smooth(all->cpu, all->layer, &all->jobs[i], all->rope, all->out);
}

void kvs_cpu_kv_smooth(kvs_backend *be, int32_t layer, const kvs_smooth_job *jobs, int32_t n_jobs, const kvs_rope *rope, float *out) {
    kvs_cpu *cpu = (kvs_cpu *)be;
    if (kvs_cpu_stopped(cpu)) return;
    smooth_jobs all = {.cpu = cpu, .layer = layer, .jobs = jobs, .rope = rope, .out = out};
    kvs_cpu_loop(cpu, smooth_some, &all, n_jobs, 2);
}
