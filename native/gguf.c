#include "gguf.h"

#include "mapped.h"
#include "quant.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "GGUF values are read as they lie in memory: this needs a little-endian machine"
#endif

/* The file is hostile until proven sound: everything is parsed once, front to back, into the structs below, and nothing that
 * decides a size is read from the mapping a second time (somebody might change the file under us). */

enum { MIN_KEY_BYTES = 8 + 1 + 4 + 1, MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8, HEADER_BYTES = 24 };
enum { MAX_ENTRIES = 1 << 20, MAX_KEY_NAME = 65535, MAX_TENSOR_NAME = 63, DEFAULT_ALIGNMENT = 32, MAX_ALIGNMENT = 65536 };
#define MAX_METADATA ((uint64_t)256 << 20) /* bytes before the tensor data; keeps positions of strings in 32 bits */

typedef struct span {
    uint32_t at, length;
} span;

typedef struct meta { /* one key */
    char *name;
    int32_t type, element; /* element: -1 if it is no array */
    int64_t count;
    uint64_t at;   /* first byte of the value; of the elements of an array */
    uint64_t bits; /* a number, copied */
    span string;
    span *strings; /* (count) of an array of strings */
} meta;

typedef struct tensor {
    kvs_gguf_tensor info;
    char *name;
    uint64_t relative; /* offset as the file gives it */
    uint64_t at;       /* where the file says so */
    bool used;
} tensor;

typedef struct by_name {
    const char *name;
    int64_t index;
    uint64_t at;
} by_name;

struct kvs_gguf {
    kvs_mapped *mapped;
    const char *path;
    const uint8_t *map;
    uint64_t size;
    int32_t version;
    int64_t n_keys, n_tensors;
    meta *keys;
    tensor *tensors;
    by_name *key_order, *tensor_order; /* sorted */
};

typedef struct reader {
    kvs_gguf *file;
    uint64_t at, end;
    char what[96]; /* what is being read, for messages */
    kvs_error *err;
} reader;

static const uint8_t value_bytes[13] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
static const char *const value_names[13] = {"u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64"};

#define FAIL_AT(r, position, ...) kvs_fail_file((r)->err, KVS_E_FORMAT, (r)->file->path, (r)->what, (int64_t)(position), __VA_ARGS__)

/* ---- reading ---- */

static int need(const reader *r, uint64_t n) {
    if (n <= r->end - r->at) return KVS_OK;
    if (r->end < r->file->size) return FAIL_AT(r, r->at, "the metadata is larger than %d MiB", (int)(MAX_METADATA >> 20));
    return FAIL_AT(r, r->at, "the file ends after %llu bytes, inside its header: is it cut short, or damaged?",
                   (unsigned long long)r->file->size);
}

static int take(reader *r, void *value, uint64_t n) {
    int status = need(r, n);
    if (status) return status;
    memcpy(value, r->file->map + r->at, (size_t)n);
    r->at += n;
    return KVS_OK;
}

static const char *room(const reader *r) { return r->end < r->file->size ? "the 256 MiB that metadata may have" : "the file"; }

static int take_span(reader *r, span *s) {
    uint64_t length, at = r->at;
    int status = take(r, &length, 8);
    if (status) return status;
    if (length > r->end - r->at) return FAIL_AT(r, at, "a string of %llu bytes does not fit into %s", (unsigned long long)length, room(r));
    *s = (span){(uint32_t)r->at, (uint32_t)length}; /* fits: end is MAX_METADATA at most */
    r->at += length;
    return KVS_OK;
}

