/* The vocabulary of a GGUF file, and ids for it. */
#include "harness.h"
#include "tokenizer.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed);

static void decode(const kvs_tokenizer *tok, int32_t id) {
    int32_t n_vocab = kvs_tokenizer_n_vocab(tok), kind = kvs_tokenizer_kind(tok, id);
    bool known = id >= 0 && id < n_vocab;
    CHECK(known ? kind >= KVS_TOKEN_NORMAL && kind <= KVS_TOKEN_BYTE : kind == -1);
    for (int special = 0; special < 2; special++) {
        int32_t length = -1;
        const char *bytes = kvs_tokenizer_bytes(tok, id, special, &length);
        CHECK((bytes != NULL) == known && length >= 0 && (known || !length));
        if (kind == KVS_TOKEN_BYTE) CHECK(length == 1);
        if (kind == KVS_TOKEN_CONTROL && !special) CHECK(length == 0);
        if (bytes) touch(bytes, (size_t)length);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input in = read_input(data, size, 2);
    kvs_tokenizer *tok = load_vocabulary(in.parts[0]);
    if (!tok) return 0;
    for (size_t at = 0; at + 4 <= in.parts[1].size; at += 4) {
        int32_t id;
        memcpy(&id, in.parts[1].data + at, 4);
        decode(tok, in.options & 1 ? id % (kvs_tokenizer_n_vocab(tok) + 2) : id);
    }
    int32_t known[] = {kvs_tokenizer_bos(tok), kvs_tokenizer_eos(tok), kvs_tokenizer_unk(tok), kvs_tokenizer_pad(tok)};
    for (int i = 0; i < 4; i++) CHECK(known[i] >= -1 && known[i] < kvs_tokenizer_n_vocab(tok)), decode(tok, known[i]);
    uint64_t identity = kvs_tokenizer_identity(tok);
    touch(&identity, sizeof identity);
    kvs_tokenizer_free(tok);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed) {
    mutator *const mutators[] = {mutate_gguf, mutate_bytes};
    return mutate_input(data, size, max, seed, 2, mutators);
}
