/* measure.h - what a device can do at best, for `pykvsmooth bench`: cpu/measure.c and cuda/measure.cu behind one handle. */
#ifndef KVS_MEASURE_H
#define KVS_MEASURE_H
#include "util.h"

typedef struct kvs_roofs_ops {
    void (*free)(kvs_roofs *roofs);
    /* kind and seconds are in range. KVS_E_DEVICE: it has no such unit */
    int (*measure)(kvs_roofs *roofs, int32_t kind, double seconds, double *per_second, kvs_error *err);
} kvs_roofs_ops;

struct kvs_roofs { /* a device's own begins with it */
    const kvs_roofs_ops *ops;
};

int kvs_cpu_roofs_open(int32_t threads, int64_t bytes, kvs_roofs **out, kvs_error *err);
int kvs_cuda_roofs_open(int32_t index, int64_t bytes, kvs_roofs **out, kvs_error *err);
#endif
