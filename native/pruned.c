/* pruned.c - rows of pictures that left the cache: which, where they stood, and how they come back. */
#include "cache.h"

#include <stdlib.h>
#include <string.h>

/* ---- one event ---- */

static int64_t row_bytes(const kvs_cache *cache, const kvs_event *event) { /* of one move: K and V */
    return 2 * (int64_t)event->n_dropped * cache->kv.row_bytes;
}

bool kvs_event_make(kvs_cache *cache, int32_t index, int32_t n_before, int32_t n_dropped, kvs_event *event) {
    kvs_pruned *p = &cache->pruned;
    const kvs_kv *kv = &cache->kv;
    *event = (kvs_event){.index = index, .n_before = n_before, .n_dropped = n_dropped, .first = INT32_MAX};
    if (p->n_events == p->room) { /* for the list that it will be in */
        int32_t room = KVS_MAX(4, 2 * p->room);
        kvs_event *grown = kvs_realloc(p->events, (uint64_t)room, sizeof *grown);
        if (!grown) return false;
        p->events = grown;
        p->room = room;
    }
    if (!n_dropped) return true;
    event->n_moves = p->n_on * kv->n_kv_head;
    event->moves = kvs_calloc((uint64_t)event->n_moves, sizeof *event->moves);
    event->places = kvs_calloc((uint64_t)p->n_on * (uint64_t)kv->n_sets * (uint64_t)n_dropped, sizeof *event->places);
    if (p->reversible) event->rows = kvs_calloc((uint64_t)event->n_moves, (uint64_t)row_bytes(cache, event));
    if (event->moves && event->places && (event->rows || !p->reversible)) return true;
    kvs_event_free(event);
    return false;
}

void kvs_event_free(kvs_event *event) {
    free(event->moves);
    free(event->places);
    free(event->rows);
    event->moves = NULL;
    event->places = NULL;
    event->rows = NULL;
}

/* The places of one list's rows while the event's own rows are there and those of earlier events are gone. */
static void locate_list(const kvs_cache *cache, const uint16_t *gone, int32_t number, int32_t *places) {
    int32_t before = 0, n = 0;
    for (int32_t i = 0; i < cache->n_pictures; i++)
        for (int32_t j = cache->pictures[i].first; j < cache->pictures[i].first + cache->pictures[i].n; j++) {
            if (gone[j] == number) places[n++] = j - before;
            before += gone[j] && gone[j] < number;
        }
}

void kvs_event_locate(const kvs_cache *cache, int32_t number) {
    const kvs_pruned *p = &cache->pruned;
    const kvs_kv *kv = &cache->kv;
    kvs_event *event = &p->events[number - 1];
    int32_t *places = event->places;
    kvs_move *move = event->moves;
    for (int32_t layer = 0; layer < kv->n_layer && event->n_dropped; layer++) {
        if (!p->on[layer]) continue;
        for (int32_t set = 0; set < kv->n_sets; set++)
            locate_list(cache, kvs_pruned_list(p, kv, layer, set), number, places + (int64_t)set * event->n_dropped);
        for (int32_t head = 0; head < kv->n_kv_head; head++, move++) {
            int64_t set = kv->n_sets > 1 ? head : 0, index = move - event->moves;
            uint8_t *rows = event->rows ? event->rows + index * row_bytes(cache, event) : NULL;
            *move = (kvs_move){layer, head, places + set * event->n_dropped, event->n_dropped, 0, rows};
        }
        places += (int64_t)kv->n_sets * event->n_dropped;
    }
}

static void move_layer(kvs_cache *cache, const kvs_move *moves, int32_t n, bool back) {
    kvs_backend *be = cache->be;
    kvs_step step = {0};
    be->ops->begin(be, &step);
    if (back)
        be->ops->kv_scatter(be, &cache->kv, moves, n);
    else
        be->ops->kv_gather(be, &cache->kv, moves, n);
    if (!back) be->ops->kv_trim(be, &cache->kv, moves->layer, moves->n_rows - moves->n);
    /* Nothing in it should fail. If it does, rows are not where the cache thinks they are, and nobody may go on with them. */
    kvs_error why = {.struct_size = sizeof why};
    if (be->ops->end(be, &why)) kvs_device_fail(be, false, "rows of pictures could not be moved: %.100s", why.message);
}

