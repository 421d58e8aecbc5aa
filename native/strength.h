/* strength.h - rank and strength of KVSmooth (arXiv 2602.04268, eq. 13-14), shared by all backends. */
#ifndef KVS_STRENGTH_H
#define KVS_STRENGTH_H
#include "util.h"

#include <math.h>

/* Rank of value among n entries, itself one of them: how many are smaller; with midrank, others that are equal count 1/2. */
KVS_SHARED float kvs_rank(int smaller, int equal_others, int midrank) {
    return (float)smaller + (midrank ? 0.5f * (float)equal_others : 0.0f);
}

/* The window is clamped on the outside by [0, lambda_max]; a fixed strength is used as it is. */
KVS_SHARED float kvs_strength(float rank, int entries, int window, int den_capacity, float lambda_ref, float half_width, float lambda_max,
                              float lambda_fixed) {
    if (!isnan(lambda_fixed)) return lambda_fixed;
    float hat = rank / (float)(den_capacity ? window : entries);
    float low = lambda_ref - half_width, high = lambda_ref + half_width;
    float strength = hat < low ? low : hat > high ? high : hat;
    return strength < 0.0f ? 0.0f : strength > lambda_max ? lambda_max : strength;
}
#endif
