/* mapped.h - a file mapped for reading that stays somebody else's: it may shrink or change under us, and the disk below it may fail.
 * The kernel tells of a page that is gone by SIGBUS, which would end the process. The handler in mapped.c puts zeros in its place and
 * marks the file as torn; whoever computes with its bytes asks kvs_mapped_check before the results are handed out. */
#ifndef KVS_MAPPED_H
#define KVS_MAPPED_H
#include "util.h"

typedef struct kvs_mapped kvs_mapped;

/* KVS_E_IO (errno in err.offset: absent, a folder, no regular file, no permission), KVS_E_FORMAT (empty), KVS_E_MEMORY. The first call of
 * a process installs the handler, unless the environment says KVS_SIGBUS=0. */
int kvs_mapped_open(const char *path, kvs_mapped **out, kvs_error *err);
void kvs_mapped_close(kvs_mapped *file);
const uint8_t *kvs_mapped_data(const kvs_mapped *file);
uint64_t kvs_mapped_size(const kvs_mapped *file); /* when it was opened; the mapping has room for so many, whatever becomes of the file */
const char *kvs_mapped_path(const kvs_mapped *file);
/* KVS_E_FORMAT once the file has shrunk, could not be read or is not what was opened (size, time of its last change), and from then on:
 * every byte read since it was opened may have been another. One fstat. */
int kvs_mapped_check(kvs_mapped *file, kvs_error *err);
#endif
