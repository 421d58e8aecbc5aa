/* cache.h - the cache manager: one session's rows, its timeline, and the interface of the policies that edit it.
 *
 * The timeline is a list of rows by index: what was fed, in order. Rows are committed only when a whole feed has succeeded.
 * A policy is one file (policy_*.c) behind kvs_policy_ops; whatever can be derived from the timeline is derived, not kept. */
#ifndef KVS_CACHE_H
#define KVS_CACHE_H
#include "pruned.h"

enum { KVS_ROW_GENERATED = 1, KVS_ROW_ENDED = 2 }; /* ENDED: policies have done their after-prefill work behind this row */

typedef struct kvs_policy kvs_policy;

enum { KVS_MAX_POLICIES = 3 };

typedef struct kvs_cache {
    kvs_backend *be;
    kvs_kv kv;
    kvs_policy *policies[KVS_MAX_POLICIES]; /* in the order in which they act */
    int32_t n_policies;
    int32_t n_past; /* committed rows of the timeline */
    /* by index, (n_ctx) each */
    int32_t *ids;     /* -1 for an image row */
    uint64_t *hashes; /* picture of an image row, 0 otherwise */
    uint8_t *flags;   /* KVS_ROW_* */
    int32_t *turns;   /* (n_turns) n_past at the start of each turn but the first, rising */
    int32_t n_turns;
    kvs_picture *pictures; /* (n_pictures), rising; of a feed under way, too */
    int32_t n_pictures, room_pictures;
    kvs_pruned pruned;
    float *kept;         /* [dev] (n_layer, rings' rows) the newest exact row of each layer while a prompt runs that may fail, or NULL */
    int32_t exact_from;  /* the ring of exact rows holds the indices exact_from..n_past-1 */
    bool store_is_exact; /* a float32 store that is what the next mix wants: rows can go back into the ring */
    uint64_t bytes;      /* of all buffers */
} kvs_cache;

typedef struct kvs_cache_shape {
    int32_t type, n_layer, n_head, n_kv_head, head_dim, n_ctx;
    int32_t n_exact; /* 0 without smoothing */
    bool exact_o;
    int32_t n_group, exclude_self;
    const kvs_prune_params *prune; /* NULL = no row ever leaves */
} kvs_cache_shape;

/* Rows of one session in a pass over the model: first..first+n of the step. */
typedef struct kvs_span {
    kvs_cache *cache;
    int32_t index;          /* of its first row in the timeline: n_past and beyond, or less for a row that runs again */
    int32_t first, n;       /* rows of the step */
    const int32_t *ids;     /* (n), -1 = image row */
    const uint64_t *hashes; /* (n) or NULL */
    bool generated;         /* then n is 1 */
} kvs_span;

enum { KVS_MAX_FACTS = 32 };

typedef struct kvs_facts { /* parameters of a policy as named numbers: what a saved session is compared by */
    int32_t n;
    const char *name[KVS_MAX_FACTS];
    double value[KVS_MAX_FACTS];
} kvs_facts;

typedef struct kvs_policy_ops { /* what a policy does not need is NULL; the first four are there */
    const char *name;
    void (*free)(kvs_policy *policy);
    kvs_policy *(*clone)(const kvs_policy *policy); /* NULL = out of memory */
    void (*facts)(const kvs_policy *policy, kvs_facts *facts);
    /* A generated row is about to run: host side, before the first layer. */
    void (*before_step)(kvs_policy *policy, const kvs_span *span);
    /* May these n embeddings be a picture? Before any work of a feed. */
    int (*check_picture)(const kvs_policy *policy, int32_t n, const float *depth, kvs_error *err);
    /* How many prompt rows from index on are the next pass, of n at most; more where a picture must not be cut. */
    int32_t (*pass_rows)(const kvs_policy *policy, const kvs_cache *cache, int32_t index, int32_t n);
    /* Prompt rows are about to run: host side, the model's lock is held. */
    int (*before_pass)(kvs_policy *policy, const kvs_span *span, kvs_error *err);
    /* Prompt rows: K and V of a layer are in the cache, its attention comes next. */
    void (*before_attn)(kvs_policy *policy, const kvs_span *span, int32_t layer, const kvs_rope *rope);
    /* A pass has ended with this picture, not committed yet; inside its own begin/end. rope->table has room for its rows. */
    int (*after_image)(kvs_policy *policy, kvs_cache *cache, kvs_picture *picture, const kvs_rope *rope, const int32_t *cancel,
                       kvs_error *err);
    /* Right after the attention of a layer, generated rows only; out: attention outputs (rows of the step, n_head * head_dim). */
    void (*after_attn)(kvs_policy *policy, const kvs_span *span, int32_t layer, const kvs_rope *rope, float *out);
    /* Once behind the last row of a prompt, the row index; inside its own begin/end. rope->table has room for any picture's rows. It
     * writes over rows from end_from() on; if it fails they are put back as they were. */
    int (*end_prefill)(kvs_policy *policy, kvs_cache *cache, int32_t index, const kvs_rope *rope, const int32_t *cancel, kvs_error *err);
    int32_t (*end_from)(const kvs_policy *policy, const kvs_cache *cache, int32_t index); /* index + 1: over none */
    /* A generated row has run in all layers and is about to be committed. after_step does all that can fail, and may be the last that is
     * heard of it; committed does the rest. The model's lock is held, no step is open. */
    int (*after_step)(kvs_policy *policy, const kvs_span *span, kvs_error *err);
    void (*committed)(kvs_policy *policy, kvs_cache *cache);
    /* Is a row with these flags mixed with the exact row before it? Then rewind and step take care that it is there. */
    bool (*mixes)(const kvs_policy *policy, uint8_t flags);
} kvs_policy_ops;

