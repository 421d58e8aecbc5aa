/* vision.c - the CLIP tower and the projector of LLaVA-1.5, in backend ops. What Hugging Face computes: class row first, the
 * outputs of the feature layer, class row dropped, no post-norm, Linear - GELU (erf) - Linear. */
#include "llama.h"

#include <stdlib.h>
#include <string.h>

typedef struct tower { /* one encode: N = n_image + 1 rows, E, F of the tower, P = rows of mm0 */
    kvs_model *model;
    const kvs_vision *v;
    int32_t n;
    float *patches;     /* (n_image, 3 patch^2) */
    float *x, *y;       /* (N, E) */
    float *q, *k, *val; /* (N, E) */
    float *wide;        /* (N, max(F, P)) */
    float *out;         /* (n_image, n_embd of the text) */
} tower;

/* host: (3, S, S) -> (n_image, 3 patch^2), columns ordered channel, row, column, as the convolution's weights are */
static void cut_patches(const kvs_vision *v, const float *pixels, float *patches) {
    int64_t size = v->image_size, patch = v->patch_size, grid = size / patch;
    for (int64_t p = 0; p < grid * grid; p++)
        for (int64_t c = 0; c < 3; c++)
            for (int64_t row = 0; row < patch; row++) {
                const float *src = pixels + (c * size + p / grid * patch + row) * size + p % grid * patch;
                for (int64_t col = 0; col < patch; col++) *patches++ = src[col];
            }
}

/* What finite() is told: the embedding, each block, the projector. */
enum { AT_EMBEDDING, AT_BLOCKS };

static int fail_numeric(const kvs_vision *v, const kvs_fault *fault, kvs_error *err) {
    char name[64] = "the embedding of the vision tower";
    int32_t block = fault->place - AT_BLOCKS;
    if (block == v->n_layer)
        snprintf(name, sizeof name, "the picture's rows behind the projector (mm)");
    else if (block >= 0)
        snprintf(name, sizeof name, "block %d of %d of the vision tower (v.blk.%d)", block + 1, v->n_layer, block);
    return kvs_fail_numeric(err, name, fault->value, KVS_BAD_WEIGHTS);
}

typedef struct buffer {
    float **place;
    int64_t columns;
} buffer;

enum { N_BUFFERS = 8 };

static void list_buffers(tower *t, buffer list[N_BUFFERS]) {
    const kvs_vision *v = t->v;
    int64_t E = v->n_embd;
    const buffer all[N_BUFFERS] = {{&t->patches, v->patch_embd.cols},
                                   {&t->x, E},
                                   {&t->y, E},
                                   {&t->q, E},
                                   {&t->k, E},
                                   {&t->val, E},
                                   {&t->wide, KVS_MAX((int64_t)v->n_ff, v->mm0.rows)},
                                   {&t->out, v->mm2.rows}};
    memcpy(list, all, sizeof all);
}

uint64_t kvs_vision_work_bytes(const kvs_model *model) {
    tower t = {.v = &model->vision};
    buffer list[N_BUFFERS];
    uint64_t columns = 0;
    list_buffers(&t, list);
    for (int i = 0; i < N_BUFFERS; i++) columns += (uint64_t)list[i].columns;
    return ((uint64_t)model->vision.n_image + 1) * columns * sizeof(float);
}

static bool allocate(tower *t) {
    buffer list[N_BUFFERS];
    bool ok = true;
    list_buffers(t, list);
    for (int i = 0; i < N_BUFFERS; i++) {
        *list[i].place = ok ? t->model->be->ops->alloc(t->model->be, (uint64_t)t->n * (uint64_t)list[i].columns * sizeof(float)) : NULL;
        ok = *list[i].place != NULL;
    }
    return ok;
}

static void release(tower *t) {
    buffer list[N_BUFFERS];
    list_buffers(t, list);
    for (int i = 0; i < N_BUFFERS; i++)
        if (*list[i].place) t->model->be->ops->release(t->model->be, *list[i].place);
}

static void multiply(const tower *t, float *y, const float *x, const kvs_weight *w, const kvs_weight *bias, int32_t n, int32_t rounding) {
    kvs_matmul job = {.y = y, .w = w, .bias = bias->data, .rounding = rounding};
    t->model->be->ops->matmul(t->model->be, &job, 1, x, n);
}

static void linear(const tower *t, float *y, const float *x, const kvs_weight *w, const kvs_weight *bias, int32_t n) {
    multiply(t, y, x, w, bias, n, t->v->rounding);
}

/* x = pre_ln([class row; patches W] + positions) */
static void embed(const tower *t, const int32_t *ids) {
    const kvs_ops *ops = t->model->be->ops;
    kvs_backend *be = t->model->be;
    const kvs_vision *v = t->v;
    int64_t n = (int64_t)t->n * v->n_embd;
    ops->rows(be, t->y, &v->class_embd, ids, 1);
    /* never rounded: the least of the work, and what is lost here goes through all blocks */
    multiply(t, t->y + v->n_embd, t->patches, &v->patch_embd, &v->patch_bias, v->n_image, KVS_ROUND_NONE);
    ops->rows(be, t->x, &v->position_embd, ids, t->n);
    ops->add(be, t->y, t->x, n);
    ops->norm(be, t->x, t->y, v->pre_ln.data, v->pre_ln_bias.data, v->eps, t->n, v->n_embd);
}