/* Names are ASCII by the format's rule; a control character in one could also do things to a terminal. */
static int take_name(reader *r, uint64_t limit, char **name) {
    span s = {0};
    uint64_t at = r->at;
    int status = take_span(r, &s);
    if (status) return status;
    if (s.length == 0) return FAIL_AT(r, at, "its name is empty");
    if (s.length > limit) return FAIL_AT(r, at, "its name has %u bytes, %u are allowed", s.length, (unsigned)limit);
    const uint8_t *text = r->file->map + s.at;
    char *copy = kvs_calloc((uint64_t)s.length + 1, 1);
    if (!copy) return kvs_fail_memory(r->err, (uint64_t)s.length + 1, "a name of a GGUF file");
    for (uint32_t i = 0; i < s.length; i++) {
        copy[i] = (char)text[i];
        if (copy[i] < 32 || copy[i] > 126) {
            free(copy);
            return FAIL_AT(r, s.at + i, "its name holds a byte that is no printable ASCII");
        }
    }
    copy[s.length] = 0;
    *name = copy;
    snprintf(r->what, sizeof r->what, "%s", copy);
    return KVS_OK;
}

static int check_bools(const reader *r, uint64_t at, uint64_t n) {
    for (uint64_t i = 0; i < n; i++)
        if (r->file->map[at + i] > 1) return FAIL_AT(r, at + i, "a bool must be 0 or 1, not %u", r->file->map[at + i]);
    return KVS_OK;
}

static int take_strings(reader *r, meta *k, uint64_t count) {
    if (count > (r->end - r->at) / 8)
        return FAIL_AT(r, k->at, "an array of %llu strings does not fit into %s", (unsigned long long)count, room(r));
    k->strings = kvs_calloc(count, sizeof *k->strings);
    if (!k->strings) return kvs_fail_memory(r->err, count * sizeof *k->strings, "an array of strings");
    for (uint64_t i = 0; i < count; i++) {
        int status = take_span(r, &k->strings[i]);
        if (status) return status;
    }
    return KVS_OK;
}

static int take_array(reader *r, meta *k) {
    uint32_t element;
    uint64_t count, at = r->at;
    int status = take(r, &element, 4);
    if (!status) status = take(r, &count, 8);
    if (status) return status;
    if (element == KVS_GGUF_ARRAY) return FAIL_AT(r, at, "arrays of arrays are not supported");
    if (element > KVS_GGUF_F64) return FAIL_AT(r, at, "elements of the unknown type %u", element);
    k->element = (int32_t)element;
    k->at = r->at;
    if (element == KVS_GGUF_STRING) {
        status = take_strings(r, k, count);
    } else {
        if (count > (r->end - r->at) / value_bytes[element])
            return FAIL_AT(r, at, "an array of %llu elements of type %s does not fit into %s", (unsigned long long)count,
                           value_names[element], room(r));
        if (element == KVS_GGUF_BOOL) status = check_bools(r, r->at, count);
        r->at += count * value_bytes[element];
    }
    k->count = (int64_t)count; /* bounded by the file by now */
    return status;
}

static int take_key(reader *r, meta *k) {
    uint32_t type;
    int status = take_name(r, MAX_KEY_NAME, &k->name);
    if (!status) status = take(r, &type, 4);
    if (status) return status;
    if (type > KVS_GGUF_F64) return FAIL_AT(r, r->at - 4, "a value of the unknown type %u", type);
    *k = (meta){.name = k->name, .type = (int32_t)type, .element = -1, .count = 1, .at = r->at};
    if (type == KVS_GGUF_ARRAY) return take_array(r, k);
    if (type == KVS_GGUF_STRING) return take_span(r, &k->string);
    status = take(r, &k->bits, value_bytes[type]);
    return !status && type == KVS_GGUF_BOOL ? check_bools(r, k->at, 1) : status;
}

