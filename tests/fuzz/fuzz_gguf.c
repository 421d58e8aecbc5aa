/* A GGUF file: header, metadata, tensor table; whatever opens is looked at through every getter. */
#include "gguf.h"
#include "harness.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed);
size_t LLVMFuzzerCustomCrossOver(const uint8_t *a, size_t n, const uint8_t *b, size_t m, uint8_t *out, size_t max, unsigned seed);

static void read_by_name(const kvs_gguf *file, const char *name) {
    kvs_error err = new_error();
    bool found, flag;
    uint32_t integer;
    float real;
    char text[64];
    int64_t index, count;
    check_error(kvs_gguf_get_u32(file, name, 1, 1000, NULL, &integer, &err), &err);
    check_error(kvs_gguf_get_f32(file, name, 0, 1, &found, &real, &err), &err);
    check_error(kvs_gguf_get_bool(file, name, &found, &flag, &err), &err);
    int status = kvs_gguf_get_string(file, name, NULL, text, sizeof text, &err);
    check_error(status, &err);
    if (!status) CHECK(strlen(text) < sizeof text);
    for (const char *want = "ifs"; *want; want++) check_error(kvs_gguf_get_array(file, name, *want, &found, &index, &count, &err), &err);
}

static void read_key(const kvs_gguf *file, int64_t i) {
    kvs_gguf_key key;
    CHECK(!kvs_gguf_key_at(file, i, &key) && kvs_gguf_find_key(file, key.name) == i && kvs_gguf_key_offset(file, key.name) > 0);
    CHECK(key.type >= 0 && key.type <= KVS_GGUF_F64 && key.count >= 0);
    for (int64_t j = -1; j <= key.count; j++) {
        int64_t length = 0;
        const char *text = kvs_gguf_string(file, i, j, &length);
        if (text) touch(text, (size_t)length);
        int64_t integer = kvs_gguf_int(file, i, j);
        double real = kvs_gguf_float(file, i, j);
        touch(&integer, sizeof integer);
        touch(&real, sizeof real);
    }
    read_by_name(file, key.name);
}

static void read_tensor(const kvs_gguf *file, int64_t i) {
    kvs_gguf_tensor t;
    CHECK(!kvs_gguf_tensor_at(file, i, &t) && kvs_gguf_find_tensor(file, t.name) == i);
    CHECK(t.n_dims >= 1 && t.n_dims <= 4 && t.dims[0] > 0 && t.dims[1] > 0 && t.dims[2] > 0 && t.dims[3] > 0);
    const void *values = kvs_gguf_tensor_data(file, i);
    CHECK((values != NULL) == (t.bytes >= 0));
    if (values) touch(values, (size_t)t.bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    kvs_error err = new_error();
    kvs_gguf *file;
    int status = kvs_gguf_open(memory_file(0, data, size), &file, &err);
    check_error(status, &err);
    CHECK((status == KVS_OK) == (file != NULL));
    if (status) return 0;
    for (int64_t i = 0; i < kvs_gguf_n_keys(file); i++) read_key(file, i);
    for (int64_t i = 0; i < kvs_gguf_n_tensors(file); i++) read_tensor(file, i);
    read_by_name(file, "no such key");
    CHECK(kvs_gguf_version(file) == 2 || kvs_gguf_version(file) == 3);
    kvs_gguf_free(file);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed) { return mutate_gguf(data, size, max, seed); }

size_t LLVMFuzzerCustomCrossOver(const uint8_t *a, size_t n, const uint8_t *b, size_t m, uint8_t *out, size_t max, unsigned seed) {
    return crossover_gguf(a, n, b, m, out, max, seed);
}
