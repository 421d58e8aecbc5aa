/* keep.h - rows of a cache as they are, to be put back if what writes over them fails or is cancelled half way. Part of the cache
 * manager. */
#ifndef KVS_KEEP_H
#define KVS_KEEP_H
#include "cache.h"

typedef struct kvs_keep {
    kvs_cache *cache;
    int32_t first, n;      /* rows, none of them in front of a row that was dropped */
    const int32_t *cancel; /* while they are copied */
    uint8_t *block;        /* [dev] */
    uint64_t bytes;
    bool back;
} kvs_keep;

/* Rows first..first+n: store, history, and their slots in the ring of exact rows. KVS_E_MEMORY or KVS_E_CANCELLED: nothing is kept. */
int kvs_keep_rows(kvs_keep *keep, kvs_cache *cache, int32_t first, int32_t n, const int32_t *cancel, kvs_error *err);
void kvs_keep_end(kvs_keep *keep, bool put_back); /* without an error: they may be what they are now */
#endif
