/* dots.c - the table of dots.h, once per instruction set. */
#include "dots.h"
#include "cpu.h"
#include "dots_float.h"
#if defined(KVS_ISA_AVX512)
#include "dots_panel.h"
const kvs_dots kvs_dots_avx512 = {"avx512", true, quantize, few, many, floats};
#elif defined(KVS_ISA_AVX2)
#include "dots_panel.h"
const kvs_dots kvs_dots_avx2 = {"avx2", true, quantize, few, many, floats};
#else
#include "dots_base.h"
const kvs_dots kvs_dots_base = {"base", false, quantize, few, many, floats};
#endif
