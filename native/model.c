#include "model.h"

#include "load.h"

#include <errno.h>
#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_EMBD = 1 << 16, MAX_FF = 1 << 20, MAX_HEADS = 1024, MAX_CTX_TRAIN = 1 << 30, MAX_TENSORS = 1 << 17 };

/* ---- files ---- */

/* "-00002-of-00005.gguf" in place of the same ending of part 1; false if path has no such ending. */
static bool part_path(const char *path, uint32_t have, uint32_t want, uint32_t count, char **out) {
    char ending[40], other[40];
    snprintf(ending, sizeof ending, "-%05u-of-%05u.gguf", have + 1, count);
    snprintf(other, sizeof other, "-%05u-of-%05u.gguf", want + 1, count);
    size_t n = strlen(path), m = strlen(ending);
    if (n < m || strcmp(path + n - m, ending)) return false;
    *out = kvs_calloc(n - m + strlen(other) + 1, 1);
    if (*out) memcpy(*out, path, n - m), strcpy(*out + n - m, other);
    return true;
}

static int read_split(const kvs_gguf *file, uint32_t *no, uint32_t *count, kvs_error *err) {
    bool found;
    *no = 0, *count = 1;
    int status = kvs_gguf_get_u32(file, "split.count", 0, 65535, &found, count, err);
    if (!status) status = kvs_gguf_get_u32(file, "split.no", 0, 65535, &found, no, err);
    if (*count == 0) *count = 1;
    return status;
}

static int open_part(kvs_model *model, const char *path, uint32_t i, uint32_t count, kvs_error *err) {
    uint32_t no, parts;
    int status = kvs_gguf_open(path, &model->parts[i], err);
    if (status == KVS_E_IO && (!err || err->offset == ENOENT))
        return kvs_fail_file(err, KVS_E_IO, path, "", ENOENT,
                             "part %u of %u of this split model is missing: all parts belong in one folder", i + 1, count);
    if (status) return status;
    model->n_parts = (int32_t)i + 1;
    if ((status = kvs_model_count_file(model, model->parts[i], err))) return status;
    if ((status = read_split(model->parts[i], &no, &parts, err))) return status;
    if (no != i || parts != count)
        return kvs_fail_file(err, KVS_E_FORMAT, path, "split.no", kvs_gguf_key_offset(model->parts[i], "split.no"),
                             "this is part %u of %u by its own account, part %u of %u by its name", no + 1, parts, i + 1, count);
    return KVS_OK;
}

/* Every name once over all parts, and as many as part 1 promises. */
static int check_parts(const kvs_model *model, kvs_error *err) {
    int64_t n = 0;
    for (int32_t i = 0; i < model->n_parts; i++) {
        n += kvs_gguf_n_tensors(model->parts[i]);
        if (n > MAX_TENSORS) /* each is looked for in all other parts */
            return kvs_fail_file(err, KVS_E_FORMAT, kvs_gguf_path(model->parts[i]), "", -1, "the parts hold more than %d tensors",
                                 MAX_TENSORS);
        for (int64_t j = 0; j < kvs_gguf_n_tensors(model->parts[i]); j++) {
            kvs_gguf_tensor t;
            kvs_gguf_tensor_at(model->parts[i], j, &t);
            for (int32_t before = 0; before < i; before++)
                if (kvs_gguf_find_tensor(model->parts[before], t.name) >= 0)
                    return kvs_fail_file(err, KVS_E_FORMAT, kvs_gguf_path(model->parts[i]), t.name, t.offset,
                                         "this tensor is in part %d, too", before + 1);
        }
    }
    bool found;
    uint32_t promised = 0;
    int status = kvs_gguf_get_u32(model->parts[0], "split.tensors.count", 0, INT32_MAX, &found, &promised, err);
    if (status || !found || promised == n) return status;
    return kvs_fail_file(err, KVS_E_FORMAT, kvs_gguf_path(model->parts[0]), "split.tensors.count",
                         kvs_gguf_key_offset(model->parts[0], "split.tensors.count"), "%u tensors are promised, the %d parts hold %lld",
                         promised, model->n_parts, (long long)n);
}

