#include "measure.h"

#include "backend.h"

#include <string.h>

int32_t kvs_roofs_open(const char *device, int32_t threads, int64_t bytes, kvs_roofs **out, kvs_error *err) {
    *out = NULL;
    if (threads < 0 || threads > 1024) return kvs_fail(err, KVS_E_ARGUMENT, "threads: must be in 0..1024, 0 for all that are allowed");
    if (bytes < 1 || bytes > (int64_t)1 << 40) return kvs_fail(err, KVS_E_ARGUMENT, "bytes: must be in 1..2^40");
    if (!strcmp(device, "cpu")) return kvs_cpu_roofs_open(threads, bytes, out, err);
    int32_t index = kvs_cuda_index(device);
    if (index < 0) return kvs_fail(err, KVS_E_ARGUMENT, "device: \"%.40s\" is none of cpu, cuda, cuda:N", device);
    return kvs_cuda_roofs_open(index, bytes, out, err);
}

void kvs_roofs_free(kvs_roofs *roofs) {
    if (roofs) roofs->ops->free(roofs);
}

int32_t kvs_roofs_measure(kvs_roofs *roofs, int32_t kind, double seconds, double *per_second, kvs_error *err) {
    *per_second = 0;
    if (kind < 0 || kind >= KVS_ROOF_KINDS) return kvs_fail(err, KVS_E_ARGUMENT, "kind: there is no roof %d", (int)kind);
    if (!(seconds > 0 && seconds <= 10)) return kvs_fail(err, KVS_E_ARGUMENT, "seconds: must be above 0 and at most 10");
    return roofs->ops->measure(roofs, kind, seconds, per_second, err);
}
