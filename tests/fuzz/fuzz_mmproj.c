/* An mmproj beside a sound text model, through to one encoded picture. */
#include "harness.h"
#include "model.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_SIDE = 64 }; /* larger pictures are legal, and slow */

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed);
size_t LLVMFuzzerCustomCrossOver(const uint8_t *a, size_t n, const uint8_t *b, size_t m, uint8_t *out, size_t max, unsigned seed);

static kvs_model *model;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    kvs_error err = new_error();
    kvs_model_params params = {.struct_size = sizeof params, .threads = 1, .text_path = fixed_file("text.gguf")};
    int status = kvs_model_load(&params, &model, &err);
    if (status) fprintf(stderr, "%s\n", err.message);
    CHECK(!status);
    return 0;
}

static void encode(void) {
    kvs_error err = new_error();
    kvs_model_info info = {.struct_size = sizeof info};
    kvs_model_get_info(model, &info);
    size_t n_pixels = 3 * (size_t)info.image_size * (size_t)info.image_size, n = (size_t)info.n_image * (size_t)info.n_embd;
    float *pixels = malloc(n_pixels * sizeof *pixels), *embeddings = malloc(n * sizeof *embeddings);
    CHECK(pixels && embeddings);
    for (size_t i = 0; i < n_pixels; i++) pixels[i] = (float)(i % 17) / 8 - 1;
    int status = kvs_encode_image(model, pixels, 1, embeddings, NULL, &err);
    check_error(status, &err);
    if (!status) touch(embeddings, n * sizeof *embeddings);
    free(pixels);
    free(embeddings);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    kvs_error err = new_error();
    int status = kvs_vision_load(model, memory_file(0, data, size), NULL, &err);
    check_error(status, &err);
    if (!status && model->vision.image_size <= MAX_SIDE) encode();
    kvs_vision_unload(model);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed) { return mutate_gguf(data, size, max, seed); }

size_t LLVMFuzzerCustomCrossOver(const uint8_t *a, size_t n, const uint8_t *b, size_t m, uint8_t *out, size_t max, unsigned seed) {
    return crossover_gguf(a, n, b, m, out, max, seed);
}
