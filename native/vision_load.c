/* vision_load.c - the mmproj of LLaVA-1.5 in every form that was published: a CLIP tower and a two-layer projector. What the
 * files leave open is decided for Hugging Face's result: see gguf.md 4c for the forms, and load_ffn and blocks_to_run below. */
#include "load.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_IMAGE = 2048, MAX_EMBD = 1 << 14, MAX_FF = 1 << 16, MAX_HEADS = 256, MAX_PATCHES = 1 << 14 };

static int fail_key(const kvs_gguf *file, int code, const char *key, kvs_error *err, const char *reason) {
    return kvs_fail_file(err, code, kvs_gguf_path(file), key, kvs_gguf_key_offset(file, key), "%s", reason);
}

static const char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* ---- what this file is ---- */

static int check_architecture(const kvs_gguf *file, kvs_error *err) {
    char arch[64], reason[200];
    const char *key = "general.architecture";
    int status = kvs_gguf_get_string(file, key, NULL, arch, sizeof arch, err);
    if (status || !strcmp(arch, "clip")) return status;
    if (!strcmp(arch, "llama"))
        return fail_key(file, KVS_E_MISMATCH, key, err, "this is a text model, not an mmproj: are the two paths swapped?");
    snprintf(reason, sizeof reason, "architecture \"%s\" is no mmproj; \"clip\" with LLaVA-1.5's projector is what loads", arch);
    return fail_key(file, KVS_E_UNSUPPORTED, key, err, reason);
}

static int fail_projector(const kvs_gguf *file, const char *key, const char *type, kvs_error *err) {
    static const struct {
        const char *type, *family;
    } known[] = {{"mlp_norm", "Yi-VL: norms between its layers"},
                 {"ldp", "MobileVLM: convolutions"},
                 {"ldpv2", "MobileVLM 2: convolutions and pooling"},
                 {"resampler", "MiniCPM-V: cross-attention"},
                 {"adapter", "GLM-Edge: convolutions"},
                 {"gemma3", "Gemma 3: pooling"},
                 {"pixtral", "Pixtral: a tower with 2-D RoPE"},
                 {"qwen2vl_merger", "Qwen2-VL: a tower with 2-D RoPE"}};
    char reason[200];
    const char *family = "another model";
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (!strcmp(type, known[i].type)) family = known[i].family;
    snprintf(reason, sizeof reason, "projector \"%.40s\" (%s) can't be run: only LLaVA-1.5's \"mlp\" (Linear, GELU, Linear) can", type,
             family);
    return fail_key(file, KVS_E_UNSUPPORTED, key, err, reason);
}

static int check_projector(const kvs_loader *ld, kvs_error *err) {
    static const char *const keys[] = {"clip.projector_type", "clip.vision.projector_type"};
    const kvs_gguf *file = ld->files[0];
    bool found, flag = true;
    for (size_t i = 0; i < 2; i++) {
        char type[64];
        int status = kvs_gguf_get_string(file, keys[i], &found, type, sizeof type, err);
        if (status) return status;
        if (found && strcmp(type, "mlp")) return fail_projector(file, keys[i], type, err);
    }
    static const char *const needed[] = {"clip.has_vision_encoder", "clip.has_llava_projector"};
    for (size_t i = 0; i < 2; i++) {
        int status = kvs_gguf_get_bool(file, needed[i], &found, &flag, err);
        if (status) return status;
        if (!flag) return fail_key(file, KVS_E_UNSUPPORTED, needed[i], err, "is false: this file is no mmproj of LLaVA-1.5");
    }
    if (kvs_load_find(ld, "mm.3.weight").file) return fail_projector(file, "mm.3.weight", "mlp_norm", err);
    return KVS_OK;
}

/* LLaVA-1.6 cuts a picture into tiles: running its file as 1.5 would give a caption, but not the model's. */
static int refuse_tiles(const kvs_loader *ld, kvs_error *err) {
    static const char *const reason = "LLaVA-1.6 (a picture cut into tiles, anyres) can't be run: only LLaVA-1.5 can";
    static const struct {
        const char *key, *means_tiles;
    } keys[] = {{"clip.vision.mm_patch_merge_type", "spatial"}, {"clip.vision.image_aspect_ratio", "anyres"}};
    const kvs_gguf *file = ld->files[0];
    for (size_t i = 0; i < 2; i++) {
        char text[64] = "";
        bool found;
        int status = kvs_gguf_get_string(file, keys[i].key, &found, text, sizeof text, err);
        if (status) return status;
        if (!strncmp(text, keys[i].means_tiles, strlen(keys[i].means_tiles)))
            return fail_key(file, KVS_E_UNSUPPORTED, keys[i].key, err, reason);
    }
    kvs_gguf_key pinpoints;
    const char *key = "clip.vision.image_grid_pinpoints";
    if (!kvs_gguf_key_at(file, kvs_gguf_find_key(file, key), &pinpoints) && pinpoints.count > 0)
        return fail_key(file, KVS_E_UNSUPPORTED, key, err, reason);
    static const char *const newline[] = {"v.image_newline", "model.image_newline"};
    for (size_t i = 0; i < 2; i++)
        if (kvs_load_find(ld, newline[i]).file) return fail_key(file, KVS_E_UNSUPPORTED, newline[i], err, reason);
    return KVS_OK;
}

