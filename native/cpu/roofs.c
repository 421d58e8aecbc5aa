/* roofs.c - the table of roofs.h, once per instruction set. Sums depend on those of the round before, so that no compiler leaves rounds
 * out, and there are as many of them as hide the latency of an instruction. */
#include "roofs.h"
#include "dots.h"
#include "simd.h"

/* As a kernel reads weights: asked for so many bytes before their use, where the processor gives more that way. */
static uint64_t read_all(const uint64_t *p, int64_t n, int64_t ahead) {
    enum { LINE = 8, BLOCK = 64 };
    uint64_t sum[BLOCK] = {0}, all = 0;
    for (int64_t i = 0; i < n; i += BLOCK) {
        for (int64_t k = 0; ahead && k < BLOCK; k += LINE) __builtin_prefetch((const char *)(p + i + k) + ahead);
        for (int64_t k = 0; k < BLOCK; k++) sum[k] ^= p[i + k];
    }
    for (int64_t k = 0; k < BLOCK; k++) all ^= sum[k];
    return all;
}

enum { SUMS = VW > 1 ? 12 : 48 }; /* plain C is made into short vectors */

static float f32_rounds(int64_t rounds) {
    vf sum[SUMS], half = v_set(0.5f), one = v_set(1.0f), all = v_zero();
    for (int i = 0; i < SUMS; i++) sum[i] = v_set((float)i);
    for (int64_t r = 0; r < rounds; r++)
        KVS_EACH (i, SUMS) sum[i] = v_fma(sum[i], half, one);
    for (int i = 0; i < SUMS; i++) all = v_add(all, sum[i]);
    return v_sum(all);
}

#if defined(KVS_ISA_AVX512)
enum { INT8_OPERATIONS = 2 * 64 * SUMS };

static float int8_rounds(int64_t rounds) {
    __m512i sum[SUMS], x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(5), all = _mm512_setzero_si512();
    for (int i = 0; i < SUMS; i++) sum[i] = _mm512_set1_epi32(i);
    for (int64_t r = 0; r < rounds; r++)
        KVS_EACH (i, SUMS) sum[i] = _mm512_dpbusd_epi32(sum[i], x, y);
    for (int i = 0; i < SUMS; i++) all = _mm512_xor_si512(all, sum[i]);
    return (float)_mm256_extract_epi32(_mm512_castsi512_si256(all), 0);
}
#elif defined(KVS_ISA_AVX2)
enum { INT8_SUMS = 8, INT8_OPERATIONS = 2 * 32 * INT8_SUMS }; /* more would not stay in registers beside their products */

/* Pairs added up in 16 bits, which is as far as a kernel may go before it must widen them. */
static float int8_rounds(int64_t rounds) {
    __m256i sum[INT8_SUMS], x = _mm256_set1_epi8(3), y = _mm256_set1_epi8(5), all = _mm256_setzero_si256();
    for (int i = 0; i < INT8_SUMS; i++) sum[i] = _mm256_set1_epi16((short)i);
    for (int64_t r = 0; r < rounds; r++)
        KVS_EACH (i, INT8_SUMS) {
            __asm__ volatile("" : "+x"(x)); /* otherwise there would be one product for all sums */
            sum[i] = _mm256_add_epi16(sum[i], _mm256_maddubs_epi16(x, y));
        }
    for (int i = 0; i < INT8_SUMS; i++) all = _mm256_xor_si256(all, sum[i]);
    return (float)_mm256_extract_epi32(all, 0);
}
#else
enum { INT8_OPERATIONS = 2 * 1024 };

static float int8_rounds(int64_t rounds) {
    int8_t x[INT8_OPERATIONS / 2], y[INT8_OPERATIONS / 2];
    int32_t sum = 0;
    memset(x, 3, sizeof x);
    memset(y, 5, sizeof y);
    for (int64_t r = 0; r < rounds; r++) {
        __asm__ volatile("" : : "r"(x), "r"(y) : "memory"); /* they may have changed */
        for (int i = 0; i < INT8_OPERATIONS / 2; i++) sum = (int32_t)((uint32_t)sum + (uint32_t)(x[i] * y[i]));
    }
    return (float)sum;
}
#endif

