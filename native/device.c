#include "device.h"

#include "check.h"
#include "offload.h"
#include "split.h"

#include <stdlib.h>
#include <string.h>

static bool is_auto(const kvs_model_params *p) { return !p->device || !strcmp(p->device, "auto"); }

/* In place of a GPU, and why. */
static int open_cpu_instead(const kvs_model_params *p, kvs_model *model, const char *why, kvs_error *err) {
    int status = kvs_cpu_open(p->threads, &model->be, err);
    if (status) return status;
    char kernels[sizeof model->be->reason];
    memcpy(kernels, model->be->reason, sizeof kernels);
    int n = snprintf(model->be->reason, sizeof model->be->reason, "%.160s; ", why);
    snprintf(model->be->reason + n, sizeof model->be->reason - (size_t)n, "%.80s", kernels);
    return KVS_OK;
}

static int open_cuda(const kvs_model_params *p, int32_t index, kvs_model *model, kvs_error *err) {
    int status = kvs_cuda_open(index, &model->be, err);
    if (status || !kvs_check_wanted()) return status;
    kvs_backend *cpu = NULL, *both = NULL;
    status = kvs_cpu_open(p->threads, &cpu, err);
    if (!status) status = kvs_check_open(model->be, cpu, &both, err);
    if (status && cpu) cpu->ops->close(cpu);
    if (status) model->be->ops->close(model->be);
    model->be = both;
    return status;
}

/* What was wanted and what there was, of the error that a longer one tells of. */
static int with_bytes(kvs_error *err, const kvs_error *why, int status) {
    if (err) err->needed = why->needed, err->available = why->available;
    return status;
}

static int open_auto(const kvs_model_params *p, kvs_model *model, kvs_error *err) {
    kvs_error no_gpu = {.struct_size = sizeof no_gpu};
    int status = open_cuda(p, 0, model, &no_gpu);
    if (!status) return KVS_OK;
    if (p->gpu_layers > 0) {
        kvs_fail(err, status, "gpu_layers: %d layers on a GPU can't be had: %.200s; leave gpu_layers away", p->gpu_layers, no_gpu.message);
        return with_bytes(err, &no_gpu, status);
    }
    char why[168];
    snprintf(why, sizeof why, "no GPU: %.159s", no_gpu.message);
    return open_cpu_instead(p, model, why, err);
}

int kvs_device_open(const kvs_model_params *p, kvs_model *model, kvs_error *err) {
    if (p->threads < 0 || p->threads > 1024)
        return kvs_fail(err, KVS_E_ARGUMENT, "threads: must be in 0..1024, 0 for all that are allowed");
    if (p->gpu_layers < KVS_GPU_LAYERS_NONE) return kvs_fail(err, KVS_E_ARGUMENT, "gpu_layers: there is no number %d", p->gpu_layers);
    if (is_auto(p)) return open_auto(p, model, err);
    if (!strcmp(p->device, "cpu")) {
        if (p->gpu_layers <= 0) return kvs_cpu_open(p->threads, &model->be, err);
        return kvs_fail(err, KVS_E_DEVICE, "gpu_layers: %d layers on a GPU were asked for, and the device \"cpu\"; leave one of them away",
                        p->gpu_layers);
    }
    int32_t index = kvs_cuda_index(p->device);
    if (index < 0) return kvs_fail(err, KVS_E_ARGUMENT, "device: \"%s\" is none of auto, cpu, cuda, cuda:N", p->device);
    kvs_error why = {.struct_size = sizeof why};
    int status = open_cuda(p, index, model, &why);
    if (!status) return KVS_OK;
    kvs_fail(err, status, "device \"%s\" can't be had: %s; use \"cpu\" or \"auto\"", p->device, why.message);
    return with_bytes(err, &why, status);
}

/* ---- sharing ---- */

/* "auto" found a GPU, but nothing of the model fits. */
static int leave_device(const kvs_model_params *p, kvs_model *model, const kvs_error *why, kvs_error *err) {
    char text[160];
    snprintf(text, sizeof text, "%.12s is not used: %.130s", model->be->name, why->message);
    model->be->ops->close(model->be);
    model->be = NULL;
    return open_cpu_instead(p, model, text, err);
}

static int add_cpu(const kvs_model_params *p, kvs_model *model, const kvs_split *split, kvs_error *err) {
    kvs_backend *cpu, *both;
    int status = kvs_cpu_open(p->threads, &cpu, err);
    if (status) return status;
    status = kvs_offload_open(model->be, cpu, model->text.n_layer - split->n_layer, &both, err);
    if (status) {
        cpu->ops->close(cpu);
        return status;
    }
    kvs_split_tell(model, split, model->be->name, model->be->reason, cpu->reason, both->reason, sizeof both->reason);
    both->has_bf16 = split->tower ? model->be->has_bf16 : cpu->has_bf16;
    both->has_f16 = split->tower ? model->be->has_f16 : cpu->has_f16;
    model->be = both;
    return KVS_OK;
}

int kvs_device_share(const kvs_model_params *p, kvs_model *model, kvs_error *err) {
    model->plan = kvs_plan_host(model);
    if (model->be->host_memory) return KVS_OK;
    kvs_split split;
    kvs_error why = {.struct_size = sizeof why};
    int status = kvs_split_choose(model, p->gpu_layers, &split, &why);
    if (status == KVS_E_MEMORY && is_auto(p) && p->gpu_layers <= 0) return leave_device(p, model, &why, err);
    if (status) {
        if (err) *err = why;
        return status;
    }
    kvs_split_apply(model, &split);
    model->plan = split.plan;
    if (!kvs_split_whole(model, &split)) return add_cpu(p, model, &split, err);
    char reason[sizeof model->be->reason];
    kvs_split_tell(model, &split, model->be->name, model->be->reason, "", reason, sizeof reason);
    memcpy(model->be->reason, reason, sizeof reason);
    return KVS_OK;
}
