/* A whole pair, and perhaps a second part of its text model: loaded, a prompt with a picture, two steps, policies by the options. */
#include "harness.h"

#include <stdlib.h>
#include <string.h>

enum { N_CTX = 48, MAX_SIDE = 32, MAX_IMAGE_ROWS = 32 }; /* more is legal, and slow */
enum { NO_ROOM = 256 };                                  /* of the options: a limit that no cache keeps to */

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed);

static float *encode(kvs_model *model, const kvs_model_info *info) {
    kvs_error err = new_error();
    size_t n_pixels = 3 * (size_t)info->image_size * (size_t)info->image_size;
    float *pixels = calloc(n_pixels, sizeof *pixels), *embeddings = calloc((size_t)info->n_image * (size_t)info->n_embd, sizeof(float));
    CHECK(pixels && embeddings);
    for (size_t i = 0; i < n_pixels; i++) pixels[i] = (float)(i % 13) / 6 - 1;
    int status = kvs_encode_image(model, pixels, 1, embeddings, NULL, &err);
    check_error(status, &err);
    free(pixels);
    if (!status) return embeddings;
    free(embeddings);
    return NULL;
}

static int feed(kvs_model *model, const kvs_model_info *info, kvs_session *session, kvs_error *err) {
    int32_t ids[8], n = (int32_t)kvs_tokenize(model, "a dog", 5, 1, 0, ids, 8);
    kvs_chunk chunks[2] = {{.ids = ids, .n = KVS_MIN(n, 8)}};
    float *embeddings = NULL;
    bool picture = info->has_vision && info->image_size <= MAX_SIDE && info->n_image <= MAX_IMAGE_ROWS;
    if (picture && (embeddings = encode(model, info)))
        chunks[1] = chunks[0], chunks[0] = (kvs_chunk){.embd = embeddings, .n = info->n_image};
    int status = kvs_session_feed(session, chunks, embeddings ? 2 : 1, NULL, err);
    free(embeddings);
    return status;
}

static void run(kvs_model *model, uint32_t options) {
    kvs_error err = new_error();
    kvs_model_info info = {.struct_size = sizeof info};
    kvs_model_get_info(model, &info);
    static const int32_t types[] = {KVS_TYPE_F16, KVS_TYPE_F32, KVS_TYPE_Q8_0, KVS_TYPE_F16};
    kvs_session_params params = {.struct_size = sizeof params, .n_ctx = N_CTX, .kv_type = types[options >> 6 & 3], .seed = 1};
    policies chosen;
    choose_policies(options, info.has_vision ? info.image_size / info.patch_size : 0, &chosen, &params);
    kvs_session *session;
    int status = kvs_session_new(model, &params, &session, &err);
    check_error(status, &err);
    if (status) return;
    check_error(status = feed(model, &info, session, &err), &err);
    kvs_sampling greedy = {.struct_size = sizeof greedy, .top_p = 1, .repetition_penalty = 1};
    for (int i = 0; i < 3 && !status; i++) {
        kvs_sample sample;
        check_error(status = kvs_session_sample(session, &greedy, &sample, NULL, &err), &err);
        if (!status) CHECK(sample.id >= 0 && sample.id < info.n_vocab);
        if (!status) check_error(status = kvs_sessions_step(&session, &sample.id, 1, NULL, &err), &err);
    }
    kvs_session_free(session);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input in = read_input(data, size, 3);
    kvs_error err = new_error();
    kvs_model *model;
    kvs_model_params params = {.struct_size = sizeof params, .threads = 1};
    if (in.options & NO_ROOM) params.cache_bytes = 1;
    params.text_path = memory_file(0, in.parts[0].data, in.parts[0].size);
    memory_file(1, in.parts[2].data, in.parts[2].size);
    if (in.parts[1].size) params.mmproj_path = memory_file(2, in.parts[1].data, in.parts[1].size);
    int status = kvs_model_load(&params, &model, &err);
    check_error(status, &err);
    CHECK((status == KVS_OK) == (model != NULL));
    if (!status) run(model, in.options);
    kvs_model_free(model);
    return 0;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed) {
    mutator *const mutators[] = {mutate_gguf, mutate_gguf, mutate_gguf};
    return mutate_input(data, size, max, seed, 3, mutators);
}