static int open_parts(kvs_model *model, const char *path, kvs_error *err) {
    uint32_t no, count;
    int status = kvs_gguf_open(path, &model->parts[0], err);
    if (status) return status;
    model->n_parts = 1;
    if ((status = kvs_model_count_file(model, model->parts[0], err))) return status;
    const kvs_gguf *first = model->parts[0];
    if ((status = read_split(first, &no, &count, err)) || (count == 1 && no == 0)) return status;
    if (count > KVS_MAX_PARTS)
        return kvs_fail_file(err, KVS_E_UNSUPPORTED, path, "split.count", kvs_gguf_key_offset(first, "split.count"),
                             "a model of %u parts, at most %d are supported", count, KVS_MAX_PARTS);
    char *other = NULL;
    if (no != 0) {
        bool named = part_path(path, no, 0, count, &other) && other;
        status = kvs_fail_file(err, KVS_E_FORMAT, path, "split.no", kvs_gguf_key_offset(first, "split.no"),
                               "this is part %u of %u of a split model; give the first part instead%s%s", no + 1, count, named ? ": " : "",
                               named ? other : "");
        free(other);
        return status;
    }
    for (uint32_t i = 1; i < count && !status; i++) {
        if (!part_path(path, 0, i, count, &other))
            return kvs_fail_file(err, KVS_E_FORMAT, path, "split.count", kvs_gguf_key_offset(first, "split.count"),
                                 "this is part 1 of %u, but its name does not end in -00001-of-%05u.gguf, so the others can't be found",
                                 count, count);
        status = other ? open_part(model, other, i, count, err) : kvs_fail_memory(err, strlen(path) + 1, "a path");
        free(other);
    }
    return status ? status : check_parts(model, err);
}

/* ---- hyperparameters ---- */

static int check_architecture(const kvs_gguf *file, kvs_error *err) {
    char arch[64];
    int status = kvs_gguf_get_string(file, "general.architecture", NULL, arch, sizeof arch, err);
    if (status || !strcmp(arch, "llama")) return status;
    if (!strcmp(arch, "clip"))
        return kvs_fail_file(err, KVS_E_MISMATCH, kvs_gguf_path(file), "general.architecture", -1,
                             "this is an mmproj (the image half of a pair), not a text model: are the two paths swapped?");
    return kvs_fail_file(
        err, KVS_E_UNSUPPORTED, kvs_gguf_path(file), "general.architecture", kvs_gguf_key_offset(file, "general.architecture"),
        "architecture \"%s\" can't be run; what loads: text models of architecture \"llama\" (LLaMA, Vicuna, LLaVA-1.5), and "
        "\"clip\" mmproj files of LLaVA-1.5 beside them",
        arch);
}

/* Keys that would change the meaning of a llama file. Running it without them would be quietly wrong. */
static int refuse_variants(const kvs_gguf *file, kvs_error *err) {
    static const char *const keys[] = {
        "llama.expert_count",    "llama.logit_scale",         "llama.embedding_scale",         "llama.residual_scale",
        "llama.attention.scale", "llama.attention.clamp_kqv", "llama.rope.scaling.attn_factor"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        double x = kvs_gguf_float(file, kvs_gguf_find_key(file, keys[i]), 0);
        if (x == 0 || (i > 0 && x == 1)) continue; /* absent, or the value that changes nothing */
        return kvs_fail_file(
            err, KVS_E_UNSUPPORTED, kvs_gguf_path(file), keys[i], kvs_gguf_key_offset(file, keys[i]),
            i == 0 ? "models with experts (MoE; %g of them here) can't be run" : "models with this scaling (%g) can't be run", x);
    }
    return KVS_OK;
}

typedef struct field {
    const char *key;
    uint32_t max;
    int32_t *value;
    bool optional; /* then *value stays as it is */
} field;

static int read_fields(const kvs_gguf *file, const field *fields, size_t n, kvs_error *err) {
    int status = KVS_OK;
    for (size_t i = 0; i < n && !status; i++) {
        bool found;
        uint32_t value = (uint32_t)*fields[i].value;
        status = kvs_gguf_get_u32(file, fields[i].key, 1, fields[i].max, fields[i].optional ? &found : NULL, &value, err);
        *fields[i].value = (int32_t)value;
    }
    return status;
}

static int fail_value(const kvs_gguf *file, const char *key, kvs_error *err, const char *relation, int32_t value, int32_t other) {
    return kvs_fail_file(err, KVS_E_FORMAT, kvs_gguf_path(file), key, kvs_gguf_key_offset(file, key), "%d %s %d", value, relation, other);
}

