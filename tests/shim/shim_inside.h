/* shim_inside.h - what shim_runtime.cpp and shim_stream.cpp share. */
#ifndef KVS_SHIM_INSIDE_H
#define KVS_SHIM_INSIDE_H
#include "shim.h"

#include <atomic>

struct kvs_shim_queue;
struct kvs_shim_stream {
    kvs_shim_queue *queue;
    kvs_shim_graph *capture; /* what is being captured, or NULL */
    bool spoilt;             /* by a call that may not be captured */
    int device;              /* of the thread that made it */
};

enum kvs_shim_count { WAITS, TO_HOST, TO_DEVICE, GRAPHS, CAPTURES, KERNELS, EARLY, ASKED, BLOCKS, PINNED, OBJECTS, COUNTS };
extern std::atomic<long long> kvs_shim_so_far[COUNTS];

cudaError_t kvs_shim_fail(cudaError_t error); /* remembers it as the last one */
cudaError_t kvs_shim_asked(const char *name); /* what KVS_SHIM_FAIL says of this call */
cudaError_t kvs_shim_enter(const char *name,
                           bool safe); /* every call that can fail begins with it. safe: it may be called while this thread captures */
#define ENTER(safe)                                                                                                                        \
    if (cudaError_t error = kvs_shim_enter(__func__, safe)) return error

cudaError_t kvs_shim_broken(void); /* by an error that stays: nothing runs any more */
/* Broken devices give back what they have, too, if with an error: so tests can see that nobody forgets to ask. */
static inline bool kvs_shim_gives_back(cudaError_t error) { return !error || error == kvs_shim_broken(); }

int kvs_shim_device(void);                 /* this host thread's */
bool kvs_shim_on_device(const void *p);    /* in an allocated block */
bool kvs_shim_awaited(void);               /* by the thread that runs: the kernel in front */
void kvs_shim_finish(cudaStream_t stream); /* what waits in it is done; NULL: the default stream */
void kvs_shim_finish_all(void);
#endif
