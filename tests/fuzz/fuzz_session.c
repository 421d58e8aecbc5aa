/* A saved session over a sound pair; what loads is looked at, goes on, and is rewound. Mutants get their checksums right, so that what
 * stands behind these is reached. */
#include "harness.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_CTX = 256, CTX_AT = 32, HEADER_BYTES_AT = 12, MIN_HEADER = 96 };

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed);

static kvs_model *model;
static kvs_model_info info;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    (void)argc, (void)argv;
    kvs_error err = new_error();
    char text[4096];
    snprintf(text, sizeof text, "%s", fixed_file("text.gguf"));
    kvs_model_params params = {.struct_size = sizeof params, .threads = 1, .text_path = text, .mmproj_path = fixed_file("mmproj.gguf")};
    int status = kvs_model_load(&params, &model, &err);
    if (status) fprintf(stderr, "%s\n", err.message);
    CHECK(!status);
    kvs_model_get_info(model, &info);
    return 0;
}

/* The last hash of a load goes over the stored sum, and its seed is what that sum has to be. */
uint64_t __real_kvs_hash(uint64_t seed, const void *data, uint64_t n);
uint64_t __wrap_kvs_hash(uint64_t seed, const void *data, uint64_t n);
static uint64_t last_seed;

uint64_t __wrap_kvs_hash(uint64_t seed, const void *data, uint64_t n) {
    last_seed = seed;
    return __real_kvs_hash(seed, data, n);
}

static bool expensive(part file) { /* a large context is legal, and slow */
    int32_t n_ctx = 0;
    if (file.size >= CTX_AT + 4) memcpy(&n_ctx, file.data + CTX_AT, 4);
    return n_ctx > MAX_CTX;
}

static int load(part file, uint32_t options, kvs_session **out, kvs_error *err) {
    kvs_session_params params = {.struct_size = sizeof params, .n_ctx = 1, .kv_type = KVS_TYPE_F16};
    policies chosen;
    choose_policies(options, info.image_size / info.patch_size, &chosen, &params);
    return kvs_session_load(model, memory_file(0, file.data, file.size), &params, out, NULL, err);
}

/* ---- what loads is used ---- */

static void look(kvs_session *s) {
    kvs_error err = new_error();
    int32_t n = kvs_session_n_past(s), generated = kvs_session_n_generated(s);
    size_t room = (size_t)n + 1;
    CHECK(n >= 0 && n <= kvs_session_n_ctx(s) && generated >= 0 && generated <= n && kvs_session_n_exact(s) >= 0);
    int32_t *ids = malloc(room * 4), *flags = malloc(room * 4), *positions = malloc(room * 4 * (size_t)info.n_head_kv);
    uint64_t *hashes = malloc(room * 8);
    float *k = malloc(room * 4 * (size_t)info.n_head_kv * (size_t)info.head_dim),
          *v = malloc(room * 4 * (size_t)info.n_head_kv * (size_t)info.head_dim);
    float *telemetry = malloc(room * 12 * (size_t)info.n_layer);
    check_error(kvs_session_timeline(s, n, ids, hashes, flags, &err), &err);
    for (int32_t i = 0; i < info.n_layer; i++) {
        int32_t rows = kvs_session_n_rows(s, i);
        CHECK(rows >= 0 && rows <= n);
        check_error(kvs_session_positions(s, i, rows, positions, &err), &err);
        check_error(kvs_session_kv(s, i, rows, k, v, &err), &err);
    }
    size_t columns = (size_t)generated * (size_t)info.n_layer;
    check_error(kvs_session_telemetry(s, generated, telemetry, telemetry + columns, telemetry + 2 * columns, &err), &err);
    kvs_pruning prunings[64];
    check_error(kvs_session_prunings(s, KVS_MIN(kvs_session_n_prunings(s), 64), prunings, &err), &err);
    CHECK(kvs_session_n_whole(s) >= 0 && kvs_session_n_whole(s) <= n && kvs_session_bytes(s) > 0);
    free(ids), free(flags), free(positions), free(hashes), free(k), free(v), free(telemetry);
}