/* Elements and bytes of a tensor; the product of dims stays below 2^63. */
static int measure_tensor(const reader *r, tensor *t) {
    uint64_t n = 1, bytes;
    for (int i = 0; i < t->info.n_dims; i++)
        if (!kvs_mul_u64(n, (uint64_t)t->info.dims[i], &n) || n > INT64_MAX)
            return FAIL_AT(r, t->at, "the product of its dimensions overflows");
    t->info.bytes = -1;
    const kvs_type_traits *traits = kvs_type_get(t->info.type);
    if (!traits) return KVS_OK; /* one may still look at the file */
    if (t->info.dims[0] % traits->block)
        return FAIL_AT(r, t->at, "rows of %lld elements are not whole %s blocks of %d", (long long)t->info.dims[0], traits->name,
                       traits->block);
    if (!kvs_mul_u64(n / (uint64_t)traits->block, (uint64_t)traits->block_bytes, &bytes) || bytes > INT64_MAX)
        return FAIL_AT(r, t->at, "its size in bytes overflows");
    t->info.bytes = (int64_t)bytes;
    return KVS_OK;
}

static int take_tensor(reader *r, tensor *t) {
    uint32_t n_dims, type;
    int status = take_name(r, MAX_TENSOR_NAME, &t->name);
    if (status) return status;
    t->at = r->at;
    if ((status = take(r, &n_dims, 4))) return status;
    if (n_dims < 1 || n_dims > 4) return FAIL_AT(r, t->at, "a tensor has 1 to 4 dimensions, not %u", n_dims);
    t->info = (kvs_gguf_tensor){.name = t->name, .n_dims = (int32_t)n_dims, .dims = {1, 1, 1, 1}};
    for (uint32_t i = 0; i < n_dims; i++) {
        uint64_t dim;
        if ((status = take(r, &dim, 8))) return status;
        if (dim < 1 || dim > INT64_MAX) return FAIL_AT(r, r->at - 8, "its dimension %u is %llu", i, (unsigned long long)dim);
        t->info.dims[i] = (int64_t)dim;
    }
    if ((status = take(r, &type, 4))) return status;
    if (type > INT32_MAX) return FAIL_AT(r, r->at - 4, "%u is no tensor type", type);
    t->info.type = (int32_t)type;
    if ((status = take(r, &t->relative, 8))) return status;
    return measure_tensor(r, t);
}

/* ---- order and place ---- */

static int compare_names(const void *a, const void *b) { return strcmp(((const by_name *)a)->name, ((const by_name *)b)->name); }

static int64_t find(const by_name *order, int64_t n, const char *name) {
    by_name wanted = {.name = name};
    const by_name *hit = n ? bsearch(&wanted, order, (size_t)n, sizeof *order, compare_names) : NULL;
    return hit ? hit->index : -1;
}

/* Sorting, not hashing: a hash could be made to collide. */
static int sort_names(const reader *r, by_name *order, int64_t n, const char *kind) {
    if (n) qsort(order, (size_t)n, sizeof *order, compare_names);
    for (int64_t i = 1; i < n; i++)
        if (!strcmp(order[i - 1].name, order[i].name))
            return kvs_fail_file(r->err, KVS_E_FORMAT, r->file->path, order[i].name, (int64_t)KVS_MAX(order[i - 1].at, order[i].at),
                                 "this %s appears twice", kind);
    return KVS_OK;
}

static int compare_offsets(const void *a, const void *b) {
    const kvs_gguf_tensor *x = *(const kvs_gguf_tensor *const *)a, *y = *(const kvs_gguf_tensor *const *)b;
    return x->offset < y->offset ? -1 : x->offset > y->offset;
}

static int check_overlap(const reader *r) {
    int64_t n = r->file->n_tensors;
    const kvs_gguf_tensor **order = kvs_calloc((uint64_t)n, sizeof *order);
    if (!order) return kvs_fail_memory(r->err, (uint64_t)n * sizeof *order, "the tensor table");
    for (int64_t i = 0; i < n; i++) order[i] = &r->file->tensors[i].info;
    qsort(order, (size_t)n, sizeof *order, compare_offsets);
    int status = KVS_OK;
    for (int64_t i = 1; i < n && !status; i++) {
        const kvs_gguf_tensor *a = order[i - 1], *b = order[i];
        int64_t bytes = a->bytes < 0 ? 1 : a->bytes; /* of an unknown type: at least something */
        if (bytes > b->offset - a->offset)
            status = kvs_fail_file(r->err, KVS_E_FORMAT, r->file->path, b->name, b->offset, "its data overlaps that of %s", a->name);
    }
    free(order);
    return status;
}

