/* types.cuh - weights in the order of the device, and their decoders.
 *
 * A row of a matrix is cut into groups of 32 neighbouring values, and what GGUF keeps in one block lies here in up to four planes, one
 * after the other, each padded to a multiple of 16 bytes: so all loads are aligned, and neighbouring lanes that take neighbouring groups read
 * neighbouring bytes. No plane is wider than GGUF's fields (Q3_K's scales apart: 16 bytes for 14). Bits are regrouped, so that every group
 * stands for itself and words come apart with shifts and masks:
 *
 *   low     per group: the low bits of its values.
 *           4 bits: byte b of word w holds value 4w + b, and 16 + 4w + b in its high nibble. IQ4: nibble k of word w is value 8w + k.
 *           2 bits: bits 2k of byte b of word w are value 16w + 4k + b. 8 bits: values 0..15. F32, F16, BF16: the values as they are.
 *   high    per group: the bits above those.
 *           1 bit: bit w of byte b is value 4w + b. 2 bits: as above. 8 bits: values 16..31.
 *   scales  per group: the two scales of its halves, a byte each, where a block is 16 x 16 values with such scales.
 *   record  per block: d, m and what else there is.
 *           Q3_K, Q4_K, Q5_K: word 0 is d, m; of the 96 bits behind it 12 j .. 12 j + 11 are two numbers of six bits that belong
 *           to group j: scale and minimum; Q3_K: the scales of its halves.
 *           IQ4_XS: as in GGUF.
 *
 * Rows of F32, F16 and BF16 are padded with zeros to whole groups. weights.cu writes this order (pack_kernel).
 * Decoded values are those of quant.c, bit by bit: products of scales and integers fit into float32, so that only the last
 * subtraction rounds (fused or not). */
#ifndef KVS_TYPES_CUH
#define KVS_TYPES_CUH
#include "device.cuh"

extern "C" {
#include "../quant.h"
}

enum { KVS_GROUP = 32 };

typedef struct kvs_order { /* of a type on the device */
    int block;             /* values of a record; 32 for types without blocks */
    int low, high, scales; /* bytes of a group */
    int record;            /* bytes of a block */
    int offset;            /* value = d (q - offset), where there is no minimum */
    bool minimum;          /* value = d q - m */
    bool halves;           /* the halves of a group have scales of their own */
    bool sign;             /* q may be negative */
} kvs_order;

KVS_SHARED constexpr kvs_order kvs_order_of(int type) {
    switch (type) { /*                  block low high scales record offset */
    case KVS_TYPE_F32: return kvs_order{32, 128, 0, 0, 0, 0, false, false, false};
    case KVS_TYPE_F16:
    case KVS_TYPE_BF16: return kvs_order{32, 64, 0, 0, 0, 0, false, false, false};
    case KVS_TYPE_Q4_0: return kvs_order{32, 16, 0, 0, 2, 8, false, false, false};
    case KVS_TYPE_Q4_1: return kvs_order{32, 16, 0, 0, 4, 0, true, false, false};
    case KVS_TYPE_Q5_0: return kvs_order{32, 16, 4, 0, 2, 16, false, false, false};
    case KVS_TYPE_Q5_1: return kvs_order{32, 16, 4, 0, 4, 0, true, false, false};
    case KVS_TYPE_Q8_0: return kvs_order{32, 16, 16, 0, 2, 0, false, false, true};
    case KVS_TYPE_Q2_K: return kvs_order{256, 8, 0, 2, 4, 0, true, true, false};
    case KVS_TYPE_Q3_K: return kvs_order{256, 8, 4, 0, 16, 4, false, true, false};
    case KVS_TYPE_Q4_K: return kvs_order{256, 16, 0, 0, 16, 0, true, false, false};
    case KVS_TYPE_Q5_K: return kvs_order{256, 16, 4, 0, 16, 0, true, false, false};
    case KVS_TYPE_Q6_K: return kvs_order{256, 16, 8, 2, 2, 32, false, true, false};
    case KVS_TYPE_IQ4_NL: return kvs_order{32, 16, 0, 0, 2, 0, false, false, true};
    case KVS_TYPE_IQ4_XS: return kvs_order{256, 16, 0, 0, 8, 0, false, false, true};
    default: return kvs_order{0, 0, 0, 0, 0, 0, false, false, false};
    }
}

