/* policy.h - what the files of the policies share: how a parameter is refused, and lists of layers. */
#ifndef KVS_POLICY_H
#define KVS_POLICY_H
#include "cache.h"

/* KVS_E_POLICY with "policy: message"; what names the parameter. */
int kvs_policy_refuse(kvs_error *err, const char *policy, const char *what, const char *message);
/* 0-based, each once, at least one. */
int kvs_policy_check_layers(const char *policy, const int32_t *layers, int32_t n_layers, int32_t n_layer, kvs_error *err);
int32_t *kvs_policy_copy_list(const int32_t *list, int32_t n);                        /* (n); of an empty list, too; NULL = out of memory */
bool *kvs_policy_layers_on(const int32_t *layers, int32_t n_layers, int32_t n_layer); /* (n_layer); NULL = out of memory */
#endif
