#include "pool.h"
#include "../cgroup.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* One word says everything about the current loop: its number, whether helpers may still join, and how many are inside.
 * A helper that wakes too late finds it closed and is never waited for, so a busy machine does not stall the caller. */
#define JOB_OPEN    ((uint64_t)1 << 31)
#define JOB_HELPERS (JOB_OPEN - 1)
#define JOB_NUMBER  ((uint64_t)1 << 32)

enum { MAX_THREADS = 1024, MAX_GRAINS = 16 };

typedef struct helper {
    kvs_pool *pool;
    pthread_t id;
    int32_t thread;
} helper;

struct kvs_pool {
    int32_t n_threads, n_wanted; /* helpers are threads 1..n_threads-1 */
    double spin;                 /* seconds */
    pid_t pid;                   /* a forked child has the struct but no helpers */
    helper *helpers;
    /* the loop: written by the caller while it is closed and empty, read by helpers inside */
    kvs_task fn;
    void *arg;
    int64_t n, grain;
    const int32_t *cancel;
    _Alignas(64) _Atomic uint64_t job;
    _Alignas(64) _Atomic int64_t cursor;
    _Alignas(64) _Atomic int32_t sleepers;
    _Atomic int32_t caller_sleeps;
    _Atomic int32_t stop, skipped;
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;
};

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Long pieces first, so that each thread reads one stream of memory; short ones at the end, so that all are done at once. */
static int64_t take(kvs_pool *pool, int64_t *begin) {
    int64_t left, n;
    *begin = atomic_load_explicit(&pool->cursor, memory_order_relaxed);
    do {
        left = pool->n - *begin;
        n = KVS_MIN(left, KVS_MAX(pool->grain, KVS_MIN(left / (2 * pool->n_threads), MAX_GRAINS * pool->grain)));
    } while (n > 0 && !atomic_compare_exchange_weak_explicit(&pool->cursor, begin, *begin + n, memory_order_relaxed, memory_order_relaxed));
    return n;
}

static void work(kvs_pool *pool, int32_t thread) {
    for (int64_t begin, n; (n = take(pool, &begin)) > 0;) {
        if (kvs_cancelled(pool->cancel)) {
            atomic_store_explicit(&pool->skipped, 1, memory_order_relaxed);
            return;
        }
        pool->fn(pool->arg, begin, begin + n, thread);
    }
}

static bool run_alone(kvs_task fn, void *arg, int64_t n, int64_t grain, const int32_t *cancel) {
    for (int64_t i = 0; i < n; i += grain) {
        if (kvs_cancelled(cancel)) return false;
        fn(arg, i, KVS_MIN(i + grain, n), 0);
    }
    return true;
}

static bool joinable(kvs_pool *pool, uint64_t seen) {
    uint64_t job = atomic_load(&pool->job);
    return (job & JOB_OPEN) && job / JOB_NUMBER != seen;
}

/* The counter of sleepers and the job word are a pair: each side writes its own, then reads the other's (sequentially
 * consistent), so either the caller sees the sleeper or the sleeper sees the job. */
static void await_job(kvs_pool *pool, uint64_t seen) {
    double until = kvs_now() + pool->spin;
    do {
        for (int i = 0; i < 16; i++) {
            if (joinable(pool, seen) || atomic_load_explicit(&pool->stop, memory_order_relaxed)) return;
            relax();
        }
    } while (kvs_now() < until);
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleepers, 1);
    while (!joinable(pool, seen) && !atomic_load(&pool->stop)) pthread_cond_wait(&pool->wake, &pool->mutex);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void leave(kvs_pool *pool) {
    uint64_t job = atomic_fetch_sub(&pool->job, 1) - 1;
    if ((job & (JOB_OPEN | JOB_HELPERS)) || !atomic_load(&pool->caller_sleeps)) return;
    pthread_mutex_lock(&pool->mutex);
    pthread_cond_signal(&pool->done);
    pthread_mutex_unlock(&pool->mutex);
}

static void *helper_main(void *arg) {
    helper *self = arg;
    kvs_pool *pool = self->pool;
    uint64_t seen = 0;
    for (;;) {
        await_job(pool, seen);
        if (atomic_load(&pool->stop)) return NULL;
        uint64_t job = atomic_load(&pool->job);
        while ((job & JOB_OPEN) && !atomic_compare_exchange_weak(&pool->job, &job, job + 1)) {}
        seen = job / JOB_NUMBER;
        if (!(job & JOB_OPEN)) continue;
        work(pool, self->thread);
        leave(pool);
    }
}

static void wake_helpers(kvs_pool *pool, int64_t wanted) {
    int32_t sleepers = atomic_load(&pool->sleepers);
    if (!sleepers) return;
    pthread_mutex_lock(&pool->mutex);
    if (wanted >= sleepers)
        pthread_cond_broadcast(&pool->wake);
    else
        for (int64_t i = 0; i < wanted; i++) pthread_cond_signal(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
}

static bool empty(kvs_pool *pool) { return !(atomic_load(&pool->job) & JOB_HELPERS); }

static void await_helpers(kvs_pool *pool) {
    if (empty(pool)) return;
    double until = kvs_now() + pool->spin;
    do {
        for (int i = 0; i < 16; i++) {
            if (empty(pool)) return;
            relax();
        }
    } while (kvs_now() < until);
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->caller_sleeps, 1);
    while (!empty(pool)) pthread_cond_wait(&pool->done, &pool->mutex);
    atomic_store(&pool->caller_sleeps, 0);
    pthread_mutex_unlock(&pool->mutex);
}

