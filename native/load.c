#include "load.h"

#include "quant.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

enum { SAMPLE_BYTES = 4096 };

/* Names of the types that GGUF knows and we do not load: a message should not say "type 19". */
static const char *foreign_type(int32_t type) {
    static const char *const names[] = {[9] = "Q8_1",   [15] = "Q8_K",  [16] = "IQ2_XXS", [17] = "IQ2_XS", [18] = "IQ3_XXS", [19] = "IQ1_S",
                                        [21] = "IQ3_S", [22] = "IQ2_S", [24] = "I8",      [25] = "I16",    [26] = "I32",     [27] = "I64",
                                        [28] = "F64",   [29] = "IQ1_M", [34] = "TQ1_0",   [35] = "TQ2_0",  [39] = "MXFP4"};
    bool known = type >= 0 && type < (int32_t)(sizeof names / sizeof *names) && names[type];
    return known ? names[type] : "unknown";
}

void kvs_load_name(const kvs_loader *ld, int32_t layer, const char *name, char full[KVS_NAME]) {
    if (layer == KVS_NO_LAYER)
        snprintf(full, KVS_NAME, "%s", name);
    else
        snprintf(full, KVS_NAME, "%s.%d.%s", ld->block, layer, name);
}

kvs_found kvs_load_find(const kvs_loader *ld, const char *full_name) {
    kvs_found t = {.index = -1};
    for (int32_t i = 0; i < ld->n_files && !t.file; i++) {
        t.index = kvs_gguf_find_tensor(ld->files[i], full_name);
        if (t.index < 0) continue;
        t.file = ld->files[i];
        kvs_gguf_tensor_at(t.file, t.index, &t.info);
    }
    return t;
}

void kvs_load_fail(kvs_loader *ld, const kvs_found *t, const char *format, ...) {
    if (ld->status) return;
    char reason[256];
    va_list args;
    va_start(args, format);
    vsnprintf(reason, sizeof reason, format, args);
    va_end(args);
    ld->status = kvs_fail_file(ld->err, KVS_E_FORMAT, kvs_gguf_path(t->file), t->info.name, t->info.offset, "%s", reason);
}

/* Finds a tensor of a type that loads; file is NULL after a failure and where an optional one is absent. */
static kvs_found find_loadable(kvs_loader *ld, int32_t layer, const char *name, bool optional) {
    char full[KVS_NAME];
    kvs_load_name(ld, layer, name, full);
    kvs_found t = {.index = -1};
    if (!ld->status && kvs_cancelled(ld->cancel)) ld->status = kvs_fail(ld->err, KVS_E_CANCELLED, "loading was cancelled");
    if (ld->status) return t;
    t = kvs_load_find(ld, full);
    if (!t.file && !optional) {
        bool empty = ld->n_files == 1 && kvs_gguf_n_tensors(ld->files[0]) == 0;
        ld->status = kvs_fail_file(ld->err, KVS_E_FORMAT, kvs_gguf_path(ld->files[0]), full, -1, "this tensor is missing%s",
                                   empty ? ": the file holds a vocabulary only, no weights" : "");
    } else if (t.file && t.info.bytes < 0) {
        ld->status = kvs_fail_file(ld->err, KVS_E_UNSUPPORTED, kvs_gguf_path(t.file), full, t.info.offset,
                                   "tensors of type %s (%d) can't be run; F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, "
                                   "IQ4_NL and IQ4_XS can",
                                   foreign_type(t.info.type), t.info.type);
        t.file = NULL;
    }
    return t;
}

static void check_shape(kvs_loader *ld, const kvs_found *t, kvs_shape want) {
    const int64_t *d = t->info.dims;
    if ((want.cols && d[0] != want.cols) || (want.rows && d[1] != want.rows) || d[2] != 1 || d[3] != 1) {
        char is[96], rows[24] = "any", cols[24] = "any";
        int n = snprintf(is, sizeof is, "%lld", (long long)d[0]);
        for (int i = 1; i < t->info.n_dims; i++) n += snprintf(is + n, sizeof is - (size_t)n, ", %lld", (long long)d[i]);
        if (want.cols) snprintf(cols, sizeof cols, "%lld", (long long)want.cols);
        if (want.rows) snprintf(rows, sizeof rows, "%lld", (long long)want.rows);
        if (want.rows == 1)
            kvs_load_fail(ld, t, "has the shape [%s], but the hyperparameters ask for [%s]", is, cols);
        else
            kvs_load_fail(ld, t, "has the shape [%s], but the hyperparameters ask for [%s, %s]", is, cols, rows);
    }
}

/* What points into a file is told where to lie once all of it is known: place.c. */
static void remember(kvs_loader *ld, kvs_weight *w, int32_t layer) {
    kvs_model *m = ld->model;
    if (m->n_bound == m->room_bound) {
        int32_t room = 2 * m->room_bound + 64;
        kvs_bound *grown = kvs_realloc(m->bound, (uint64_t)room, sizeof *grown);
        if (!grown) {
            ld->status = kvs_fail_memory(ld->err, (uint64_t)room * sizeof *grown, "a list of weights");
            return;
        }
        m->bound = grown;
        m->room_bound = room;
    }
    m->bound[m->n_bound++] = (kvs_bound){w, ld->tower ? KVS_OF_TOWER : layer};
}

