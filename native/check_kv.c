/* check_kv.c - ops on caches, on both sides. */
#include "check.h"
#include "quant.h"

#include <stdlib.h>
#include <string.h>

#define THERE(x) kvs_check_there(c, x)

/* ---- what ops have written ---- */

/* Bounds for stored rows: both round the same values, or values that are a last bit apart. */
static float row_bound(int32_t type) { return type == KVS_TYPE_F32 ? KVS_CHECK_FLOAT : type == KVS_TYPE_F16 ? KVS_CHECK_SUMS : 1e-2f; }

/* Rows place..place+n of every head, K and V. */
static void compare_stored(kvs_check *c, const char *op, const kvs_kv *kv, int32_t layer, int64_t place, int32_t n) {
    uint64_t bytes = (uint64_t)n * (uint64_t)kv->row_bytes;
    for (int32_t i = 0; i < 2 * kv->n_kv_head && kvs_check_enter(c); i++) {
        uint8_t *rows = kvs_kv_rows(kv, i % 2 ? kv->v : kv->k, layer, i / 2) + place * kv->row_bytes;
        const uint8_t *there = kvs_check_fetch(c, rows, bytes);
        if (!there) return;
        float a[KVS_MAX_HEAD_DIM], b[KVS_MAX_HEAD_DIM];
        for (int32_t row = 0; row < n; row++) {
            kvs_kv_row_to_f32(kv->type, there + row * kv->row_bytes, a, kv->head_dim);
            kvs_kv_row_to_f32(kv->type, rows + row * kv->row_bytes, b, kv->head_dim);
            if (!kvs_check_compare(c, op, a, b, 1, kv->head_dim, row_bound(kv->type))) break;
        }
        memcpy(rows, there, (size_t)bytes);
    }
}

/* Rows index..index+n of the ring of exact rows of a layer, as far as they are there. What else stands in it need not be equal: a step that
 * failed may have written it on one side only. */
static void compare_ring(kvs_check *c, const char *op, const kvs_kv *kv, int32_t layer, int32_t index, int32_t n, bool outputs,
                         float bound) {
    int64_t width = (int64_t)kv->n_kv_head * kv->head_dim, out_width = (int64_t)kv->n_head * kv->head_dim;
    for (int32_t i = index + KVS_MAX(n - kv->n_exact, 0); i < index + n; i++) {
        int64_t at = kvs_kv_exact(kv, layer, i, kv->n_kv_head);
        if (kv->exact_k) kvs_check_floats(c, op, kv->exact_k + at, 1, width, bound);
        if (kv->exact_v) kvs_check_floats(c, op, kv->exact_v + at, 1, width, bound);
        if (outputs && kv->exact_o) kvs_check_floats(c, op, kv->exact_o + kvs_kv_exact(kv, layer, i, kv->n_head), 1, out_width, bound);
    }
}

static int32_t run_of(const kvs_step *step, int32_t i) { /* rows of the same session from row i on */
    int32_t n = 1;
    while (i + n < step->n && step->rows[i + n].kv == step->rows[i].kv) n++;
    return n;
}

/* ---- ops ---- */

static kvs_taps taps_there(kvs_check *c, const kvs_taps *taps) {
    return (kvs_taps){THERE(taps->entropy), THERE(taps->mass), THERE(taps->lse)};
}

void kvs_check_attn(kvs_backend *be, int32_t layer, const float *q, float *out, const kvs_taps *taps) {
    kvs_check *c = (kvs_check *)be;
    const float *q_there = THERE(q);
    float *out_there = THERE(out);
    kvs_taps there = taps_there(c, taps);
    if (!kvs_check_enter(c) || !c->step->n) return;
    c->device->ops->attn(c->device, layer, q_there, out_there, &there);
    c->cpu->ops->attn(c->cpu, layer, q, out, taps);
    const kvs_kv *kv = c->step->rows->kv;
    int64_t n = c->step->n;
    kvs_check_floats(c, "attn", out, n, (int64_t)kv->n_head * kv->head_dim, KVS_CHECK_SUMS);
    kvs_check_floats(c, "attn, entropy", taps->entropy, n, kv->n_head, KVS_CHECK_SUMS);
    kvs_check_floats(c, "attn, mass", taps->mass, n, kv->n_head, KVS_CHECK_SUMS);
    kvs_check_floats(c, "attn, lse", taps->lse, n, kv->n_head, KVS_CHECK_SUMS);
}

