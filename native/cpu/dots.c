/* dots.c - the table of dots.h, once per instruction set. */
#include "dots.h"
#include "cpu.h"
#include "dots_float.h"
#if defined(KVS_ISA_AVX512)
#include "dots_panel.h"
#ifdef KVS_HAVE_AVX512BF16
#include "attn_bf16.h"
static const kvs_bf16 bf16 = {BF16_GROUP, bf16_round, bf16_many, bf16_keys, bf16_values, bf16_attend};
#define IF_BF16(table) &(table)
#else
#define IF_BF16(table) NULL
#endif
const kvs_dots kvs_dots_avx512 = {"avx512", true, quantize, few, many, floats, IF_BF16(bf16)};
#ifdef KVS_HAVE_AMX
#include "dots_amx.h"
#ifdef KVS_HAVE_AVX512BF16
#include "amx_bf16.h"
static const kvs_bf16 tiles_bf16 = {TILE_X, amx_round, amx_bf16_many, bf16_keys, bf16_values, amx_attend};
#endif
const kvs_dots kvs_dots_amx = {"amx", true, quantize, few, amx_many, floats, IF_BF16(tiles_bf16)};
#endif
#elif defined(KVS_ISA_AVX2)
#include "dots_panel.h"
const kvs_dots kvs_dots_avx2 = {"avx2", true, quantize, few, many, floats, NULL};
#else
#include "dots_base.h"
const kvs_dots kvs_dots_base = {"base", false, quantize, few, many, floats, NULL};
#endif
