/* The vocabulary of a GGUF file, and a text for it. */
#include "harness.h"
#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed);

static void encode(const kvs_tokenizer *tok, const char *text, size_t size, bool add_bos, bool special) {
    int64_t n = kvs_tokenizer_encode(tok, text, (int64_t)size, add_bos, special, NULL, 0);
    CHECK(n >= 0 && n <= (int64_t)(3 * size + 4)); /* at most three tokens for a byte, a prefix, BOS */
    int64_t room = size % 2 ? n : n / 2;
    int32_t *ids = malloc((size_t)room * sizeof *ids + 1);
    CHECK(ids && kvs_tokenizer_encode(tok, text, (int64_t)size, add_bos, special, ids, room) == n);
    for (int64_t i = 0; i < room; i++) CHECK(ids[i] >= 0 && ids[i] < kvs_tokenizer_n_vocab(tok));
    free(ids);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input in = read_input(data, size, 2);
    kvs_tokenizer *tok = load_vocabulary(in.parts[0]);
    if (!tok) return 0;
    char *text = malloc(in.parts[1].size); /* of its own: what is read beyond it is seen */
    if (in.parts[1].size) memcpy(text, in.parts[1].data, in.parts[1].size);
    encode(tok, text, in.parts[1].size, in.options & 1, in.options & 2);
    free(text);
    kvs_tokenizer_free(tok);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed) {
    mutator *const mutators[] = {mutate_gguf, mutate_bytes};
    return mutate_input(data, size, max, seed, 2, mutators);
}
