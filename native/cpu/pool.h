/* pool.h - a small pool of threads for one parallel loop at a time. The caller is thread 0 and works, too; helpers spin
 * briefly between loops and then sleep, so that an idle pool uses no CPU. */
#ifndef KVS_POOL_H
#define KVS_POOL_H
#include "../util.h"

typedef struct kvs_pool kvs_pool;
typedef void (*kvs_task)(void *arg, int64_t begin, int64_t end, int32_t thread); /* work [begin, end) */

int32_t kvs_pool_default_threads(void); /* affinity and cgroup quota (v1 and v2) */
/* 1 thread: no helpers at all. 0: the default, or as many of it as can be started; a number that can't be had is KVS_E_DEVICE. */
int kvs_pool_new(int32_t threads, kvs_pool **out, kvs_error *err);
int32_t kvs_pool_missing(const kvs_pool *pool); /* of the default */
void kvs_pool_free(kvs_pool *pool);
int32_t kvs_pool_threads(const kvs_pool *pool);
/* Runs fn over 0..n in pieces of one to 16 grains, handed out by an atomic cursor; returns when all is done. Pieces not yet begun are
 * skipped once *cancel is set (cancel may be NULL); then it returns false. A loop of one piece runs on the caller without waking
 * anyone. */
bool kvs_pool_run(kvs_pool *pool, kvs_task fn, void *arg, int64_t n, int64_t grain, const int32_t *cancel);
#endif
