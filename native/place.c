/* place.c - weights into memory and order of the backend that they are used on. */
#include "model.h"

#include <stdlib.h>
#include <string.h>

/* Used where the files are mapped, unless the backend wants another order. */
static bool on_host(const kvs_model *m, const kvs_weight *w) { return m->be->host_memory || w->on_host; }

static bool own(kvs_model *m, void *block) {
    void **grown = kvs_realloc(m->owned, (uint64_t)m->n_owned + 1, sizeof *grown);
    if (!grown) {
        m->be->ops->release(m->be, block);
        return false;
    }
    m->owned = grown;
    m->owned[m->n_owned++] = block;
    return true;
}

static int place_angles(kvs_model *m, kvs_error *err) {
    uint64_t bytes = (uint64_t)m->text.rope.n_rot / 2 * sizeof(float);
    float *block = m->be->ops->alloc(m->be, bytes);
    if (!block || !own(m, block)) return kvs_fail_room(m->be, err, bytes, "a vector of the model");
    m->be->ops->upload(m->be, block, m->inv_freq, bytes);
    m->text.rope.inv_freq = block;
    return KVS_OK;
}

/* ---- room ---- */

/* Memory for those of the list that the backend wants a copy of. */
static int reserve(kvs_model *m, kvs_placing *placing, kvs_weight *const *list, int32_t n, bool host, kvs_error *err) {
    placing->matrices = kvs_calloc((uint64_t)n, sizeof *placing->matrices);
    if (!placing->matrices) return kvs_fail_memory(err, (uint64_t)n * sizeof *list, "a list of weights");
    uint64_t total = 0; /* at most 64 times their files' sizes, which are mapped: no sum overflows */
    for (int32_t i = 0; i < n; i++) {
        uint64_t room = list[i]->data && on_host(m, list[i]) == host ? m->be->ops->weight_room(m->be, list[i]) : 0;
        if (room) placing->matrices[placing->n++] = list[i];
        total += room;
    }
    if (!placing->n) return KVS_OK;
    placing->room = m->be->ops->alloc_weights(m->be, total, host);
    if (placing->room && own(m, placing->room)) return KVS_OK;
    return host ? kvs_fail_memory(err, total, "the weights of the model") : kvs_fail_room(m->be, err, total, "the weights of the model");
}

/* All that points into the files, and the output where it is the token embedding and that one stays on the host. */
static int reserve_at_load(kvs_model *m, kvs_error *err) {
    kvs_text *t = &m->text;
    kvs_weight **list = kvs_calloc((uint64_t)m->n_bound + 1, sizeof *list);
    if (!list) return kvs_fail_memory(err, ((uint64_t)m->n_bound + 1) * sizeof *list, "a list of weights");
    for (int32_t i = 0; i < m->n_bound; i++) list[i] = m->bound[i].w;
    int32_t n = m->n_bound;
    if (t->tied && t->token_embd.on_host && !t->output.on_host) list[n++] = &t->output;
    int status = reserve(m, &m->at_load, list, n, false, err);
    free(list);
    return status;
}

/* Matrices of the text, which are multiplied with int8: the tower's are not. */
static int reserve_at_pass(kvs_model *m, kvs_error *err) {
    enum { PER_LAYER = 7 };
    kvs_text *t = &m->text;
    uint64_t room = (uint64_t)t->n_layer * PER_LAYER + 1;
    kvs_weight **list = kvs_calloc(room, sizeof *list);
    if (!list) return kvs_fail_memory(err, room * sizeof *list, "a list of weights");
    int32_t n = 0;
    for (int32_t i = 0; i < t->n_layer; i++) {
        kvs_text_layer *l = &t->layers[i];
        kvs_weight *const of_layer[PER_LAYER] = {&l->q, &l->k, &l->v, &l->o, &l->gate, &l->up, &l->down};
        memcpy(list + n, of_layer, sizeof of_layer);
        n += PER_LAYER;
    }
    list[n++] = &t->output; /* a copy of its own where it is tied: tokens are looked up in rows */
    int status = reserve(m, &m->at_pass, list, n, true, err);
    free(list);
    return status;
}

/* ---- copies ---- */

int kvs_place(kvs_model *m, kvs_placing *placing, const int32_t *cancel, kvs_error *err) {
    for (; placing->done < placing->n; placing->done++) {
        kvs_weight *w = placing->matrices[placing->done];
        uint64_t room = m->be->ops->weight_room(m->be, w);
        const void *from = w->data;
        uint64_t bytes = (uint64_t)(w->rows * w->row_bytes);
        if (!m->be->ops->place(m->be, w, placing->room, cancel)) {
            int status = kvs_device_check(m->be, err);
            if (!status && m->be->ops->status(m->be) == KVS_E_MEMORY) status = kvs_fail_room(m->be, err, bytes, "a copy of weights");
            return status ? status : kvs_fail(err, KVS_E_CANCELLED, "cancelled");
        }
        for (int32_t i = 0; i < m->n_parts; i++) kvs_gguf_forget(m->parts[i], from, bytes);
        if (m->mmproj) kvs_gguf_forget(m->mmproj, from, bytes);
        placing->room += room;
    }
    return KVS_OK;
}

int kvs_place_model(kvs_model *m, const int32_t *cancel, kvs_error *err) {
    int status = place_angles(m, err);
    if (!status) status = reserve_at_pass(m, err);
    if (!status && !m->be->host_memory) status = reserve_at_load(m, err);
    if (!status) status = kvs_place(m, &m->at_load, cancel, err);
    m->be->ops->end_place(m->be);
    if (m->text.tied && m->text.token_embd.placed && !m->text.output.placed) m->text.output = m->text.token_embd;
    free(m->bound);
    m->bound = NULL, m->n_bound = m->room_bound = 0;
    return status;
}
