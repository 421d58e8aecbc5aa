/* turns.h - a lock that is served in the order of asking, and that a waiter can give up. A plain mutex is not fair: a thread that
 * takes it again at once, block after block of a long prompt, would leave the others waiting to the end. */
#ifndef KVS_TURNS_H
#define KVS_TURNS_H
#include "util.h"

#include <pthread.h>

typedef struct kvs_waiter kvs_waiter;

typedef struct kvs_turns {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    bool taken;
    kvs_waiter *first, *last;
} kvs_turns;

bool kvs_turns_init(kvs_turns *turns);
void kvs_turns_destroy(kvs_turns *turns);
bool kvs_turns_take(kvs_turns *turns, const int32_t *cancel); /* false: cancelled (which is looked for every 10 ms) */
void kvs_turns_give(kvs_turns *turns);
#endif
