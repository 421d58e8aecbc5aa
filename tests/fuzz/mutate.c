/* mutate.c - changes to GGUF files that know where its fields are: a blind flip ends at the first length, these reach what is behind. */
#include "harness.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_FIELDS = 2048, MAX_RECORDS = 256, MAX_FILE = 1 << 20, HEADER_BYTES = 24 };
enum kind { COUNTS, NAME, TEXT, TYPE, ELEMENT, LENGTH, NUMBER, N_DIMS, DIM, TENSOR_TYPE, OFFSET };

typedef struct field {
    uint32_t at;
    uint8_t bytes, kind;
} field;

typedef struct record {
    uint32_t at, value, end; /* value: behind its name */
    bool tensor;
} record;

typedef struct outline { /* of the header, as far as it can be followed */
    field fields[MAX_FIELDS];
    record records[MAX_RECORDS];
    uint32_t n_fields, n_records, end;
    uint64_t alignment;
} outline;

static const uint8_t value_bytes[13] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

static const char *const names[] = {"general.architecture",
                                    "general.alignment",
                                    "split.count",
                                    "split.no",
                                    "split.tensors.count",
                                    "llama.context_length",
                                    "llama.embedding_length",
                                    "llama.block_count",
                                    "llama.feed_forward_length",
                                    "llama.attention.head_count",
                                    "llama.attention.head_count_kv",
                                    "llama.attention.key_length",
                                    "llama.attention.value_length",
                                    "llama.attention.layer_norm_rms_epsilon",
                                    "llama.rope.dimension_count",
                                    "llama.rope.freq_base",
                                    "llama.rope.scaling.type",
                                    "llama.rope.scaling.factor",
                                    "llama.rope.scale_linear",
                                    "llama.vocab_size",
                                    "llama.expert_count",
                                    "llama.logit_scale",
                                    "tokenizer.ggml.model",
                                    "tokenizer.ggml.tokens",
                                    "tokenizer.ggml.scores",
                                    "tokenizer.ggml.token_type",
                                    "tokenizer.ggml.bos_token_id",
                                    "tokenizer.ggml.eos_token_id",
                                    "tokenizer.ggml.unknown_token_id",
                                    "tokenizer.ggml.padding_token_id",
                                    "tokenizer.ggml.add_bos_token",
                                    "tokenizer.ggml.add_space_prefix",
                                    "clip.projector_type",
                                    "clip.vision.projector_type",
                                    "clip.has_vision_encoder",
                                    "clip.has_llava_projector",
                                    "clip.use_gelu",
                                    "clip.use_silu",
                                    "clip.vision.image_size",
                                    "clip.vision.patch_size",
                                    "clip.vision.embedding_length",
                                    "clip.vision.feed_forward_length",
                                    "clip.vision.block_count",
                                    "clip.vision.attention.head_count",
                                    "clip.vision.attention.layer_norm_epsilon",
                                    "clip.vision.image_mean",
                                    "clip.vision.image_std",
                                    "clip.vision.feature_layer",
                                    "clip.vision.mm_patch_merge_type",
                                    "clip.vision.image_aspect_ratio",
                                    "clip.vision.image_grid_pinpoints",
                                    "rope_freqs.weight",
                                    "output.weight",
                                    "blk.0.attn_q.bias",
                                    "blk.0.attn_output.bias",
                                    "blk.0.ffn_down.bias",
                                    "v.patch_embd.bias",
                                    "v.post_ln.weight",
                                    "v.image_newline",
                                    "mm.3.weight",
                                    "v.blk.0.attn_qkv.weight",
                                    "v.blk.0.attn_output.weight",
                                    "v.blk.1023.ln1.bias"};
static const char *const words[] = {"llama",  "clip", "mlp",    "ldp", "none", "linear", "yarn",         "spatial_unpad",
                                    "anyres", "gpt2", "<0x41>", "<s>", "</s>", "<unk>",  "\xE2\x96\x81", "\xE2\x96\x81\x61"};