static int place_tensor(reader *r, tensor *t, uint64_t alignment, uint64_t data_start) {
    snprintf(r->what, sizeof r->what, "%s", t->name);
    if (t->relative % alignment)
        return FAIL_AT(r, t->at, "its offset %llu is not a multiple of the alignment %llu", (unsigned long long)t->relative,
                       (unsigned long long)alignment);
    uint64_t size = r->file->size, left = data_start < size ? size - data_start : 0;
    uint64_t bytes = t->info.bytes < 0 ? 1 : (uint64_t)t->info.bytes;
    if (t->relative > left || bytes > left - t->relative)
        return FAIL_AT(r, t->at,
                       "its data (%llu bytes at offset %llu of the data) goes beyond the end of the file, which has %llu bytes: "
                       "is the download complete?",
                       (unsigned long long)bytes, (unsigned long long)t->relative, (unsigned long long)size);
    t->info.offset = (int64_t)(data_start + t->relative); /* at most size */
    return KVS_OK;
}

static int read_alignment(reader *r, uint64_t *alignment) {
    int64_t i = kvs_gguf_find_key(r->file, "general.alignment");
    *alignment = DEFAULT_ALIGNMENT;
    if (i < 0) return KVS_OK;
    const meta *k = &r->file->keys[i];
    snprintf(r->what, sizeof r->what, "%s", k->name);
    if (k->type != KVS_GGUF_U32) return FAIL_AT(r, k->at, "is of type %s, not u32", value_names[k->type]);
    *alignment = k->bits;
    if (k->bits < 8 || k->bits > MAX_ALIGNMENT || (k->bits & (k->bits - 1)))
        return FAIL_AT(r, k->at, "the alignment must be a power of two from 8 to %d, not %llu", MAX_ALIGNMENT, (unsigned long long)k->bits);
    return KVS_OK;
}

static int place_tensors(reader *r) {
    uint64_t alignment;
    int status = read_alignment(r, &alignment);
    uint64_t data_start = (r->at + alignment - 1) & ~(alignment - 1); /* at is MAX_METADATA at most */
    for (int64_t i = 0; i < r->file->n_tensors && !status; i++) status = place_tensor(r, &r->file->tensors[i], alignment, data_start);
    return status ? status : check_overlap(r);
}

/* ---- the file as a whole ---- */

static bool starts(const char *text, const char *with) { return !strncmp(text, with, strlen(with)); }

static int fail_magic(const reader *r) {
    char head[33];
    size_t n = 0;
    const uint8_t *p = r->file->map;
    for (; n < sizeof head - 1 && n < r->file->size && p[n] >= 32 && p[n] < 127; n++) head[n] = (char)p[n];
    head[n] = 0;
    const char *hint = "this is no model in GGUF format";
    if (head[0] == '<')
        hint = "is this a web page saved as a model?";
    else if (starts(head, "version https://git-lfs"))
        hint = "this is a Git LFS pointer, the model itself was not downloaded";
    else if (starts(head, "lmgg") || starts(head, "fmgg") || starts(head, "tjgg") || starts(head, "algg"))
        hint = "this is an old GGML file, from before GGUF; convert the model again";
    else if (starts(head, "PK"))
        hint = "this is a ZIP archive, perhaps a PyTorch checkpoint; it must be converted to GGUF first";
    else if (n >= 8)
        hint = "is this a text file?";
    if (n >= 2) return FAIL_AT(r, 0, "starts with \"%s\", not with GGUF: %s", head, hint);
    uint8_t b[4] = {0};
    memcpy(b, p, (size_t)KVS_MIN(r->file->size, 4));
    return FAIL_AT(r, 0, "starts with the bytes %02x %02x %02x %02x, not with GGUF: %s", b[0], b[1], b[2], b[3], hint);
}