#if defined(KVS_ISA_AVX512) && defined(KVS_HAVE_AVX512BF16)
enum { BF16_OPERATIONS = 2 * 32 * SUMS };

__attribute__((target("avx512bf16"))) static float bf16_rounds(int64_t rounds) {
    __m512 sum[SUMS], all = _mm512_setzero_ps();
    __m512bh x = (__m512bh)_mm512_set1_epi16(0x3f80), y = x; /* ones */
    for (int i = 0; i < SUMS; i++) sum[i] = _mm512_set1_ps((float)i);
    for (int64_t r = 0; r < rounds; r++)
        KVS_EACH (i, SUMS) sum[i] = _mm512_dpbf16_ps(sum[i], x, y);
    for (int i = 0; i < SUMS; i++) all = _mm512_add_ps(all, sum[i]);
    return _mm512_reduce_add_ps(all);
}
#define BF16_LOOP                                                                                                                          \
    { "avx512bf16", bf16_rounds, BF16_OPERATIONS }
#else
#define BF16_LOOP                                                                                                                          \
    { 0 }
#endif

#if defined(KVS_ISA_AVX512) && defined(KVS_HAVE_AMX)
#include "amx.h"
enum { TILES = 4, AMX_INT8_OPERATIONS = 2 * 16 * 16 * 64 * TILES, AMX_BF16_OPERATIONS = 2 * 16 * 16 * 32 * TILES };

static void tiles_begin(void) {
    static const uint8_t zeros[1024];
    const kvs_tile_config config = kvs_tiles_2x2(64);
    KVS_TILES_BEGIN(&config);
    KVS_TILE_ZERO(0);
    KVS_TILE_ZERO(1);
    KVS_TILE_ZERO(2);
    KVS_TILE_ZERO(3);
    KVS_TILE_LOAD(4, zeros, 64);
    KVS_TILE_LOAD(5, zeros, 64);
    KVS_TILE_LOAD(6, zeros, 64);
    KVS_TILE_LOAD(7, zeros, 64);
}

static float tiles_end(void) {
    float sums[256];
    KVS_TILE_STORE(0, sums, 64);
    KVS_TILES_END();
    return sums[0];
}

static float amx_int8_rounds(int64_t rounds) {
    tiles_begin();
    for (int64_t r = 0; r < rounds; r++) {
        KVS_TILE_DOT_SIGNED(0, 4, 6);
        KVS_TILE_DOT_SIGNED(1, 4, 7);
        KVS_TILE_DOT_SIGNED(2, 5, 6);
        KVS_TILE_DOT_SIGNED(3, 5, 7);
    }
    return tiles_end();
}

static float amx_bf16_rounds(int64_t rounds) {
    tiles_begin();
    for (int64_t r = 0; r < rounds; r++) {
        KVS_TILE_DOT_BF16(0, 4, 6);
        KVS_TILE_DOT_BF16(1, 4, 7);
        KVS_TILE_DOT_BF16(2, 5, 6);
        KVS_TILE_DOT_BF16(3, 5, 7);
    }
    return tiles_end();
}
#endif

#define LOOPS                                                                                                                              \
    [KVS_ROOF_F32] = {NULL, f32_rounds, 2 * VW * SUMS}, [KVS_ROOF_INT8] = {NULL, int8_rounds, INT8_OPERATIONS}, [KVS_ROOF_BF16] = BF16_LOOP
#if defined(KVS_ISA_AVX512)
const kvs_roof_loops kvs_roof_loops_avx512 = {"avx512", read_all, {LOOPS}};
#ifdef KVS_HAVE_AMX
const kvs_roof_loops kvs_roof_loops_amx = {"amx",
                                           read_all,
                                           {LOOPS, [KVS_ROOF_AMX_INT8] = {"amx_int8", amx_int8_rounds, AMX_INT8_OPERATIONS},
                                            [KVS_ROOF_AMX_BF16] = {"amx_bf16", amx_bf16_rounds, AMX_BF16_OPERATIONS}}};
#endif
#elif defined(KVS_ISA_AVX2)
const kvs_roof_loops kvs_roof_loops_avx2 = {"avx2", read_all, {LOOPS}};
#else
const kvs_roof_loops kvs_roof_loops_base = {"base", read_all, {LOOPS}};
#endif
