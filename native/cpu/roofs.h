/* roofs.h - what this processor can do at best, for `pykvsmooth bench`: loops that do nothing but read, multiply and add. roofs.c compiles
 * them once per instruction set, measure.c runs them on a pool of threads. */
#ifndef KVS_ROOFS_H
#define KVS_ROOFS_H
#include "../util.h"

typedef struct kvs_roof_loop {
    const char *feature;          /* of the CPU, which is needed beyond the instruction set; NULL = none */
    float (*run)(int64_t rounds); /* the result keeps compilers from leaving the work out */
    int64_t operations;           /* of a round: a multiply-add is two. 0 = this set, or this build, has no such loop */
} kvs_roof_loop;

typedef struct kvs_roof_loops {
    const char *isa;
    uint64_t (*read)(const uint64_t *p, int64_t n, int64_t ahead); /* n a multiple of 64; ahead: kvs_isa_ahead() */
    kvs_roof_loop loops[KVS_ROOF_KINDS];                           /* by kvs_roof; those of reading are empty */
} kvs_roof_loops;
extern const kvs_roof_loops kvs_roof_loops_base, kvs_roof_loops_avx2, kvs_roof_loops_avx512, kvs_roof_loops_amx;
#endif