void kvs_load_bind(kvs_loader *ld, kvs_weight *w, int32_t layer, const kvs_found *t, int64_t rows, int64_t cols) {
    *w = (kvs_weight){.type = t->info.type,
                      .rows = rows,
                      .cols = cols,
                      .row_bytes = t->info.bytes / rows,
                      .data = kvs_gguf_tensor_data(t->file, t->index)};
    kvs_gguf_use_tensor(t->file, t->index);
    ld->model->weight_bytes += (uint64_t)t->info.bytes;
    remember(ld, w, layer);
}

void kvs_load_matrix(kvs_loader *ld, kvs_weight *w, int32_t layer, const char *name, kvs_shape shape) {
    kvs_found t = find_loadable(ld, layer, name, shape.optional);
    if (t.file) check_shape(ld, &t, shape);
    if (t.file && !ld->status) kvs_load_bind(ld, w, layer, &t, t.info.dims[1], t.info.dims[0]);
}

static float *widen(kvs_loader *ld, const kvs_found *t) {
    float *host = kvs_calloc((uint64_t)t->info.dims[0], sizeof *host);
    if (!host) {
        ld->status = kvs_fail_memory(ld->err, (uint64_t)t->info.dims[0] * sizeof *host, "a vector of the model");
        return NULL;
    }
    kvs_gguf_use_tensor(t->file, t->index);
    kvs_type_get(t->info.type)->to_f32(kvs_gguf_tensor_data(t->file, t->index), host, t->info.dims[0]);
    return host;
}

float *kvs_load_floats(kvs_loader *ld, int32_t layer, const char *name, int64_t cols, bool optional) {
    kvs_found t = find_loadable(ld, layer, name, optional);
    if (t.file) check_shape(ld, &t, (kvs_shape){1, cols, optional});
    return t.file && !ld->status ? widen(ld, &t) : NULL;
}

/* Vectors are small enough to be read at load; in matrices a value that is not finite is found by the pass that meets it. */
static void check_finite(kvs_loader *ld, const kvs_found *t, const float *x) {
    for (int64_t i = 0; i < t->info.dims[0]; i++) {
        if (isfinite(x[i])) continue;
        kvs_found at = *t;
        at.info.offset += i * (t->info.bytes / t->info.dims[0]);
        kvs_load_fail(ld, &at, "its value %lld is %g: norms and biases must be finite", (long long)i, (double)x[i]);
        return;
    }
}

static bool own(kvs_loader *ld, float *host) { /* takes it over */
    kvs_model *m = ld->model;
    float **grown = kvs_realloc(m->widened, (uint64_t)m->n_widened + 1, sizeof *grown);
    if (!grown) {
        free(host);
        ld->status = kvs_fail_memory(ld->err, sizeof *grown, "a list of vectors");
        return false;
    }
    m->widened = grown;
    m->widened[m->n_widened++] = host;
    return true;
}

void kvs_load_vector(kvs_loader *ld, kvs_weight *w, int32_t layer, const char *name, int64_t cols, bool optional) {
    kvs_found t = find_loadable(ld, layer, name, optional);
    if (t.file) check_shape(ld, &t, (kvs_shape){1, cols, optional});
    if (!t.file || ld->status) return;
    kvs_load_bind(ld, w, layer, &t, 1, t.info.dims[0]);
    if (ld->status) return;
    if (t.info.type == KVS_TYPE_F32) {
        check_finite(ld, &t, kvs_gguf_tensor_data(t.file, t.index));
        return;
    }
    float *host = widen(ld, &t);
    if (!host || !own(ld, host)) return;
    check_finite(ld, &t, host);
    *w = (kvs_weight){.type = KVS_TYPE_F32, .rows = 1, .cols = w->cols, .row_bytes = 4 * w->cols, .data = host};
}

void kvs_load_refuse_rest(kvs_loader *ld, bool (*changes_nothing)(const kvs_model *model, const char *name)) {
    for (int32_t i = 0; i < ld->n_files && !ld->status; i++)
        for (int64_t j = 0; j < kvs_gguf_n_tensors(ld->files[i]) && !ld->status; j++) {
            kvs_gguf_tensor t;
            kvs_gguf_tensor_at(ld->files[i], j, &t);
            if (kvs_gguf_tensor_used(ld->files[i], j) || changes_nothing(ld->model, t.name)) continue;
            ld->status = kvs_fail_file(ld->err, KVS_E_UNSUPPORTED, kvs_gguf_path(ld->files[i]), t.name, t.offset,
                                       "this tensor has no place in the architectures that load; without it the result would be quietly "
                                       "another model's");
        }
}

uint64_t kvs_load_identity(const kvs_loader *ld, uint64_t seed) {
    for (int32_t i = 0; i < ld->n_files; i++)
        for (int64_t j = 0; j < kvs_gguf_n_tensors(ld->files[i]) && !kvs_cancelled(ld->cancel); j++) {
            kvs_gguf_tensor t;
            kvs_gguf_tensor_at(ld->files[i], j, &t);
            seed = kvs_hash(seed, t.name, strlen(t.name));
            seed = kvs_hash(seed, t.dims, sizeof t.dims);
            seed = kvs_hash(seed, &t.type, sizeof t.type);
            const uint8_t *data = kvs_gguf_tensor_data(ld->files[i], j);
            if (!data) continue;
            uint64_t n = KVS_MIN((uint64_t)t.bytes, SAMPLE_BYTES), middle = ((uint64_t)t.bytes - n) / 2;
            seed = kvs_hash(seed, data, n);
            seed = kvs_hash(seed, data + middle, n);
        }
    return seed;
}