enum { N_NAMES = sizeof names / sizeof *names, N_WORDS = sizeof words / sizeof *words };

uint64_t next_random(uint64_t *rng) { /* splitmix64 */
    uint64_t x = *rng += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

static uint32_t below(uint64_t *rng, uint64_t n) { return n ? (uint32_t)(next_random(rng) % n) : 0; }

uint64_t edit_number(uint64_t value, int bytes, uint64_t *rng) {
    uint64_t top = bytes == 8 ? UINT64_MAX : ((uint64_t)1 << 8 * bytes) - 1;
    switch (below(rng, 9)) {
    case 0: return 0;
    case 1: return 1;
    case 2: return top;
    case 3: return top >> 1;
    case 4: return (top >> 1) + 1;
    case 5: return (uint64_t)1 << below(rng, 8 * (uint64_t)bytes);
    case 6: return value + below(rng, 16) - 8;
    case 7: return below(rng, 2) ? value * 2 : value / 2;
    default: return next_random(rng) >> below(rng, 64);
    }
}

/* ---- outline ---- */

static uint64_t get(const uint8_t *data, uint32_t at, int bytes) {
    uint64_t value = 0;
    memcpy(&value, data + at, (size_t)bytes);
    return value;
}

static void put(uint8_t *data, uint32_t at, int bytes, uint64_t value) { memcpy(data + at, &value, (size_t)bytes); }

typedef struct walker {
    const uint8_t *data;
    size_t size;
    uint32_t at;
    outline *o;
} walker;

static bool take(walker *w, int bytes, enum kind kind, uint64_t *value) {
    if (w->size - w->at < (size_t)bytes || w->o->n_fields == MAX_FIELDS) return false;
    w->o->fields[w->o->n_fields++] = (field){w->at, (uint8_t)bytes, (uint8_t)kind};
    *value = get(w->data, w->at, bytes);
    w->at += (uint32_t)bytes;
    return true;
}

static bool take_text(walker *w, enum kind kind) {
    uint64_t length;
    if (!take(w, 8, kind, &length) || length > w->size - w->at) return false;
    w->at += (uint32_t)length;
    return true;
}

static bool take_array(walker *w) {
    uint64_t element, count;
    if (!take(w, 4, ELEMENT, &element) || !take(w, 8, LENGTH, &count) || element > 12 || element == 9) return false;
    for (uint64_t i = 0; i < count && element == 8; i++)
        if (!take_text(w, TEXT)) return false;
    if (element == 8) return true;
    if (count > (w->size - w->at) / value_bytes[element]) return false;
    for (uint64_t i = 0, value; i < count && i < 8; i++) /* the first few are enough */
        if (!take(w, value_bytes[element], NUMBER, &value)) return false;
    w->at += (uint32_t)((count - KVS_MIN(count, 8)) * value_bytes[element]);
    return true;
}

static bool take_record(walker *w, bool tensor) {
    record r = {.at = w->at, .tensor = tensor};
    uint64_t type = 0, value = 0;
    if (w->o->n_records == MAX_RECORDS || !take_text(w, NAME)) return false;
    r.value = w->at;
    if (!take(w, 4, tensor ? N_DIMS : TYPE, &type)) return false;
    bool fine = true;
    if (tensor) {
        if (type > 8) return false;
        for (uint64_t i = 0; i < type && fine; i++) fine = take(w, 8, DIM, &value);
        fine = fine && take(w, 4, TENSOR_TYPE, &value) && take(w, 8, OFFSET, &value);
    } else if (type > 12) {
        return false;
    } else {
        fine = type == 8 ? take_text(w, TEXT) : type == 9 ? take_array(w) : take(w, value_bytes[type], NUMBER, &value);
    }
    if (!fine) return false;
    r.end = w->at;
    w->o->records[w->o->n_records++] = r;
    w->o->end = w->at;
    return true;
}

static bool named(const uint8_t *data, const record *r, const char *name) {
    return r->value - r->at - 8 == strlen(name) && !memcmp(data + r->at + 8, name, strlen(name));
}

static void draw_outline(const uint8_t *data, size_t size, outline *o) {
    o->n_fields = o->n_records = 0;
    o->end = HEADER_BYTES, o->alignment = 32;
    walker w = {data, size, 4, o};
    uint64_t version, n_tensors, n_keys;
    if (size < HEADER_BYTES || !take(&w, 4, COUNTS, &version) || !take(&w, 8, COUNTS, &n_tensors) || !take(&w, 8, COUNTS, &n_keys)) return;
    bool fine = true;
    for (uint64_t i = 0; i < n_keys && fine; i++) fine = take_record(&w, false);
    for (uint64_t i = 0; i < n_tensors && fine; i++) fine = take_record(&w, true);
    for (uint32_t i = 0; i < o->n_records; i++)
        if (named(data, &o->records[i], "general.alignment") &&
            o->records[i].end - o->records[i].value >= 8) /* its type may have been edited */
            o->alignment = get(data, o->records[i].value + 4, 4);
    if (o->alignment < 8 || o->alignment > 65536 || (o->alignment & (o->alignment - 1))) o->alignment = 32;
}

/* ---- one change ---- */

typedef struct change {
    uint8_t *data;
    size_t size, max;
    uint64_t rng;
    outline *o;
} change;

static uint64_t aligned(const change *c, uint64_t at) { return (at + c->o->alignment - 1) & ~(c->o->alignment - 1); }

/* Bytes of the header for others; the tensors' data stay where the header says. */
static void replace(change *c, uint32_t at, uint32_t remove, const void *insert, size_t n) {
    static uint8_t scratch[MAX_FILE];
    uint64_t data = aligned(c, c->o->end), end = c->o->end - remove + n, start = aligned(c, end);
    size_t rest = data < c->size ? c->size - (size_t)data : 0, total = rest ? (size_t)start + rest : (size_t)end;
    if (total > c->max || total > MAX_FILE || at + remove > c->o->end || c->o->end > c->size) return;
    memset(scratch, 0, total);
    memcpy(scratch, c->data, at);
    if (n) memcpy(scratch + at, insert, n);
    memcpy(scratch + at + n, c->data + at + remove, c->o->end - at - remove);
    if (rest) memcpy(scratch + start, c->data + data, rest);
    memcpy(c->data, scratch, total);
    c->size = total;
}

static void count_records(change *c, bool tensor, int64_t more) {
    uint32_t at = tensor ? 8 : 16;
    if (c->size >= HEADER_BYTES && below(&c->rng, 16)) put(c->data, at, 8, get(c->data, at, 8) + (uint64_t)more);
}

static const record *any_record(change *c) { return c->o->n_records ? &c->o->records[below(&c->rng, c->o->n_records)] : NULL; }

static const field *any_field(change *c, int kind) { /* -1: of any kind */
    for (int i = 0; i < 32 && c->o->n_fields; i++) {
        const field *f = &c->o->fields[below(&c->rng, c->o->n_fields)];
        if (kind < 0 || f->kind == kind) return f;
    }
    return NULL;
}

static void edit_field(change *c) {
    const field *f = any_field(c, -1);
    if (!f) return;
    uint64_t value = get(c->data, f->at, f->bytes);
    const field *other = any_field(c, f->kind);
    uint64_t edited = other && below(&c->rng, 4) == 0 ? get(c->data, other->at, f->bytes) : edit_number(value, f->bytes, &c->rng);
    if (f->kind == TENSOR_TYPE || f->kind == TYPE || f->kind == ELEMENT) edited = below(&c->rng, 8) ? below(&c->rng, 40) : edited;
    if (f->kind == NUMBER && f->bytes == 4 && below(&c->rng, 3) == 0) {
        static const float floats[] = {0.0f, -1.0f, 1e-38f, 1e38f, 1.0f / 0.0f, 0.0f / 0.0f, 1e-5f, 2.0f};
        memcpy(&edited, &floats[below(&c->rng, 8)], 4);
    }
    put(c->data, f->at, f->bytes, edited);
}

static void drop_record(change *c) {
    const record *r = any_record(c);
    if (!r) return;
    replace(c, r->at, r->end - r->at, NULL, 0);
    count_records(c, r->tensor, -1);
}

static void copy_record(change *c) {
    const record *r = any_record(c), *where = any_record(c);
    uint8_t copy[4096];
    if (!r || r->end - r->at > sizeof copy) return;
    if (where->tensor != r->tensor) where = r;
    memcpy(copy, c->data + r->at, r->end - r->at);
    replace(c, where->at, 0, copy, r->end - r->at);
    count_records(c, r->tensor, 1);
}

static size_t write_text(uint8_t *out, const void *text, size_t n) {
    uint64_t length = n;
    memcpy(out, &length, 8);
    memcpy(out + 8, text, n);
    return n + 8;
}

static void rename_record(change *c) {
    const record *r = any_record(c), *other = any_record(c);
    uint8_t name[4096 + 8];
    if (!r) return;
    size_t n = KVS_MIN(other->value - other->at, 4096u);
    if (below(&c->rng, 2)) {
        const char *known = names[below(&c->rng, N_NAMES)];
        n = write_text(name, known, strlen(known));
    } else {
        memcpy(name, c->data + other->at, n);
    }
    replace(c, r->at, r->value - r->at, name, n);
}

static void edit_text(change *c) {
    const field *f = any_field(c, below(&c->rng, 4) ? TEXT : NAME);
    uint8_t text[2048 + 8];
    if (!f) return;
    uint32_t length = (uint32_t)get(c->data, f->at, 8);
    if (length > 1024 || f->at + 8 + length > c->o->end) return;
    memcpy(text + 8, c->data + f->at + 8, length);
    size_t n;
    if (below(&c->rng, 3)) {
        n = LLVMFuzzerMutate(text + 8, length, 2048);
    } else {
        const char *word = words[below(&c->rng, N_WORDS)];
        n = strlen(word);
        memcpy(text + 8, word, n);
    }
    uint64_t fits = n;
    memcpy(text, &fits, 8);
    replace(c, f->at, 8 + length, text, 8 + n);
}

/* A value of any type, as it stands behind a key's name. */
static size_t write_value(change *c, uint8_t *out) {
    uint32_t type = below(&c->rng, 13), n = 4;
    memcpy(out, &type, 4);
    if (type == 9) {
        uint32_t element = below(&c->rng, 13);
        uint64_t count = below(&c->rng, 5);
        memcpy(out + 4, &element, 4);
        memcpy(out + 8, &count, 8);
        n = 16;
        for (uint64_t i = 0; i < count * value_bytes[element]; i++) out[n++] = (uint8_t)(below(&c->rng, 3) ? below(&c->rng, 3) : 0);
        for (uint64_t i = 0; i < count && element == 8; i++) n += (uint32_t)write_text(out + n, "ab", 2);
        return n;
    }
    if (type == 8) {
        const char *word = words[below(&c->rng, N_WORDS)];
        return n + write_text(out + n, word, strlen(word));
    }
    uint64_t value = below(&c->rng, 2) ? below(&c->rng, 9) : edit_number(1, value_bytes[type], &c->rng);
    memcpy(out + n, &value, value_bytes[type]);
    return n + value_bytes[type];
}

static void retype_key(change *c) {
    const record *r = any_record(c);
    uint8_t value[256];
    if (r && !r->tensor) replace(c, r->value, r->end - r->value, value, write_value(c, value));
}

static void add_key(change *c) {
    const record *r = any_record(c);
    uint8_t key[512];
    const char *name = names[below(&c->rng, N_NAMES)];
    size_t n = write_text(key, name, strlen(name));
    n += write_value(c, key + n);
    replace(c, r && !r->tensor ? r->at : HEADER_BYTES, 0, key, n);
    count_records(c, false, 1);
}

/* Elements more or less, with a count that says so. */
static void resize_array(change *c) {
    const field *f = any_field(c, LENGTH);
    if (!f) return;
    uint32_t element = (uint32_t)get(c->data, f->at - 4, 4);
    uint64_t count = get(c->data, f->at, 8), n = 1 + below(&c->rng, 3);
    if (element == 8) {
        const char *word = words[below(&c->rng, N_WORDS)];
        uint8_t text[64];
        put(c->data, f->at, 8, count + 1);
        replace(c, f->at + 8, 0, text, write_text(text, word, strlen(word)));
    } else if (element <= 12 && below(&c->rng, 2) && count >= n) {
        put(c->data, f->at, 8, count - n);
        replace(c, f->at + 8, (uint32_t)n * value_bytes[element], NULL, 0);
    } else if (element <= 12) {
        static const uint8_t zeros[32];
        put(c->data, f->at, 8, count + n);
        replace(c, f->at + 8, 0, zeros, n * value_bytes[element]);
    }
}

static void edit_data(change *c) {
    static const uint32_t words_of_data[] = {0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF, 1, 0x7C007C00, 0x7E007E00, 0xFFFFFFFF};
    uint64_t data = aligned(c, c->o->end);
    if (data + 4 >= c->size) return;
    size_t n = c->size - (size_t)data;
    if (below(&c->rng, 2))
        memcpy(c->data + data + (below(&c->rng, n - 3) & ~3u), &words_of_data[below(&c->rng, 8)], 4);
    else
        c->size = (size_t)data + LLVMFuzzerMutate(c->data + data, n, c->max - (size_t)data);
}

static void cut(change *c) {
    const field *f = any_field(c, -1);
    if (below(&c->rng, 2) && c->size)
        c->size = f && below(&c->rng, 2) ? f->at + below(&c->rng, 9) : below(&c->rng, c->size);
    else if (c->size + 64 <= c->max)
        memset(c->data + c->size, 0, 64), c->size += 64;
}

size_t mutate_bytes(uint8_t *data, size_t size, size_t max, uint32_t seed) {
    (void)seed;
    return LLVMFuzzerMutate(data, size, max);
}

size_t mutate_gguf(uint8_t *data, size_t size, size_t max, uint32_t seed) {
    static outline o;
    static void (*const changes[])(change *) = {edit_field, edit_field, edit_field,   drop_record, copy_record, rename_record,
                                                edit_text,  retype_key, resize_array, edit_data,   add_key,     edit_text};
    change c = {data, size, KVS_MIN(max, MAX_FILE), seed, &o};
    for (uint32_t left = 1 + below(&c.rng, 3); left; left--) {
        draw_outline(c.data, c.size, &o);
        uint32_t which = below(&c.rng, 64);
        if (which == 0)
            cut(&c);
        else if (which < 4 || !o.n_fields)
            c.size = LLVMFuzzerMutate(c.data, c.size, c.max);
        else
            changes[which % (sizeof changes / sizeof *changes)](&c);
    }
    return c.size;
}

static size_t splice(uint8_t *data, size_t size, size_t max, const uint8_t *other, size_t other_size, uint32_t seed) {
    static outline mine, theirs;
    change c = {data, size, KVS_MIN(max, MAX_FILE), seed, &theirs};
    draw_outline(other, other_size, &theirs);
    const record *r = any_record(&c);
    c.o = &mine;
    draw_outline(data, size, &mine);
    const record *where = any_record(&c);
    if (!r || !where) return size;
    bool instead = where->tensor == r->tensor && below(&c.rng, 2);
    uint32_t at = where->tensor == r->tensor ? where->at : r->tensor ? mine.end : HEADER_BYTES;
    replace(&c, at, instead ? where->end - where->at : 0, other + r->at, r->end - r->at);
    if (!instead) count_records(&c, r->tensor, 1);
    return c.size;
}

size_t crossover_gguf(const uint8_t *a, size_t n, const uint8_t *b, size_t m, uint8_t *out, size_t max, uint32_t seed) {
    if (n > max) return 0;
    memcpy(out, a, n);
    return splice(out, n, max, b, m, seed);
}
