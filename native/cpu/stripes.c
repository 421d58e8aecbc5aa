#include "stripes.h"

#ifdef KVS_HAVE_X86
#include <immintrin.h>
#endif

/* Words of a block that follow each other, and where they stand in a stripe: n words from byte from on are its words to, to + step, ... */
typedef struct run {
    uint8_t from, to, step, n;
} run;
typedef struct halves {
    uint8_t n, from[2];
} halves;
typedef struct order { /* of a stripe: halves, words, halves; scales, or bits of Q5_0 and Q5_1, are words of their own order */
    uint8_t n_words;
    run scales, bits, runs[6];
    halves first, last;
} order;
static const order orders[] = {
    [KVS_TYPE_Q4_0] = {4, {0}, {0}, {{2, 0, 1, 4}}, {0}, {1, {0}}},
    [KVS_TYPE_Q4_1] = {4, {0}, {0}, {{4, 0, 1, 4}}, {0}, {2, {0, 2}}},
    [KVS_TYPE_Q5_0] = {5, {0}, {2, 0, 1, 1}, {{6, 1, 1, 4}}, {0}, {1, {0}}},
    [KVS_TYPE_Q5_1] = {5, {0}, {4, 0, 1, 1}, {{8, 1, 1, 4}}, {0}, {2, {0, 2}}},
    [KVS_TYPE_Q8_0] = {8, {0}, {0}, {{2, 0, 1, 8}}, {0}, {1, {0}}},
    [KVS_TYPE_Q2_K] = {20, {0, 0, 1, 4}, {0}, {{16, 4, 1, 16}}, {0}, {2, {80, 82}}},
    [KVS_TYPE_Q3_K] = {27, {96, 0, 1, 3}, {0}, {{0, 3, 2, 8}, {32, 4, 2, 8}, {64, 19, 1, 8}}, {0}, {1, {108}}},
    [KVS_TYPE_Q4_K] = {35, {4, 0, 1, 3}, {0}, {{16, 3, 1, 32}}, {0}, {2, {0, 2}}},
    [KVS_TYPE_Q5_K] = {43, {4, 0, 1, 3}, {0}, {{16, 3, 2, 8}, {48, 4, 2, 8}, {80, 19, 1, 24}}, {0}, {2, {0, 2}}},
    [KVS_TYPE_Q6_K] = {52,
                       {192, 0, 1, 4},
                       {0},
                       {{0, 4, 3, 8}, {32, 5, 3, 8}, {128, 6, 3, 8}, {64, 28, 3, 8}, {96, 29, 3, 8}, {160, 30, 3, 8}},
                       {0},
                       {1, {208}}},
    [KVS_TYPE_IQ4_NL] = {4, {0}, {0}, {{2, 0, 1, 4}}, {0}, {1, {0}}},
    [KVS_TYPE_IQ4_XS] = {33, {0}, {0}, {{4, 0, 1, 33}}, {2, {2, 0}}, {0}},
};
_Static_assert(sizeof(kvs_stripe_q4_0) == 16 * sizeof(kvs_q4_0) && sizeof(kvs_stripe_q4_1) == 16 * sizeof(kvs_q4_1), "as many bytes");
_Static_assert(sizeof(kvs_stripe_q5_0) == 16 * sizeof(kvs_q5_0) && sizeof(kvs_stripe_q5_1) == 16 * sizeof(kvs_q5_1), "as many bytes");
_Static_assert(sizeof(kvs_stripe_q8_0) == 16 * sizeof(kvs_q8_0) && sizeof(kvs_stripe_q4_0) == 16 * sizeof(kvs_iq4_nl), "as many bytes");
_Static_assert(sizeof(kvs_stripe_q2_k) == 16 * sizeof(kvs_q2_k) && sizeof(kvs_stripe_q3_k) == 16 * sizeof(kvs_q3_k), "as many bytes");
_Static_assert(sizeof(kvs_stripe_q4_k) == 16 * sizeof(kvs_q4_k) && sizeof(kvs_stripe_q5_k) == 16 * sizeof(kvs_q5_k), "as many bytes");
_Static_assert(sizeof(kvs_stripe_q6_k) == 16 * sizeof(kvs_q6_k) && sizeof(kvs_stripe_iq4_xs) == 16 * sizeof(kvs_iq4_xs), "as many bytes");

bool kvs_striped(int32_t type) { return type >= 0 && type < (int32_t)(sizeof orders / sizeof *orders) && orders[type].n_words; }

typedef const uint8_t *const blocks[KVS_STRIPE];

