/* pack.cuh - from GGUF's blocks to the order of types.cuh, a group at a time: the inverse of its decoders. Speed does not matter here: a block
 * comes over the bus once. */
#ifndef KVS_PACK_CUH
#define KVS_PACK_CUH
#include "types.cuh"

/* ---- what GGUF keeps: value i of a block as an unsigned number, the bits of quant.c's decoders before scales and offsets ---- */

template <int TYPE> struct kvs_block;
template <> struct kvs_block<KVS_TYPE_Q4_0> { typedef kvs_q4_0 type; };
template <> struct kvs_block<KVS_TYPE_Q4_1> { typedef kvs_q4_1 type; };
template <> struct kvs_block<KVS_TYPE_Q5_0> { typedef kvs_q5_0 type; };
template <> struct kvs_block<KVS_TYPE_Q5_1> { typedef kvs_q5_1 type; };
template <> struct kvs_block<KVS_TYPE_Q8_0> { typedef kvs_q8_0 type; };
template <> struct kvs_block<KVS_TYPE_Q2_K> { typedef kvs_q2_k type; };
template <> struct kvs_block<KVS_TYPE_Q3_K> { typedef kvs_q3_k type; };
template <> struct kvs_block<KVS_TYPE_Q4_K> { typedef kvs_q4_k type; };
template <> struct kvs_block<KVS_TYPE_Q5_K> { typedef kvs_q5_k type; };
template <> struct kvs_block<KVS_TYPE_Q6_K> { typedef kvs_q6_k type; };
template <> struct kvs_block<KVS_TYPE_IQ4_NL> { typedef kvs_iq4_nl type; };
template <> struct kvs_block<KVS_TYPE_IQ4_XS> { typedef kvs_iq4_xs type; };