struct kvs_policy {
    const kvs_policy_ops *ops;
};

int kvs_cache_init(kvs_cache *cache, kvs_backend *be, const kvs_cache_shape *shape, kvs_error *err);
void kvs_cache_free(kvs_cache *cache); /* the policies, too */
int kvs_cache_clone(const kvs_cache *from, kvs_cache *to, const int32_t *cancel, kvs_error *err);

void kvs_cache_rows(const kvs_span *span, kvs_row *rows); /* rows of a span as the backend wants them: (span->n) */
void kvs_cache_commit(const kvs_span *span);              /* the span begins where the timeline ends */
/* Rows n_past + at .. + n are a picture's: before they run; depth (n) or NULL is copied. What a feed added and did not commit is
 * forgotten by kvs_cache_forget. */
int kvs_cache_add_picture(kvs_cache *cache, int32_t at, int32_t n, const float *depth, kvs_error *err);
kvs_picture *kvs_cache_picture_at(const kvs_cache *cache, int32_t end); /* that ends before the row end, or NULL */
void kvs_cache_forget(kvs_cache *cache);
/* Around a prompt of n rows that may be cancelled: what it writes into the ring of exact rows takes the newest one's place. */
void kvs_cache_keep_exact(kvs_cache *cache);
void kvs_cache_restore_exact(kvs_cache *cache);      /* after kvs_cache_touched */
void kvs_cache_refill_exact(kvs_cache *cache);       /* from a store that is exact; what the ring lacks of the newest rows */
void kvs_cache_touched(kvs_cache *cache, int32_t n); /* n rows beyond the end were written, committed or not */

/* Cuts the timeline to its first n_past rows. KVS_E_POLICY where a generated row would follow whose exact predecessor is gone. logits:
 * they will be asked for, without a new row. */
int kvs_cache_rewind(kvs_cache *cache, int32_t n_past, bool logits, const int32_t *cancel, kvs_error *err);
int32_t kvs_cache_rewindable(const kvs_cache *cache); /* how many rows that can drop, at most */
bool kvs_cache_mixes(const kvs_cache *cache, uint8_t flags);
bool kvs_cache_exact(const kvs_cache *cache, int32_t index);
/* Where to begin to run rows again so that the rows from index on are exact, -1 where that can't be done: the values of pictures
 * and of smoothed rows are gone with the ring, and a row that saw a picture as it was before it was refined can't see it so again. */
int32_t kvs_cache_again_from(const kvs_cache *cache, int32_t index);
int32_t kvs_cache_turn_start(const kvs_cache *cache, int32_t index); /* of the turn that the row index is in */

static inline int32_t kvs_cache_n_rows(const kvs_cache *cache, int32_t layer) { return kvs_kv_place(&cache->kv, layer, cache->n_past); }
/* Indices of the rows that are there: (n_sets, n_rows). They are the rotary positions, too. */
void kvs_cache_positions(const kvs_cache *cache, int32_t layer, int32_t *positions);
/* float32 copies: k, v (n_kv_head, n_rows, head_dim) */
int kvs_cache_read(const kvs_cache *cache, int32_t layer, float *k, float *v, kvs_error *err);

/* policy_kvsmooth.c. params are checked against the model's depth and head counts, and copied. */
int kvs_policy_kvsmooth(const kvs_smooth_params *params, int32_t n_layer, kvs_policy **out, kvs_error *err);

/* policy_dscr.c, the same */
int kvs_policy_dscr(const kvs_dscr_params *params, int32_t n_layer, kvs_policy **out, kvs_error *err);
/* policy_prunehal.c */
int kvs_policy_prunehal(const kvs_prune_params *params, int32_t n_layer, kvs_policy **out, kvs_error *err);
int kvs_policy_prunehal_check(const kvs_prune_params *params, int32_t n_layer, kvs_error *err);

static inline void kvs_fact(kvs_facts *facts, const char *name, double value) {
    if (facts->n < KVS_MAX_FACTS) facts->name[facts->n] = name, facts->value[facts->n++] = value;
}
static inline double kvs_fact_of_list(const int32_t *list, int32_t n) { /* a number that a double holds */
    return (double)(kvs_hash(0, list, (uint64_t)n * sizeof *list) >> 11);
}
#endif
