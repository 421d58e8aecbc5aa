/* llama.c - the layer loop: one for prefill and decode, for one session and many, for every device. */
#include "llama.h"

#include <math.h>
#include <string.h>

/* What finite() is told: the embedding, of each layer its keys, its values and what it adds up to, the logits. */
enum { AT_EMBEDDING, AT_LAYERS };
enum { KEYS, VALUES, SUM, PER_LAYER };

static int32_t place_in(int32_t layer, int32_t what) { return AT_LAYERS + layer * PER_LAYER + what; }

static int fail_input(const kvs_pass *pass, const kvs_fault *fault, kvs_error *err) {
    int32_t s = 0;
    while (fault->row >= pass->spans[s].first + pass->spans[s].n) s++;
    const kvs_span *span = &pass->spans[s];
    int32_t at = fault->row - span->first, id = span->ids[at];
    char name[64];
    snprintf(name, sizeof name, id < 0 ? "the embeddings given for row %d" : "the embedding of token %d", id < 0 ? span->index + at : id);
    return kvs_fail_numeric(err, name, fault->value, id < 0 ? "give finite numbers of a sane size" : KVS_BAD_WEIGHTS);
}

static int fail_numeric(const kvs_model *model, const kvs_pass *pass, const kvs_fault *fault, kvs_error *err) {
    int32_t n_layer = model->text.n_layer, layer = (fault->place - AT_LAYERS) / PER_LAYER, what = (fault->place - AT_LAYERS) % PER_LAYER;
    const char *parts[] = {", its keys", ", its values", ""};
    if (fault->place == AT_EMBEDDING) return fail_input(pass, fault, err);
    char name[64] = "the output";
    if (layer < n_layer) snprintf(name, sizeof name, "layer %d of %d (blk.%d)%s", layer + 1, n_layer, layer, parts[what]);
    bool store = what != SUM && isfinite(fault->value);
    const char *reason = store ? "more than this cache can hold; make the session with kv_type=\"f32\"" : KVS_BAD_WEIGHTS;
    return kvs_fail_numeric(err, name, fault->value, reason);
}

static kvs_matmul job(float *y, const kvs_weight *w, const kvs_weight *bias) { return (kvs_matmul){.y = y, .w = w, .bias = bias->data}; }

/* Token rows from the embedding table, picture rows from the host: x (n, E), run by run. */
static void input_rows(kvs_model *model, const kvs_pass *pass) {
    const kvs_ops *ops = model->be->ops;
    int64_t width = model->text.n_embd;
    int32_t row = 0;
    for (int32_t s = 0; s < pass->n_spans;) {
        const int32_t *ids = pass->spans[s].ids;
        int32_t n = 0; /* ids of sessions that step together follow each other */
        for (; s < pass->n_spans && pass->spans[s].ids == ids + n; s++) n += pass->spans[s].n;
        for (int32_t i = 0; i < n;) {
            bool image = ids[i] < 0;
            int32_t run = 1;
            while (i + run < n && (ids[i + run] < 0) == image && (!image || pass->embd[row + run] == pass->embd[row] + run * width)) run++;
            float *x = model->work.x + row * width;
            if (image)
                ops->upload(model->be, x, pass->embd[row], (uint64_t)run * (uint64_t)width * sizeof(float));
            else
                ops->rows(model->be, x, &model->text.token_embd, ids + i, run);
            i += run;
            row += run;
        }
    }
}

static void before_step(const kvs_span *span) {
    for (int32_t i = 0; i < span->cache->n_policies && span->generated; i++) {
        kvs_policy *policy = span->cache->policies[i];
        if (policy->ops->before_step) policy->ops->before_step(policy, span);
    }
}

static void check_new_rows(const kvs_model *model, const kvs_span *span, int32_t layer) {
    const kvs_work *w = &model->work;
    const kvs_kv *kv = &span->cache->kv;
    int32_t width = kv->n_kv_head * kv->head_dim;
    float limit = kvs_kv_limit(kv->type);
    model->be->ops->finite(model->be, w->k + (int64_t)span->first * width, span->n, width, limit, place_in(layer, KEYS));
    model->be->ops->finite(model->be, w->v + (int64_t)span->first * width, span->n, width, limit, place_in(layer, VALUES));
}

static void before_attention(const kvs_span *span, int32_t layer, const kvs_rope *rope) {
    for (int32_t i = 0; i < span->cache->n_policies && !span->generated; i++) {
        kvs_policy *policy = span->cache->policies[i];
        if (policy->ops->before_attn) policy->ops->before_attn(policy, span, layer, rope);
    }
}

static void after_attention(const kvs_span *span, int32_t layer, const kvs_rope *rope, float *out) {
    for (int32_t i = 0; i < span->cache->n_policies && span->generated; i++) {
        kvs_policy *policy = span->cache->policies[i];
        if (policy->ops->after_attn) policy->ops->after_attn(policy, span, layer, rope, out);
    }
}

/* For all sessions before any of them has its row or its logits: what may fail. A row that runs again has had it. */
static int after_step(const kvs_span *span, kvs_error *err) {
    int status = KVS_OK;
    bool fresh = span->generated && span->index == span->cache->n_past;
    for (int32_t i = 0; i < span->cache->n_policies && fresh && !status; i++) {
        kvs_policy *policy = span->cache->policies[i];
        if (policy->ops->after_step) status = policy->ops->after_step(policy, span, err);
    }
    return status;
}

