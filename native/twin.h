/* twin.h - memory that the CPU and a device share by copying. A block has an address on the host, which is what callers see, and a twin on
 * the device, which is made when it is first wanted. What was written on one side only is copied when the other side wants it.
 * An array of a cache is not copied at all: each layer lies on its own side, and only addresses are translated.
 * The list of blocks may be used from any thread; a block by one thread at a time. */
#ifndef KVS_TWIN_H
#define KVS_TWIN_H
#include "backend.h"

#include <pthread.h>

enum { KVS_HOST = 1, KVS_DEVICE = 2 }; /* sides; both: or-ed */
enum { KVS_READ = 1, KVS_WRITE = 2 };
enum { KVS_TWIN_STRETCHES = 32 };

typedef struct kvs_stretch { /* of a block, from the end of the one before it */
    uint64_t end;
    int32_t fresh; /* the sides whose bytes are valid */
} kvs_stretch;

typedef struct kvs_twin {
    uint8_t *host, *device; /* device: NULL until it is wanted */
    uint64_t bytes;
    bool layers; /* an array of a cache: its first host_bytes are on the host, the others on the device */
    uint64_t host_bytes;
    uint64_t skipped;                          /* of the array: the device's memory begins behind them */
    kvs_stretch stretches[KVS_TWIN_STRETCHES]; /* (n) */
    int32_t n;
} kvs_twin;

typedef struct kvs_twins {
    kvs_backend *cpu, *device;
    pthread_mutex_t mutex; /* of the list */
    kvs_twin **blocks;     /* (n) by address on the host */
    int32_t n, room;
    /* of a step, for its thread */
    const kvs_kv **kvs; /* (n_kvs) caches, and what the device knows of them */
    kvs_kv **copies;    /* (room_kvs) */
    int32_t n_kvs, room_kvs;
    kvs_row *rows; /* (room_rows) */
    int32_t room_rows;
} kvs_twins;

bool kvs_twins_init(kvs_twins *twins, kvs_backend *cpu, kvs_backend *device);
void kvs_twins_free(kvs_twins *twins); /* what callers have not given back, too */
void *kvs_twins_alloc(kvs_twins *twins, uint64_t bytes);
/* n_host of the layers are the host's */
void *kvs_twins_alloc_layers(kvs_twins *twins, int32_t n_layer, int32_t n_host, uint64_t bytes_per_layer);
void kvs_twins_release(kvs_twins *twins, void *block);
kvs_twin *kvs_twins_find(kvs_twins *twins, const void *address); /* NULL: in none of them */

/* Bytes from address on are about to be used on a side, with KVS_READ and KVS_WRITE: where they are there. NULL: no memory. What is in no
 * block is given back as it is. */
void *kvs_twins_use(kvs_twins *twins, int32_t side, const void *address, uint64_t bytes, int32_t access);
/* For copies: on which sides the byte at address is valid, and how many behind it are so, too, of n at most. */
int32_t kvs_twin_where(const kvs_twin *twin, const void *address, uint64_t *n);
uint8_t *kvs_twin_on_device(const kvs_twin *twin, const void *address); /* its twin, which is there */
void kvs_twin_wrote(kvs_twins *twins, kvs_twin *twin, int32_t sides, const void *address, uint64_t bytes);
/* A step begins: its rows as the device knows them. NULL: no memory. */
const kvs_row *kvs_twins_rows(kvs_twins *twins, const kvs_step *step);
/* The same cache with its arrays where the device has them, at one address through the step. NULL: no memory. */
kvs_kv *kvs_twins_kv(kvs_twins *twins, const kvs_kv *kv);
#endif