void kvs_check_kv_put(kvs_backend *be, int32_t layer, const float *k, const float *v) {
    kvs_check *c = (kvs_check *)be;
    const float *k_there = THERE(k), *v_there = THERE(v);
    if (!kvs_check_enter(c)) return;
    c->device->ops->kv_put(c->device, layer, k_there, v_there);
    c->cpu->ops->kv_put(c->cpu, layer, k, v);
    const kvs_step *step = c->step;
    for (int32_t i = 0, n; i < step->n; i += n) {
        const kvs_kv *kv = step->rows[i].kv;
        n = run_of(step, i);
        compare_stored(c, "kv_put", kv, layer, kvs_kv_place(kv, layer, step->rows[i].index), n);
        compare_ring(c, "kv_put, exact rows", kv, layer, step->rows[i].index, n, false, KVS_CHECK_EXACT);
    }
}

void kvs_check_kv_put_out(kvs_backend *be, int32_t layer, const float *out) {
    kvs_check *c = (kvs_check *)be;
    const float *out_there = THERE(out);
    if (!kvs_check_enter(c)) return;
    c->device->ops->kv_put_out(c->device, layer, out_there);
    c->cpu->ops->kv_put_out(c->cpu, layer, out);
    const kvs_step *step = c->step;
    for (int32_t i = 0, n; i < step->n; i += n) {
        n = run_of(step, i);
        compare_ring(c, "kv_put_out", step->rows[i].kv, layer, step->rows[i].index, n, true, KVS_CHECK_EXACT);
    }
}

static void compare_history(kvs_check *c, const char *op, const kvs_kv *kv, int32_t layer, int32_t index, int32_t n) {
    int64_t at = kvs_kv_history(kv, layer, index);
    kvs_check_floats(c, op, kv->entropy + at, n, kv->n_group, KVS_CHECK_FLOAT);
    kvs_check_floats(c, op, kv->strength + at, n, kv->n_group, KVS_CHECK_FLOAT);
    kvs_check_floats(c, op, kv->mass + kvs_kv_mass(kv, layer, index), n, 1, KVS_CHECK_FLOAT);
}

void kvs_check_kv_record(kvs_backend *be, int32_t layer, const float *q, const kvs_taps *taps) {
    kvs_check *c = (kvs_check *)be;
    const float *q_there = THERE(q);
    kvs_taps there = taps_there(c, taps);
    if (!kvs_check_enter(c)) return;
    c->device->ops->kv_record(c->device, layer, q_there, &there);
    c->cpu->ops->kv_record(c->cpu, layer, q, taps);
    for (int32_t i = 0, n; i < c->step->n; i += n) {
        const kvs_kv *kv = c->step->rows[i].kv;
        int64_t width = (int64_t)kv->n_head * kv->head_dim;
        n = run_of(c->step, i);
        compare_history(c, "kv_record", kv, layer, c->step->rows[i].index, n);
        if (kv->query) kvs_check_floats(c, "kv_record, query", kv->query + layer * width, 1, width, KVS_CHECK_EXACT);
        if (kv->query) kvs_check_floats(c, "kv_record, lse", kv->lse + (int64_t)layer * kv->n_head, 1, kv->n_head, KVS_CHECK_EXACT);
    }
}

static bool jobs_there(kvs_check *c, const kvs_smooth_job *jobs, int32_t n_jobs) {
    if (n_jobs > c->room_jobs) {
        kvs_smooth_job *grown = kvs_realloc(c->smooth_jobs, (uint64_t)n_jobs, sizeof *grown);
        if (!grown) c->status = KVS_E_MEMORY;
        if (!grown) return false;
        c->smooth_jobs = grown;
        c->room_jobs = n_jobs;
    }
    for (int32_t i = 0; i < n_jobs; i++) {
        c->smooth_jobs[i] = jobs[i];
        c->smooth_jobs[i].kv = kvs_twins_kv(&c->twins, jobs[i].kv);
        if (!c->smooth_jobs[i].kv) c->status = KVS_E_MEMORY;
    }
    return true;
}