/* F32, F16, BF16: no integers, no kvs_group */
KVS_SHARED constexpr bool kvs_type_is_float(int type) { return type == KVS_TYPE_F32 || type == KVS_TYPE_F16 || type == KVS_TYPE_BF16; }
KVS_SHARED constexpr int64_t kvs_pad16(int64_t bytes) { return (bytes + 15) / 16 * 16; }
KVS_SHARED constexpr int64_t kvs_groups(int64_t cols) { return (cols + KVS_GROUP - 1) / KVS_GROUP; }

/* Where the planes of a row begin; bytes: of the row */
typedef struct kvs_plane_offsets {
    int64_t high, scales, record, bytes;
} kvs_plane_offsets;

KVS_SHARED constexpr kvs_plane_offsets kvs_planes_at(int type, int64_t cols) {
    const kvs_order o = kvs_order_of(type);
    const int64_t groups = kvs_groups(cols);
    const int64_t high = kvs_pad16(groups * o.low), scales = high + kvs_pad16(groups * o.high);
    const int64_t record = scales + kvs_pad16(groups * o.scales);
    return kvs_plane_offsets{high, scales, record, record + kvs_pad16(cols / o.block * o.record)};
}

/* 32 neighbouring values of a row: value i = d[i / 16] * q_i - m[i / 16], q signed bytes, four per word, the first in the low byte */
typedef struct kvs_group {
    uint32_t q[8];
    float d[2], m[2];
} kvs_group;

/* The planes of one row */
typedef struct kvs_planes {
    const uint8_t *low, *high, *scales, *record;
} kvs_planes;

/* A group as it lies in memory: loaded, not yet decoded. A kernel that loads several of these before it decodes the first
 * has that many more bytes under way. What a type does not have costs no register. */
typedef struct kvs_stored {
    uint4 low, high, record;
    uint32_t scales;
} kvs_stored;

template <int TYPE> KVS_DEVICE kvs_planes kvs_planes_of(const uint8_t *row, int64_t cols) {
    const kvs_plane_offsets at = kvs_planes_at(TYPE, cols);
    return kvs_planes{row, row + at.high, row + at.scales, row + at.record};
}

/* BYTES at a multiple of BYTES, into the first words. ONCE: global memory that nobody else reads. */
template <int BYTES, bool ONCE> KVS_DEVICE void kvs_load_entry(const uint8_t *p, uint4 *out) {
    if constexpr (BYTES == 16) {
        *out = ONCE ? kvs_load16_once(p) : kvs_load16(p);
    } else if constexpr (BYTES == 8) {
        uint2 pair = kvs_load8(p);
        out->x = pair.x;
        out->y = pair.y;
    } else if constexpr (BYTES == 4) {
        out->x = kvs_load4(p);
    } else if constexpr (BYTES == 2) {
        out->x = kvs_load2(p);
    }
}

template <int TYPE, bool ONCE = false> KVS_DEVICE void kvs_group_load(const kvs_planes *planes, int32_t group, kvs_stored *out) {
    constexpr kvs_order o = kvs_order_of(TYPE);
    static_assert(o.block && !kvs_type_is_float(TYPE), "a type of blocks");
    kvs_load_entry<o.low, ONCE>(planes->low + (int64_t)group * o.low, &out->low);
    kvs_load_entry<o.high, ONCE>(planes->high + (int64_t)group * o.high, &out->high);
    kvs_load_entry<o.record, ONCE>(planes->record + (int64_t)(group / (o.block / KVS_GROUP)) * o.record, &out->record);
    if constexpr (o.scales != 0) out->scales = kvs_load2(planes->scales + (int64_t)group * o.scales);
}

/* ---- words of values ---- */

/* The bits of mask << to that stand in x at from, moved to bit to */
template <int FROM, int TO> KVS_DEVICE uint32_t kvs_moved(uint32_t x, uint32_t mask) {
    if constexpr (FROM > TO) x >>= FROM - TO;
    if constexpr (FROM < TO) x <<= TO - FROM;
    return x & mask << TO;
}

KVS_DEVICE void kvs_low_nibbles(const uint4 &low, uint32_t q[8]) {
    const uint32_t words[4] = {low.x, low.y, low.z, low.w};
#pragma unroll
    for (int w = 0; w < 4; w++) {
        q[w] = words[w] & 0x0f0f0f0fu;
        q[w + 4] = words[w] >> 4 & 0x0f0f0f0fu;
    }
}