static int check_count(const reader *r, uint64_t at, uint64_t count, uint64_t min_bytes, const char *kind) {
    uint64_t most = (r->end - r->at) / min_bytes;
    if (count > most)
        return FAIL_AT(r, at, "the header counts %llu %s, but %s has room for %llu at most", (unsigned long long)count, kind, room(r),
                       (unsigned long long)most);
    if (count > MAX_ENTRIES) return FAIL_AT(r, at, "the header counts %llu %s, more than %d", (unsigned long long)count, kind, MAX_ENTRIES);
    return KVS_OK;
}

static int take_header(reader *r) {
    kvs_gguf *f = r->file;
    uint32_t version;
    uint64_t n_tensors, n_keys;
    if (memcmp(f->map, "GGUF", (size_t)KVS_MIN(f->size, 4))) return fail_magic(r);
    if (f->size < HEADER_BYTES) return FAIL_AT(r, 0, "the file has %d bytes only: is it cut short?", (int)f->size);
    r->at = 4;
    int status = take(r, &version, 4);
    if (!status) status = take(r, &n_tensors, 8);
    if (!status) status = take(r, &n_keys, 8);
    if (status) return status;
    if (version && (version & 0xffff) == 0) return FAIL_AT(r, 4, "this GGUF file is for big-endian machines");
    if (version != 2 && version != 3)
        return FAIL_AT(r, 4, "GGUF version %u is not supported, 2 and 3 are%s", version, version == 1 ? "; convert the model again" : "");
    f->version = (int32_t)version;
    if ((status = check_count(r, 8, n_tensors, MIN_TENSOR_BYTES, "tensors"))) return status;
    if ((status = check_count(r, 16, n_keys, MIN_KEY_BYTES, "keys"))) return status;
    f->keys = kvs_calloc(n_keys, sizeof *f->keys);
    f->tensors = kvs_calloc(n_tensors, sizeof *f->tensors);
    f->key_order = kvs_calloc(n_keys, sizeof *f->key_order);
    f->tensor_order = kvs_calloc(n_tensors, sizeof *f->tensor_order);
    if (!f->keys || !f->tensors || !f->key_order || !f->tensor_order)
        return kvs_fail_memory(r->err, n_keys * (sizeof(meta) + sizeof(by_name)) + n_tensors * (sizeof(tensor) + sizeof(by_name)),
                               "the tables of a GGUF file");
    f->n_keys = (int64_t)n_keys, f->n_tensors = (int64_t)n_tensors;
    return KVS_OK;
}

static int parse(kvs_gguf *f, kvs_error *err) {
    reader r = {.file = f, .end = KVS_MIN(f->size, MAX_METADATA), .err = err};
    int status = take_header(&r);
    for (int64_t i = 0; i < f->n_keys && !status; i++) {
        snprintf(r.what, sizeof r.what, "key %lld of %lld", (long long)i + 1, (long long)f->n_keys);
        status = take_key(&r, &f->keys[i]);
        f->key_order[i] = (by_name){f->keys[i].name, i, f->keys[i].at};
    }
    if (!status) status = sort_names(&r, f->key_order, f->n_keys, "key");
    for (int64_t i = 0; i < f->n_tensors && !status; i++) {
        snprintf(r.what, sizeof r.what, "tensor %lld of %lld", (long long)i + 1, (long long)f->n_tensors);
        status = take_tensor(&r, &f->tensors[i]);
        f->tensor_order[i] = (by_name){f->tensors[i].name, i, f->tensors[i].at};
    }
    if (!status) status = sort_names(&r, f->tensor_order, f->n_tensors, "tensor");
    return status ? status : place_tensors(&r);
}

