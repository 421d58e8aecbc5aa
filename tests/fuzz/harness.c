#include "harness.h"

#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { N_FILES = 3 };

/* ---- files ---- */

static char folder[] = "/tmp/kvs-fuzz-XXXXXX";
static char paths[N_FILES][64];
static int files[N_FILES];

static void remove_files(void) {
    for (int i = 0; i < N_FILES; i++) unlink(paths[i]);
    rmdir(folder);
}

static void make_files(void) {
    CHECK(mkdtemp(folder));
    for (int i = 0; i < N_FILES; i++) {
        char target[64];
        files[i] = memfd_create("fuzz", MFD_CLOEXEC);
        CHECK(files[i] >= 0);
        snprintf(target, sizeof target, "/proc/self/fd/%d", files[i]);
        snprintf(paths[i], sizeof paths[i], "%s/m-0000%d-of-00002.gguf", folder, i + 1);
        CHECK(!symlink(target, paths[i]));
    }
    atexit(remove_files);
}

const char *memory_file(int i, const uint8_t *data, size_t size) {
    if (!paths[0][0]) make_files();
    CHECK(!ftruncate(files[i], (off_t)size) && pwrite(files[i], data, size, 0) == (ssize_t)size);
    return paths[i];
}

const char *fixed_file(const char *name) {
    static char path[4096];
    snprintf(path, sizeof path, KVS_FUZZ_CORPUS "/fixed/%s", name);
    return path;
}

/* ---- mappings: a block of the heap instead, so that AddressSanitizer sees the first byte read beyond the file ---- */

void *__real_mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset);
int __real_munmap(void *address, size_t size);
void *__wrap_mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset);
int __wrap_munmap(void *address, size_t size);

enum { MAX_MAPPED = 64 };
static void *mapped[MAX_MAPPED];

void *__wrap_mmap(void *address, size_t size, int protection, int flags, int fd, off_t offset) {
    int slot = 0;
    while (slot < MAX_MAPPED && mapped[slot]) slot++;
    if (fd < 0 || address || (protection & PROT_WRITE) || slot == MAX_MAPPED)
        return __real_mmap(address, size, protection, flags, fd, offset);
    void *block;
    if (posix_memalign(&block, 64, size)) return MAP_FAILED;
    CHECK(pread(fd, block, size, offset) == (ssize_t)size);
    return mapped[slot] = block;
}

int __wrap_munmap(void *address, size_t size) {
    for (int i = 0; i < MAX_MAPPED && address; i++)
        if (mapped[i] == address) {
            mapped[i] = NULL;
            free(address);
            return 0;
        }
    return __real_munmap(address, size);
}

const char *__asan_default_options(void);
const char *__asan_default_options(void) { return "quarantine_size_mb=16:allocator_may_return_null=1"; }

/* ---- inputs of several parts ---- */

input read_input(const uint8_t *data, size_t size, int n_parts) {
    input in = {0};
    size_t at = KVS_MIN(size, OPTION_BYTES);
    memcpy(&in.options, data, at);
    for (int i = 0; i < n_parts; i++) {
        uint32_t length = UINT32_MAX;
        if (i + 1 < n_parts) {
            size_t n = KVS_MIN(size - at, sizeof length);
            length = 0;
            memcpy(&length, data + at, n);
            at += n;
        }
        in.parts[i] = (part){data + at, KVS_MIN(size - at, length)};
        at += in.parts[i].size;
    }
    return in;
}

static size_t write_input(const input *in, int n_parts, uint8_t *out, size_t max) {
    size_t at = 0;
    for (int i = 0; i < n_parts; i++) {
        uint32_t length = (uint32_t)in->parts[i].size;
        size_t head = i ? 0 : OPTION_BYTES;
        head += i + 1 < n_parts ? sizeof length : 0;
        if (at + head + length > max) return 0;
        if (!i) memcpy(out, &in->options, OPTION_BYTES), at = OPTION_BYTES;
        if (i + 1 < n_parts) memcpy(out + at, &length, sizeof length), at += sizeof length;
        memcpy(out + at, in->parts[i].data, length);
        at += length;
    }
    return at;
}

