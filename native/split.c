#include "split.h"

#include "llama.h"

#include <stdlib.h>
#include <string.h>

enum {
    SESSION_ROWS = 4096, /* of the cache that finds room beside the weights, or as many as the model was trained for */
    BATCH_ROWS = 16      /* sessions that step together */
};

typedef struct costs { /* bytes of the device */
    uint64_t *layers;  /* (n_layer) weights and cache */
    uint64_t fixed, tower, embd;
} costs;

/* The driver, graphs, and ops take this for themselves; of a small device, an eighth. */
enum { RESERVE = 300 << 20, SHARE = 8 };

static uint64_t usable(uint64_t free_bytes) { return KVS_MAX(free_bytes / SHARE * (SHARE - 1), free_bytes - KVS_MIN(free_bytes, RESERVE)); }

static uint64_t with_reserve(uint64_t bytes) { return KVS_MIN(bytes + RESERVE, bytes / (SHARE - 1) * SHARE + SHARE); }

static uint64_t layer_cache(const kvs_text *t) {
    uint64_t rows = (uint64_t)KVS_MIN(t->n_ctx_train, (int32_t)SESSION_ROWS);
    uint64_t row = 2 * (uint64_t)t->n_head_kv * (uint64_t)kvs_kv_row_bytes(KVS_TYPE_F16, t->head_dim);
    return rows * (row + 3 * sizeof(float));
}

static bool add_up(const kvs_model *m, costs *c) {
    const kvs_text *t = &m->text;
    *c = (costs){.layers = kvs_calloc((uint64_t)t->n_layer, sizeof *c->layers)};
    if (!c->layers) return false;
    for (int32_t i = 0; i < t->n_layer; i++) c->layers[i] = layer_cache(t);
    int32_t rows = KVS_BLOCK_ROWS;
    if (m->has_vision) {
        rows = KVS_MAX(rows, m->vision.n_image);
        c->tower = kvs_vision_work_bytes(m);
    }
    c->fixed = kvs_work_bytes(m, rows, BATCH_ROWS);
    for (int32_t i = 0; i < m->n_bound; i++) {
        const kvs_bound *b = &m->bound[i];
        uint64_t room = m->be->ops->weight_room(m->be, b->w);
        bool embd = b->w == &t->token_embd && !t->tied; /* where it is tied it is the output */
        *(b->layer >= 0 ? &c->layers[b->layer] : b->layer == KVS_OF_TOWER ? &c->tower : embd ? &c->embd : &c->fixed) += room;
    }
    return true;
}

static uint64_t last_layers(const kvs_text *t, const costs *c, int32_t n) {
    uint64_t bytes = 0;
    for (int32_t i = t->n_layer - n; i < t->n_layer; i++) bytes += c->layers[i];
    return bytes;
}

static int fail(const kvs_model *m, const kvs_split *s, uint64_t needed, int32_t n, kvs_error *err) {
    char what[160];
    snprintf(what, sizeof what, "%d of %d layers, the output, a cache of %d rows and working space", n, m->text.n_layer,
             KVS_MIN(m->text.n_ctx_train, (int32_t)SESSION_ROWS));
    kvs_fail(err, KVS_E_MEMORY, "out of memory on %s, %.1f MiB are free: %.1f MiB needed for %s; %s", m->be->name,
             (double)s->free / 1048576.0, (double)needed / 1048576.0, what, n > 1 ? "ask for fewer gpu_layers" : "use the device \"cpu\"");
    if (err) err->needed = needed, err->available = s->free;
    return KVS_E_MEMORY;
}

/* As many layers as fit; the tower goes first where one layer still fits beside it: a picture costs the CPU seconds. */
static int32_t choose_layers(const kvs_text *t, const costs *c, uint64_t room) {
    uint64_t left = room - c->fixed, one = last_layers(t, c, 1);
    int32_t n = 1;
    if (one + c->tower <= left) left -= c->tower;
    while (n < t->n_layer && last_layers(t, c, n + 1) <= left) n++;
    return n;
}

static bool take(kvs_split *s, uint64_t bytes, uint64_t room) {
    if (bytes > room - s->used) return false;
    s->used += bytes;
    return true;
}

int kvs_split_choose(const kvs_model *m, int32_t gpu_layers, kvs_split *s, kvs_error *err) {
    const kvs_text *t = &m->text;
    uint64_t known = m->be->ops->free_memory(m->be), room = known ? usable(known) : UINT64_MAX;
    costs c;
    *s = (kvs_split){.free = known ? known : UINT64_MAX};
    if (!add_up(m, &c)) return kvs_fail_memory(err, (uint64_t)t->n_layer * sizeof *c.layers, "a list of layers");
    bool given = gpu_layers != KVS_GPU_LAYERS_AUTO;
    int32_t least = !given ? 1 : KVS_MAX(KVS_MIN(gpu_layers, t->n_layer), 0);
    uint64_t needed = c.fixed + last_layers(t, &c, least);
    int status = needed > room ? fail(m, s, with_reserve(needed), least, err) : KVS_OK;
    if (!status) {
        s->n_layer = given ? least : choose_layers(t, &c, room);
        s->used = c.fixed + last_layers(t, &c, s->n_layer);
        s->tower = take(s, c.tower, room);
        s->embd = s->n_layer == t->n_layer && take(s, c.embd, room);
        s->used = with_reserve(s->used);
    }
    free(c.layers);
    return status;
}

bool kvs_split_whole(const kvs_model *m, const kvs_split *s) { return s->n_layer == m->text.n_layer && s->tower && s->embd; }

void kvs_split_apply(kvs_model *m, const kvs_split *s) {
    kvs_text *t = &m->text;
    for (int32_t i = 0; i < m->n_bound; i++) {
        kvs_bound *b = &m->bound[i];
        if (b->layer >= 0)
            b->w->on_host = b->layer < t->n_layer - s->n_layer;
        else if (b->layer == KVS_OF_TOWER)
            b->w->on_host = !s->tower;
        else
            b->w->on_host = b->w == &t->token_embd && !s->embd;
    }
    t->output.on_host = false; /* if it is the embedding, it is no weight of its own */
}

static int print_share(uint64_t used, uint64_t all, char *text, size_t size) {
    double unit = all >= (uint64_t)1 << 30 ? 1 << 30 : 1 << 20;
    return snprintf(text, size, "%.1f of %.1f %s", (double)used / unit, (double)all / unit, unit > 1 << 20 ? "GiB" : "MiB");
}

void kvs_split_tell(const kvs_model *m, const kvs_split *s, const char *name, const char *device, const char *cpu, char *text,
                    size_t size) {
    char share[48] = "", rest[96] = "";
    int32_t n_layer = m->text.n_layer, n_host = n_layer - s->n_layer;
    if (s->free != UINT64_MAX) share[0] = ';', share[1] = ' ', print_share(s->used, s->free, share + 2, sizeof share - 2);
    if (n_host) snprintf(rest, sizeof rest, ", %d layer%s", n_host, n_host > 1 ? "s" : "");
    if (!s->tower) snprintf(rest + strlen(rest), sizeof rest - strlen(rest), "%sthe vision tower", n_host ? " and " : ", ");
    if (!n_host && s->tower && !s->embd) snprintf(rest, sizeof rest, ", the token embedding");
    int n = snprintf(text, size, "%d of %d layers on %s (%.64s%s)%s", s->n_layer, n_layer, name, device, share, rest);
    if (rest[0] && n > 0 && (size_t)n < size) snprintf(text + n, size - (size_t)n, " on the CPU (%.48s)", cpu);
}
