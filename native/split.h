/* split.h - which layers of a model a device has room for, before anything is allocated there. */
#ifndef KVS_SPLIT_H
#define KVS_SPLIT_H
#include "model.h"

typedef struct kvs_split {
    int32_t n_layer;     /* the last so many layers are the device's, and the output, always */
    bool tower, embd;    /* the vision tower and the token embedding, too; tower: true where there is none */
    uint64_t used, free; /* bytes of the device; free: UINT64_MAX where nobody knows */
    kvs_plan plan;       /* the same, part by part */
} kvs_split;

kvs_plan kvs_plan_host(const kvs_model *model); /* of a model that is all the CPU's */
/* gpu_layers as in kvs_model_params. KVS_E_MEMORY with both numbers where so many layers do not fit, or with KVS_GPU_LAYERS_AUTO not one. */
int kvs_split_choose(const kvs_model *model, int32_t gpu_layers, kvs_split *split, kvs_error *err);
bool kvs_split_whole(const kvs_model *model, const kvs_split *split); /* nothing is left for the CPU */
void kvs_split_apply(kvs_model *model, const kvs_split *split);       /* weights know whose they are */
/* "24 of 32 layers on cuda:0 (NAME; 5.1 of 7.8 GiB), 8 layers on the CPU (KERNELS)"; device and cpu: what their reasons say */
void kvs_split_tell(const kvs_model *model, const kvs_split *split, const char *name, const char *device, const char *cpu, char *text,
                    size_t size);
#endif
