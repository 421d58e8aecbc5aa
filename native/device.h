/* device.h - where a model runs: the device that was asked for, and the CPU for what finds no room there. */
#ifndef KVS_DEVICE_H
#define KVS_DEVICE_H
#include "model.h"

int kvs_device_open(const kvs_model_params *params, kvs_model *model, kvs_error *err);
/* Once the weights are known, before any of them is placed: model->be is what all of it runs on. */
int kvs_device_share(const kvs_model_params *params, kvs_model *model, kvs_error *err);
#endif