static int read_head_dims(kvs_text *t, const kvs_gguf *file, kvs_error *err) {
    const char *heads = "llama.attention.head_count", *length = "llama.attention.key_length";
    t->n_head_kv = t->n_head;
    const field kv = {"llama.attention.head_count_kv", MAX_HEADS, &t->n_head_kv, true};
    int status = read_fields(file, &kv, 1, err);
    if (status) return status;
    if (t->n_head % t->n_head_kv) return fail_value(file, kv.key, err, "does not divide the number of heads,", t->n_head_kv, t->n_head);
    if (kvs_gguf_find_key(file, length) < 0 && t->n_embd % t->n_head)
        return fail_value(file, heads, err, "does not divide the embedding length,", t->n_head, t->n_embd);
    int32_t value_length = t->head_dim = t->n_embd / t->n_head;
    const field lengths[] = {{length, KVS_MAX_HEAD_DIM, &t->head_dim, true},
                             {"llama.attention.value_length", KVS_MAX_HEAD_DIM, &value_length, true}};
    if ((status = read_fields(file, lengths, 2, err))) return status;
    if (value_length != t->head_dim) return fail_value(file, length, err, "differs from the value length,", t->head_dim, value_length);
    if (t->head_dim % 2 || t->head_dim > KVS_MAX_HEAD_DIM)
        return fail_value(file, heads, err, "heads make the odd or large head size", t->n_head, t->head_dim);
    t->rope.n_rot = t->head_dim;
    const field rot = {"llama.rope.dimension_count", KVS_MAX_HEAD_DIM, &t->rope.n_rot, true};
    if ((status = read_fields(file, &rot, 1, err))) return status;
    if (t->rope.n_rot % 2 || t->rope.n_rot > t->head_dim)
        return fail_value(file, rot.key, err, "must be even, and the head size at most, which is", t->rope.n_rot, t->head_dim);
    return KVS_OK;
}

static int read_hyperparameters(kvs_text *t, const kvs_gguf *file, kvs_error *err) {
    const field fields[] = {{"llama.context_length", MAX_CTX_TRAIN, &t->n_ctx_train, false},
                            {"llama.embedding_length", MAX_EMBD, &t->n_embd, false},
                            {"llama.block_count", KVS_MAX_LAYERS, &t->n_layer, false},
                            {"llama.feed_forward_length", MAX_FF, &t->n_ff, false},
                            {"llama.attention.head_count", MAX_HEADS, &t->n_head, false}};
    int status = read_fields(file, fields, sizeof fields / sizeof *fields, err);
    if (!status) status = read_head_dims(t, file, err);
    if (!status) status = kvs_gguf_get_f32(file, "llama.attention.layer_norm_rms_epsilon", FLT_MIN, 1.0f, NULL, &t->rms_eps, err);
    return status;
}

static int load_tokenizer(kvs_model *model, kvs_error *err) {
    const kvs_gguf *file = model->parts[0];
    int status = kvs_tokenizer_load(file, &model->tokenizer, err);
    if (status) return status;
    int32_t n = model->text.n_vocab = kvs_tokenizer_n_vocab(model->tokenizer), said = n;
    const field vocab = {"llama.vocab_size", INT32_MAX, &said, true};
    if ((status = read_fields(file, &vocab, 1, err))) return status;
    return said == n ? KVS_OK : fail_value(file, vocab.key, err, "differs from the length of the token list,", said, n);
}

/* ---- rope ---- */

static int read_scaling(const kvs_gguf *file, float *factor, kvs_error *err) {
    const char *key = "llama.rope.scaling.type";
    char type[32] = "linear"; /* what a factor without a type has always meant */
    bool found;
    *factor = 1.0f;
    int status = kvs_gguf_get_string(file, key, &found, type, sizeof type, err);
    if (status || !strcmp(type, "none")) return status;
    if (strcmp(type, "linear"))
        return kvs_fail_file(err, KVS_E_UNSUPPORTED, kvs_gguf_path(file), key, kvs_gguf_key_offset(file, key),
                             "rope scaling \"%s\" can't be run; none, linear, and the llama3 factors in rope_freqs.weight can", type);
    status = kvs_gguf_get_f32(file, "llama.rope.scaling.factor", 1e-4f, 1e4f, &found, factor, err);
    return status || found ? status : kvs_gguf_get_f32(file, "llama.rope.scale_linear", 1e-4f, 1e4f, &found, factor, err);
}