void kvs_check_kv_smooth(kvs_backend *be, int32_t layer, const kvs_smooth_job *jobs, int32_t n_jobs, const kvs_rope *rope, float *out) {
    kvs_check *c = (kvs_check *)be;
    float *out_there = THERE(out);
    kvs_rope there = rope ? (kvs_rope){rope->n_rot, THERE(rope->inv_freq), NULL} : (kvs_rope){0};
    if (!kvs_check_enter(c) || !jobs_there(c, jobs, n_jobs) || c->status) return;
    c->device->ops->kv_smooth(c->device, layer, c->smooth_jobs, n_jobs, rope ? &there : NULL, out_there);
    c->cpu->ops->kv_smooth(c->cpu, layer, jobs, n_jobs, rope, out);
    for (int32_t i = 0; i < n_jobs; i++) {
        const kvs_kv *kv = jobs[i].kv;
        compare_history(c, "kv_smooth, strength", kv, layer, jobs[i].index, 1);
        compare_stored(c, "kv_smooth", kv, layer, kvs_kv_place(kv, layer, jobs[i].index), 1);
        compare_ring(c, "kv_smooth, exact rows", kv, layer, jobs[i].index, 1, true, KVS_CHECK_FLOAT);
        if (out) kvs_check_floats(c, "kv_smooth, out", out, c->step->n, (int64_t)kv->n_head * kv->head_dim, KVS_CHECK_FLOAT);
    }
}

void kvs_check_kv_mix(kvs_backend *be, int32_t layer, const kvs_mix_job *job, const kvs_rope *rope) {
    kvs_check *c = (kvs_check *)be;
    kvs_rope there = {rope->n_rot, THERE(rope->inv_freq), THERE(rope->table)};
    c->mix_job = *job;
    c->mix_job.kv = kvs_twins_kv(&c->twins, job->kv);
    if (!c->mix_job.kv && !c->status) c->status = KVS_E_MEMORY;
    if (!kvs_check_enter(c)) return;
    c->device->ops->kv_mix(c->device, layer, &c->mix_job, &there);
    c->cpu->ops->kv_mix(c->cpu, layer, job, rope);
    compare_stored(c, "kv_mix", job->kv, layer, kvs_kv_place(job->kv, layer, job->index), job->mix->n);
    int32_t from = KVS_MAX(job->index, job->exact_from);
    compare_ring(c, "kv_mix, exact rows", job->kv, layer, from, job->index + job->mix->n - from, false, KVS_CHECK_FLOAT);
}

/* From the first place of any head to the last one: what stands between them has not changed. */
static kvs_range places_of(const kvs_scale_job *job) {
    int32_t least = INT32_MAX, most = -1;
    for (int32_t head = 0; head < KVS_MAX(job->n_sets, 1); head++)
        for (int32_t i = 0; i < job->n; i++) {
            int32_t place = kvs_scale_place(job, head, i);
            if (place >= 0) least = KVS_MIN(least, place), most = KVS_MAX(most, place);
        }
    return (kvs_range){least, most < 0 ? 0 : most - least + 1};
}

void kvs_check_kv_scale(kvs_backend *be, int32_t layer, const kvs_scale_job *job) {
    kvs_check *c = (kvs_check *)be;
    c->scale_job = *job;
    c->scale_job.kv = kvs_twins_kv(&c->twins, job->kv);
    if (!c->scale_job.kv && !c->status) c->status = KVS_E_MEMORY;
    if (!kvs_check_enter(c)) return;
    c->device->ops->kv_scale(c->device, layer, &c->scale_job);
    c->cpu->ops->kv_scale(c->cpu, layer, job);
    kvs_range places = places_of(job);
    if (places.n) compare_stored(c, "kv_scale", job->kv, layer, places.first, places.n);
    for (int32_t i = 0; i < job->n; i++)
        if (job->indices[i] >= job->exact_from)
            compare_ring(c, "kv_scale, exact rows", job->kv, layer, job->indices[i], 1, false, KVS_CHECK_EXACT);
}

/* ---- pruning ---- */

