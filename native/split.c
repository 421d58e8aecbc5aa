#include "split.h"

#include "llama.h"

#include <stdlib.h>
#include <string.h>

enum {
    SESSION_ROWS = 4096, /* of the cache that finds room beside the weights, or as many as the model was trained for */
    BATCH_ROWS = 64      /* sessions that step together */
};

typedef struct costs { /* bytes of the device */
    uint64_t *layers;  /* (n_layer) weights and cache */
    uint64_t fixed, tower, embd;
    uint64_t layer_cache, work, tower_work; /* what of them is no weights: of each layer, of fixed, of tower */
} costs;

/* The driver, graphs, and ops take this for themselves; of a small device, an eighth. */
enum { RESERVE = 300 << 20, SHARE = 8 };

static uint64_t usable(uint64_t free_bytes) { return KVS_MAX(free_bytes / SHARE * (SHARE - 1), free_bytes - KVS_MIN(free_bytes, RESERVE)); }

static uint64_t with_reserve(uint64_t bytes) { return KVS_MIN(bytes + RESERVE, bytes / (SHARE - 1) * SHARE + SHARE); }

static int32_t cache_rows(const kvs_text *t) { return KVS_MIN(t->n_ctx_train, (int32_t)SESSION_ROWS); }

static uint64_t layer_cache(const kvs_text *t) {
    uint64_t rows = (uint64_t)cache_rows(t);
    uint64_t row = 2 * (uint64_t)t->n_head_kv * (uint64_t)kvs_kv_row_bytes(KVS_TYPE_F16, t->head_dim);
    return rows * (row + 3 * sizeof(float));
}

static uint64_t text_work(const kvs_model *m) {
    return kvs_work_bytes(m, m->has_vision ? KVS_MAX(m->vision.n_image, (int32_t)KVS_BLOCK_ROWS) : KVS_BLOCK_ROWS, BATCH_ROWS);
}

static uint64_t tower_work(const kvs_model *m) { return m->has_vision ? kvs_vision_work_bytes(m) : 0; }

kvs_plan kvs_plan_host(const kvs_model *m) {
    return (kvs_plan){.rows = cache_rows(&m->text),
                      .weights = m->weight_bytes,
                      .cache = (uint64_t)m->text.n_layer * layer_cache(&m->text),
                      .work = text_work(m) + tower_work(m)};
}

static bool add_up(const kvs_model *m, costs *c) {
    const kvs_text *t = &m->text;
    *c = (costs){.layers = kvs_calloc((uint64_t)t->n_layer, sizeof *c->layers), .layer_cache = layer_cache(t)};
    if (!c->layers) return false;
    for (int32_t i = 0; i < t->n_layer; i++) c->layers[i] = c->layer_cache;
    c->tower = c->tower_work = tower_work(m);
    c->fixed = c->work = text_work(m);
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

/* used: without the reserve */
static kvs_plan plan_of(const kvs_model *m, const costs *c, const kvs_split *s, int32_t n_layer, bool tower, uint64_t used) {
    kvs_plan plan = {.rows = cache_rows(&m->text),
                     .cache = (uint64_t)n_layer * c->layer_cache,
                     .work = c->work + (tower ? c->tower_work : 0),
                     .reserve = with_reserve(used) - used,
                     .free = s->free == UINT64_MAX ? 0 : s->free};
    plan.weights = used - plan.cache - plan.work;
    return plan;
}

static int fail(const kvs_model *m, const kvs_plan *p, int32_t n, kvs_error *err) {
    const double mib = 1048576.0;
    const uint64_t needed = p->weights + p->cache + p->work + p->reserve;
    kvs_fail(
        err, KVS_E_MEMORY,
        "out of memory on %s, %.1f MiB are free: %.1f MiB needed for %d of %d layers and the output: %.1f for weights, %.1f for a cache "
        "of %d rows, %.1f of working space, %.1f for the device itself; %s",
        m->be->name, (double)p->free / mib, (double)needed / mib, n, m->text.n_layer, (double)p->weights / mib, (double)p->cache / mib,
        p->rows, (double)p->work / mib, (double)p->reserve / mib, n > 1 ? "ask for fewer gpu_layers" : "use the device \"cpu\"");
    if (err) err->needed = needed, err->available = p->free;
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
    int status = KVS_OK;
    if (needed > room) {
        s->plan = plan_of(m, &c, s, least, false, needed);
        status = fail(m, &s->plan, least, err);
    } else {
        s->n_layer = given ? least : choose_layers(t, &c, room);
        s->used = c.fixed + last_layers(t, &c, s->n_layer);
        s->tower = take(s, c.tower, room);
        s->embd = s->n_layer == t->n_layer && take(s, c.embd, room);
        s->plan = plan_of(m, &c, s, s->n_layer, s->tower, s->used);
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