int32_t kvs_gguf_open(const char *path, kvs_gguf **out, kvs_error *err) {
    if (!path || !out) return kvs_fail(err, KVS_E_ARGUMENT, "kvs_gguf_open needs a path and a place for the result");
    *out = NULL;
    kvs_gguf *f = kvs_calloc(1, sizeof *f);
    if (!f) return kvs_fail_memory(err, sizeof *f, "a GGUF file");
    int status = kvs_mapped_open(path, &f->mapped, err);
    if (!status) {
        f->path = kvs_mapped_path(f->mapped);
        f->map = kvs_mapped_data(f->mapped);
        f->size = kvs_mapped_size(f->mapped);
        status = parse(f, err);
        if (status != KVS_E_MEMORY && kvs_mapped_check(f->mapped, err)) status = KVS_E_FORMAT; /* that is what was wrong */
    }
    if (status)
        kvs_gguf_free(f);
    else
        *out = f;
    return status;
}

int32_t kvs_gguf_check(const kvs_gguf *f, kvs_error *err) { return kvs_mapped_check(f->mapped, err); }

void kvs_gguf_free(kvs_gguf *f) {
    if (!f) return;
    for (int64_t i = 0; i < f->n_keys; i++) {
        free(f->keys[i].name);
        free(f->keys[i].strings);
    }
    for (int64_t i = 0; i < f->n_tensors; i++) free(f->tensors[i].name);
    free(f->keys);
    free(f->tensors);
    free(f->key_order);
    free(f->tensor_order);
    kvs_mapped_close(f->mapped);
    free(f);
}

void kvs_gguf_prefetch(const kvs_gguf *f) { /* a hint: failure changes nothing but time */
    (void)posix_madvise((void *)(uintptr_t)f->map, (size_t)f->size, POSIX_MADV_WILLNEED);
}

void kvs_gguf_forget(const kvs_gguf *f, const void *data, uint64_t bytes) {
    enum { PAGE = 1 << 16 }; /* a multiple of every system's; the pages at both ends stay */
    const uint64_t first = (uint64_t)(uintptr_t)f->map, begin = (uint64_t)(uintptr_t)data;
    if (begin < first || begin - first > f->size || bytes > f->size - (begin - first)) return;
    uint64_t from = (begin + PAGE - 1) / PAGE * PAGE, to = (begin + bytes) / PAGE * PAGE;
    if (to > from) (void)madvise((void *)(uintptr_t)from, (size_t)(to - from), MADV_DONTNEED);
}

const char *kvs_gguf_path(const kvs_gguf *f) { return f->path; }
uint64_t kvs_gguf_size(const kvs_gguf *f) { return f->size; }
int32_t kvs_gguf_version(const kvs_gguf *f) { return f->version; }
int64_t kvs_gguf_n_keys(const kvs_gguf *f) { return f->n_keys; }
int64_t kvs_gguf_n_tensors(const kvs_gguf *f) { return f->n_tensors; }
int64_t kvs_gguf_find_key(const kvs_gguf *f, const char *key) { return find(f->key_order, f->n_keys, key); }
int64_t kvs_gguf_find_tensor(const kvs_gguf *f, const char *name) { return find(f->tensor_order, f->n_tensors, name); }

int64_t kvs_gguf_key_offset(const kvs_gguf *f, const char *key) {
    int64_t i = kvs_gguf_find_key(f, key);
    return i < 0 ? -1 : (int64_t)f->keys[i].at;
}

/* ---- values ---- */

int32_t kvs_gguf_key_at(const kvs_gguf *f, int64_t i, kvs_gguf_key *key) {
    if (i < 0 || i >= f->n_keys) return KVS_E_ARGUMENT;
    const meta *k = &f->keys[i];
    *key = (kvs_gguf_key){.name = k->name, .type = k->type, .element_type = k->element, .count = k->count};
    return KVS_OK;
}