/* Adds two bits of every value at bit TO */
template <int TO> KVS_DEVICE void kvs_two_bits(uint32_t x, uint32_t q[4]) {
    const uint32_t mask = 0x03030303u;
    q[0] |= kvs_moved<0, TO>(x, mask);
    q[1] |= kvs_moved<2, TO>(x, mask);
    q[2] |= kvs_moved<4, TO>(x, mask);
    q[3] |= kvs_moved<6, TO>(x, mask);
}

/* Adds one bit of every value at bit TO */
template <int TO> KVS_DEVICE void kvs_one_bit(uint32_t x, uint32_t q[8]) {
    const uint32_t mask = 0x01010101u;
    q[0] |= kvs_moved<0, TO>(x, mask);
    q[1] |= kvs_moved<1, TO>(x, mask);
    q[2] |= kvs_moved<2, TO>(x, mask);
    q[3] |= kvs_moved<3, TO>(x, mask);
    q[4] |= kvs_moved<4, TO>(x, mask);
    q[5] |= kvs_moved<5, TO>(x, mask);
    q[6] |= kvs_moved<6, TO>(x, mask);
    q[7] |= kvs_moved<7, TO>(x, mask);
}

/* Four nibbles of x (its low half) to values of IQ4: of the table's halves, and bit 3 chooses. */
KVS_DEVICE uint32_t kvs_iq4_word(uint32_t index, uint32_t choice) {
    uint32_t below = kvs_byte_perm(0xbfad9881u, 0xf6eaddcfu, index); /* -127 -104 -83 -65, -49 -35 -22 -10 */
    uint32_t above = kvs_byte_perm(0x26190d01u, 0x71594535u, index); /* 1 13 25 38, 53 69 89 113 */
    return kvs_byte_perm(below, above, choice);
}
KVS_DEVICE void kvs_iq4_words(const uint4 &low, uint32_t q[8]) {
    const uint32_t words[4] = {low.x, low.y, low.z, low.w};
#pragma unroll
    for (int w = 0; w < 4; w++) {
        uint32_t index = words[w] & 0x77777777u, choice = (words[w] >> 1 & 0x44444444u) | 0x32103210u;
        q[2 * w] = kvs_iq4_word(index, choice);
        q[2 * w + 1] = kvs_iq4_word(index >> 16, choice >> 16);
    }
}

template <int TYPE> KVS_DEVICE void kvs_group_words(const kvs_stored *s, uint32_t q[8]) {
    constexpr kvs_order o = kvs_order_of(TYPE);
    if constexpr (TYPE == KVS_TYPE_Q8_0) {
        q[0] = s->low.x, q[1] = s->low.y, q[2] = s->low.z, q[3] = s->low.w;
        q[4] = s->high.x, q[5] = s->high.y, q[6] = s->high.z, q[7] = s->high.w;
    } else if constexpr (TYPE == KVS_TYPE_IQ4_NL || TYPE == KVS_TYPE_IQ4_XS) {
        kvs_iq4_words(s->low, q);
    } else if constexpr (o.low == 8) {
#pragma unroll
        for (int w = 0; w < 8; w++) q[w] = 0;
        kvs_two_bits<0>(s->low.x, q);
        kvs_two_bits<0>(s->low.y, q + 4);
        if constexpr (o.high == 4) kvs_one_bit<2>(s->high.x, q);
    } else {
        kvs_low_nibbles(s->low, q);
        if constexpr (o.high == 4) kvs_one_bit<4>(s->high.x, q);
        if constexpr (o.high == 8) {
            kvs_two_bits<4>(s->high.x, q);
            kvs_two_bits<4>(s->high.y, q + 4);
        }
    }
}

/* ---- scales and minima ---- */

/* The two numbers of six bits that group j of a block has in words 1 to 3 of a record */
KVS_DEVICE void kvs_six_bits(const uint4 &record, int j, float *first, float *second) {
    const uint32_t low = j < 3 ? record.y : j < 6 ? record.z : record.w, high = j < 3 ? record.z : record.w;
    const uint32_t bits = (uint32_t)(((uint64_t)high << 32 | low) >> 12 * j % 32);
    *first = (float)(int)(bits & 63);
    *second = (float)(int)(bits >> 6 & 63);
}

