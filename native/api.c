/* api.c - what the public header promises beside sessions: library facts, the life of a model, vocabulary, image encode. */
#include "device.h"
#include "llama.h"
#include "session.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int32_t kvs_abi_version(void) { return KVS_ABI_VERSION; }

const char *kvs_version(void) { return KVS_VERSION; }

int32_t kvs_struct_size(const char *name) {
    static const struct {
        const char *name;
        int32_t size;
    } sizes[] = {
        {"kvs_error", sizeof(kvs_error)},
        {"kvs_gguf_key", sizeof(kvs_gguf_key)},
        {"kvs_gguf_tensor", sizeof(kvs_gguf_tensor)},
        {"kvs_model_params", sizeof(kvs_model_params)},
        {"kvs_model_info", sizeof(kvs_model_info)},
        {"kvs_smooth_params", sizeof(kvs_smooth_params)},
        {"kvs_dscr_params", sizeof(kvs_dscr_params)},
        {"kvs_prune_params", sizeof(kvs_prune_params)},
        {"kvs_pruning", sizeof(kvs_pruning)},
        {"kvs_session_params", sizeof(kvs_session_params)},
        {"kvs_chunk", sizeof(kvs_chunk)},
        {"kvs_sampling", sizeof(kvs_sampling)},
        {"kvs_sample", sizeof(kvs_sample)},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (!strcmp(name, sizes[i].name)) return sizes[i].size;
    return -1;
}

void kvs_flag_set(int32_t *flag, int32_t value) { __atomic_store_n(flag, value, __ATOMIC_RELAXED); }

/* ---- the life of a model ---- */

static void report(const kvs_model_params *p, int32_t permille) {
    if (p->progress) kvs_flag_set(p->progress, permille);
}

static int load(const kvs_model_params *p, kvs_model *model, kvs_error *err) {
    int status = kvs_device_open(p, model, err);
    if (status) return status;
    report(p, 50);
    if ((status = kvs_text_load(model, p->text_path, p->cancel, err))) return status;
    report(p, 300);
    if (kvs_cancelled(p->cancel)) return kvs_fail(err, KVS_E_CANCELLED, "loading was cancelled");
    if (p->mmproj_path && (status = kvs_vision_load(model, p->mmproj_path, p->cancel, err))) return status;
    report(p, 400);
    if ((status = kvs_device_share(p, model, err))) return status;
    if ((status = kvs_place_model(model, p->cancel, err))) return status;
    report(p, 1000);
    return kvs_cancelled(p->cancel) ? kvs_fail(err, KVS_E_CANCELLED, "loading was cancelled") : KVS_OK;
}

int32_t kvs_model_load(const kvs_model_params *params, kvs_model **out, kvs_error *err) {
    *out = NULL;
    if (params->struct_size != sizeof *params) return kvs_fail(err, KVS_E_ARGUMENT, "struct_size: kvs_model_params of another version");
    if (params->precision != KVS_PRECISION_AUTO && params->precision != KVS_PRECISION_EXACT)
        return kvs_fail(err, KVS_E_ARGUMENT, "precision: there is no kvs_precision %d", (int)params->precision);
    if (!params->text_path) return kvs_fail(err, KVS_E_ARGUMENT, "text_path: a model needs a file");
    kvs_model *model = kvs_calloc(1, sizeof *model);
    if (!model) return kvs_fail_memory(err, sizeof *model, "a model");
    if (!kvs_turns_init(&model->turns)) {
        free(model);
        return kvs_fail_memory(err, 0, "a lock");
    }
    model->exact = params->precision == KVS_PRECISION_EXACT;
    model->max_file_bytes = params->model_bytes;
    model->max_cache_bytes =
        params->cache_bytes ? params->cache_bytes : (uint64_t)sysconf(_SC_PHYS_PAGES) * (uint64_t)sysconf(_SC_PAGESIZE);
    int status = load(params, model, err);
    if (status != KVS_E_MEMORY && (kvs_text_check(model, err) || kvs_vision_check(model, err))) status = KVS_E_FORMAT;
    if (status)
        kvs_model_free(model);
    else
        *out = model;
    return status;
}

static void free_work(kvs_model *model) {
    const kvs_work *w = &model->work;
    float *buffers[] = {w->x, w->y, w->q, w->k, w->v, w->attn, w->gate, w->up, w->taps.entropy, w->taps.mass, w->taps.lse, w->logits};
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; i++)
        if (buffers[i]) model->be->ops->release(model->be, buffers[i]);
}