/* ---- hyperparameters ---- */

static int read_u32(const kvs_gguf *file, const char *key, uint32_t max, int32_t *value, kvs_error *err) {
    uint32_t x = 0;
    int status = kvs_gguf_get_u32(file, key, 1, max, NULL, &x, err);
    *value = (int32_t)x;
    return status;
}

static int read_pixels(const kvs_gguf *file, const char *key, bool positive, float out[3], kvs_error *err) {
    int64_t index, count;
    int status = kvs_gguf_get_array(file, key, 'f', NULL, &index, &count, err);
    if (status) return status;
    if (count != 3) return fail_key(file, KVS_E_FORMAT, key, err, "one value for each of red, green and blue is needed");
    for (int i = 0; i < 3; i++) {
        out[i] = (float)kvs_gguf_float(file, index, i);
        if (!isfinite(out[i]) || fabsf(out[i]) > 1e4f || (positive && out[i] < 1e-6f))
            return fail_key(file, KVS_E_FORMAT, key, err, positive ? "values must be finite and positive" : "values must be finite");
    }
    return KVS_OK;
}

/* Neither flag: quick-GELU, CLIP's own. "gelu" in Hugging Face is the erf form. */
static int read_activation(const kvs_gguf *file, int32_t *act, kvs_error *err) {
    bool found, gelu = false, silu = false;
    int status = kvs_gguf_get_bool(file, "clip.use_gelu", &found, &gelu, err);
    if (!status) status = kvs_gguf_get_bool(file, "clip.use_silu", &found, &silu, err);
    if (!status && silu) return fail_key(file, KVS_E_UNSUPPORTED, "clip.use_silu", err, "a tower with SiLU is not LLaVA-1.5's");
    *act = gelu ? KVS_GELU : KVS_GELU_QUICK;
    return status;
}

static int read_hyperparameters(kvs_vision *v, const kvs_gguf *file, kvs_error *err) {
    const char *image = "clip.vision.image_size", *heads = "clip.vision.attention.head_count";
    int status = read_u32(file, image, MAX_IMAGE, &v->image_size, err);
    if (!status) status = read_u32(file, "clip.vision.patch_size", MAX_IMAGE, &v->patch_size, err);
    if (!status) status = read_u32(file, "clip.vision.embedding_length", MAX_EMBD, &v->n_embd, err);
    if (!status) status = read_u32(file, "clip.vision.feed_forward_length", MAX_FF, &v->n_ff, err);
    if (!status) status = read_u32(file, heads, MAX_HEADS, &v->n_head, err);
    if (!status) status = kvs_gguf_get_f32(file, "clip.vision.attention.layer_norm_epsilon", FLT_MIN, 1.0f, NULL, &v->eps, err);
    if (!status) status = read_pixels(file, "clip.vision.image_mean", false, v->mean, err);
    if (!status) status = read_pixels(file, "clip.vision.image_std", true, v->std, err);
    if (!status) status = read_activation(file, &v->act, err);
    if (status) return status;
    if (v->image_size % v->patch_size) return fail_key(file, KVS_E_FORMAT, image, err, "is not a multiple of clip.vision.patch_size");
    if (v->n_embd % v->n_head || v->n_embd / v->n_head > KVS_MAX_HEAD_DIM)
        return fail_key(file, KVS_E_FORMAT, heads, err, "does not divide clip.vision.embedding_length into heads of a sane size");
    int32_t grid = v->image_size / v->patch_size;
    v->n_image = grid * grid;
    return v->n_image <= MAX_PATCHES ? KVS_OK : fail_key(file, KVS_E_UNSUPPORTED, image, err, "more than 16384 patches of one picture");
}