/* In float32 and in this order, as transformers computes it: at position 4000 a last bit in inv_freq is seen in the angle. */
static void load_rope(kvs_loader *ld) {
    kvs_rope *rope = &ld->model->text.rope;
    const kvs_gguf *file = ld->files[0];
    float base = 10000.0f, scaling;
    bool found;
    ld->status = kvs_gguf_get_f32(file, "llama.rope.freq_base", 1.0f, FLT_MAX, &found, &base, ld->err);
    if (!ld->status) ld->status = read_scaling(file, &scaling, ld->err);
    float *factors = kvs_load_floats(ld, KVS_NO_LAYER, "rope_freqs.weight", rope->n_rot / 2, true);
    float *inv_freq = ld->model->inv_freq;
    for (int32_t i = 0; i < rope->n_rot / 2 && !ld->status; i++) {
        float exponent = (float)(2 * i) / (float)rope->n_rot, factor = factors ? factors[i] : 1.0f;
        inv_freq[i] = 1.0f / (float)pow((double)base, (double)exponent) / factor / scaling;
        if (!(factor > 0) || !isfinite(factor) || !isfinite(inv_freq[i])) {
            kvs_found t = kvs_load_find(ld, "rope_freqs.weight");
            if (t.file) kvs_load_fail(ld, &t, "its value %d is %g: a frequency can't be divided by it", i, (double)factor);
        }
    }
    if (!ld->status) ld->model->identity = kvs_hash(ld->model->identity, inv_freq, (uint64_t)rope->n_rot / 2 * sizeof *inv_freq);
    free(factors);
}

/* ---- weights ---- */

static void load_layer(kvs_loader *ld, const kvs_text *t, kvs_text_layer *l, int32_t i) {
    int64_t E = t->n_embd, F = t->n_ff, Q = (int64_t)t->n_head * t->head_dim, G = (int64_t)t->n_head_kv * t->head_dim;
    kvs_load_vector(ld, &l->attn_norm, i, "attn_norm.weight", E, false);
    kvs_load_matrix(ld, &l->q, i, "attn_q.weight", (kvs_shape){Q, E, false});
    kvs_load_matrix(ld, &l->k, i, "attn_k.weight", (kvs_shape){G, E, false});
    kvs_load_matrix(ld, &l->v, i, "attn_v.weight", (kvs_shape){G, E, false});
    kvs_load_matrix(ld, &l->o, i, "attn_output.weight", (kvs_shape){E, Q, false});
    kvs_load_vector(ld, &l->q_bias, i, "attn_q.bias", Q, true);
    kvs_load_vector(ld, &l->k_bias, i, "attn_k.bias", G, true);
    kvs_load_vector(ld, &l->v_bias, i, "attn_v.bias", G, true);
    kvs_load_vector(ld, &l->o_bias, i, "attn_output.bias", E, true);
    kvs_load_vector(ld, &l->ffn_norm, i, "ffn_norm.weight", E, false);
    kvs_load_matrix(ld, &l->gate, i, "ffn_gate.weight", (kvs_shape){F, E, false});
    kvs_load_matrix(ld, &l->up, i, "ffn_up.weight", (kvs_shape){F, E, false});
    kvs_load_matrix(ld, &l->down, i, "ffn_down.weight", (kvs_shape){E, F, false});
    kvs_load_vector(ld, &l->gate_bias, i, "ffn_gate.bias", F, true);
    kvs_load_vector(ld, &l->up_bias, i, "ffn_up.bias", F, true);
    kvs_load_vector(ld, &l->down_bias, i, "ffn_down.bias", E, true);
}

static void load_weights(kvs_loader *ld) {
    kvs_text *t = &ld->model->text;
    kvs_load_matrix(ld, &t->token_embd, KVS_NO_LAYER, "token_embd.weight", (kvs_shape){t->n_vocab, t->n_embd, false});
    kvs_load_vector(ld, &t->output_norm, KVS_NO_LAYER, "output_norm.weight", t->n_embd, false);
    kvs_load_matrix(ld, &t->output, KVS_NO_LAYER, "output.weight", (kvs_shape){t->n_vocab, t->n_embd, true});
    t->tied = !t->output.data;
    if (t->tied) t->output = t->token_embd;
    t->layers = kvs_calloc((uint64_t)t->n_layer, sizeof *t->layers);
    if (!t->layers && !ld->status) ld->status = kvs_fail_memory(ld->err, (uint64_t)t->n_layer * sizeof *t->layers, "the layers of a model");
    for (int32_t i = 0; i < t->n_layer && !ld->status; i++) load_layer(ld, t, &t->layers[i], i);
}

