#include "turns.h"

#include <time.h>

enum { SLICE_NS = 10 * 1000 * 1000 };

struct kvs_waiter { /* on the stack of its thread */
    kvs_waiter *next;
    bool served;
};

#ifdef __linux__ /* a clock that nobody sets */
#define CLOCK CLOCK_MONOTONIC
static bool init_condition(pthread_cond_t *condition) {
    pthread_condattr_t attributes;
    if (kvs_refused() || pthread_condattr_init(&attributes)) return false;
    bool done = !pthread_condattr_setclock(&attributes, CLOCK) && !pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
    return done;
}
#else
#define CLOCK CLOCK_REALTIME
static bool init_condition(pthread_cond_t *condition) { return !kvs_refused() && !pthread_cond_init(condition, NULL); }
#endif

bool kvs_turns_init(kvs_turns *turns) {
    *turns = (kvs_turns){.taken = false};
    if (kvs_refused() || pthread_mutex_init(&turns->mutex, NULL)) return false;
    if (init_condition(&turns->changed)) return true;
    pthread_mutex_destroy(&turns->mutex);
    return false;
}

void kvs_turns_destroy(kvs_turns *turns) {
    pthread_cond_destroy(&turns->changed);
    pthread_mutex_destroy(&turns->mutex);
}

static void wait_a_slice(kvs_turns *turns) {
    struct timespec until;
    clock_gettime(CLOCK, &until);
    until.tv_nsec += SLICE_NS;
    if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
    pthread_cond_timedwait(&turns->changed, &turns->mutex, &until);
}

static void remove_waiter(kvs_turns *turns, const kvs_waiter *gone) {
    kvs_waiter **link = &turns->first, *before = NULL;
    for (; *link != gone; link = &before->next) before = *link;
    *link = gone->next;
    if (turns->last == gone) turns->last = before;
}

bool kvs_turns_take(kvs_turns *turns, const int32_t *cancel) {
    if (kvs_cancelled(cancel)) return false;
    kvs_waiter self = {.served = false};
    pthread_mutex_lock(&turns->mutex);
    if (!turns->taken) {
        turns->taken = self.served = true;
    } else {
        if (turns->last)
            turns->last->next = &self;
        else
            turns->first = &self;
        turns->last = &self;
        while (!self.served && !kvs_cancelled(cancel)) wait_a_slice(turns);
        if (!self.served) remove_waiter(turns, &self);
    }
    pthread_mutex_unlock(&turns->mutex);
    return self.served;
}

/* From hand to hand: nobody who comes later can be quicker. */
void kvs_turns_give(kvs_turns *turns) {
    pthread_mutex_lock(&turns->mutex);
    kvs_waiter *next = turns->first;
    turns->taken = next != NULL;
    if (next) {
        turns->first = next->next;
        if (!turns->first) turns->last = NULL;
        next->served = true;
        pthread_cond_broadcast(&turns->changed);
    }
    pthread_mutex_unlock(&turns->mutex);
}
