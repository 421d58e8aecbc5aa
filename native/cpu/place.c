/* place.c - matrices of a model in memory and order of our own: stripes, on huge pages. A copy that is read once per token at a third
 * more bandwidth than the file's small pages give, and that no writer of the file can change. */
#include "cpu.h"
#include "dots.h"
#include "stripes.h"

typedef struct copy {
    const kvs_weight *w;
    uint8_t *to;
} copy;

void *kvs_cpu_alloc_weights(kvs_backend *be, uint64_t bytes, bool on_host) {
    (void)be, (void)on_host;
    return kvs_calloc_huge(bytes);
}

uint64_t kvs_cpu_weight_room(kvs_backend *be, const kvs_weight *w) {
    if (!((kvs_cpu *)be)->isa->dots->striped || !kvs_striped(w->type)) return 0;
    uint64_t stripes = (uint64_t)(w->rows + KVS_STRIPE - 1) / KVS_STRIPE;
    return (stripes * KVS_STRIPE * (uint64_t)w->row_bytes + 63) / 64 * 64;
}

static void copy_stripes(void *arg, int64_t begin, int64_t end, int32_t thread) {
    const copy *c = arg;
    const kvs_weight *w = c->w;
    (void)thread;
    for (int64_t row = begin * KVS_STRIPE; row < KVS_MIN(end * KVS_STRIPE, w->rows); row += KVS_STRIPE)
        kvs_stripe_pack(w->type, (const uint8_t *)w->data + row * w->row_bytes, KVS_MIN(KVS_STRIPE, w->rows - row), w->row_bytes,
                        c->to + row * w->row_bytes);
}

bool kvs_cpu_place(kvs_backend *be, kvs_weight *w, void *room, const int32_t *cancel) {
    copy c = {w, room};
    if (!kvs_pool_run(((kvs_cpu *)be)->pool, copy_stripes, &c, (w->rows + KVS_STRIPE - 1) / KVS_STRIPE, 1, cancel)) return false;
    w->data = room;
    w->placed = true;
    return true;
}
