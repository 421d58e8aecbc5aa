#include "twin.h"

#include <stdlib.h>
#include <string.h>

/* ---- the list ---- */

static void free_twin(kvs_twins *t, kvs_twin *twin) {
    if (twin->device) t->device->ops->release(t->device, twin->device);
    if (twin->host) t->cpu->ops->release(t->cpu, twin->host);
    free(twin);
}

void kvs_twins_free(kvs_twins *t) {
    for (int32_t i = 0; i < t->n; i++) free_twin(t, t->blocks[i]);
    free(t->blocks);
    for (int32_t i = 0; i < t->room_kvs; i++) free(t->copies[i]);
    free(t->copies);
    free(t->kvs);
    free(t->rows);
    pthread_mutex_destroy(&t->mutex);
}

static int32_t first_behind(const kvs_twins *t, const uint8_t *address) { /* of the blocks that begin behind it */
    int32_t low = 0, high = t->n;
    while (low < high) {
        int32_t middle = (low + high) / 2;
        if (t->blocks[middle]->host > address)
            high = middle;
        else
            low = middle + 1;
    }
    return low;
}

static bool add(kvs_twins *t, kvs_twin *twin) { /* the mutex is held */
    if (t->n == t->room) {
        int32_t room = 2 * t->room + 32;
        kvs_twin **grown = kvs_realloc(t->blocks, (uint64_t)room, sizeof *grown);
        if (!grown) return false;
        t->blocks = grown;
        t->room = room;
    }
    int32_t at = first_behind(t, twin->host);
    memmove(t->blocks + at + 1, t->blocks + at, (size_t)(t->n - at) * sizeof *t->blocks);
    t->blocks[at] = twin;
    t->n++;
    return true;
}

static void *listed(kvs_twins *t, kvs_twin *twin) {
    pthread_mutex_lock(&t->mutex);
    bool ok = add(t, twin);
    pthread_mutex_unlock(&t->mutex);
    if (ok) return twin->host;
    free_twin(t, twin);
    return NULL;
}

void *kvs_twins_alloc(kvs_twins *t, uint64_t bytes) {
    kvs_twin *twin = kvs_calloc(1, sizeof *twin);
    if (!twin) return NULL;
    twin->bytes = bytes;
    twin->stretches[twin->n++] = (kvs_stretch){bytes, KVS_HOST | KVS_DEVICE}; /* zeros, on both */
    twin->host = t->cpu->ops->alloc(t->cpu, bytes);
    if (twin->host) return listed(t, twin);
    free_twin(t, twin);
    return NULL;
}

/* On the host all of it has an address, but memory only where it is touched. */
void *kvs_twins_alloc_layers(kvs_twins *t, int32_t n_layer, int32_t n_host, uint64_t bytes_per_layer) {
    kvs_twin *twin = kvs_calloc(1, sizeof *twin);
    bool ok = twin && kvs_mul_u64((uint64_t)n_layer, bytes_per_layer, &twin->bytes);
    if (ok) {
        n_host = KVS_MIN(n_host, n_layer);
        twin->layers = true;
        int32_t skipped = t->device->whole_arrays ? 0 : n_host;
        twin->host_bytes = (uint64_t)n_host * bytes_per_layer;
        twin->skipped = (uint64_t)skipped * bytes_per_layer;
        twin->host = t->cpu->ops->alloc(t->cpu, twin->bytes);
        if (n_host < n_layer) twin->device = t->device->ops->alloc_layers(t->device, n_layer - skipped, bytes_per_layer);
        ok = twin->host && (twin->device || n_host == n_layer);
    }
    if (ok) return listed(t, twin);
    if (twin) free_twin(t, twin);
    return NULL;
}

static int32_t index_of(const kvs_twins *t, const uint8_t *address) { /* the mutex is held; -1: in none */
    int32_t at = first_behind(t, address) - 1;
    return at >= 0 && (uint64_t)(address - t->blocks[at]->host) < KVS_MAX(t->blocks[at]->bytes, 1) ? at : -1;
}

void kvs_twins_release(kvs_twins *t, void *block) {
    pthread_mutex_lock(&t->mutex);
    int32_t at = index_of(t, block);
    kvs_twin *twin = at < 0 ? NULL : t->blocks[at];
    if (twin) memmove(t->blocks + at, t->blocks + at + 1, (size_t)(--t->n - at) * sizeof *t->blocks);
    pthread_mutex_unlock(&t->mutex);
    if (twin) free_twin(t, twin);
}