void kvs_check_kv_score(kvs_backend *be, const kvs_kv *kv, int32_t layer, int32_t maximum, float *scores) {
    kvs_check *c = (kvs_check *)be;
    float *scores_there = THERE(scores);
    const kvs_kv *there = kvs_twins_kv(&c->twins, kv);
    const kvs_range *spans = kvs_kv_spans(kv, layer, 0);
    int64_t rows = 0;
    for (int32_t i = 0; i < kv->n_spans; i++) rows += spans[i].n;
    if (!there && !c->status) c->status = KVS_E_MEMORY;
    if (!kvs_check_enter(c)) return;
    c->device->ops->kv_score(c->device, there, layer, maximum, scores_there);
    c->cpu->ops->kv_score(c->cpu, kv, layer, maximum, scores);
    kvs_check_floats(c, "kv_score", scores, kv->n_kv_head, rows, KVS_CHECK_SUMS);
}

/* Bytes of the store and of the rows that have left: nothing is rounded. What stands where rows come back that nobody has kept is open. */
static void compare_moved(kvs_check *c, const char *op, const kvs_kv *kv, const kvs_move *move, int32_t n_rows, const uint8_t *left,
                          bool open) {
    uint64_t bytes = (uint64_t)n_rows * (uint64_t)kv->row_bytes, kept = 2 * (uint64_t)move->n * (uint64_t)kv->row_bytes;
    if (left && memcmp(left, move->rows, (size_t)kept))
        kvs_check_fail(c, "%s: rows that leave head %d of layer %d differ from the CPU's", op, move->head, move->layer);
    for (int side = 0; side < 2 && kvs_check_enter(c); side++) {
        uint8_t *rows = kvs_kv_rows(kv, side ? kv->v : kv->k, move->layer, move->head);
        const uint8_t *there = kvs_check_fetch(c, rows, bytes);
        if (!there) return;
        if (!open && memcmp(there, rows, (size_t)bytes))
            kvs_check_fail(c, "%s: %s of head %d of layer %d differ from the CPU's (%d rows)", op, side ? "values" : "keys", move->head,
                           move->layer, n_rows);
        memcpy(rows, there, (size_t)bytes);
    }
}

/* One move after the other: each with rows of its own to compare. Where there is no memory to compare in, rows are moved all the same: callers
 * can't go on without. */
static void move_rows(kvs_check *c, const kvs_kv *kv, const kvs_move *moves, int32_t n, bool back) {
    const kvs_kv *there = kvs_twins_kv(&c->twins, kv); /* never NULL: kvs_twins_init */
    for (int32_t i = 0; i < n && kvs_check_enter(c); i++) {
        const kvs_move *move = &moves[i];
        kvs_move here = *move;
        bool keeps = move->rows && !back; /* both sides write the rows to the host: the CPU's go elsewhere */
        uint8_t *left = keeps ? kvs_calloc(2 * (uint64_t)move->n, (uint64_t)kv->row_bytes) : NULL;
        if (keeps) here.rows = left;
        (back ? c->device->ops->kv_scatter : c->device->ops->kv_gather)(c->device, there, move, 1);
        (back ? c->cpu->ops->kv_scatter : c->cpu->ops->kv_gather)(c->cpu, kv, &here, 1);
        compare_moved(c, back ? "kv_scatter" : "kv_gather", kv, move, back ? move->n_rows : move->n_rows - move->n, left,
                      back && !move->rows);
        free(left);
        if (c->status == KVS_E_MEMORY) c->status = KVS_OK;
    }
}

void kvs_check_kv_gather(kvs_backend *be, const kvs_kv *kv, const kvs_move *moves, int32_t n) {
    move_rows((kvs_check *)be, kv, moves, n, false);
}

void kvs_check_kv_scatter(kvs_backend *be, const kvs_kv *kv, const kvs_move *moves, int32_t n) {
    move_rows((kvs_check *)be, kv, moves, n, true);
}

void kvs_check_kv_trim(kvs_backend *be, const kvs_kv *kv, int32_t layer, int32_t n_rows) {
    kvs_check *c = (kvs_check *)be;
    const kvs_kv *there = kvs_twins_kv(&c->twins, kv);
    if (!there && !c->status) c->status = KVS_E_MEMORY;
    if (!kvs_check_enter(c)) return;
    c->device->ops->kv_trim(c->device, there, layer, n_rows);
    c->cpu->ops->kv_trim(c->cpu, kv, layer, n_rows);
}