static void put_word(kvs_words *out, blocks row, run a, int i) {
    for (int r = 0; r < KVS_STRIPE; r++) memcpy(out[a.to + i * a.step][r], row[r] + a.from + 4 * i, 4);
}

#ifdef KVS_HAVE_X86
/* Eight words of eight rows, turned. Whoever wants stripes has AVX2. */
__attribute__((target("avx2"))) static void put_eight(kvs_words *out, const uint8_t *const *row, run a, int i, int first) {
    __m256i r[8], t[8];
    for (int k = 0; k < 8; k++) r[k] = _mm256_loadu_si256((const __m256i *)(const void *)(row[first + k] + a.from + 4 * i));
    for (int k = 0; k < 8; k += 2) t[k] = _mm256_unpacklo_epi32(r[k], r[k + 1]), t[k + 1] = _mm256_unpackhi_epi32(r[k], r[k + 1]);
    for (int k = 0; k < 8; k += 4) {
        r[k] = _mm256_unpacklo_epi64(t[k], t[k + 2]), r[k + 1] = _mm256_unpackhi_epi64(t[k], t[k + 2]);
        r[k + 2] = _mm256_unpacklo_epi64(t[k + 1], t[k + 3]), r[k + 3] = _mm256_unpackhi_epi64(t[k + 1], t[k + 3]);
    }
    for (int k = 0; k < 4; k++) {
        t[k] = _mm256_permute2x128_si256(r[k], r[k + 4], 0x20), t[k + 4] = _mm256_permute2x128_si256(r[k], r[k + 4], 0x31);
    }
    for (int k = 0; k < 8; k++) _mm256_storeu_si256((__m256i *)(void *)out[a.to + (i + k) * a.step][first], t[k]);
}
#endif

static void put_run(kvs_words *out, blocks row, run a) {
    int i = 0;
#ifdef KVS_HAVE_X86
    for (; i + 8 <= a.n; i += 8)
        for (int first = 0; first < KVS_STRIPE; first += 8) put_eight(out, row, a, i, first);
#endif
    for (; i < a.n; i++) put_word(out, row, a, i);
}

static void put_scales(kvs_words *out, blocks row, run a) {
    put_run(out, row, a);
    for (int i = 0; i < a.n; i++)
        for (int r = 0; r < KVS_STRIPE; r++) {
            uint8_t middle = out[i][r][1];
            out[i][r][1] = out[i][r][2], out[i][r][2] = middle;
        }
}

/* Bit 4k + j to bit k of byte j */
static uint32_t bits_by_byte(uint32_t h) {
    uint32_t out = 0;
    for (int j = 0; j < 4; j++) {
        uint32_t x = h >> j & 0x11111111;
        x = (x | x >> 3) & 0x03030303;
        x = (x | x >> 6) & 0x000f000f;
        out |= ((x | x >> 12) & 255) << 8 * j;
    }
    return out;
}

static void put_bits(kvs_words *out, blocks row, run a) {
    put_run(out, row, a);
    for (int i = 0; i < a.n; i++)
        for (int r = 0; r < KVS_STRIPE; r++) {
            uint32_t h;
            memcpy(&h, out[i][r], 4);
            h = bits_by_byte(h);
            memcpy(out[i][r], &h, 4);
        }
}

static uint8_t *put_halves(uint8_t *out, blocks row, halves a) {
    for (int i = 0; i < a.n; i++)
        for (int r = 0; r < KVS_STRIPE; r++, out += 2) memcpy(out, row[r] + a.from[i], 2);
    return out;
}

static uint8_t *pack_block(uint8_t *out, blocks row, const order *o) {
    out = put_halves(out, row, o->first);
    kvs_words *words = (kvs_words *)out;
    put_scales(words, row, o->scales);
    put_bits(words, row, o->bits);
    for (size_t i = 0; i < sizeof o->runs / sizeof *o->runs; i++) put_run(words, row, o->runs[i]);
    return put_halves(out + o->n_words * sizeof *words, row, o->last);
}

void kvs_stripe_pack(int32_t type, const void *rows_of_blocks, int64_t rows, int64_t row_bytes, void *stripe) {
    static const uint8_t no_block[256];
    const order *o = &orders[type];
    int64_t block = kvs_type_get(type)->block_bytes;
    uint8_t *out = stripe;
    for (int64_t at = 0; at < row_bytes; at += block) {
        const uint8_t *row[KVS_STRIPE];
        for (int64_t r = 0; r < KVS_STRIPE; r++) row[r] = r < rows ? (const uint8_t *)rows_of_blocks + r * row_bytes + at : no_block;
        out = pack_block(out, row, o);
    }
}
