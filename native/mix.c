#include "mix.h"

#include <stdlib.h>
#include <string.h>

void kvs_mix_free(kvs_mix *mix) {
    free(mix->target);
    free(mix->start);
    free(mix->source);
    free(mix->weight);
    memset(mix, 0, sizeof *mix);
}

bool kvs_mix_reset(kvs_mix *mix, int32_t n) {
    if (n > mix->n || !mix->start) {
        uint64_t panels = ((uint64_t)n + KVS_MIX_COLUMNS - 1) / KVS_MIX_COLUMNS;
        kvs_mix_free(mix);
        mix->target = kvs_calloc(panels * KVS_MIX_COLUMNS + 1, sizeof *mix->target);
        mix->start = kvs_calloc(panels + 1, sizeof *mix->start);
        if (!mix->target || !mix->start) return false;
    }
    mix->n = n;
    mix->n_panel = 0;
    return true;
}

static bool reserve(kvs_mix *mix, int64_t entries) {
    if (entries <= mix->room) return true;
    int64_t room = KVS_MAX(entries, 2 * (int64_t)mix->room);
    if (room > INT32_MAX) return false;
    int32_t *source = kvs_realloc(mix->source, (uint64_t)room, sizeof *source);
    if (source) mix->source = source;
    float *weight = source ? kvs_realloc(mix->weight, (uint64_t)room, KVS_MIX_COLUMNS * sizeof *weight) : NULL;
    if (!weight) return false;
    mix->weight = weight;
    mix->room = (int32_t)room;
    return true;
}

bool kvs_mix_add(kvs_mix *mix, const int32_t *target, int32_t n_target, const float *columns) {
    int32_t at = mix->start[mix->n_panel];
    if (!reserve(mix, (int64_t)at + mix->n)) return false;
    for (int32_t i = 0; i < mix->n; i++) {
        float *weight = mix->weight + (int64_t)at * KVS_MIX_COLUMNS;
        bool used = false;
        for (int32_t c = 0; c < KVS_MIX_COLUMNS; c++) {
            weight[c] = c < n_target ? columns[(int64_t)c * mix->n + i] : 0.0f;
            used = used || weight[c] != 0.0f;
        }
        if (used) mix->source[at++] = i;
    }
    for (int32_t c = 0; c < KVS_MIX_COLUMNS; c++) mix->target[mix->n_panel * KVS_MIX_COLUMNS + c] = c < n_target ? target[c] : -1;
    mix->start[++mix->n_panel] = at;
    return true;
}