void kvs_model_free(kvs_model *model) {
    if (!model) return;
    free_work(model);
    kvs_vision_unload(model);
    kvs_text_unload(model);
    if (model->be) model->be->ops->close(model->be); /* NULL: none could be opened, or none in place of a full GPU; no block was there */
    kvs_turns_destroy(&model->turns);
    free(model);
}

static void get_vision_info(const kvs_model *model, kvs_model_info *info) {
    const kvs_vision *v = &model->vision;
    info->has_vision = 1;
    info->image_size = v->image_size;
    info->patch_size = v->patch_size;
    info->n_image = v->n_image;
    info->n_vision_layer = v->n_layer;
    info->vision_rounding = v->rounding != KVS_ROUND_BF16 || !model->be->has_bf16 ? 0 : model->be->has_f16 ? 2 : 1;
    memcpy(info->image_mean, v->mean, sizeof info->image_mean);
    memcpy(info->image_std, v->std, sizeof info->image_std);
}

void kvs_model_get_info(const kvs_model *model, kvs_model_info *info) {
    const kvs_text *t = &model->text;
    const kvs_tokenizer *tok = model->tokenizer;
    *info = (kvs_model_info){
        .struct_size = sizeof *info,
        .n_ctx_train = t->n_ctx_train,
        .n_layer = t->n_layer,
        .n_embd = t->n_embd,
        .n_ff = t->n_ff,
        .n_head = t->n_head,
        .n_head_kv = t->n_head_kv,
        .head_dim = t->head_dim,
        .n_vocab = t->n_vocab,
        .bos = kvs_tokenizer_bos(tok),
        .eos = kvs_tokenizer_eos(tok),
        .unk = kvs_tokenizer_unk(tok),
        .pad = kvs_tokenizer_pad(tok),
        .add_bos = kvs_tokenizer_add_bos(tok),
        .add_space_prefix = kvs_tokenizer_add_space_prefix(tok),
        .n_gpu_layers = model->be->host_memory ? 0 : t->n_layer - model->be->host_layers,
        .threads = model->be->threads,
        .threads_missing = model->be->threads_missing,
        .weight_bytes = model->weight_bytes,
        .plan_weights = model->plan.weights,
        .plan_cache = model->plan.cache,
        .plan_work = model->plan.work,
        .plan_reserve = model->plan.reserve,
        .plan_free = model->plan.free,
        .plan_rows = model->plan.rows,
        .identity = model->identity,
        .mmproj_identity = model->mmproj_identity,
    };
    if (model->has_vision) get_vision_info(model, info);
    memcpy(info->device, model->be->name, sizeof info->device);
    memcpy(info->device_reason, model->be->reason, sizeof info->device_reason);
}

/* ---- vocabulary and pictures ---- */

int64_t kvs_tokenize(const kvs_model *model, const char *text, int64_t length, int32_t add_bos, int32_t special, int32_t *ids,
                     int64_t capacity) {
    return kvs_tokenizer_encode(model->tokenizer, text, length, add_bos, special, ids, capacity);
}

const char *kvs_token_bytes(const kvs_model *model, int32_t id, int32_t special, int32_t *length) {
    return kvs_tokenizer_bytes(model->tokenizer, id, special, length);
}

int32_t kvs_token_type(const kvs_model *model, int32_t id) { return kvs_tokenizer_kind(model->tokenizer, id); }

int32_t kvs_encode_image(kvs_model *model, const float *pixels, int32_t n_pictures, float *embeddings, int32_t *cancel, kvs_error *err) {
    if (!model->has_vision) return kvs_fail(err, KVS_E_UNSUPPORTED, "this is a text-only model: a picture needs an mmproj file");
    if (n_pictures < 1) return kvs_fail(err, KVS_E_ARGUMENT, "n_pictures: must be at least 1");
    const kvs_vision *v = &model->vision;
    int64_t in = 3 * (int64_t)v->image_size * v->image_size, out = (int64_t)v->n_image * v->mm2.rows;
    int status = KVS_OK;
    for (int32_t i = 0; i < n_pictures && !status; i++) {
        if ((status = kvs_model_lock(model, cancel, err))) break;
        status = kvs_vision_encode(model, pixels + i * in, embeddings + i * out, cancel, err);
        kvs_model_unlock(model);
    }
    return status;
}
