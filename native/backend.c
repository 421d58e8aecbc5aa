#include "backend.h"

#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

void kvs_device_fail(kvs_backend *be, bool for_good, const char *format, ...) {
    int32_t expected = 0;
    while (be->device) be = be->device;
    if (!__atomic_compare_exchange_n(&be->failed, &expected, KVS_FAILING, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) return;
    va_list args;
    va_start(args, format);
    vsnprintf(be->failure, sizeof be->failure, format, args);
    va_end(args);
    __atomic_store_n(&be->failed, for_good ? KVS_FAILED_FOR_GOOD : KVS_FAILED, __ATOMIC_RELEASE);
}

int kvs_device_check(const kvs_backend *be, kvs_error *err) {
    while (be->device) be = be->device;
    int32_t failed = __atomic_load_n(&be->failed, __ATOMIC_ACQUIRE);
    if (!failed) return KVS_OK;
    return kvs_fail(err, KVS_E_DEVICE, "%s failed: %s; %s", be->name, failed > KVS_FAILING ? be->failure : "see the first error",
                    failed == KVS_FAILED_FOR_GOOD ? "restart the process, or load the model with device=\"cpu\"" : "load the model again");
}

int kvs_fail_room(kvs_backend *be, kvs_error *err, uint64_t needed, const char *what) {
    int status = kvs_device_check(be, err); /* a device that has failed has no memory either */
    if (status) return status;
    uint64_t left = be->ops->free_memory(be);
    if (!left) return kvs_fail_memory(err, needed, what);
    kvs_fail(err, KVS_E_MEMORY, "out of memory on %s, %.1f MiB are free: %.1f MiB needed for %s", be->name, (double)left / 1048576.0,
             (double)needed / 1048576.0, what);
    if (err) err->needed = needed, err->available = left;
    return KVS_E_MEMORY;
}

int32_t kvs_cuda_index(const char *device) {
    if (strncmp(device, "cuda", 4)) return -1;
    if (!device[4]) return 0;
    bool digits = device[4] == ':' && device[5] && strspn(device + 5, "0123456789") == strlen(device + 5);
    return digits && strlen(device + 5) <= 2 ? (int32_t)atoi(device + 5) : -1;
}