bool kvs_pool_run(kvs_pool *pool, kvs_task fn, void *arg, int64_t n, int64_t grain, const int32_t *cancel) {
    if (grain < 1) grain = 1;
    if (!pool || pool->n_threads == 1 || n <= grain || getpid() != pool->pid) return run_alone(fn, arg, n, grain, cancel);
    pool->fn = fn;
    pool->arg = arg;
    pool->n = n;
    pool->grain = grain;
    pool->cancel = cancel;
    atomic_store_explicit(&pool->cursor, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->skipped, 0, memory_order_relaxed);
    atomic_store(&pool->job, (atomic_load(&pool->job) / JOB_NUMBER + 1) * JOB_NUMBER | JOB_OPEN);
    wake_helpers(pool, (n - 1) / grain);
    work(pool, 0);
    atomic_fetch_and(&pool->job, ~JOB_OPEN);
    await_helpers(pool);
    return !atomic_load_explicit(&pool->skipped, memory_order_relaxed);
}

/* Signals are the business of the process that we are a guest in: helpers take none, but those of a page of a model file that is gone. */
static int start_helper(helper *self) {
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_BLOCK, &all, &before);
    int status = kvs_refused() ? EAGAIN : pthread_create(&self->id, NULL, helper_main, self);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return status;
}

static bool init_locks(kvs_pool *pool) {
    if (kvs_refused() || pthread_mutex_init(&pool->mutex, NULL)) return false;
    if (!kvs_refused() && !pthread_cond_init(&pool->wake, NULL)) {
        if (!kvs_refused() && !pthread_cond_init(&pool->done, NULL)) return true;
        pthread_cond_destroy(&pool->wake);
    }
    pthread_mutex_destroy(&pool->mutex);
    return false;
}

static kvs_pool *make(int32_t threads) {
    kvs_pool *pool = kvs_calloc_aligned(1, sizeof *pool);
    helper *helpers = kvs_calloc((uint64_t)threads, sizeof *helpers);
    if (!pool || !helpers || !init_locks(pool)) {
        kvs_free_aligned(pool);
        free(helpers);
        return NULL;
    }
    pool->n_wanted = threads;
    pool->spin = threads > kvs_pool_default_threads() ? 1e-6 : 40e-6; /* more threads than processors: spinning steals work time */
    pool->pid = getpid();
    pool->helpers = helpers;
    return pool;
}

int kvs_pool_new(int32_t asked, kvs_pool **out, kvs_error *err) {
    *out = NULL;
    int32_t threads = asked ? asked : kvs_pool_default_threads();
    if (threads < 1 || threads > MAX_THREADS)
        return kvs_fail(err, KVS_E_ARGUMENT, "threads must be 1..%d, not %d", (int)MAX_THREADS, (int)threads);
    kvs_pool *pool = make(threads);
    if (!pool) return kvs_fail_memory(err, sizeof *pool + (uint64_t)threads * sizeof(helper), "the thread pool");
    for (pool->n_threads = 1; pool->n_threads < threads; pool->n_threads++) {
        helper *next = &pool->helpers[pool->n_threads];
        *next = (helper){.pool = pool, .thread = pool->n_threads};
        int status = start_helper(next);
        if (status && asked) {
            kvs_fail(err, KVS_E_DEVICE, "cannot start thread %d of %d: %s; ask for fewer threads", (int)pool->n_threads + 1, (int)threads,
                     strerror(status));
            kvs_pool_free(pool);
            return KVS_E_DEVICE;
        }
        if (status) break; /* a process at the limit of its threads works with those that it has */
    }
    *out = pool;
    return KVS_OK;
}

void kvs_pool_free(kvs_pool *pool) {
    if (!pool) return;
    if (getpid() == pool->pid) {
        pthread_mutex_lock(&pool->mutex);
        atomic_store(&pool->stop, 1);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
        for (int32_t i = 1; i < pool->n_threads; i++) pthread_join(pool->helpers[i].id, NULL);
        pthread_cond_destroy(&pool->done);
        pthread_cond_destroy(&pool->wake);
        pthread_mutex_destroy(&pool->mutex);
    }
    free(pool->helpers);
    kvs_free_aligned(pool);
}

int32_t kvs_pool_threads(const kvs_pool *pool) { return pool ? pool->n_threads : 1; }

int32_t kvs_pool_missing(const kvs_pool *pool) { return pool->n_wanted - pool->n_threads; }

/* ---- how many processors are ours ---- */

static int32_t affinity_threads(void) {
#ifdef __linux__
    for (int cpus = 1024; cpus <= 1 << 16; cpus *= 4) { /* the kernel refuses a set that is smaller than its own */
        size_t size = CPU_ALLOC_SIZE((size_t)cpus);
        cpu_set_t *set = kvs_calloc(1, size);
        if (!set) break;
        int count = sched_getaffinity(0, size, set) == 0 ? CPU_COUNT_S(size, set) : 0;
        free(set);
        if (count > 0) return count;
    }
#endif
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online > 0 && online < MAX_THREADS ? (int32_t)online : 1;
}

int32_t kvs_pool_default_threads(void) {
    int32_t threads = affinity_threads();
    double quota = kvs_cgroup_limit(KVS_CGROUP_PROCESSORS);
    if (quota > 0 && quota < threads) {
        int32_t whole = (int32_t)quota;
        threads = whole + (quota > whole);
    }
    return KVS_MIN(KVS_MAX(threads, 1), (int32_t)MAX_THREADS);
}
