/* prune.c - rows of pictures: what attention the newest row pays each of them, and rows that leave the store or come back. */
#include "cpu.h"

#include <math.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- kv_score ---- */

typedef struct score_job {
    const kvs_cpu *cpu;
    const kvs_kv *kv;
    int32_t layer, maximum, n; /* n: rows of the spans of a head */
    float *scores;
} score_job;

static float reduce(const float *weights, int32_t n, int32_t maximum) {
    double sum = 0;
    float top = weights[0];
    for (int32_t i = 0; i < n; i++) {
        sum += (double)weights[i];
        if (!(top >= weights[i])) top = weights[i]; /* NaN wins */
    }
    return maximum ? top : (float)(sum / n);
}

static void score_head(const score_job *job, int32_t head) {
    const kvs_kv *kv = job->kv;
    int32_t group = kv->n_head / kv->n_kv_head;
    int64_t first = (int64_t)job->layer * kv->n_head + (int64_t)head * group;
    enum { CHUNK = 64 }; /* query heads at a time */
    float weights[CHUNK];
    kvs_weigh_task task = {.kv_type = kv->type, .head_dim = kv->head_dim, .scale = 1.0f / sqrtf((float)kv->head_dim)};
    const uint8_t *rows = kvs_kv_rows(kv, kv->k, job->layer, head);
    const kvs_range *spans = kvs_kv_spans(kv, job->layer, head);
    for (int32_t begin = 0; begin < group; begin += CHUNK) {
        task.n_q = KVS_MIN((int32_t)CHUNK, group - begin);
        task.q = kv->query + (first + begin) * kv->head_dim;
        task.lse = kv->lse + first + begin;
        float *out = job->scores + (int64_t)head * job->n, share = (float)task.n_q / (float)group;
        for (int32_t i = 0; i < kv->n_spans; i++)
            for (int32_t j = 0; j < spans[i].n; j++, out++) {
                job->cpu->isa->rows->weigh(&task, rows + (spans[i].first + j) * kv->row_bytes, weights);
                float score = reduce(weights, task.n_q, job->maximum);
                if (job->maximum)
                    *out = begin && *out >= score ? *out : score;
                else
                    *out = (begin ? *out : 0.0f) + score * share;
            }
    }
}

static void score_heads(void *arg, int64_t begin, int64_t end, int32_t thread) {
    const score_job *job = arg;
    (void)thread;
    for (int64_t head = begin; head < end; head++) score_head(job, (int32_t)head);
}

void kvs_cpu_kv_score(kvs_backend *be, const kvs_kv *kv, int32_t layer, int32_t maximum, float *scores) {
    kvs_cpu *cpu = (kvs_cpu *)be;
    if (kvs_cpu_stopped(cpu)) return;
    score_job job = {.cpu = cpu, .kv = kv, .layer = layer, .maximum = maximum, .scores = scores};
    const kvs_range *spans = kvs_kv_spans(kv, layer, 0);
    for (int32_t i = 0; i < kv->n_spans; i++) job.n += spans[i].n;
    kvs_cpu_loop(cpu, score_heads, &job, kv->n_kv_head, 1);
}

/* ---- kv_gather, kv_scatter ---- */

typedef struct move_jobs {
    const kvs_kv *kv;
    const kvs_move *moves;
    void (*move)(const kvs_move *move, uint8_t *base, uint8_t *kept, int64_t row_bytes);
} move_jobs;

static int32_t run_end(const kvs_move *m, int32_t i) { /* of the rows that stay behind row i of those that leave */
    return i + 1 < m->n ? m->places[i + 1] : m->n_rows;
}

static void gather(const kvs_move *m, uint8_t *base, uint8_t *kept, int64_t row_bytes) {
    for (int32_t i = 0; i < m->n; i++) {
        int64_t place = m->places[i], n = run_end(m, i) - place - 1;
        if (kept) memcpy(kept + i * row_bytes, base + place * row_bytes, (size_t)row_bytes);
        memmove(base + (place - i) * row_bytes, base + (place + 1) * row_bytes, (size_t)(n * row_bytes));
    }
}

static void scatter(const kvs_move *m, uint8_t *base, uint8_t *kept, int64_t row_bytes) {
    for (int32_t i = m->n - 1; i >= 0; i--) {
        int64_t place = m->places[i], n = run_end(m, i) - place - 1;
        memmove(base + (place + 1) * row_bytes, base + (place - i) * row_bytes, (size_t)(n * row_bytes));
        if (kept) memcpy(base + place * row_bytes, kept + i * row_bytes, (size_t)row_bytes);
    }
}

static void move_some(void *arg, int64_t begin, int64_t end, int32_t thread) {
    const move_jobs *jobs = arg;
    const kvs_kv *kv = jobs->kv;
    (void)thread;
    for (int64_t i = begin; i < end; i++) {
        const kvs_move *m = &jobs->moves[i];
        uint8_t *second = m->rows ? m->rows + m->n * kv->row_bytes : NULL;
        jobs->move(m, kvs_kv_rows(kv, kv->k, m->layer, m->head), m->rows, kv->row_bytes);
        jobs->move(m, kvs_kv_rows(kv, kv->v, m->layer, m->head), second, kv->row_bytes);
    }
}

void kvs_cpu_kv_gather(kvs_backend *be, const kvs_kv *kv, const kvs_move *moves, int32_t n) {
    kvs_cpu *cpu = (kvs_cpu *)be;
    if (kvs_cpu_stopped(cpu)) return;
    move_jobs jobs = {.kv = kv, .moves = moves, .move = gather};
    kvs_cpu_loop(cpu, move_some, &jobs, n, 1);
}

void kvs_cpu_kv_scatter(kvs_backend *be, const kvs_kv *kv, const kvs_move *moves, int32_t n) {
    kvs_cpu *cpu = (kvs_cpu *)be;
    if (kvs_cpu_stopped(cpu)) return;
    move_jobs jobs = {.kv = kv, .moves = moves, .move = scatter};
    kvs_cpu_loop(cpu, move_some, &jobs, n, 1);
}

/* ---- kv_trim ---- */

/* Whole pages: they read as zeros afterwards, and take memory again when rows come. A failure costs memory and nothing else. */
static void give_back(uint8_t *begin, uint8_t *end) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t first = ((uintptr_t)begin + page - 1) / page * page, last = (uintptr_t)end / page * page;
    if (first < last) madvise((void *)first, last - first, MADV_DONTNEED);
}

void kvs_cpu_kv_trim(kvs_backend *be, const kvs_kv *kv, int32_t layer, int32_t n_rows) {
    if (kvs_cpu_stopped((kvs_cpu *)be)) return;
    for (int32_t head = 0; head < kv->n_kv_head; head++)
        for (int side = 0; side < 2; side++) {
            uint8_t *rows = kvs_kv_rows(kv, side ? kv->v : kv->k, layer, head);
            give_back(rows + n_rows * kv->row_bytes, rows + kv->n_ctx * kv->row_bytes);
        }
}