/* x += attention(norm(x)) W_o; the cache gets the new rows, policies see the outputs before W_o. */
static void attention_block(kvs_model *model, const kvs_pass *pass, int32_t index) {
    const kvs_ops *ops = model->be->ops;
    const kvs_text *t = &model->text;
    const kvs_text_layer *layer = &t->layers[index];
    kvs_work *w = &model->work;
    ops->norm(model->be, w->y, w->x, layer->attn_norm.data, NULL, t->rms_eps, pass->n, t->n_embd);
    kvs_matmul qkv[] = {job(w->q, &layer->q, &layer->q_bias), job(w->k, &layer->k, &layer->k_bias), job(w->v, &layer->v, &layer->v_bias)};
    ops->matmul(model->be, qkv, 3, w->y, pass->n);
    ops->rope(model->be, w->q, &t->rope, pass->n, t->n_head, t->head_dim);
    ops->rope(model->be, w->k, &t->rope, pass->n, t->n_head_kv, t->head_dim);
    for (int32_t s = 0; s < pass->n_spans; s++) check_new_rows(model, &pass->spans[s], index);
    ops->kv_put(model->be, index, w->k, w->v);
    for (int32_t s = 0; s < pass->n_spans; s++) before_attention(&pass->spans[s], index, &t->rope);
    ops->attn(model->be, index, w->q, w->attn, &w->taps);
    ops->kv_record(model->be, index, w->q, &w->taps);
    ops->kv_put_out(model->be, index, w->attn);
    for (int32_t s = 0; s < pass->n_spans; s++) after_attention(&pass->spans[s], index, &t->rope, w->attn);
    kvs_matmul o = job(w->y, &layer->o, &layer->o_bias);
    ops->matmul(model->be, &o, 1, w->attn, pass->n);
    ops->add(model->be, w->x, w->y, (int64_t)pass->n * t->n_embd);
}

/* x += (silu(n W_gate) * (n W_up)) W_down with n = norm(x) */
static void ffn_block(kvs_model *model, int32_t n, const kvs_text_layer *layer) {
    const kvs_ops *ops = model->be->ops;
    const kvs_text *t = &model->text;
    kvs_work *w = &model->work;
    ops->norm(model->be, w->y, w->x, layer->ffn_norm.data, NULL, t->rms_eps, n, t->n_embd);
    kvs_matmul both[] = {job(w->gate, &layer->gate, &layer->gate_bias), job(w->up, &layer->up, &layer->up_bias)};
    ops->matmul(model->be, both, 2, w->y, n);
    ops->gate(model->be, w->gate, w->up, (int64_t)n * t->n_ff);
    kvs_matmul down = job(w->y, &layer->down, &layer->down_bias);
    ops->matmul(model->be, &down, 1, w->gate, n);
    ops->add(model->be, w->x, w->y, (int64_t)n * t->n_embd);
}

/* Logits of the last row of each span, to its session's memory. */
static void output_rows(kvs_model *model, const kvs_pass *pass) {
    const kvs_ops *ops = model->be->ops;
    const kvs_text *t = &model->text;
    kvs_work *w = &model->work;
    uint64_t bytes = (uint64_t)t->n_embd * sizeof(float);
    for (int32_t s = 0; s < pass->n_spans; s++) {
        int64_t last = pass->spans[s].first + pass->spans[s].n - 1;
        if (last != s) ops->copy(model->be, w->x + (int64_t)s * t->n_embd, w->x + last * t->n_embd, bytes);
    }
    ops->norm(model->be, w->y, w->x, t->output_norm.data, NULL, t->rms_eps, pass->n_spans, t->n_embd);
    kvs_matmul out = {.y = w->logits, .w = &t->output};
    ops->matmul(model->be, &out, 1, w->y, pass->n_spans);
    ops->finite(model->be, w->logits, pass->n_spans, t->n_vocab, FLT_MAX, place_in(t->n_layer, 0));
    ops->scatter(model->be, pass->logits_out, w->logits, pass->n_spans, t->n_vocab);
}

int kvs_llama_pass(kvs_model *model, const kvs_pass *pass, kvs_error *err) {
    const kvs_ops *ops = model->be->ops;
    int status = kvs_text_check(model, err);
    if (!status) status = kvs_place(model, &model->at_pass, pass->cancel, err);
    if (!status) status = kvs_work_reserve(model, pass->n, pass->logits ? pass->n_spans : 0, err);
    if (status) return status;
    for (int32_t s = 0; s < pass->n_spans; s++) before_step(&pass->spans[s]);
    kvs_fault fault;
    kvs_step step = {.rows = pass->rows, .n = pass->n, .cancel = pass->cancel, .fault = &fault};
    ops->begin(model->be, &step);
    input_rows(model, pass);
    ops->finite(model->be, model->work.x, pass->n, model->text.n_embd, KVS_MAX_RESIDUAL, AT_EMBEDDING);
    ops->angles(model->be, &model->text.rope);
    for (int32_t i = 0; i < model->text.n_layer; i++) {
        attention_block(model, pass, i);
        ffn_block(model, pass->n, &model->text.layers[i]);
        ops->finite(model->be, model->work.x, pass->n, model->text.n_embd, KVS_MAX_RESIDUAL, place_in(i, SUM));
    }
    if (pass->logits) output_rows(model, pass);
    if (pass->told) ops->kv_tell(model->be, (kvs_range){0, model->text.n_layer}, pass->told);
    status = ops->end(model->be, err);
    if (status == KVS_E_NUMERIC) status = fail_numeric(model, pass, &fault, err);
    if (kvs_text_check(model, err)) status = KVS_E_FORMAT; /* zeros in place of weights are the cause of whatever came of it */
    for (int32_t s = 0; s < pass->n_spans && !status; s++) status = after_step(&pass->spans[s], err);
    return status ? status : kvs_device_check(model->be, err);
}
