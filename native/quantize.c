/* quantize.c - floats to blocks, for every type whose decoder stands in quant.c but the IQ ones. */
#include "quant.h"

#include <float.h>
#include <math.h>

static void f32_from_f32(const float *x, void *out, int64_t n) { memcpy(out, x, (size_t)n * sizeof *x); }

static void store_u16(void *p, int64_t i, uint16_t h) { memcpy((uint8_t *)p + 2 * i, &h, 2); }

static void f16_from_f32(const float *x, void *out, int64_t n) {
    for (int64_t i = 0; i < n; i++) store_u16(out, i, kvs_f32_to_f16(x[i]));
}

static void bf16_from_f32(const float *x, void *out, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, 4);
        store_u16(out, i, (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)); /* to nearest, ties to even */
    }
}

static void q8_0_from_f32(const float *x, void *out, int64_t n) {
    kvs_q8_0 *b = out;
    for (const float *end = x + n; x < end; x += 32, b++) {
        float top = 0.0f;
        for (int i = 0; i < 32; i++) top = KVS_MAX(top, fabsf(x[i]));
        b->d = kvs_f32_to_f16(top / 127.0f);
        float d = kvs_f16_to_f32(b->d), inverse = d > 0.0f ? 1.0f / d : 0.0f;
        for (int i = 0; i < 32; i++) b->q[i] = (int8_t)KVS_MAX(-127.0f, KVS_MIN(127.0f, rintf(x[i] * inverse)));
    }
}

typedef struct encoder {
    void (*from_f32)(const float *x, void *out, int64_t n); /* n: whole blocks */
    float largest;                                          /* magnitude that the type, or the scales of its blocks, can hold */
} encoder;

static const encoder encoders[] = {
    [KVS_TYPE_F32] = {f32_from_f32, FLT_MAX},
    [KVS_TYPE_F16] = {f16_from_f32, 65504.0f},
    [KVS_TYPE_BF16] = {bf16_from_f32, 0x1.fep127f},
    [KVS_TYPE_Q8_0] = {q8_0_from_f32, 65504.0f},
};

static bool fits(const float *x, int64_t n, float largest) {
    bool all = true;
    for (int64_t i = 0; i < n; i++) all &= fabsf(x[i]) <= largest; /* false for NaN, too */
    return all;
}

static int fail_value(int32_t type, const float *x, int64_t first, kvs_error *err) {
    float largest = encoders[type].largest;
    int64_t i = 0;
    while (fits(x + i, 1, largest)) i++;
    kvs_fail(err, KVS_E_ARGUMENT, "%s holds finite values up to %g, not %g", kvs_type_name(type), (double)largest, (double)x[i]);
    if (err) err->offset = first + i;
    return KVS_E_ARGUMENT;
}

int32_t kvs_encode(int32_t type, const float *values, int64_t rows, int64_t cols, void *out, kvs_error *err) {
    const kvs_type_traits *traits = kvs_type_get(type);
    if (!traits || type >= (int32_t)(sizeof encoders / sizeof *encoders) || !encoders[type].from_f32)
        return kvs_fail(err, KVS_E_ARGUMENT, "type: %s can't be written", traits ? traits->name : "this number");
    if (rows < 0 || cols < 0 || cols % traits->block)
        return kvs_fail(err, KVS_E_ARGUMENT, "cols: rows of %lld values are not whole %s blocks of %d", (long long)cols, traits->name,
                        traits->block);
    int64_t row_bytes = kvs_row_bytes(type, cols);
    for (int64_t i = 0; i < rows; i++, values += cols) {
        if (!fits(values, cols, encoders[type].largest)) return fail_value(type, values, i * cols, err);
        encoders[type].from_f32(values, (uint8_t *)out + i * row_bytes, cols);
    }
    return KVS_OK;
}

int32_t kvs_decode(int32_t type, const void *blocks, int64_t n, float *out) {
    if (kvs_row_bytes(type, n) < 0) return KVS_E_ARGUMENT;
    kvs_type_get(type)->to_f32(blocks, out, n);
    return KVS_OK;
}
