/* selftest_rows.c - the ops that go row by row or value by value, for tests. */
#include "selftest.h"

#include <stdlib.h>
#include <string.h>

int32_t kvs_test_norm(const char *isa, const float *x, const float *w, const float *b, float eps, int32_t n, int32_t cols, float *y) {
    int status;
    kvs_step step;
    kvs_lent lent = {.be = kvs_selftest_open(isa, 1, &status)};
    if (!lent.be) return status;
    x = kvs_lend(&lent, x, (int64_t)n * cols);
    y = kvs_lend_back(&lent, y, (int64_t)n * cols);
    w = kvs_lend(&lent, w, cols);
    b = kvs_lend(&lent, b, cols);
    if (lent.status) return kvs_selftest_finish(&lent, KVS_OK);
    kvs_selftest_begin(lent.be, &step, NULL, 0);
    lent.be->ops->norm(lent.be, y, x, w, b, eps, n, cols);
    return kvs_selftest_finish(&lent, lent.be->ops->end(lent.be, NULL));
}

int32_t kvs_test_rope(const char *isa, float *x, const int32_t *pos, int32_t n, int32_t n_head, int32_t head_dim, const float *inv_freq,
                      int32_t n_rot) {
    int status;
    if (n < 1 || n_rot < 0 || n_rot > head_dim || n_rot % 2) return KVS_E_ARGUMENT;
    kvs_step step;
    kvs_kv kv = {0};
    kvs_lent lent = {.be = kvs_selftest_open(isa, 1, &status)};
    if (!lent.be) return status;
    kvs_row *rows = kvs_selftest_rows(&kv, n);
    kvs_rope rope = {.n_rot = n_rot,
                     .inv_freq = kvs_lend(&lent, inv_freq, n_rot / 2),
                     .table = kvs_lend_new(&lent, (uint64_t)n * (uint64_t)n_rot * sizeof(float) + 1)};
    x = kvs_lend_back(&lent, x, (int64_t)n * n_head * head_dim);
    if (rows && !lent.status) {
        for (int32_t i = 0; i < n; i++) rows[i].pos = pos[i];
        kvs_selftest_begin(lent.be, &step, rows, n);
        lent.be->ops->angles(lent.be, &rope);
        lent.be->ops->rope(lent.be, x, &rope, n, n_head, head_dim);
        status = lent.be->ops->end(lent.be, NULL);
    } else
        status = KVS_E_MEMORY;
    free(rows);
    return kvs_selftest_finish(&lent, status);
}

int32_t kvs_test_unary(const char *isa, const char *op, float *x, const float *y, int64_t n) {
    static const char *const names[] = {[KVS_GELU] = "gelu", [KVS_GELU_TANH] = "gelu_tanh", [KVS_GELU_QUICK] = "gelu_quick"};
    int status;
    kvs_step step;
    kvs_lent lent = {.be = kvs_selftest_open(isa, 1, &status)};
    if (!lent.be) return status;
    x = kvs_lend_back(&lent, x, n);
    y = kvs_lend(&lent, y, n);
    if (lent.status) return kvs_selftest_finish(&lent, KVS_OK);
    const kvs_ops *ops = lent.be->ops;
    kvs_selftest_begin(lent.be, &step, NULL, 0);
    bool known = true;
    if (!strcmp(op, "add"))
        ops->add(lent.be, x, y, n);
    else if (!strcmp(op, "silu_mul"))
        ops->gate(lent.be, x, y, n);
    else {
        int32_t kind = KVS_GELU;
        while (kind <= KVS_GELU_QUICK && strcmp(op, names[kind])) kind++;
        known = kind <= KVS_GELU_QUICK;
        if (known) ops->unary(lent.be, kind, x, n);
    }
    status = kvs_selftest_finish(&lent, ops->end(lent.be, NULL));
    return known ? status : KVS_E_ARGUMENT;
}

int32_t kvs_test_finite(const char *isa, int32_t threads, const float *x, int32_t n, int32_t cols, float limit, int32_t *row,
                        float *value) {
    int status;
    kvs_lent lent = {.be = kvs_selftest_open(isa, threads, &status)};
    if (!lent.be) return status;
    x = kvs_lend(&lent, x, (int64_t)n * cols);
    if (lent.status) return kvs_selftest_finish(&lent, KVS_OK);
    kvs_fault fault = {0};
    kvs_step step = {.fault = &fault};
    lent.be->ops->begin(lent.be, &step);
    lent.be->ops->finite(lent.be, x, n, cols, limit, 1);
    lent.be->ops->finite(lent.be, x, n, cols, 0, 2); /* what comes after the first one is not looked at */
    status = kvs_selftest_finish(&lent, lent.be->ops->end(lent.be, NULL));
    *row = fault.row;
    *value = fault.value;
    return fault.place == 2 ? KVS_OK : status;
}
