/* tokenizer.h - the vocabulary of a GGUF file: text -> ids, id -> bytes. SentencePiece ("llama"). */
#ifndef KVS_TOKENIZER_H
#define KVS_TOKENIZER_H
#include "gguf.h"

typedef struct kvs_tokenizer kvs_tokenizer;

enum kvs_token_kind {
    KVS_TOKEN_NORMAL = 1,
    KVS_TOKEN_UNKNOWN = 2,
    KVS_TOKEN_CONTROL = 3,
    KVS_TOKEN_USER = 4,
    KVS_TOKEN_UNUSED = 5,
    KVS_TOKEN_BYTE = 6
};

int kvs_tokenizer_load(const kvs_gguf *file, kvs_tokenizer **out, kvs_error *err);
uint64_t kvs_tokenizer_identity(const kvs_tokenizer *tok); /* hash of pieces, scores and kinds */
void kvs_tokenizer_free(kvs_tokenizer *tok);
int32_t kvs_tokenizer_n_vocab(const kvs_tokenizer *tok);
int32_t kvs_tokenizer_bos(const kvs_tokenizer *tok); /* -1 = none; the same for the others */
int32_t kvs_tokenizer_eos(const kvs_tokenizer *tok);
int32_t kvs_tokenizer_unk(const kvs_tokenizer *tok);
int32_t kvs_tokenizer_pad(const kvs_tokenizer *tok);
bool kvs_tokenizer_add_bos(const kvs_tokenizer *tok);
bool kvs_tokenizer_add_space_prefix(const kvs_tokenizer *tok);
/* as kvs_tokenize, kvs_token_bytes and kvs_token_type in kvs.h */
int64_t kvs_tokenizer_encode(const kvs_tokenizer *tok, const char *text, int64_t length, bool add_bos, bool special, int32_t *ids,
                             int64_t capacity);
const char *kvs_tokenizer_bytes(const kvs_tokenizer *tok, int32_t id, bool special, int32_t *length);
int32_t kvs_tokenizer_kind(const kvs_tokenizer *tok, int32_t id);
#endif
