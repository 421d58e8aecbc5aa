/* amx.h - the tile instructions of Intel AMX; tiles are named by literals, 0..7. Compilers' _tile_* are not used: gcc 12's do not say
 * what memory they read, and stores to it are dropped. With KVS_EMULATE_AMX they are plain C: emulate_amx.h. */
#ifndef KVS_AMX_H
#define KVS_AMX_H
#include <stdint.h>

typedef struct kvs_tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} kvs_tile_config;
_Static_assert(sizeof(kvs_tile_config) == 64, "as ldtilecfg reads it");

/* Sums are tiles 0..3, of 16 rows of 16 words. What they are products of: rows in 4 and 5, words of 16 columns in 6 and 7; bytes of a
 * row of 4 and 5, which are four times the rows of 6 and 7. */
static inline kvs_tile_config kvs_tiles_2x2(int row_bytes) {
    kvs_tile_config c = {.palette = 1};
    for (int i = 0; i < 8; i++) c.row_bytes[i] = 64, c.rows[i] = 16;
    c.row_bytes[4] = c.row_bytes[5] = (uint16_t)row_bytes;
    c.rows[6] = c.rows[7] = (uint8_t)(row_bytes / 4);
    return c;
}

#ifdef KVS_EMULATE_AMX
#include "emulate_amx.h"
#else
#define KVS_TILES_BEGIN(config)        __asm__ volatile("ldtilecfg %0" : : "m"(*(config)))
#define KVS_TILES_END()                __asm__ volatile("tilerelease" : : : "memory")
#define KVS_TILE_ZERO(t)               __asm__ volatile("tilezero %%tmm" #t : :)
#define KVS_TILE_LOAD(t, p, step)      __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t : : "r"(p), "r"((int64_t)(step)) : "memory")
#define KVS_TILE_STORE(t, p, step)     __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" : : "r"(p), "r"((int64_t)(step)) : "memory")
#define KVS_TILE_DOT(kind, c, a, b)    __asm__ volatile(kind " %%tmm" #b ", %%tmm" #a ", %%tmm" #c : :)
/* c += a b; of bytes, those of a are signed */
#define KVS_TILE_DOT_SIGNED(c, a, b)   KVS_TILE_DOT("tdpbssd", c, a, b)
#define KVS_TILE_DOT_UNSIGNED(c, a, b) KVS_TILE_DOT("tdpbsud", c, a, b)
#define KVS_TILE_DOT_BF16(c, a, b)     KVS_TILE_DOT("tdpbf16ps", c, a, b)
#endif
#endif
