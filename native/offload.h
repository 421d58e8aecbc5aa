/* offload.h - a backend over two: the first layers of a model are the CPU's, the others a device's. What is left of the model is where its
 * weights lie (kvs_weight.on_host), and what has neither weights nor a layer runs where the op before it ran. */
#ifndef KVS_OFFLOAD_H
#define KVS_OFFLOAD_H
#include "backend.h"

/* Takes both over, if it succeeds. */
int kvs_offload_open(kvs_backend *device, kvs_backend *cpu, int32_t host_layers, kvs_backend **out, kvs_error *err);
#endif