static uint64_t hash_sizes(const kvs_text *t) {
    const int32_t sizes[] = {t->n_layer, t->n_embd, t->n_ff, t->n_head, t->n_head_kv, t->head_dim, t->n_vocab, t->rope.n_rot};
    return kvs_hash(kvs_hash(0, sizes, sizeof sizes), &t->rms_eps, sizeof t->rms_eps);
}

/* Tables of angles that old converters wrote: we have our own. */
static bool is_angles(const kvs_model *model, const char *name) {
    (void)model;
    return strstr(name, "attn_rot_embd") || strstr(name, "inv_freq");
}

int kvs_text_load(kvs_model *model, const char *path, const int32_t *cancel, kvs_error *err) {
    int status = open_parts(model, path, err);
    if (status) return status;
    const kvs_gguf *file = model->parts[0];
    if ((status = check_architecture(file, err))) return status;
    if ((status = refuse_variants(file, err))) return status;
    if ((status = read_hyperparameters(&model->text, file, err))) return status;
    if ((status = load_tokenizer(model, err))) return status;
    model->identity = hash_sizes(&model->text) ^ kvs_tokenizer_identity(model->tokenizer);
    kvs_loader ld = {.model = model, .files = model->parts, .n_files = model->n_parts, .block = "blk", .cancel = cancel, .err = err};
    load_rope(&ld);
    load_weights(&ld);
    kvs_load_refuse_rest(&ld, is_angles);
    if (ld.status) return ld.status;
    for (int32_t i = 0; i < model->n_parts; i++) kvs_gguf_prefetch(model->parts[i]);
    model->identity = kvs_load_identity(&ld, model->identity);
    return KVS_OK;
}

int kvs_text_check(const kvs_model *model, kvs_error *err) {
    int status = KVS_OK;
    for (int32_t i = 0; i < model->n_parts && !status; i++) status = kvs_gguf_check(model->parts[i], err);
    return status;
}

void kvs_text_unload(kvs_model *model) {
    if (model->text.rope.table) model->be->ops->release(model->be, model->text.rope.table);
    for (int32_t i = 0; i < model->n_owned; i++) model->be->ops->release(model->be, model->owned[i]);
    free(model->owned);
    model->owned = NULL, model->n_owned = 0;
    free(model->at_load.matrices);
    free(model->at_pass.matrices);
    free(model->bound);
    for (int32_t i = 0; i < model->n_widened; i++) free(model->widened[i]);
    free(model->widened);
    free(model->text.layers);
    model->at_load = model->at_pass = (kvs_placing){0};
    model->bound = NULL, model->n_bound = model->room_bound = 0;
    model->widened = NULL, model->n_widened = 0;
    model->text = (kvs_text){0};
    kvs_tokenizer_free(model->tokenizer);
    model->tokenizer = NULL;
    for (int32_t i = 0; i < KVS_MAX_PARTS; i++) {
        kvs_gguf_free(model->parts[i]);
        model->parts[i] = NULL;
    }
    model->n_parts = 0;
}

/* ---- work buffers ---- */

typedef struct buffer {
    float **place;
    uint64_t columns;
} buffer;

enum { MAX_BUFFERS = 12 };

static void list_buffers(kvs_model *model, buffer list[MAX_BUFFERS]) {
    kvs_text *t = &model->text;
    kvs_work *w = &model->work;
    uint64_t E = (uint64_t)t->n_embd, F = (uint64_t)t->n_ff, H = (uint64_t)t->n_head;
    uint64_t Q = H * (uint64_t)t->head_dim, G = (uint64_t)t->n_head_kv * (uint64_t)t->head_dim;
    const buffer all[MAX_BUFFERS] = {{&w->x, E},         {&w->y, E},        {&w->q, Q},
                                     {&w->k, G},         {&w->v, G},        {&w->attn, Q},
                                     {&w->gate, F},      {&w->up, F},       {&w->taps.entropy, H},
                                     {&w->taps.mass, H}, {&w->taps.lse, H}, {&t->rope.table, (uint64_t)t->rope.n_rot}};
    memcpy(list, all, sizeof all);
}

