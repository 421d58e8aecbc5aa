/* stripes.h - matrices of the integer types in the order that the AVX kernels read: stripes of 16 rows, and in a stripe block after
 * block. A stripe's block holds the 16 rows' blocks word by word (32 bits), each word of all rows side by side, so that a vector has one
 * word of each row: its lanes are rows, nothing is summed across lanes. The words stand in the order in which the kernels read them: a
 * stripe is one rising stream of memory, which is what a processor fetches ahead. It takes as many bytes as the blocks do; rows that fill
 * up the last stripe are zeros. */
#ifndef KVS_STRIPES_H
#define KVS_STRIPES_H
#include "../quant.h"

enum { KVS_STRIPE = 16 };

/* Fields as in quant.h: word i of a field holds its bytes 4i..4i+3. In words of scales (Q2_K, Q4_K, Q5_K: of scales and minima), bytes 1
 * and 2 have changed places: even bytes, and odd ones, are then pairs of neighbours, as products of 16 bits want them. In h of Q5_0 and
 * Q5_1, bit 4k + j of a row's word (of value 4k + j) stands at bit k of byte j: a shift takes it to the byte that its value is in. */
typedef uint8_t kvs_words[KVS_STRIPE][4];
typedef struct kvs_stripe_q4_0 { /* and of IQ4_NL */
    kvs_words q[4];
    uint16_t d[KVS_STRIPE];
} kvs_stripe_q4_0;
typedef struct kvs_stripe_q4_1 {
    kvs_words q[4];
    uint16_t d[KVS_STRIPE], m[KVS_STRIPE];
} kvs_stripe_q4_1;
typedef struct kvs_stripe_q5_0 {
    kvs_words h, q[4];
    uint16_t d[KVS_STRIPE];
} kvs_stripe_q5_0;
typedef struct kvs_stripe_q5_1 {
    kvs_words h, q[4];
    uint16_t d[KVS_STRIPE], m[KVS_STRIPE];
} kvs_stripe_q5_1;
typedef struct kvs_stripe_q8_0 {
    kvs_words q[8];
    uint16_t d[KVS_STRIPE];
} kvs_stripe_q8_0;
typedef struct kvs_stripe_q2_k {
    kvs_words scales[4], q[2][8];
    uint16_t d[KVS_STRIPE], m[KVS_STRIPE];
} kvs_stripe_q2_k;
typedef struct kvs_stripe_q3_k {
    kvs_words scales[3], hq[8][2], q[8]; /* hq: h, and the first half of q */
    uint16_t d[KVS_STRIPE];
} kvs_stripe_q3_k;
typedef struct kvs_stripe_q4_k {
    kvs_words scales[3], q[4][8];
    uint16_t d[KVS_STRIPE], m[KVS_STRIPE];
} kvs_stripe_q4_k;
typedef struct kvs_stripe_q5_k {
    kvs_words scales[3], hq[8][2]; /* h, and the first eight of q */
    kvs_words q[3][8];
    uint16_t d[KVS_STRIPE], m[KVS_STRIPE];
} kvs_stripe_q5_k;
typedef struct kvs_stripe_q6_k {
    kvs_words scales[4], qqh[2][8][3]; /* of each half: words k and 8 + k of its q, and k of its h */
    uint16_t d[KVS_STRIPE];
} kvs_stripe_q6_k;
typedef struct kvs_stripe_iq4_xs {
    uint16_t scales_h[KVS_STRIPE], d[KVS_STRIPE]; /* d shares the line of what is read first */
    kvs_words scales_l, q[8][4];
} kvs_stripe_iq4_xs;

bool kvs_striped(int32_t type); /* is there such an order for the type? */
/* rows <= KVS_STRIPE rows of GGUF blocks, row_bytes each, to one stripe of KVS_STRIPE * row_bytes */
void kvs_stripe_pack(int32_t type, const void *rows_of_blocks, int64_t rows, int64_t row_bytes, void *stripe);
#endif