int32_t kvs_gguf_tensor_at(const kvs_gguf *f, int64_t i, kvs_gguf_tensor *out) {
    if (i < 0 || i >= f->n_tensors) return KVS_E_ARGUMENT;
    *out = f->tensors[i].info;
    return KVS_OK;
}

void kvs_gguf_use_tensor(kvs_gguf *f, int64_t i) { f->tensors[i].used = true; }

bool kvs_gguf_tensor_used(const kvs_gguf *f, int64_t i) { return f->tensors[i].used; }

const void *kvs_gguf_tensor_data(const kvs_gguf *f, int64_t i) {
    if (i < 0 || i >= f->n_tensors || f->tensors[i].info.bytes < 0) return NULL;
    return f->map + f->tensors[i].info.offset;
}

/* Element j of key i as a number; false if there is no such number. *type: what the bits are. */
static bool number(const kvs_gguf *f, int64_t i, int64_t j, int32_t *type, uint64_t *bits) {
    if (i < 0 || i >= f->n_keys || j < 0 || j >= f->keys[i].count) return false;
    const meta *k = &f->keys[i];
    *type = k->element >= 0 ? k->element : k->type;
    if (*type == KVS_GGUF_STRING) return false;
    uint64_t n = value_bytes[*type];
    *bits = k->bits;
    if (k->element >= 0) *bits = 0, memcpy(bits, f->map + k->at + (uint64_t)j * n, (size_t)n);
    return true;
}

static int64_t integer(int32_t type, uint64_t bits) {
    switch (type) {
    case KVS_GGUF_I8: return (int8_t)bits;
    case KVS_GGUF_I16: return (int16_t)bits;
    case KVS_GGUF_I32: return (int32_t)bits;
    case KVS_GGUF_BOOL: return bits != 0;
    case KVS_GGUF_U64: return bits > INT64_MAX ? INT64_MAX : (int64_t)bits;
    default: return (int64_t)bits;
    }
}

static double real(int32_t type, uint64_t bits) {
    if (type == KVS_GGUF_F32) {
        uint32_t low = (uint32_t)bits;
        float x;
        memcpy(&x, &low, 4);
        return (double)x;
    }
    if (type != KVS_GGUF_F64) return (double)integer(type, bits);
    double x;
    memcpy(&x, &bits, 8);
    return x;
}

static bool is_real(int32_t type) { return type == KVS_GGUF_F32 || type == KVS_GGUF_F64; }
static bool is_integer(int32_t type) { return type <= KVS_GGUF_I32 || type == KVS_GGUF_U64 || type == KVS_GGUF_I64; }

int64_t kvs_gguf_int(const kvs_gguf *f, int64_t i, int64_t j) {
    int32_t type;
    uint64_t bits;
    return number(f, i, j, &type, &bits) && !is_real(type) ? integer(type, bits) : 0;
}

double kvs_gguf_float(const kvs_gguf *f, int64_t i, int64_t j) {
    int32_t type;
    uint64_t bits;
    return number(f, i, j, &type, &bits) ? real(type, bits) : 0.0;
}

const char *kvs_gguf_string(const kvs_gguf *f, int64_t i, int64_t j, int64_t *length) {
    if (i < 0 || i >= f->n_keys || j < 0 || j >= f->keys[i].count) return NULL;
    const meta *k = &f->keys[i];
    if (k->type != KVS_GGUF_STRING && k->element != KVS_GGUF_STRING) return NULL;
    span s = k->strings ? k->strings[j] : k->string;
    if (length) *length = s.length;
    return (const char *)f->map + s.at;
}

/* ---- typed metadata by key ---- */

static int fail_key(const kvs_gguf *f, const meta *k, kvs_error *err, const char *wanted) {
    return kvs_fail_file(err, KVS_E_FORMAT, f->path, k->name, (int64_t)k->at, "is of type %s%s%s, %s is needed", value_names[k->type],
                         k->element >= 0 ? " of " : "", k->element >= 0 ? value_names[k->element] : "", wanted);
}