template <int TYPE> KVS_DEVICE uint32_t kvs_raw_value(const typename kvs_block<TYPE>::type *b, int i) {
    if constexpr (TYPE == KVS_TYPE_Q8_0) {
        return (uint8_t)b->q[i];
    } else if constexpr (TYPE == KVS_TYPE_Q2_K) {
        return b->q[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3;
    } else if constexpr (TYPE == KVS_TYPE_Q3_K) {
        uint32_t low = b->q[i / 128 * 32 + i % 32] >> i % 128 / 32 * 2 & 3, high = b->h[i % 32] >> i / 32 & 1;
        return low | high << 2;
    } else if constexpr (TYPE == KVS_TYPE_Q4_K) {
        return b->q[i / 64 * 32 + i % 32] >> i / 32 % 2 * 4 & 15;
    } else if constexpr (TYPE == KVS_TYPE_Q5_K) {
        uint32_t low = b->q[i / 64 * 32 + i % 32] >> i / 32 % 2 * 4 & 15, high = b->h[i % 32] >> i / 32 & 1;
        return low | high << 4;
    } else if constexpr (TYPE == KVS_TYPE_Q6_K) {
        const int half = i / 128, run = i % 128 / 32, l = i % 32;
        uint32_t low = b->q[64 * half + 32 * (run % 2) + l] >> run / 2 * 4 & 15, high = b->h[32 * half + l] >> 2 * run & 3;
        return low | high << 4;
    } else { /* blocks of 32, and IQ4_XS, which is 8 of them */
        uint32_t value = b->q[i / 32 * 16 + i % 16] >> i % 32 / 16 * 4 & 15;
        if constexpr (TYPE == KVS_TYPE_Q5_0 || TYPE == KVS_TYPE_Q5_1) value |= (uint32_t)(b->h[i / 8] >> i % 8 & 1) << 4;
        return value;
    }
}

/* ---- words ---- */

KVS_DEVICE void kvs_put_word(uint8_t *to, int word, uint32_t x) { *(uint32_t *)(void *)(to + 4 * word) = x; }
KVS_DEVICE void kvs_put_half(uint8_t *to, uint32_t x) { *(uint16_t *)(void *)to = (uint16_t)x; }

/* values (32) -> a group's low bits */
template <int TYPE> KVS_DEVICE void kvs_pack_low(const uint32_t v[32], uint8_t *to) {
    constexpr kvs_order o = kvs_order_of(TYPE);
#pragma unroll
    for (int w = 0; w < o.low / 4; w++) {
        uint32_t x = 0;
#pragma unroll
        for (int b = 0; b < 4; b++) {
            if constexpr (TYPE == KVS_TYPE_Q8_0) {
                x |= v[4 * w + b] << 8 * b;
            } else if constexpr (TYPE == KVS_TYPE_IQ4_NL || TYPE == KVS_TYPE_IQ4_XS) {
                x |= (v[8 * w + 2 * b] | v[8 * w + 2 * b + 1] << 4) << 8 * b;
            } else if constexpr (o.low == 16) {
                x |= ((v[4 * w + b] & 15) | (v[16 + 4 * w + b] & 15) << 4) << 8 * b;
            } else {
#pragma unroll
                for (int k = 0; k < 4; k++) x |= (v[16 * w + 4 * k + b] & 3) << (8 * b + 2 * k);
            }
        }
        kvs_put_word(to, w, x);
    }
}

/* values (32) -> the bits above those */
template <int TYPE> KVS_DEVICE void kvs_pack_high(const uint32_t v[32], uint8_t *to) {
    constexpr kvs_order o = kvs_order_of(TYPE);
    constexpr int from = o.low == 8 ? 2 : 4;
#pragma unroll
    for (int w = 0; w < o.high / 4; w++) {
        uint32_t x = 0;
#pragma unroll
        for (int b = 0; b < 4; b++) {
            if constexpr (TYPE == KVS_TYPE_Q8_0) {
                x |= v[16 + 4 * w + b] << 8 * b;
            } else if constexpr (o.high == 4) {
#pragma unroll
                for (int k = 0; k < 8; k++) x |= (v[4 * k + b] >> from & 1) << (8 * b + k);
            } else {
#pragma unroll
                for (int k = 0; k < 4; k++) x |= (v[16 * w + 4 * k + b] >> from & 3) << (8 * b + 2 * k);
            }
        }
        kvs_put_word(to, w, x);
    }
}

/* ---- scales ---- */

/* The two numbers of six bits of group j */
KVS_DEVICE void kvs_raw_six_bits(const kvs_q3_k *b, int j, uint32_t numbers[2]) {
    for (int i = 0; i < 2; i++) {
        const int s = 2 * j + i; /* which of 16 */
        numbers[i] = (b->scales[s % 8] >> s / 8 * 4 & 15) | (uint32_t)(b->scales[8 + s % 4] >> s / 4 * 2 & 3) << 4;
    }
}
template <class B> KVS_DEVICE void kvs_raw_six_bits(const B *b, int j, uint32_t numbers[2]) { /* Q4_K, Q5_K */
    uint8_t scale, min;
    kvs_k4_scale(b->scales, j, &scale, &min);
    numbers[0] = scale;
    numbers[1] = min;
}

template <class B> KVS_DEVICE void kvs_pack_six_bits(const B *b, uint8_t *to) {
    uint32_t words[4] = {0, 0, 0, 0}; /* the last for what is shifted out of the third: zeros */
#pragma unroll
    for (int j = 0; j < 8; j++) {
        uint32_t n[2];
        kvs_raw_six_bits(b, j, n);
        const uint64_t bits = (uint64_t)(n[0] | n[1] << 6) << 12 * j % 32;
        words[12 * j / 32] |= (uint32_t)bits;
        words[12 * j / 32 + 1] |= (uint32_t)(bits >> 32);
    }
    for (int w = 0; w < 3; w++) kvs_put_word(to, 1 + w, words[w]);
}

/* What belongs to a whole block */
template <int TYPE> KVS_DEVICE void kvs_pack_record(const typename kvs_block<TYPE>::type *b, uint8_t *to) {
    constexpr kvs_order o = kvs_order_of(TYPE);
    if constexpr (TYPE == KVS_TYPE_IQ4_XS) {
        kvs_put_word(to, 0, b->d | (uint32_t)b->scales_h << 16);
        kvs_put_word(to, 1, b->scales_l[0] | b->scales_l[1] << 8 | b->scales_l[2] << 16 | (uint32_t)b->scales_l[3] << 24);
    } else if constexpr (o.minimum) {
        kvs_put_word(to, 0, b->d | (uint32_t)b->m << 16);
    } else if constexpr (o.record == 16) {
        kvs_put_word(to, 0, b->d);
    } else {
        kvs_put_half(to, b->d);
    }
    if constexpr (o.record == 16) kvs_pack_six_bits(b, to);
}

/* Group j of a block (group: counted through the row) into the row's planes */
template <int TYPE> KVS_DEVICE void kvs_pack_group(const uint8_t *block, int j, uint8_t *row, int64_t cols, int64_t group) {
    constexpr kvs_order o = kvs_order_of(TYPE);
    const auto *b = (const typename kvs_block<TYPE>::type *)(const void *)block;
    const kvs_plane_offsets at = kvs_planes_at(TYPE, cols);
    uint32_t v[32];
#pragma unroll
    for (int i = 0; i < 32; i++) v[i] = kvs_raw_value<TYPE>(b, 32 * j + i);
    kvs_pack_low<TYPE>(v, row + group * o.low);
    if constexpr (o.high != 0) kvs_pack_high<TYPE>(v, row + at.high + group * o.high);
    if constexpr (o.scales != 0)
        kvs_put_half(row + at.scales + group * o.scales, (uint8_t)b->scales[2 * j] | (uint32_t)(uint8_t)b->scales[2 * j + 1] << 8);
    if (j == 0) kvs_pack_record<TYPE>(b, row + at.record + group / (o.block / KVS_GROUP) * o.record);
}
#endif