static void block(const tower *t, const kvs_vision_layer *layer) {
    const kvs_ops *ops = t->model->be->ops;
    kvs_backend *be = t->model->be;
    const kvs_vision *v = t->v;
    int64_t size = (int64_t)t->n * v->n_embd;
    ops->norm(be, t->y, t->x, layer->ln1.data, layer->ln1_bias.data, v->eps, t->n, v->n_embd);
    kvs_matmul qkv[] = {{t->q, &layer->q, layer->q_bias.data, v->rounding},
                        {t->k, &layer->k, layer->k_bias.data, v->rounding},
                        {t->val, &layer->v, layer->v_bias.data, v->rounding}};
    ops->matmul(be, qkv, 3, t->y, t->n);
    ops->attn_full(be, t->q, t->k, t->val, t->y, t->n, v->n_head, v->n_embd / v->n_head,
                   layer->o.type == KVS_TYPE_F32 ? KVS_ROUND_NONE : v->rounding);
    linear(t, t->q, t->y, &layer->o, &layer->o_bias, t->n);
    ops->add(be, t->x, t->q, size);
    ops->norm(be, t->y, t->x, layer->ln2.data, layer->ln2_bias.data, v->eps, t->n, v->n_embd);
    linear(t, t->wide, t->y, &layer->up, &layer->up_bias, t->n);
    ops->unary(be, v->act, t->wide, (int64_t)t->n * v->n_ff);
    linear(t, t->y, t->wide, &layer->down, &layer->down_bias, t->n);
    ops->add(be, t->x, t->y, size);
}

static void project(const tower *t) {
    const kvs_vision *v = t->v;
    linear(t, t->wide, t->x + v->n_embd, &v->mm0, &v->mm0_bias, v->n_image);
    t->model->be->ops->unary(t->model->be, KVS_GELU, t->wide, v->n_image * v->mm0.rows);
    linear(t, t->out, t->wide, &v->mm2, &v->mm2_bias, v->n_image);
}

static int run(tower *t, const float *patches, const int32_t *ids, float *embeddings, const int32_t *cancel, kvs_error *err) {
    const kvs_ops *ops = t->model->be->ops;
    const kvs_vision *v = t->v;
    kvs_fault fault;
    kvs_step step = {.cancel = cancel, .fault = &fault};
    ops->begin(t->model->be, &step);
    ops->upload(t->model->be, t->patches, patches, (uint64_t)v->n_image * (uint64_t)v->patch_embd.cols * sizeof(float));
    embed(t, ids);
    ops->finite(t->model->be, t->x, t->n, v->n_embd, KVS_MAX_RESIDUAL, AT_EMBEDDING);
    for (int32_t i = 0; i < v->n_layer; i++) {
        block(t, &v->layers[i]);
        ops->finite(t->model->be, t->x, t->n, v->n_embd, KVS_MAX_RESIDUAL, AT_BLOCKS + i);
    }
    project(t);
    ops->finite(t->model->be, t->out, v->n_image, (int32_t)v->mm2.rows, KVS_MAX_RESIDUAL, AT_BLOCKS + v->n_layer);
    int status = ops->end(t->model->be, err);
    if (status == KVS_E_NUMERIC) status = fail_numeric(v, &fault, err);
    if (kvs_vision_check(t->model, err)) status = KVS_E_FORMAT;
    if (!status) ops->download(t->model->be, embeddings, t->out, (uint64_t)v->n_image * (uint64_t)v->mm2.rows * sizeof(float));
    return status ? status : kvs_device_check(t->model->be, err);
}

int kvs_vision_encode(kvs_model *model, const float *pixels, float *embeddings, const int32_t *cancel, kvs_error *err) {
    int status = kvs_vision_check(model, err);
    if (status) return status;
    tower t = {.model = model, .v = &model->vision, .n = model->vision.n_image + 1};
    float *patches = kvs_calloc((uint64_t)t.v->n_image, (uint64_t)t.v->patch_embd.cols * sizeof *patches);
    int32_t *ids = kvs_calloc((uint64_t)t.n, sizeof *ids);
    if (!patches || !ids) {
        status = kvs_fail_memory(err, (uint64_t)t.v->n_image * (uint64_t)t.v->patch_embd.cols * sizeof *patches, "a picture's patches");
    } else if (!allocate(&t)) {
        status = kvs_fail_room(model->be, err, kvs_vision_work_bytes(model), "an image encode");
    } else {
        for (int32_t i = 0; i < t.n; i++) ids[i] = i;
        cut_patches(t.v, pixels, patches);
        status = run(&t, patches, ids, embeddings, cancel, err);
    }
    release(&t);
    free(ids);
    free(patches);
    return status;
}