/* Rows out, or back in, as the timeline is now. false: cancelled, and they are where they were. */
static bool move_rows(kvs_cache *cache, kvs_event *event, bool back, const int32_t *cancel) {
    int32_t there = cache->n_past - kvs_pruned_missing(&cache->pruned, event->index); /* rows of a pruned layer with those of the event */
    int32_t heads = cache->kv.n_kv_head, done = 0;
    for (int32_t i = 0; i < event->n_moves; i++) event->moves[i].n_rows = there;
    for (; done < event->n_moves && !kvs_cancelled(cancel); done += heads) move_layer(cache, event->moves + done, heads, back);
    if (done == event->n_moves) return true;
    for (done -= heads; done >= 0; done -= heads) move_layer(cache, event->moves + done, heads, !back);
    return false;
}

static void mark_rows(kvs_cache *cache, int32_t number, const int32_t *rows) {
    kvs_pruned *p = &cache->pruned;
    kvs_event *event = &p->events[number - 1];
    for (int32_t layer = 0; layer < cache->kv.n_layer; layer++)
        for (int32_t set = 0; set < cache->kv.n_sets && p->on[layer]; set++, rows += event->n_dropped) {
            uint16_t *gone = kvs_pruned_list(p, &cache->kv, layer, set);
            for (int32_t i = 0; i < event->n_dropped; i++) gone[rows[i]] = (uint16_t)number;
            if (event->n_dropped) event->first = KVS_MIN(event->first, rows[0]);
        }
}

void kvs_event_happen(kvs_cache *cache, kvs_event *event, const int32_t *rows) {
    kvs_pruned *p = &cache->pruned;
    p->events[p->n_events++] = *event;
    mark_rows(cache, p->n_events, rows);
    kvs_event_locate(cache, p->n_events);
    kvs_pruned_lower(cache);
    if (!p->reversible) kvs_event_free(&p->events[p->n_events - 1]);
    *event = (kvs_event){0};
}

/* ---- all of a session ---- */

bool kvs_pruned_init(kvs_cache *cache, const int32_t *layers, int32_t n_layers, bool per_head, bool reversible) {
    kvs_pruned *p = &cache->pruned;
    kvs_kv *kv = &cache->kv;
    kv->n_sets = per_head ? kv->n_kv_head : 1;
    p->reversible = reversible;
    p->on = kvs_calloc((uint64_t)kv->n_layer, sizeof *p->on);
    p->dropped = kvs_calloc((uint64_t)kv->n_layer, sizeof *p->dropped);
    p->gone = kvs_calloc((uint64_t)kv->n_layer * (uint64_t)kv->n_sets * (uint64_t)kv->n_ctx, sizeof *p->gone);
    if (!p->on || !p->dropped || !p->gone) return false;
    for (int32_t i = 0; i < n_layers; i++) p->on[layers[i]] = true;
    p->n_on = n_layers;
    kv->dropped = p->dropped;
    return true;
}

bool kvs_pruned_clone(const kvs_cache *from, kvs_cache *to) {
    const kvs_pruned *a = &from->pruned;
    kvs_pruned *b = &to->pruned;
    const kvs_kv *kv = &from->kv;
    b->quiet = a->quiet;
    if (!a->on) return true;
    b->n_on = a->n_on;
    memcpy(b->on, a->on, (size_t)kv->n_layer * sizeof *b->on);
    for (int32_t layer = 0; layer < kv->n_layer; layer++)
        for (int32_t set = 0; set < kv->n_sets; set++)
            memcpy(kvs_pruned_list(b, kv, layer, set), kvs_pruned_list(a, kv, layer, set), (size_t)from->n_past * sizeof *a->gone);
    for (int32_t i = 0; i < a->n_events; i++) {
        const kvs_event *event = &a->events[i];
        kvs_event twin;
        if (!kvs_event_make(to, event->index, event->n_before, event->n_dropped, &twin)) return false;
        twin.forced = event->forced;
        twin.first = event->first;
        if (event->rows) memcpy(twin.rows, event->rows, (size_t)(event->n_moves * row_bytes(from, event)));
        b->events[b->n_events++] = twin;
        kvs_event_locate(to, b->n_events);
        if (!b->reversible) kvs_event_free(&b->events[i]);
    }
    b->n_applied = a->n_applied;
    return true;
}

void kvs_pruned_free(kvs_pruned *pruned) {
    for (int32_t i = 0; i < pruned->n_events; i++) kvs_event_free(&pruned->events[i]);
    free(pruned->on);
    free(pruned->gone);
    free(pruned->dropped);
    free(pruned->events);
}

