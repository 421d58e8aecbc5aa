/* check.h - KVS_CHECK=1: a backend over a device and the CPU, which runs every op on both with equal inputs, and compares. The CPU's results
 * are only looked at: what goes on is the device's. The first op that differs by more than its bound fails its step, KVS_E_DEVICE. Slow. */
#ifndef KVS_CHECK_H
#define KVS_CHECK_H
#include "twin.h"

bool kvs_check_wanted(void); /* by the environment */
/* Takes both over, if it succeeds. */
int kvs_check_open(kvs_backend *device, kvs_backend *cpu, kvs_backend **out, kvs_error *err);

/* ---- for check.c, check_kv.c ---- */

typedef struct kvs_check_weight { /* as the device has it, and as the file has it */
    const void *there;
    kvs_weight here;
} kvs_check_weight;

/* Blocks are twins. Between two ops both sides of them hold the same. */
typedef struct kvs_check {
    kvs_backend base; /* first: a kvs_backend * to it is a kvs_check * */
    kvs_backend *cpu, *device;
    kvs_twins twins;
    kvs_check_weight *weights; /* (n_weights) */
    int32_t n_weights, room_weights;
    /* between begin and end */
    const kvs_step *step;
    kvs_step cpu_step, device_step;
    kvs_fault cpu_fault, device_fault;
    int32_t status;    /* KVS_OK so far, KVS_E_MEMORY, or KVS_E_DEVICE: */
    char message[400]; /* what differs */
    uint8_t *buffer;   /* what the device has, while it is compared */
    uint64_t buffer_bytes;
    kvs_smooth_job *smooth_jobs; /* (room_jobs) for the device */
    int32_t room_jobs;
    kvs_mix_job mix_job;
    kvs_scale_job scale_job;
    /* What the device gives at the end, and the CPU has given */
    float **told, *told_here; /* (step->n) where it goes; (step->n, 3, n_layer) */
    kvs_range told_layers;    /* none: nothing was told */
    const kvs_drawn *drawn;   /* (n_drawn) where they go; n_drawn 0: nothing was drawn */
    kvs_drawn *drawn_here; /* (n_drawn, 3) with the random number, a little less, a little more: a sum that is rounded may pass it or not */
    int32_t n_drawn, n_vocab;
} kvs_check;

/* Of the largest value in a row. Exact: rows that are only moved or rounded in the same way. Float: products and functions in float32. */
#define KVS_CHECK_EXACT 0.0f
#define KVS_CHECK_FLOAT 1e-4f
#define KVS_CHECK_SUMS  1e-3f /* attention: long sums of exponentials */
#define KVS_CHECK_BF16  2e-2f
#define KVS_CHECK_INT8  5e-2f

bool kvs_check_enter(kvs_check *check);                       /* false: the step has failed, here or there */
void *kvs_check_there(kvs_check *check, const void *address); /* on the device; NULL: the step has failed */
/* The device's bytes, until the next call; NULL: the step has failed. */
const uint8_t *kvs_check_fetch(kvs_check *check, const void *address, uint64_t bytes);
/* x (rows, cols), which both have written: what the device has, and from now on the CPU, too. */
void kvs_check_floats(kvs_check *check, const char *op, float *x, int64_t rows, int64_t cols, float bound);
bool kvs_check_compare(kvs_check *check, const char *op, const float *there, const float *here, int64_t rows, int64_t cols, float bound);
void kvs_check_fail(kvs_check *check, const char *format, ...) __attribute__((format(printf, 2, 3))); /* the first one is told */

/* check_end.c: both are compared by kvs_check_ended, once all has gone well */
void kvs_check_kv_tell(kvs_backend *be, kvs_range layers, float *const *told);
void kvs_check_sample(kvs_backend *be, const float *const *logits, int32_t n_vocab, const kvs_draw *draws, kvs_drawn *out, int32_t n);
void kvs_check_ended(kvs_check *check);

/* check_kv.c */
void kvs_check_attn(kvs_backend *be, int32_t layer, const float *q, float *out, const kvs_taps *taps);
void kvs_check_kv_put(kvs_backend *be, int32_t layer, const float *k, const float *v);
void kvs_check_kv_record(kvs_backend *be, int32_t layer, const float *q, const kvs_taps *taps);
void kvs_check_kv_smooth(kvs_backend *be, int32_t layer, const kvs_smooth_job *jobs, int32_t n_jobs, const kvs_rope *rope, float *out);
void kvs_check_kv_mix(kvs_backend *be, int32_t layer, const kvs_mix_job *job, const kvs_rope *rope);
void kvs_check_kv_scale(kvs_backend *be, int32_t layer, const kvs_scale_job *job);
void kvs_check_kv_put_out(kvs_backend *be, int32_t layer, const float *out);
void kvs_check_kv_score(kvs_backend *be, const kvs_kv *kv, int32_t layer, int32_t maximum, float *scores);
void kvs_check_kv_gather(kvs_backend *be, const kvs_kv *kv, const kvs_move *moves, int32_t n);
void kvs_check_kv_scatter(kvs_backend *be, const kvs_kv *kv, const kvs_move *moves, int32_t n);
void kvs_check_kv_trim(kvs_backend *be, const kvs_kv *kv, int32_t layer, int32_t n_rows);
#endif