static void go_on(kvs_session *s, uint32_t options) {
    kvs_error err = new_error();
    kvs_sample sample = {0};
    kvs_sampling sampling = {.struct_size = sizeof sampling, .temperature = 0.5f, .top_p = 0.9f, .repetition_penalty = 1.1f, .n_top = 3};
    const int32_t ids[] = {1, 2};
    kvs_chunk text = {.ids = ids, .n = 2};
    check_error(kvs_session_end_prefill(s, NULL, &err), &err);
    for (int i = 0; i < 3; i++) {
        check_error(kvs_session_sample(s, &sampling, &sample, NULL, &err), &err);
        check_error(kvs_sessions_step(&s, &sample.id, 1, NULL, &err), &err);
    }
    look(s);
    if (options & 64) check_error(kvs_session_restore(s, NULL, &err), &err);
    check_error(kvs_session_rewind(s, KVS_MIN(4, kvs_session_n_past(s)), NULL, &err), &err);
    check_error(kvs_session_new_turn(s, &err), &err);
    check_error(kvs_session_feed(s, &text, 1, NULL, &err), &err);
    check_error(kvs_sessions_step(&s, ids, 1, NULL, &err), &err);
    look(s);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    input in = read_input(data, size, 1);
    kvs_error err = new_error();
    kvs_session *session, *fork = NULL;
    if (expensive(in.parts[0])) return -1;
    int status = load(in.parts[0], in.options, &session, &err);
    check_error(status, &err);
    CHECK((status == KVS_OK) == (session != NULL));
    if (status) return 0;
    look(session);
    if (in.options & 128) check_error(kvs_session_fork(session, &fork, NULL, &err), &err);
    go_on(session, in.options);
    kvs_session_free(session);
    if (fork) go_on(fork, in.options);
    kvs_session_free(fork);
    return 0;
}

/* ---- mutants ---- */

static void repair(part file, uint8_t *data, uint32_t options) {
    uint32_t header = 0;
    kvs_error err = new_error();
    kvs_session *session = NULL;
    if (file.size >= MIN_HEADER) memcpy(&header, data + HEADER_BYTES_AT, 4);
    if (header < MIN_HEADER || header > file.size - 8 || expensive(file)) return;
    uint64_t check = __real_kvs_hash(0, data, header - 8);
    memcpy(data + header - 8, &check, 8);
    if (load(file, options, &session, &err) == KVS_E_SESSION_FILE && !strcmp(err.what, "checksum"))
        memcpy(data + file.size - 8, &last_seed, 8);
    kvs_session_free(session);
}

static size_t edit(uint8_t *data, size_t size, size_t max, uint64_t *rng) {
    uint32_t header = 0;
    if (size >= MIN_HEADER) memcpy(&header, data + HEADER_BYTES_AT, 4);
    if (header < MIN_HEADER || header >= size || next_random(rng) % 16 == 0) return LLVMFuzzerMutate(data, size, max);
    uint64_t which = next_random(rng) % 8;
    if (which < 2 || which == 7) { /* a number: of the header's first ones, or behind it */
        size_t first = which < 2 ? CTX_AT : header, n = which < 2 ? 48 : KVS_MIN(size - header, 512u);
        size_t at = first + (next_random(rng) % n & ~(size_t)3);
        uint32_t value = 0;
        size_t bytes = KVS_MIN(size - at, 4u);
        memcpy(&value, data + at, bytes);
        value = (uint32_t)edit_number(value, 4, rng);
        memcpy(data + at, &value, bytes);
        return size;
    }
    if (which == 2) { /* rows appear or disappear */
        size_t at = header + next_random(rng) % (size - header), n = 4 * (1 + next_random(rng) % 16);
        if (next_random(rng) % 2 && size + n <= max) {
            memmove(data + at + n, data + at, size - at);
            return size + n;
        }
        n = KVS_MIN(n, size - at);
        memmove(data + at, data + at + n, size - at - n);
        return size - n;
    }
    return header + LLVMFuzzerMutate(data + header, size - header, which < 6 ? size - header : max - header);
}

static size_t mutate_session(uint8_t *data, size_t size, size_t max, uint32_t seed) {
    uint64_t rng = seed;
    return edit(data, size, max, &rng);
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max, unsigned seed) {
    mutator *const mutators[] = {mutate_session};
    size = mutate_input(data, size, max, seed, 1, mutators);
    input in = read_input(data, size, 1);
    if (seed % 16) repair(in.parts[0], data + (size - in.parts[0].size), in.options);
    return size;
}
