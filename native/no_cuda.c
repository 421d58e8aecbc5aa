/* no_cuda.c - in place of cuda/ in a build without it. */
#include "backend.h"
#include "measure.h"

int32_t kvs_test_tile(int32_t n_sm, int32_t n, const int32_t *rows, int32_t n_jobs) {
    (void)n_sm, (void)n, (void)rows, (void)n_jobs;
    return -1;
}

int32_t kvs_cuda_info(char *text, int32_t size) {
    return snprintf(text, (size_t)size, "archs none; unavailable: this build has no CUDA backend");
}

int kvs_cuda_open(int32_t index, kvs_backend **out, kvs_error *err) {
    (void)index;
    *out = NULL;
    return kvs_fail(err, KVS_E_DEVICE, "this build has no CUDA backend");
}

int kvs_cuda_roofs_open(int32_t index, int64_t bytes, kvs_roofs **out, kvs_error *err) {
    (void)bytes;
    kvs_backend *be;
    *out = NULL;
    return kvs_cuda_open(index, &be, err);
}
