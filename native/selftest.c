/* selftest.c - single matrix products for tests, without a model, and what all tests of single ops share. */
#include "selftest.h"
#include "cgroup.h"

#include "check.h"
#include "offload.h"

#include <string.h>

/* The first GPU and the CPU as one; host_layers less than 0: to be compared. */
static kvs_backend *open_both(int32_t threads, int32_t host_layers, int *status) {
    kvs_backend *cpu = NULL, *device = NULL, *both = NULL;
    *status = kvs_cuda_open(0, &device, NULL);
    if (!*status) *status = kvs_cpu_open_isa(NULL, threads, &cpu, NULL);
    if (!*status)
        *status = host_layers < 0 ? kvs_check_open(device, cpu, &both, NULL) : kvs_offload_open(device, cpu, host_layers, &both, NULL);
    if (*status && cpu) cpu->ops->close(cpu);
    if (*status && device) device->ops->close(device);
    return both;
}

kvs_backend *kvs_selftest_open(const char *isa, int32_t threads, int *status) {
    kvs_backend *be = NULL;
    if (isa && !strcmp(isa, "check")) return open_both(threads, -1, status);
    if (isa && (!strcmp(isa, "offload:0") || !strcmp(isa, "offload:1"))) return open_both(threads, isa[8] - '0', status);
    *status = isa && !strcmp(isa, "cuda") ? kvs_cuda_open(0, &be, NULL) : kvs_cpu_open_isa(isa, threads, &be, NULL);
    return be;
}

void kvs_selftest_begin(kvs_backend *be, kvs_step *step, const kvs_row *rows, int32_t n) {
    *step = (kvs_step){.rows = rows, .n = n};
    be->ops->begin(be, step);
}

/* ---- arguments ---- */

static void *lend_block(kvs_lent *lent, uint64_t bytes, bool layer) {
    kvs_backend *be = lent->be;
    bool room = lent->n < KVS_LENT && !lent->status;
    void *device = !room ? NULL : layer ? be->ops->alloc_layers(be, 1, bytes) : be->ops->alloc(be, bytes);
    if (!device) {
        lent->status = KVS_E_MEMORY;
        return NULL;
    }
    lent->blocks[lent->n].device = device;
    lent->blocks[lent->n].host = NULL;
    lent->blocks[lent->n++].bytes = bytes;
    return device;
}

void *kvs_lend_new(kvs_lent *lent, uint64_t bytes) { return lend_block(lent, bytes, false); }
void *kvs_lend_layer(kvs_lent *lent, uint64_t bytes) { return lend_block(lent, bytes, true); }

float *kvs_lend_back(kvs_lent *lent, float *host, int64_t n) {
    uint64_t bytes = (uint64_t)n * sizeof *host;
    if (!host || lent->be->host_memory) return host;
    void *device = kvs_lend_new(lent, bytes);
    if (!device) return NULL;
    lent->be->ops->upload(lent->be, device, host, bytes);
    lent->blocks[lent->n - 1].host = host;
    return device;
}

const float *kvs_lend(kvs_lent *lent, const float *host, int64_t n) {
    float *device = kvs_lend_back(lent, (float *)(void *)host, n);
    if (device != host) lent->blocks[lent->n - 1].host = NULL;
    return device;
}

int kvs_take_back(kvs_lent *lent, int status) {
    kvs_backend *be = lent->be;
    if (lent->status) status = lent->status;
    for (int32_t i = 0; i < lent->n; i++) {
        void *host = lent->blocks[i].host;
        if (host && !status) be->ops->download(be, host, lent->blocks[i].device, lent->blocks[i].bytes);
        be->ops->release(be, lent->blocks[i].device);
    }
    lent->n = 0;
    return status ? status : kvs_device_check(be, NULL);
}

int kvs_selftest_finish(kvs_lent *lent, int status) {
    status = kvs_take_back(lent, status);
    lent->be->ops->close(lent->be);
    return status;
}

/* ---- which kernels, how much of the machine ---- */

double kvs_test_cgroup(int32_t bytes, const char *list, const char *trees) {
    return kvs_cgroup_limit_of(bytes ? KVS_CGROUP_BYTES : KVS_CGROUP_PROCESSORS, list, trees);
}

int32_t kvs_test_isa(const char *isa) {
    int status;
    kvs_backend *be = isa ? kvs_selftest_open(isa, 1, &status) : NULL;
    if (be) be->ops->close(be);
    return be != NULL;
}

int32_t kvs_test_bf16(const char *isa) {
    int status;
    kvs_backend *be = isa ? kvs_selftest_open(isa, 1, &status) : NULL;
    bool has = be && be->has_bf16;
    if (be) be->ops->close(be);
    return has;
}

/* ---- products ---- */

/* As a model's weights are: in the device's own order, on the CPU for products of int8 alone. */
static bool place(kvs_backend *be, kvs_weight *w, int32_t rounding, void **own) {
    uint64_t room = be->host_memory && rounding != KVS_ROUND_INT8 ? 0 : be->ops->weight_room(be, w);
    if (!room) return be->host_memory;
    *own = be->ops->alloc_weights(be, room, false);
    return *own && be->ops->place(be, w, *own, NULL);
}

int32_t kvs_test_matmul(const char *isa, int32_t threads, int32_t type, const void *w, int64_t rows, int64_t cols, const float *x,
                        int32_t n, const float *bias, int32_t rounding, float *y) {
    int status;
    kvs_step step;
    kvs_weight weight = {type, rows, cols, kvs_row_bytes(type, cols), w, false, false};
    if (weight.row_bytes < 0) return KVS_E_ARGUMENT;
    kvs_backend *be = kvs_selftest_open(isa, threads, &status);
    if (!be) return status;
    kvs_lent lent = {.be = be};
    void *own = NULL;
    x = kvs_lend(&lent, x, n * cols);
    kvs_matmul job = {kvs_lend_back(&lent, y, n * rows), &weight, kvs_lend(&lent, bias, rows), rounding};
    if (place(be, &weight, rounding, &own) && !lent.status) {
        kvs_selftest_begin(be, &step, NULL, 0);
        be->ops->matmul(be, &job, 1, x, n);
        status = be->ops->end(be, NULL);
    } else
        status = KVS_E_MEMORY;
    be->ops->release(be, own);
    return kvs_selftest_finish(&lent, status);
}