/* The key, or NULL with *status KVS_OK where it may be absent, and is. */
static const meta *look_up(const kvs_gguf *f, const char *key, bool *found, int *status, kvs_error *err) {
    int64_t i = kvs_gguf_find_key(f, key);
    if (found) *found = i >= 0;
    *status = i >= 0 || found ? KVS_OK : kvs_fail_file(err, KVS_E_FORMAT, f->path, key, -1, "this key is missing");
    return i < 0 ? NULL : &f->keys[i];
}

int kvs_gguf_get_u32(const kvs_gguf *f, const char *key, uint32_t min, uint32_t max, bool *found, uint32_t *value, kvs_error *err) {
    int status;
    const meta *k = look_up(f, key, found, &status, err);
    if (!k) return status;
    if (!is_integer(k->type)) return fail_key(f, k, err, "an integer");
    int64_t x = integer(k->type, k->bits);
    if (x < (int64_t)min || x > (int64_t)max)
        return kvs_fail_file(err, KVS_E_FORMAT, f->path, key, (int64_t)k->at, "%lld is out of range, %u to %u is possible", (long long)x,
                             min, max);
    *value = (uint32_t)x;
    return KVS_OK;
}

int kvs_gguf_get_f32(const kvs_gguf *f, const char *key, float min, float max, bool *found, float *value, kvs_error *err) {
    int status;
    const meta *k = look_up(f, key, found, &status, err);
    if (!k) return status;
    if (!is_real(k->type)) return fail_key(f, k, err, "f32");
    double x = real(k->type, k->bits);
    if (!isfinite(x) || x < (double)min || x > (double)max)
        return kvs_fail_file(err, KVS_E_FORMAT, f->path, key, (int64_t)k->at, "%g is out of range, %g to %g is possible", x, (double)min,
                             (double)max);
    *value = (float)x;
    return KVS_OK;
}

int kvs_gguf_get_bool(const kvs_gguf *f, const char *key, bool *found, bool *value, kvs_error *err) {
    int status;
    const meta *k = look_up(f, key, found, &status, err);
    if (!k) return status;
    if (k->type != KVS_GGUF_BOOL) return fail_key(f, k, err, "bool");
    *value = k->bits != 0;
    return KVS_OK;
}

int kvs_gguf_get_string(const kvs_gguf *f, const char *key, bool *found, char *buffer, size_t size, kvs_error *err) {
    int status;
    const meta *k = look_up(f, key, found, &status, err);
    if (!k) return status;
    if (k->type != KVS_GGUF_STRING) return fail_key(f, k, err, "a string");
    if (k->string.length >= size)
        return kvs_fail_file(err, KVS_E_FORMAT, f->path, key, (int64_t)k->at, "a string of %u bytes, at most %zu make sense here",
                             k->string.length, size - 1);
    memcpy(buffer, f->map + k->string.at, k->string.length);
    buffer[k->string.length] = 0;
    for (uint32_t i = 0; i < k->string.length; i++) /* it will stand in messages, and on terminals */
        if (buffer[i] < 32 || buffer[i] > 126)
            return kvs_fail_file(err, KVS_E_FORMAT, f->path, key, (int64_t)k->string.at + i,
                                 "the string holds a byte that is no printable ASCII");
    return KVS_OK;
}

int kvs_gguf_get_array(const kvs_gguf *f, const char *key, char want, bool *found, int64_t *index, int64_t *count, kvs_error *err) {
    int status;
    const meta *k = look_up(f, key, found, &status, err);
    if (!k) return status;
    int32_t e = k->element;
    bool fits = e >= 0 && (want == 'i' ? is_integer(e) : want == 'f' ? is_real(e) : e == KVS_GGUF_STRING);
    if (!fits) return fail_key(f, k, err, want == 'i' ? "an array of integers" : want == 'f' ? "an array of f32" : "an array of strings");
    *index = k - f->keys;
    *count = k->count;
    return KVS_OK;
}