int64_t kvs_pruned_bytes(const kvs_cache *cache) {
    const kvs_pruned *p = &cache->pruned;
    int64_t bytes = 0;
    for (int32_t i = 0; i < p->n_applied; i++)
        bytes += ((p->events[i].rows ? 1 : 0) - 1) * row_bytes(cache, &p->events[i]) * p->n_on * cache->kv.n_kv_head;
    return bytes;
}

static void place_spans(const kvs_cache *cache, const uint16_t *gone, kvs_range *spans) {
    int32_t before = 0;
    for (int32_t i = 0; i < cache->n_pictures; i++) {
        const kvs_picture *picture = &cache->pictures[i];
        spans[i].first = picture->first - before;
        for (int32_t j = picture->first; gone && j < picture->first + picture->n; j++)
            before += gone[j] && gone[j] <= cache->pruned.n_applied;
        spans[i].n = picture->first + picture->n - before - spans[i].first;
    }
}

void kvs_pruned_refresh(kvs_cache *cache) {
    kvs_pruned *p = &cache->pruned;
    kvs_kv *kv = &cache->kv;
    kv->n_spans = cache->n_pictures;
    if (!p->on) {
        place_spans(cache, NULL, kv->spans);
        return;
    }
    for (int32_t layer = 0; layer < kv->n_layer; layer++) {
        p->dropped[layer] = p->on[layer] ? kvs_pruned_missing(p, INT32_MAX) : 0;
        for (int32_t set = 0; set < kv->n_sets && kv->spans; set++)
            place_spans(cache, kvs_pruned_list(p, kv, layer, set), kv->spans + ((int64_t)layer * kv->n_sets + set) * kv->room_spans);
    }
}

int32_t kvs_pruned_missing(const kvs_pruned *pruned, int32_t index) {
    int32_t n = 0;
    for (int32_t i = 0; i < pruned->n_applied && pruned->events[i].index < index; i++) n += pruned->events[i].n_dropped;
    return n;
}

/* ---- back and forth ---- */

bool kvs_pruned_lift(kvs_cache *cache, const int32_t *cancel) {
    kvs_pruned *p = &cache->pruned;
    kvs_event *event = &p->events[p->n_applied - 1];
    if (event->n_dropped && !move_rows(cache, event, true, cancel)) return false;
    p->n_applied--;
    kvs_pruned_refresh(cache);
    return true;
}

void kvs_pruned_lower(kvs_cache *cache) {
    kvs_pruned *p = &cache->pruned;
    kvs_event *event = &p->events[p->n_applied];
    if (event->n_dropped) move_rows(cache, event, false, NULL);
    p->n_applied++;
    kvs_pruned_refresh(cache);
}

bool kvs_pruned_can_end(const kvs_cache *cache, int32_t n_past, bool logits) {
    const kvs_pruned *p = &cache->pruned;
    for (int32_t i = 0; i < p->n_events && !p->reversible; i++) {
        const kvs_event *event = &p->events[i];
        bool lost = event->index >= n_past && event->first < n_past;
        if (event->n_dropped && (lost || (logits && event->index == n_past - 1))) return false;
    }
    return true;
}

static void forget_marks(kvs_cache *cache, int32_t number) {
    kvs_pruned *p = &cache->pruned;
    for (int64_t i = 0; i < (int64_t)cache->kv.n_layer * cache->kv.n_sets; i++)
        for (int32_t j = 0; j < cache->n_past; j++)
            if (p->gone[i * cache->kv.n_ctx + j] == number) p->gone[i * cache->kv.n_ctx + j] = 0;
}

bool kvs_pruned_undo(kvs_cache *cache, int32_t n_past, const int32_t *cancel) {
    kvs_pruned *p = &cache->pruned;
    int32_t stay = 0;
    while (stay < p->n_events && p->events[stay].index < n_past) stay++;
    while (p->reversible && p->n_applied > stay && kvs_pruned_lift(cache, cancel)) {}
    if (p->reversible && p->n_applied > stay) {
        while (p->n_applied < p->n_events) kvs_pruned_lower(cache);
        return false;
    }
    p->n_applied = stay; /* what cannot come back is cut off now */
    for (; p->n_events > stay; kvs_event_free(&p->events[--p->n_events])) forget_marks(cache, p->n_events);
    return true;
}

int32_t kvs_pruned_whole(const kvs_cache *cache) {
    const kvs_pruned *p = &cache->pruned;
    int32_t n = cache->n_past;
    for (int32_t i = 0; i < p->n_events && !p->reversible; i++) n = KVS_MIN(n, p->events[i].first);
    return n;
}