/* Blocks that the file holds: one more than the largest N of v.blk.N. */
static int32_t count_blocks(const kvs_gguf *file) {
    int32_t blocks = 0;
    for (int64_t i = 0; i < kvs_gguf_n_tensors(file); i++) {
        kvs_gguf_tensor t;
        kvs_gguf_tensor_at(file, i, &t);
        if (strncmp(t.name, "v.blk.", 6)) continue;
        long n = strtol(t.name + 6, NULL, 10);
        if (n >= 0 && n < KVS_MAX_LAYERS) blocks = KVS_MAX(blocks, (int32_t)n + 1);
    }
    return blocks;
}

static int feature_layer(const kvs_gguf *file, int32_t blocks, int32_t *run, kvs_error *err) {
    const char *key = "clip.vision.feature_layer";
    int64_t i = kvs_gguf_find_key(file, key);
    kvs_gguf_key k;
    kvs_gguf_key_at(file, i, &k);
    int32_t type = k.type == KVS_GGUF_ARRAY ? k.element_type : k.type;
    if (type == KVS_GGUF_STRING || type == KVS_GGUF_BOOL || type == KVS_GGUF_F32 || type == KVS_GGUF_F64)
        return fail_key(file, KVS_E_FORMAT, key, err, "must be an integer or a list of them");
    if (k.count != 1)
        return fail_key(file, KVS_E_UNSUPPORTED, key, err,
                        "a list of other than one layer: features joined from several layers are not LLaVA-1.5's and can't be run");
    int64_t layer = kvs_gguf_int(file, i, 0);
    if (layer < 1 || layer > blocks)
        return kvs_fail_file(err, KVS_E_FORMAT, kvs_gguf_path(file), key, kvs_gguf_key_offset(file, key),
                             "%lld blocks are to run, the file holds %d", (long long)layer, blocks);
    *run = (int32_t)layer;
    return KVS_OK;
}

/* Hugging Face takes hidden_states[-2]: the output of block 23 of 24. Published files have dropped the last block already; where
 * one holds all 24, it must not run. The key, where present, is the index into hidden_states: the number of blocks that run. */
static int blocks_to_run(kvs_vision *v, const kvs_gguf *file, kvs_error *err) {
    const char *key = "clip.vision.block_count";
    int32_t held = count_blocks(file), said = held;
    if (held == 0) return kvs_fail_file(err, KVS_E_FORMAT, kvs_gguf_path(file), "v.blk.0", -1, "the file holds no block of a vision tower");
    int status = kvs_gguf_find_key(file, key) < 0 ? KVS_OK : read_u32(file, key, KVS_MAX_LAYERS, &said, err);
    if (status) return status;
    if (said != held)
        return kvs_fail_file(err, KVS_E_FORMAT, kvs_gguf_path(file), key, kvs_gguf_key_offset(file, key),
                             "%d blocks are promised, the file holds %d", said, held);
    v->n_layer = held == 24 ? 23 : held;
    return kvs_gguf_find_key(file, "clip.vision.feature_layer") < 0 ? KVS_OK : feature_layer(file, held, &v->n_layer, err);
}

/* ---- weights ---- */

static void load_patches(kvs_loader *ld, kvs_vision *v) { /* [P, P, 3, E] in the file: (E, 3 P P) */
    kvs_found t = kvs_load_find(ld, "v.patch_embd.weight");
    int64_t P = v->patch_size, E = v->n_embd;
    if (!t.file || t.info.bytes < 0 || t.info.n_dims < 3) { /* absent, of a strange type, or flat already */
        kvs_load_matrix(ld, &v->patch_embd, KVS_NO_LAYER, "v.patch_embd.weight", (kvs_shape){E, 3 * P * P, false});
        return;
    }
    const int64_t *d = t.info.dims;
    if (d[0] != P || d[1] != P || d[2] != 3 || d[3] != E)
        kvs_load_fail(ld, &t, "has the shape [%lld, %lld, %lld, %lld], but the hyperparameters ask for [%lld, %lld, 3, %lld]",
                      (long long)d[0], (long long)d[1], (long long)d[2], (long long)d[3], (long long)P, (long long)P, (long long)E);
    else if (!ld->status)
        kvs_load_bind(ld, &v->patch_embd, KVS_NO_LAYER, &t, E, 3 * P * P);
}

/* Converters of 2023 call the first matrix ffn_down and the second ffn_up; the shape tells, each layer on its own. A square
 * pair (F = E) can't be told, and is read by the modern names. */
static bool ffn_swapped(const kvs_loader *ld, const kvs_vision *v, int32_t i) {
    char full[KVS_NAME];
    kvs_load_name(ld, i, "ffn_up.weight", full);
    kvs_found up = kvs_load_find(ld, full);
    return up.file && v->n_ff != v->n_embd && up.info.dims[0] == v->n_ff && up.info.dims[1] == v->n_embd;
}

