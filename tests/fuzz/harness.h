/* harness.h - what the fuzz targets share: memory files, inputs of several parts, the structure-aware mutators, and the checks that hold
 * for whatever the library answers. Limits stand here, not in the product: a target skips what is expensive by intent. */
#ifndef KVS_FUZZ_HARNESS_H
#define KVS_FUZZ_HARNESS_H
#include "tokenizer.h"
#include "util.h"

#include <stddef.h>

/* The path of memory file i (0..2), now with this content. 0 and 1 are named as parts 1 and 2 of a split model of two. */
const char *memory_file(int i, const uint8_t *data, size_t size);
const char *fixed_file(const char *name); /* of tests/corpus/fixed */

/* An input of several files: options, then each part behind its length; the last part is the rest. Pointers into data. */
enum { MAX_INPUT_PARTS = 3, OPTION_BYTES = 4 };
typedef struct part {
    const uint8_t *data;
    size_t size;
} part;
typedef struct input {
    uint32_t options;
    part parts[MAX_INPUT_PARTS];
} input;
input read_input(const uint8_t *data, size_t size, int n_parts);
kvs_tokenizer *load_vocabulary(part file); /* NULL: it was refused, as it should be */

/* As LLVMFuzzerCustomMutator: bytes in place, at most max of them; the new size. */
typedef size_t mutator(uint8_t *data, size_t size, size_t max, uint32_t seed);
mutator mutate_gguf, mutate_bytes;
size_t mutate_input(uint8_t *data, size_t size, size_t max, uint32_t seed, int n_parts, mutator *const mutators[]);
/* As LLVMFuzzerCustomCrossOver: out is a with a record of b in it. */
size_t crossover_gguf(const uint8_t *a, size_t n, const uint8_t *b, size_t m, uint8_t *out, size_t max, uint32_t seed);
uint64_t edit_number(uint64_t value, int bytes, uint64_t *rng); /* near, extreme or random */
uint64_t next_random(uint64_t *rng);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max); /* libFuzzer's */

#define CHECK(condition) ((condition) ? (void)0 : fail_check(__FILE__, __LINE__, #condition))
_Noreturn void fail_check(const char *file, int line, const char *condition);
kvs_error new_error(void);
void check_error(int status, const kvs_error *err); /* a known code, and a message that a terminal can show */
void touch(const void *data, size_t size);          /* reads every byte: the sanitizer sees each */

/* Policies by the bits of options, for the tests' pairs: 1 KVSmooth, 2 DSCR, 4 PruneHal, 8 reversible, 16 strengths per KV head and exact
 * values of the row before, 32 pruned per KV head. What pykvsmooth calls them is in tests/test_corpus.py. */
typedef struct policies {
    kvs_smooth_params smooth;
    kvs_dscr_params dscr;
    kvs_prune_params prune;
} policies;
void choose_policies(uint32_t options, int32_t grid, policies *chosen, kvs_session_params *params);
#endif