size_t mutate_input(uint8_t *data, size_t size, size_t max, uint32_t seed, int n_parts, mutator *const mutators[]) {
    uint64_t rng = seed;
    input in = read_input(data, size, n_parts);
    if (next_random(&rng) % 8 == 0) in.options ^= 1u << next_random(&rng) % 8;
    int i = (int)(next_random(&rng) % (unsigned)n_parts);
    if (!in.parts[i].size) i = 0;
    size_t others = size - in.parts[i].size, room = max > others + 64 ? max - others - 64 : in.parts[i].size;
    uint8_t *copy = malloc(KVS_MAX(room, in.parts[i].size) + 1), *whole = malloc(max + 1);
    CHECK(copy && whole);
    if (in.parts[i].size) memcpy(copy, in.parts[i].data, in.parts[i].size);
    size_t changed = mutators[i](copy, in.parts[i].size, KVS_MAX(room, in.parts[i].size), (uint32_t)next_random(&rng));
    in.parts[i] = (part){copy, changed};
    size_t n = write_input(&in, n_parts, whole, max);
    if (n) memcpy(data, whole, n);
    free(copy);
    free(whole);
    return n ? n : size;
}

/* ---- checks ---- */

_Noreturn void fail_check(const char *file, int line, const char *condition) {
    fprintf(stderr, "%s:%d: this does not hold: %s\n", file, line, condition);
    abort();
}

kvs_error new_error(void) { return (kvs_error){.struct_size = sizeof(kvs_error)}; }

void check_error(int status, const kvs_error *err) {
    if (!status) return;
    CHECK(status >= KVS_E_FORMAT && status <= KVS_E_LIMIT && err->code == status && err->message[0]);
    for (const char *c = err->message; *c; c++) CHECK((unsigned char)*c >= 32 && *c != 127);
    CHECK(memchr(err->message, 0, sizeof err->message) && memchr(err->what, 0, sizeof err->what));
}

kvs_tokenizer *load_vocabulary(part file) {
    kvs_error err = new_error();
    kvs_gguf *opened;
    kvs_tokenizer *tok = NULL;
    int status = kvs_gguf_open(memory_file(0, file.data, file.size), &opened, &err);
    check_error(status, &err);
    if (!status) check_error(status = kvs_tokenizer_load(opened, &tok, &err), &err);
    kvs_gguf_free(opened); /* a vocabulary keeps nothing of its file */
    CHECK((status == KVS_OK) == (tok != NULL));
    return tok;
}

void touch(const void *data, size_t size) {
    const volatile uint8_t *bytes = data;
    for (size_t i = 0; i < size; i++) (void)bytes[i];
}

/* ---- policies ---- */

void choose_policies(uint32_t options, int32_t grid, policies *chosen, kvs_session_params *params) {
    static const int32_t layers[] = {0};
    bool variant = options & 16;
    chosen->smooth = (kvs_smooth_params){.struct_size = sizeof(kvs_smooth_params),
                                         .lambda_ref = 0.5f,
                                         .half_width = 0.25f,
                                         .lambda_max = 1.0f,
                                         .lambda_fixed = __builtin_nanf(""),
                                         .window = 3,
                                         .target = KVS_TARGET_K | KVS_TARGET_V,
                                         .rope_relative = variant,
                                         .per_kv_head = variant,
                                         .ema_one_step = variant,
                                         .n_layers = 1,
                                         .layers = layers};
    chosen->dscr = (kvs_dscr_params){.struct_size = sizeof(kvs_dscr_params),
                                     .sigma_d = 0.5f,
                                     .sigma_s = 0.5f,
                                     .alpha = 0.5f,
                                     .beta = 1.0f,
                                     .gamma = 1.0f,
                                     .target = KVS_TARGET_K | KVS_TARGET_V,
                                     .grid_w = grid,
                                     .grid_h = grid,
                                     .step_x = 1.0f,
                                     .step_y = 1.0f,
                                     .n_layers = 1,
                                     .layers = layers};
    chosen->prune = (kvs_prune_params){.struct_size = sizeof(kvs_prune_params),
                                       .times = 3,
                                       .keep = 0.5,
                                       .vote_fraction = 0.5,
                                       .force_step = 2,
                                       .scope = options & 32 ? KVS_SCOPE_KV_HEAD : KVS_SCOPE_LAYER,
                                       .reversible = (options & 8) != 0,
                                       .n_layers = 1,
                                       .layers = layers};
    if (options & 1) params->smooth = &chosen->smooth;
    if (options & 2 && grid > 0) params->dscr = &chosen->dscr;
    if (options & 4) params->prune = &chosen->prune;
}