kvs_twin *kvs_twins_find(kvs_twins *t, const void *address) {
    pthread_mutex_lock(&t->mutex);
    int32_t at = index_of(t, address);
    kvs_twin *twin = at < 0 ? NULL : t->blocks[at];
    pthread_mutex_unlock(&t->mutex);
    return twin;
}

/* ---- what is valid where ---- */

static uint64_t begin_of(const kvs_twin *twin, int32_t i) { return i ? twin->stretches[i - 1].end : 0; }

static void append(kvs_stretch *list, int32_t *n, uint64_t end, int32_t fresh) {
    uint64_t begin = *n ? list[*n - 1].end : 0;
    if (end <= begin) return;
    if (*n && list[*n - 1].fresh == fresh)
        list[*n - 1].end = end;
    else
        list[(*n)++] = (kvs_stretch){end, fresh};
}

static void mark(kvs_twin *twin, uint64_t from, uint64_t to, int32_t fresh) {
    kvs_stretch list[KVS_TWIN_STRETCHES + 2];
    int32_t n = 0, i = 0;
    for (; i < twin->n && begin_of(twin, i) < from; i++) append(list, &n, KVS_MIN(twin->stretches[i].end, from), twin->stretches[i].fresh);
    append(list, &n, to, fresh);
    for (i = 0; i < twin->n; i++)
        if (twin->stretches[i].end > to) append(list, &n, twin->stretches[i].end, twin->stretches[i].fresh);
    memcpy(twin->stretches, list, (size_t)n * sizeof *list);
    twin->n = n;
}

/* Copies what is not valid on that side; device memory is there. */
static void bring(kvs_twins *t, kvs_twin *twin, int32_t side, uint64_t from, uint64_t to) {
    for (int32_t i = 0; i < twin->n; i++) {
        uint64_t begin = KVS_MAX(begin_of(twin, i), from), end = KVS_MIN(twin->stretches[i].end, to);
        if (begin >= end || twin->stretches[i].fresh & side) continue;
        if (side == KVS_DEVICE)
            t->device->ops->upload(t->device, twin->device + begin, twin->host + begin, end - begin);
        else
            t->device->ops->download(t->device, twin->host + begin, twin->device + begin, end - begin);
    }
    for (int32_t i = 0; i < twin->n; i++) { /* marks join their neighbours: from the start each time */
        uint64_t begin = KVS_MAX(begin_of(twin, i), from), end = KVS_MIN(twin->stretches[i].end, to);
        if (begin >= end || twin->stretches[i].fresh & side) continue;
        mark(twin, begin, end, KVS_HOST | KVS_DEVICE);
        i = -1;
    }
}

/* Where a use could cut it into too many stretches: all of it is the host's. */
static void smooth_out(kvs_twins *t, kvs_twin *twin) {
    enum { PER_USE = 4 };
    if (twin->n + PER_USE <= KVS_TWIN_STRETCHES) return;
    bring(t, twin, KVS_HOST, 0, twin->bytes);
    mark(twin, 0, twin->bytes, KVS_HOST);
}

void kvs_twin_wrote(kvs_twins *t, kvs_twin *twin, int32_t sides, const void *address, uint64_t bytes) {
    uint64_t from = (uint64_t)((const uint8_t *)address - twin->host);
    if (twin->layers || !bytes) return;
    smooth_out(t, twin);
    mark(twin, from, from + bytes, sides);
}

static bool has_device(kvs_twins *t, kvs_twin *twin) {
    if (!twin->device) twin->device = t->device->ops->alloc(t->device, twin->bytes);
    return twin->device != NULL;
}

uint8_t *kvs_twin_on_device(const kvs_twin *twin, const void *address) {
    return twin->device + ((uint64_t)((const uint8_t *)address - twin->host) - twin->skipped);
}

void *kvs_twins_use(kvs_twins *t, int32_t side, const void *address, uint64_t bytes, int32_t access) {
    kvs_twin *twin = address ? kvs_twins_find(t, address) : NULL;
    if (!twin) return (void *)address;
    if (side == KVS_DEVICE && !has_device(t, twin)) return NULL;
    uint64_t from = (uint64_t)((const uint8_t *)address - twin->host);
    if (access & KVS_READ && !twin->layers) {
        smooth_out(t, twin);
        bring(t, twin, side, from, from + bytes);
    }
    if (access & KVS_WRITE) kvs_twin_wrote(t, twin, side, address, bytes);
    return side == KVS_DEVICE ? kvs_twin_on_device(twin, address) : (void *)address;
}