static void load_ffn(kvs_loader *ld, const kvs_vision *v, kvs_vision_layer *l, int32_t i) {
    int64_t E = v->n_embd, F = v->n_ff;
    bool swapped = ffn_swapped(ld, v, i);
    kvs_load_matrix(ld, &l->up, i, swapped ? "ffn_down.weight" : "ffn_up.weight", (kvs_shape){F, E, false});
    kvs_load_vector(ld, &l->up_bias, i, swapped ? "ffn_down.bias" : "ffn_up.bias", F, false);
    kvs_load_matrix(ld, &l->down, i, swapped ? "ffn_up.weight" : "ffn_down.weight", (kvs_shape){E, F, false});
    kvs_load_vector(ld, &l->down_bias, i, swapped ? "ffn_up.bias" : "ffn_down.bias", E, false);
}

static void load_layer(kvs_loader *ld, const kvs_vision *v, kvs_vision_layer *l, int32_t i) {
    const kvs_shape square = {v->n_embd, v->n_embd, false};
    int64_t E = v->n_embd;
    kvs_load_vector(ld, &l->ln1, i, "ln1.weight", E, false);
    kvs_load_vector(ld, &l->ln1_bias, i, "ln1.bias", E, false);
    kvs_load_matrix(ld, &l->q, i, "attn_q.weight", square);
    kvs_load_vector(ld, &l->q_bias, i, "attn_q.bias", E, false);
    kvs_load_matrix(ld, &l->k, i, "attn_k.weight", square);
    kvs_load_vector(ld, &l->k_bias, i, "attn_k.bias", E, false);
    kvs_load_matrix(ld, &l->v, i, "attn_v.weight", square);
    kvs_load_vector(ld, &l->v_bias, i, "attn_v.bias", E, false);
    char full[KVS_NAME];
    kvs_load_name(ld, i, "attn_output.weight", full);
    bool modern = kvs_load_find(ld, full).file != NULL; /* some converters use the text models' name */
    kvs_load_matrix(ld, &l->o, i, modern ? "attn_output.weight" : "attn_out.weight", square);
    kvs_load_vector(ld, &l->o_bias, i, modern ? "attn_output.bias" : "attn_out.bias", E, false);
    kvs_load_vector(ld, &l->ln2, i, "ln2.weight", E, false);
    kvs_load_vector(ld, &l->ln2_bias, i, "ln2.bias", E, false);
    load_ffn(ld, v, l, i);
}

/* The two widths that no hyperparameter bounds. */
static void check_widths(kvs_loader *ld, const kvs_vision *v) {
    const char *path = kvs_gguf_path(ld->files[0]);
    if (ld->status) return;
    if (v->mm0.rows > MAX_FF)
        ld->status = kvs_fail_file(ld->err, KVS_E_FORMAT, path, "mm.0.weight", -1, "has %lld rows, at most %d make sense here",
                                   (long long)v->mm0.rows, MAX_FF);
    else if (v->mm2.rows != ld->model->text.n_embd)
        ld->status = kvs_fail_file(ld->err, KVS_E_MISMATCH, path, "mm.2.weight", -1,
                                   "this mmproj gives rows of %lld values, the text model %.120s wants %d: they are not of one pair",
                                   (long long)v->mm2.rows, base_name(kvs_gguf_path(ld->model->parts[0])), ld->model->text.n_embd);
}

static void load_projector(kvs_loader *ld, kvs_vision *v) {
    kvs_load_matrix(ld, &v->mm0, KVS_NO_LAYER, "mm.0.weight", (kvs_shape){0, v->n_embd, false});
    kvs_load_matrix(ld, &v->mm2, KVS_NO_LAYER, "mm.2.weight", (kvs_shape){0, v->mm0.rows, false});
    check_widths(ld, v);
    kvs_load_vector(ld, &v->mm0_bias, KVS_NO_LAYER, "mm.0.bias", v->mm0.rows, false);
    kvs_load_vector(ld, &v->mm2_bias, KVS_NO_LAYER, "mm.2.bias", v->mm2.rows, false);
}

/* Of no use to LLaVA's features: blocks that do not run, the norm behind the last one, CLIP's text half. */
static bool is_idle(const kvs_model *model, const char *name) {
    static const char *const prefixes[] = {"v.post_ln.", "t.", "text_projection.", "visual_projection.", "logit_scale"};
    for (size_t i = 0; i < sizeof prefixes / sizeof *prefixes; i++)
        if (!strncmp(name, prefixes[i], strlen(prefixes[i]))) return true;
    return !strncmp(name, "v.blk.", 6) && strtol(name + 6, NULL, 10) >= model->vision.n_layer;
}

