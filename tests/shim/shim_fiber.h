/* shim_fiber.h - stacks that the threads of a kernel run on, and the switch from one to another. */
#ifndef KVS_SHIM_FIBER_H
#define KVS_SHIM_FIBER_H
#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#define KVS_SHIM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define KVS_SHIM_ASAN 1
#endif
#endif

struct kvs_fiber; /* a stack, and what is needed to go on with it */

/* The host thread's own stack. One per host thread. */
kvs_fiber *kvs_fiber_host(void);
/* Never returns NULL. At the first switch to it entry() begins, which never returns. */
kvs_fiber *kvs_fiber_new(void (*entry)(void));
/* Saves here what is running, goes on with another; returns when somebody switches back. */
void kvs_fiber_switch(kvs_fiber *from, kvs_fiber *to);
/* Leaves from for good: it can be given out again. */
[[noreturn]] void kvs_fiber_leave(kvs_fiber *from, kvs_fiber *to);
/* What entry() begins with. */
void kvs_fiber_arrived(kvs_fiber *self);
#endif
