/* pruned.h - rows of pictures that are gone from the cache of a session, and the events that took them (PruneHal). Part of the cache
 * manager: what is where, and how it comes back. Which rows go, and when, is policy_prunehal.c's business.
 *
 * Every list of a session (one per layer, or one per layer and KV head) says of each row which event dropped it. Places and spans
 * derive from that. Events happen behind a generated row, so that all rows that run after them stand behind the rows they dropped. */
#ifndef KVS_PRUNED_H
#define KVS_PRUNED_H
#include "backend.h"

enum { KVS_MAX_EVENTS = 65535 };

typedef struct kvs_picture { /* rows of the timeline that one picture gave */
    int32_t first, n;
    int32_t sealed; /* its rows are what they are because of all rows up to here: the timeline can't end before; 0 = they are as they ran */
    float *depth;   /* (n) of its patches, NaN = padding; our own copy, or NULL */
} kvs_picture;

typedef struct kvs_event { /* one pruning; pointers are its own */
    int32_t index;         /* the row behind which it happened: that row ran with all the rows that then left */
    int32_t forced;        /* by the step's number, not by votes */
    int32_t n_before;      /* rows of pictures in each pruned list */
    int32_t n_dropped;     /* of them */
    int32_t first;         /* the first row that is gone; INT32_MAX if none is */
    int32_t n_moves;
    kvs_move *moves; /* (n_moves) one per layer that is pruned and KV head */
    int32_t *places; /* (lists, n_dropped) */
    uint8_t *rows;   /* (n_moves, 2, n_dropped, row_bytes) where they can come back */
} kvs_event;

typedef struct kvs_pruned {
    bool *on;          /* (n_layer) layers that lose rows; NULL = no pruning in this session */
    int32_t n_on;      /* of them */
    bool reversible;   /* dropped rows are kept */
    uint16_t *gone;    /* (n_layer, n_sets, n_ctx) by index: 0, or the number of the event, from 1 on */
    int32_t *dropped;  /* (n_layer) */
    kvs_event *events; /* (n_events), by index rising */
    int32_t n_events, room;
    int32_t n_applied; /* the last one may be taken back for a moment, while its row runs again */
    int32_t quiet;     /* answers to prompts that end before this row are not pruned any more: their rows were brought back */
} kvs_pruned;

typedef struct kvs_cache kvs_cache;

/* The lists of a new session; layers as in kvs_prune_params. false = out of memory (kvs_pruned_free frees what is there). */
bool kvs_pruned_init(kvs_cache *cache, const int32_t *layers, int32_t n_layers, bool per_head, bool reversible);
bool kvs_pruned_clone(const kvs_cache *from, kvs_cache *to); /* to is made alike and holds nothing yet */
void kvs_pruned_free(kvs_pruned *pruned);
int64_t kvs_pruned_bytes(const kvs_cache *cache); /* of rows that are kept for their return, minus those of rows that are gone */

/* Spans and counts anew, after pictures or events have changed. */
void kvs_pruned_refresh(kvs_cache *cache);
static inline uint16_t *kvs_pruned_list(const kvs_pruned *p, const kvs_kv *kv, int32_t layer, int32_t set) {
    return p->gone + ((int64_t)layer * kv->n_sets + set) * kv->n_ctx;
}
int32_t kvs_pruned_missing(const kvs_pruned *pruned, int32_t index); /* rows that pruned layers lacked when the row index ran */

/* An event in the making has memory for all that it needs, so that it can't fail when it happens. false = out of memory. */
bool kvs_event_make(kvs_cache *cache, int32_t index, int32_t n_before, int32_t n_dropped, kvs_event *event);
void kvs_event_free(kvs_event *event);
/* It happens and belongs to the cache now. rows: indices of those that go, rising, (lists of pruned layers, n_dropped). Lock held. */
void kvs_event_happen(kvs_cache *cache, kvs_event *event, const int32_t *rows);
void kvs_event_locate(const kvs_cache *cache, int32_t number); /* places of the rows of an event, from the marks */

/* The newest event is taken back or done again, for rows of the timeline (n_past) as they are now. The model's lock is held. false: it
 * was cancelled, and nothing has changed. */
bool kvs_pruned_lift(kvs_cache *cache, const int32_t *cancel);
void kvs_pruned_lower(kvs_cache *cache);
/* May the timeline be cut to its first n_past rows, and will logits of the last of them be asked for? */
bool kvs_pruned_can_end(const kvs_cache *cache, int32_t n_past, bool logits);
/* Takes back what happened behind row n_past - 1 and later, rows and marks; the lock is held if there is anything reversible. */
bool kvs_pruned_undo(kvs_cache *cache, int32_t n_past, const int32_t *cancel); /* false: cancelled, as it was */
int32_t kvs_pruned_whole(const kvs_cache *cache); /* rows before the first one that is gone for good; n_past if none is */
#endif