/* d and, where the type has one, m of quant.c for both halves of the group; else m = 0 */
template <int TYPE> KVS_DEVICE void kvs_group_scales(const kvs_stored *s, int32_t group, float d[2], float m[2]) {
    const int j = (int)((uint32_t)group % 8);
    const float2 dm = kvs_half2_float2(s->record.x);
    float first, second;
    d[0] = d[1] = dm.x;
    m[0] = m[1] = 0.0f;
    if constexpr (TYPE == KVS_TYPE_Q4_1 || TYPE == KVS_TYPE_Q5_1) {
        m[0] = m[1] = -dm.y; /* these add it */
    } else if constexpr (TYPE == KVS_TYPE_Q4_K || TYPE == KVS_TYPE_Q5_K) {
        kvs_six_bits(s->record, j, &first, &second);
        d[0] = d[1] = dm.x * first;
        m[0] = m[1] = dm.y * second;
    } else if constexpr (TYPE == KVS_TYPE_Q3_K) {
        kvs_six_bits(s->record, j, &first, &second);
        d[0] = dm.x * (first - 32.0f);
        d[1] = dm.x * (second - 32.0f);
    } else if constexpr (TYPE == KVS_TYPE_Q2_K) {
        d[0] = dm.x * (float)(int)(s->scales & 15);
        m[0] = dm.y * (float)(int)(s->scales >> 4 & 15);
        d[1] = dm.x * (float)(int)(s->scales >> 8 & 15);
        m[1] = dm.y * (float)(int)(s->scales >> 12 & 15);
    } else if constexpr (TYPE == KVS_TYPE_Q6_K) {
        d[0] = dm.x * (float)(int8_t)(s->scales & 255);
        d[1] = dm.x * (float)(int8_t)(s->scales >> 8 & 255);
    } else if constexpr (TYPE == KVS_TYPE_IQ4_XS) {
        int scale = (int)((s->record.y >> 4 * j & 15) | (s->record.x >> (16 + 2 * j) & 3) << 4);
        d[0] = d[1] = dm.x * (float)(scale - 32);
    }
}

/* ---- decoders ---- */

/* The offset of a type becomes a minimum, offset * d: exact, as is offset * d's difference from q * d. */
template <int TYPE> KVS_DEVICE void kvs_group_decode(const kvs_stored *stored, int32_t group, kvs_group *out) {
    constexpr kvs_order o = kvs_order_of(TYPE);
    kvs_group_words<TYPE>(stored, out->q);
    kvs_group_scales<TYPE>(stored, group, out->d, out->m);
    if constexpr (o.offset != 0) {
        out->m[0] = out->d[0] * (float)o.offset;
        out->m[1] = out->d[1] * (float)o.offset;
    }
}

/* row: of cols values in the device's order, 16-byte aligned */
template <int TYPE, bool ONCE = false> KVS_DEVICE void kvs_group_get(const uint8_t *row, int64_t cols, int64_t group, kvs_group *out) {
    const kvs_planes planes = kvs_planes_of<TYPE>(row, cols);
    kvs_stored stored;
    kvs_group_load<TYPE, ONCE>(&planes, (int32_t)group, &stored);
    kvs_group_decode<TYPE>(&stored, (int32_t)group, out);
}

/* Byte I of a word, 0..255, less offset: 2^23 and the byte as its last bits are a float, from which 2^23 and the offset go again. */
template <int I> KVS_DEVICE float kvs_byte_float(uint32_t word, int offset) {
    return kvs_bits_float(kvs_byte_perm(word, 0x4b000000u, 0x7440 | I)) - (float)(8388608 + offset);
}

template <int TYPE> KVS_DEVICE void kvs_group_decode_floats(const kvs_stored *stored, int32_t group, float out[32]) {
    constexpr kvs_order o = kvs_order_of(TYPE);
    constexpr int offset = o.sign ? 128 : o.offset;
    uint32_t q[8];
    float d[2], m[2];
    kvs_group_words<TYPE>(stored, q);
    kvs_group_scales<TYPE>(stored, group, d, m);
#pragma unroll
    for (int w = 0; w < 8; w++) {
        uint32_t word = o.sign ? q[w] ^ 0x80808080u : q[w];
        float values[4] = {kvs_byte_float<0>(word, offset), kvs_byte_float<1>(word, offset), kvs_byte_float<2>(word, offset),
                           kvs_byte_float<3>(word, offset)};
#pragma unroll
        for (int b = 0; b < 4; b++) out[4 * w + b] = o.minimum ? d[w / 4] * values[b] - m[w / 4] : d[w / 4] * values[b];
    }
}