int32_t kvs_twin_where(const kvs_twin *twin, const void *address, uint64_t *n) {
    uint64_t from = (uint64_t)((const uint8_t *)address - twin->host);
    if (twin->layers) {
        bool host = from < twin->host_bytes;
        *n = KVS_MIN(*n, host ? twin->host_bytes - from : twin->bytes - from);
        return host ? KVS_HOST : KVS_DEVICE;
    }
    int32_t i = 0;
    while (i + 1 < twin->n && twin->stretches[i].end <= from) i++;
    *n = KVS_MIN(*n, twin->stretches[i].end - from);
    return twin->device ? twin->stretches[i].fresh : KVS_HOST; /* zeros that the device never had, perhaps */
}

/* ---- caches ---- */

/* Of a whole array: where its first byte would be on the device, if the host's layers were there. */
static void *array_on_device(kvs_twins *t, const void *array) {
    const kvs_twin *twin = array ? kvs_twins_find(t, array) : NULL;
    if (!twin || !twin->device) return NULL;
    return (void *)((uintptr_t)twin->device - (uintptr_t)twin->skipped); /* only offsets behind them are used with it */
}

static bool reserve_kv(kvs_twins *t) { /* one more */
    if (t->n_kvs < t->room_kvs) return true;
    const kvs_kv **kvs = kvs_realloc(t->kvs, (uint64_t)t->room_kvs + 1, sizeof *kvs);
    if (kvs) t->kvs = kvs;
    kvs_kv **copies = kvs_realloc(t->copies, (uint64_t)t->room_kvs + 1, sizeof *copies);
    if (copies) t->copies = copies;
    kvs_kv *copy = kvs && copies ? kvs_calloc(1, sizeof *copy) : NULL; /* each by itself: the step holds on to its address */
    if (copy) copies[t->room_kvs++] = copy;
    return copy != NULL;
}

/* Rows of pictures that move are a step without rows and with one cache, which can't fail: there is room for it from the beginning. */
bool kvs_twins_init(kvs_twins *t, kvs_backend *cpu, kvs_backend *device) {
    const kvs_step none = {0};
    *t = (kvs_twins){.cpu = cpu, .device = device};
    if (kvs_refused() || pthread_mutex_init(&t->mutex, NULL)) return false;
    if (kvs_twins_rows(t, &none) && reserve_kv(t)) return true;
    kvs_twins_free(t);
    return false;
}

kvs_kv *kvs_twins_kv(kvs_twins *t, const kvs_kv *kv) {
    for (int32_t i = t->n_kvs - 1; i >= 0; i--) /* rows of one session are neighbours */
        if (t->kvs[i] == kv) return t->copies[i];
    if (!reserve_kv(t)) return NULL;
    kvs_kv *copy = t->copies[t->n_kvs];
    *copy = *kv;
    copy->k = array_on_device(t, kv->k);
    copy->v = array_on_device(t, kv->v);
    copy->entropy = array_on_device(t, kv->entropy);
    copy->strength = array_on_device(t, kv->strength);
    copy->mass = array_on_device(t, kv->mass);
    copy->query = array_on_device(t, kv->query);
    copy->lse = array_on_device(t, kv->lse);
    copy->exact_k = array_on_device(t, kv->exact_k);
    copy->exact_v = array_on_device(t, kv->exact_v);
    copy->exact_o = array_on_device(t, kv->exact_o);
    t->kvs[t->n_kvs++] = kv;
    return copy;
}

const kvs_row *kvs_twins_rows(kvs_twins *t, const kvs_step *step) {
    t->n_kvs = 0;
    if (step->n > t->room_rows || !t->rows) {
        kvs_row *grown = kvs_realloc(t->rows, (uint64_t)step->n + 1, sizeof *grown);
        if (!grown) return NULL;
        t->rows = grown;
        t->room_rows = step->n;
    }
    for (int32_t i = 0; i < step->n; i++) {
        kvs_kv *kv = kvs_twins_kv(t, step->rows[i].kv);
        if (!kv) return NULL;
        t->rows[i] = (kvs_row){kv, step->rows[i].index, step->rows[i].pos};
    }
    return t->rows;
}