static void load_weights(kvs_loader *ld, kvs_vision *v) {
    int64_t E = v->n_embd;
    load_projector(ld, v);
    load_patches(ld, v);
    kvs_load_vector(ld, &v->patch_bias, KVS_NO_LAYER, "v.patch_embd.bias", E, true);
    kvs_load_vector(ld, &v->class_embd, KVS_NO_LAYER, "v.class_embd", E, false);
    kvs_load_matrix(ld, &v->position_embd, KVS_NO_LAYER, "v.position_embd.weight", (kvs_shape){v->n_image + 1, E, false});
    kvs_load_vector(ld, &v->pre_ln, KVS_NO_LAYER, "v.pre_ln.weight", E, false);
    kvs_load_vector(ld, &v->pre_ln_bias, KVS_NO_LAYER, "v.pre_ln.bias", E, false);
    v->layers = kvs_calloc((uint64_t)v->n_layer, sizeof *v->layers);
    if (!v->layers && !ld->status) ld->status = kvs_fail_memory(ld->err, (uint64_t)v->n_layer * sizeof *v->layers, "the layers of a tower");
    for (int32_t i = 0; i < v->n_layer && !ld->status; i++) load_layer(ld, v, &v->layers[i], i);
    kvs_load_refuse_rest(ld, is_idle);
}

/* KVS_ROUND_BF16 is for the matrices that are not F32; a file without any is told as what it is. */
static bool all_f32(const kvs_vision *v) {
    bool same = v->patch_embd.type == KVS_TYPE_F32 && v->mm0.type == KVS_TYPE_F32 && v->mm2.type == KVS_TYPE_F32;
    for (int32_t i = 0; i < v->n_layer; i++) {
        const kvs_vision_layer *l = &v->layers[i];
        const kvs_weight *matrices[] = {&l->q, &l->k, &l->v, &l->o, &l->up, &l->down};
        for (size_t j = 0; j < sizeof matrices / sizeof *matrices; j++) same = same && matrices[j]->type == KVS_TYPE_F32;
    }
    return same;
}

static uint64_t hash_hyperparameters(const kvs_vision *v) {
    const int32_t sizes[] = {v->n_layer, v->n_embd, v->n_ff, v->n_head, v->image_size, v->patch_size, v->act};
    uint64_t hash = kvs_hash(kvs_hash(0, sizes, sizeof sizes), &v->eps, sizeof v->eps);
    return kvs_hash(kvs_hash(hash, v->mean, sizeof v->mean), v->std, sizeof v->std);
}

int kvs_vision_load(kvs_model *model, const char *path, const int32_t *cancel, kvs_error *err) {
    int status = kvs_gguf_open(path, &model->mmproj, err);
    if (!status) status = kvs_model_count_file(model, model->mmproj, err);
    if (status) return status;
    kvs_loader ld = {.model = model, .files = &model->mmproj, .n_files = 1, .block = "v.blk", .tower = true, .cancel = cancel, .err = err};
    kvs_vision *v = &model->vision;
    if ((status = check_architecture(model->mmproj, err))) return status;
    if ((status = check_projector(&ld, err))) return status;
    if ((status = refuse_tiles(&ld, err))) return status;
    if (kvs_load_find(&ld, "v.blk.0.attn_qkv.weight").file)
        return fail_key(model->mmproj, KVS_E_UNSUPPORTED, "v.blk.0.attn_qkv.weight", err,
                        "a tower with fused q, k and v is not LLaVA-1.5's");
    if ((status = read_hyperparameters(v, model->mmproj, err))) return status;
    if ((status = blocks_to_run(v, model->mmproj, err))) return status;
    load_weights(&ld, v);
    if (ld.status) return ld.status;
    v->rounding = model->exact || all_f32(v) ? KVS_ROUND_NONE : KVS_ROUND_BF16;
    kvs_gguf_prefetch(model->mmproj);
    model->mmproj_identity = kvs_load_identity(&ld, hash_hyperparameters(v));
    model->has_vision = true;
    return KVS_OK;
}

int kvs_vision_check(const kvs_model *model, kvs_error *err) { return model->mmproj ? kvs_gguf_check(model->mmproj, err) : KVS_OK; }

void kvs_vision_unload(kvs_model *model) {
    free(model->vision.layers);
    model->vision = (kvs_vision){0};
    kvs_gguf_free(model->mmproj);
    model->mmproj = NULL;
    model->has_vision = false;
}