/* Values of F32, F16, BF16 in 16 bytes: 4, 8, 8 */
template <int TYPE> KVS_DEVICE void kvs_floats_of(const uint4 &x, float *out) {
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int w = 0; w < 4; w++) {
        if constexpr (TYPE == KVS_TYPE_F32) {
            out[w] = kvs_bits_float(words[w]);
        } else if constexpr (TYPE == KVS_TYPE_F16) {
            float2 pair = kvs_half2_float2(words[w]);
            out[2 * w] = pair.x, out[2 * w + 1] = pair.y;
        } else {
            out[2 * w] = kvs_bits_float(words[w] << 16), out[2 * w + 1] = kvs_bits_float(words[w] & 0xffff0000u);
        }
    }
}

/* All types; zeros beyond cols */
template <int TYPE, bool ONCE = false> KVS_DEVICE void kvs_group_floats(const uint8_t *row, int64_t cols, int64_t group, float out[32]) {
    if constexpr (kvs_type_is_float(TYPE)) {
        constexpr int bytes = kvs_order_of(TYPE).low, values = 512 / bytes;
        const uint8_t *from = row + group * bytes;
#pragma unroll
        for (int i = 0; i < bytes / 16; i++)
            kvs_floats_of<TYPE>(ONCE ? kvs_load16_once(from + 16 * i) : kvs_load16(from + 16 * i), out + i * values);
    } else {
        const kvs_planes planes = kvs_planes_of<TYPE>(row, cols);
        kvs_stored stored;
        kvs_group_load<TYPE, ONCE>(&planes, (int32_t)group, &stored);
        kvs_group_decode_floats<TYPE>(&stored, (int32_t)group, out);
    }
}

/* CALL<TYPE>(arguments...): the one place where a number becomes a template's argument. CALL is a struct with a static function run. */
template <template <int> class CALL, class... A> static inline bool kvs_for_blocks(int type, A... args) {
    switch (type) {
    case KVS_TYPE_Q4_0: CALL<KVS_TYPE_Q4_0>::run(args...); return true;
    case KVS_TYPE_Q4_1: CALL<KVS_TYPE_Q4_1>::run(args...); return true;
    case KVS_TYPE_Q5_0: CALL<KVS_TYPE_Q5_0>::run(args...); return true;
    case KVS_TYPE_Q5_1: CALL<KVS_TYPE_Q5_1>::run(args...); return true;
    case KVS_TYPE_Q8_0: CALL<KVS_TYPE_Q8_0>::run(args...); return true;
    case KVS_TYPE_Q2_K: CALL<KVS_TYPE_Q2_K>::run(args...); return true;
    case KVS_TYPE_Q3_K: CALL<KVS_TYPE_Q3_K>::run(args...); return true;
    case KVS_TYPE_Q4_K: CALL<KVS_TYPE_Q4_K>::run(args...); return true;
    case KVS_TYPE_Q5_K: CALL<KVS_TYPE_Q5_K>::run(args...); return true;
    case KVS_TYPE_Q6_K: CALL<KVS_TYPE_Q6_K>::run(args...); return true;
    case KVS_TYPE_IQ4_NL: CALL<KVS_TYPE_IQ4_NL>::run(args...); return true;
    case KVS_TYPE_IQ4_XS: CALL<KVS_TYPE_IQ4_XS>::run(args...); return true;
    default: return false;
    }
}
template <template <int> class CALL, class... A> static inline bool kvs_for_types(int type, A... args) {
    switch (type) {
    case KVS_TYPE_F32: CALL<KVS_TYPE_F32>::run(args...); return true;
    case KVS_TYPE_F16: CALL<KVS_TYPE_F16>::run(args...); return true;
    case KVS_TYPE_BF16: CALL<KVS_TYPE_BF16>::run(args...); return true;
    default: return kvs_for_blocks<CALL>(type, args...);
    }
}
#endif
