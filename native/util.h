/* util.h - what every file of the runtime needs: errors, checked memory, files. Knows nothing above it. */
#ifndef KVS_UTIL_H
#define KVS_UTIL_H
#include "kvs.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#ifdef __CUDACC__ /* functions that kernels of all backends share */
#define KVS_SHARED static __host__ __device__ inline
#else
#define KVS_SHARED static inline
#endif

#define KVS_MIN(a, b) ((a) < (b) ? (a) : (b))
#define KVS_MAX(a, b) ((a) > (b) ? (a) : (b))

/* Fills *err (if not NULL) and returns code, so that callers write: return kvs_fail(err, KVS_E_..., "...", ...).
 * The message is one sentence that a user can act on. kvs_fail clears path, what, offset, needed and available. */
int kvs_fail(kvs_error *err, int code, const char *format, ...) __attribute__((format(printf, 3, 4)));
/* The same for a file: path and what are stored, and stand in front of the message: "path: what: message (at byte N)". */
int kvs_fail_file(kvs_error *err, int code, const char *path, const char *what, int64_t offset, const char *format, ...)
    __attribute__((format(printf, 6, 7)));
/* Out of memory: "needed N MiB for WHAT". */
int kvs_fail_memory(kvs_error *err, uint64_t needed, const char *what);
/* A value that can't be gone on with: "where: value: reason". */
int kvs_fail_numeric(kvs_error *err, const char *where, float value, const char *reason);

/* Whatever the system may refuse - memory, a mapping, a stream, a lock, a thread - asks here first (make lint checks): in a build with
 * KVS_INJECT a test makes the n-th of them fail, with errno = ENOMEM. Such a build counts the blocks that are there, too. */
#ifdef KVS_INJECT
#include <stdlib.h>
bool kvs_refused(void);
void kvs_counted_free(void *block);
#define free kvs_counted_free
#else
static inline bool kvs_refused(void) { return false; }
#endif

/* count * size bytes, zeroed; NULL on overflow or failure. Free with free(). */
void *kvs_calloc(uint64_t count, uint64_t size);
/* The same for a block that grows; what is new is not zeroed. On failure the old block stays. */
void *kvs_realloc(void *block, uint64_t count, uint64_t size);
/* The same, aligned to 64 bytes. Large blocks are not touched (zero pages of the kernel). Free with kvs_free_aligned. */
void *kvs_calloc_aligned(uint64_t count, uint64_t size);
void kvs_free_aligned(void *block);
/* The same on huge pages, where the system grants the wish: read faster, and resident as a whole soon after the first touch. */
void *kvs_calloc_huge(uint64_t bytes);
uint64_t kvs_huge_bytes(void);                               /* of all blocks that are there with that wish */
bool kvs_mul_u64(uint64_t a, uint64_t b, uint64_t *product); /* false on overflow */

uint64_t kvs_hash(uint64_t seed, const void *data, uint64_t n); /* 64-bit, not cryptographic, stable across machines of one byte order */
double kvs_now(void);                                           /* seconds, monotonic */

#ifdef KVS_INJECT
bool kvs_cancelled(const int32_t *flag); /* a test makes the n-th look at any flag see it set */
#else
static inline bool kvs_cancelled(const int32_t *flag) { return flag && __atomic_load_n(flag, __ATOMIC_RELAXED) != 0; }
#endif
#endif
