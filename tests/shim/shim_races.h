/* shim_races.h - in builds with KVS_SHIM_RACES every access of a kernel to memory is looked at: two threads at one byte, one of them writing, and
 * nothing that orders them; bytes that nobody has written. shim_races.cpp. Elsewhere these do nothing. */
#ifndef KVS_SHIM_RACES_H
#define KVS_SHIM_RACES_H
#include <cstddef>
#include <cstdint>

#ifdef KVS_SHIM_RACES
void kvs_races_launch(bool early);                                                     /* before the one in front has ended */
void kvs_races_block(void *shared, size_t bytes, void *statics, size_t statics_bytes); /* begins */
void kvs_races_barrier(void);                                                          /* of the block */
void kvs_races_warp(int32_t warp);                                                     /* __syncwarp by all of its lanes */
void kvs_races_device(const void *p, size_t bytes);              /* is allocated, or freed: nobody has written there */
void kvs_races_written(const void *p, size_t bytes);             /* by the host */
void kvs_races_access(const void *p, size_t bytes, bool writes); /* by a kernel, in code of the shim's own */
#else
static inline void kvs_races_launch(bool) {}
static inline void kvs_races_block(void *, size_t, void *, size_t) {}
static inline void kvs_races_barrier(void) {}
static inline void kvs_races_warp(int32_t) {}
static inline void kvs_races_device(const void *, size_t) {}
static inline void kvs_races_written(const void *, size_t) {}
static inline void kvs_races_access(const void *, size_t, bool) {}
#endif
#endif