/* All or nothing: new blocks first, then the old ones go. */
static int grow(kvs_backend *be, const buffer *buffers, int n, int32_t rows, kvs_error *err) {
    float *fresh[MAX_BUFFERS];
    uint64_t total = 0;
    bool ok = true;
    for (int i = 0; i < n; i++) {
        uint64_t bytes = (uint64_t)rows * buffers[i].columns * sizeof(float); /* columns below 2^31, rows 2^31: fits */
        total += bytes;
        fresh[i] = ok ? be->ops->alloc(be, bytes) : NULL;
        ok = ok && fresh[i];
    }
    for (int i = 0; i < n; i++) {
        float *old = ok ? *buffers[i].place : fresh[i];
        if (old) be->ops->release(be, old);
        if (ok) *buffers[i].place = fresh[i];
    }
    return ok ? KVS_OK : kvs_fail_room(be, err, total, "the activations of a pass");
}

int kvs_work_reserve(kvs_model *model, int32_t rows, int32_t logit_rows, kvs_error *err) {
    kvs_text *t = &model->text;
    kvs_work *w = &model->work;
    buffer of_rows[MAX_BUFFERS];
    list_buffers(model, of_rows);
    const buffer of_logits = {&w->logits, (uint64_t)t->n_vocab};
    int status = KVS_OK;
    if (rows > w->max_rows) {
        if ((status = grow(model->be, of_rows, MAX_BUFFERS, rows, err))) return status;
        w->max_rows = rows;
    }
    if (logit_rows > w->max_logit_rows) {
        if ((status = grow(model->be, &of_logits, 1, logit_rows, err))) return status;
        w->max_logit_rows = logit_rows;
    }
    return KVS_OK;
}

uint64_t kvs_work_bytes(const kvs_model *model, int32_t rows, int32_t logit_rows) {
    buffer of_rows[MAX_BUFFERS];
    uint64_t columns = 0;
    list_buffers((kvs_model *)model, of_rows);
    for (int i = 0; i < MAX_BUFFERS; i++) columns += of_rows[i].columns;
    return ((uint64_t)rows * columns + (uint64_t)logit_rows * (uint64_t)model->text.n_vocab) * sizeof(float);
}

/* ---- limits ---- */

static int fail_limit(kvs_error *err, const char *limit, uint64_t needed, uint64_t allowed) {
    kvs_fail(err, KVS_E_LIMIT, "%s: %.1f MiB are needed, %.1f MiB are allowed", limit, (double)needed / 1048576.0,
             (double)allowed / 1048576.0);
    if (!err) return KVS_E_LIMIT;
    snprintf(err->what, sizeof err->what, "%s", limit);
    err->needed = needed, err->available = allowed;
    return KVS_E_LIMIT;
}

int kvs_model_count_file(kvs_model *model, const kvs_gguf *file, kvs_error *err) {
    uint64_t total = model->file_bytes + kvs_gguf_size(file); /* sizes of files are below 2^63 */
    if (model->max_file_bytes && total > model->max_file_bytes) return fail_limit(err, "model_bytes", total, model->max_file_bytes);
    model->file_bytes = total;
    return KVS_OK;
}

int kvs_model_count_cache(kvs_model *model, uint64_t bytes, kvs_error *err) {
    uint64_t total = __atomic_add_fetch(&model->cache_bytes, bytes, __ATOMIC_RELAXED);
    if (total <= model->max_cache_bytes) return KVS_OK;
    kvs_model_uncount_cache(model, bytes);
    uint64_t others = total - bytes, left = others < model->max_cache_bytes ? model->max_cache_bytes - others : 0;
    return fail_limit(err, "cache_bytes", bytes, left);
}

void kvs_model_uncount_cache(kvs_model *model, uint64_t bytes) { __atomic_sub_fetch(&model->cache_bytes, bytes, __ATOMIC_RELAXED); }

/* ---- lock ---- */

int kvs_model_lock(kvs_model *model, const int32_t *cancel, kvs_error *err) {
    if (kvs_turns_take(&model->turns, cancel)) return KVS_OK;
    return kvs_fail(err, KVS_E_CANCELLED, "cancelled while waiting for the model, which another session uses");
}

void kvs_model_unlock(kvs_model *model) { kvs_turns_give(&model->turns); }
