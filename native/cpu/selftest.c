/* selftest.c - single matrix products for tests, without a model. */
#include "cpu.h"

int32_t kvs_test_isa(const char *isa) {
    const kvs_isa *chosen;
    return isa && kvs_isa_choose(isa, &chosen, NULL) == KVS_OK;
}

int32_t kvs_test_matmul(const char *isa, int32_t threads, int32_t type, const void *w, int64_t rows, int64_t cols, const float *x,
                        int32_t n, const float *bias, int32_t rounding, float *y) {
    kvs_weight weight = {type, rows, cols, kvs_row_bytes(type, cols), w, false};
    kvs_matmul job = {y, &weight, bias, rounding};
    kvs_cpu cpu = {0};
    if (weight.row_bytes < 0) return KVS_E_ARGUMENT;
    int status = kvs_isa_choose(isa, &cpu.isa, NULL);
    if (!status) status = kvs_pool_new(threads, &cpu.pool, NULL);
    if (status) return status;
    cpu.bf16 = kvs_isa_bf16(cpu.isa);
    uint64_t room = rounding == KVS_ROUND_INT8 ? kvs_cpu_weight_room(&cpu.base, &weight) : 0;
    void *own = room ? kvs_cpu_alloc_weights(&cpu.base, room) : NULL;
    if (room && !(own && kvs_cpu_place(&cpu.base, &weight, own, NULL)))
        cpu.status = KVS_E_MEMORY;
    else
        kvs_cpu_matmul(&cpu.base, &job, 1, x, n);
    kvs_free_aligned(own);
    kvs_pool_free(cpu.pool);
    kvs_free_aligned(cpu.x_scratch);
    return cpu.status;
}

int32_t kvs_test_bf16(const char *isa) {
    const kvs_isa *chosen;
    return isa && kvs_isa_choose(isa, &chosen, NULL) == KVS_OK && kvs_isa_bf16(chosen) != NULL;
}
