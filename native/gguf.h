/* gguf.h - one GGUF file, mapped and checked: header, typed metadata, tensor lookup by name, type and shape.
 * Every count, length and offset is checked against the file before it is used; a kvs_gguf that was opened is sound as a
 * container (what the values mean is the business of model.c). See kvs.h for the inspection functions. */
#ifndef KVS_GGUF_H
#define KVS_GGUF_H
#include "util.h"

const char *kvs_gguf_path(const kvs_gguf *file);
uint64_t kvs_gguf_size(const kvs_gguf *file); /* bytes of the file */
void kvs_gguf_prefetch(const kvs_gguf *file); /* asks the system to read ahead; returns at once */
/* These bytes, if they are of the file, will hardly be read again: their pages no longer count as this process's memory. */
void kvs_gguf_forget(const kvs_gguf *file, const void *data, uint64_t bytes);

/* Metadata by key. Each returns KVS_OK, or KVS_E_FORMAT with file, key and offset in err when the key has another type, is
 * out of [min, max] or not finite. A key that is absent gives *found = false (if found is not NULL), otherwise an error. */
int kvs_gguf_get_u32(const kvs_gguf *file, const char *key, uint32_t min, uint32_t max, bool *found, uint32_t *value,
                     kvs_error *err); /* any integer type */
int kvs_gguf_get_f32(const kvs_gguf *file, const char *key, float min, float max, bool *found, float *value, kvs_error *err);
int kvs_gguf_get_bool(const kvs_gguf *file, const char *key, bool *found, bool *value, kvs_error *err);
/* Zero-terminated copy into buffer of a short name: an error if it does not fit or is no printable ASCII. */
int kvs_gguf_get_string(const kvs_gguf *file, const char *key, bool *found, char *buffer, size_t size, kvs_error *err);
/* An array of count elements of the wanted class (all integer types read as int64 through kvs_gguf_int, F32 and F64 through
 * kvs_gguf_float, strings through kvs_gguf_string): *index for those functions. want: 'i', 'f' or 's'. */
int kvs_gguf_get_array(const kvs_gguf *file, const char *key, char want, bool *found, int64_t *index, int64_t *count, kvs_error *err);
int64_t kvs_gguf_find_key(const kvs_gguf *file, const char *key);   /* index or -1 */
int64_t kvs_gguf_key_offset(const kvs_gguf *file, const char *key); /* byte of its value in the file, or -1; for messages */

int64_t kvs_gguf_find_tensor(const kvs_gguf *file, const char *name); /* index or -1 */
const void *kvs_gguf_tensor_data(const kvs_gguf *file, int64_t i);    /* in the mapping; NULL if its type does not load */
void kvs_gguf_use_tensor(kvs_gguf *file, int64_t i);                  /* a loader's note: this one has been taken */
bool kvs_gguf_tensor_used(const kvs_gguf *file, int64_t i);
#endif
