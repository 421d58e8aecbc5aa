#include "policy.h"

#include <string.h>

int kvs_policy_refuse(kvs_error *err, const char *policy, const char *what, const char *message) {
    kvs_fail(err, KVS_E_POLICY, "%s: %s", policy, message);
    if (err) snprintf(err->what, sizeof err->what, "%s", what);
    return KVS_E_POLICY;
}

int kvs_policy_check_layers(const char *policy, const int32_t *layers, int32_t n_layers, int32_t n_layer, kvs_error *err) {
    if (n_layers < 1 || n_layers > n_layer || !layers)
        return kvs_policy_refuse(err, policy, "layers", "no layers, or more than the model has");
    for (int32_t i = 0; i < n_layers; i++) {
        if (layers[i] < 0 || layers[i] >= n_layer)
            return kvs_fail(err, KVS_E_POLICY, "%s: layer %d is out of range: the model has layers 0..%d", policy, layers[i], n_layer - 1);
        for (int32_t j = 0; j < i; j++)
            if (layers[j] == layers[i]) return kvs_policy_refuse(err, policy, "layers", "a layer is named twice");
    }
    return KVS_OK;
}

int32_t *kvs_policy_copy_list(const int32_t *list, int32_t n) {
    int32_t *copy = kvs_calloc((uint64_t)n + 1, sizeof *copy);
    if (copy && n) memcpy(copy, list, (size_t)n * sizeof *copy);
    return copy;
}

bool *kvs_policy_layers_on(const int32_t *layers, int32_t n_layers, int32_t n_layer) {
    bool *on = kvs_calloc((uint64_t)n_layer, sizeof *on);
    for (int32_t i = 0; on && i < n_layers; i++) on[layers[i]] = true;
    return on;
}
