/* tokenizer.c - the vocabulary of a GGUF file: text -> ids and id -> bytes, as SentencePiece's BPE does it.
 *
 * Text is cut at user-defined tokens (always) and at control tokens (special = true), leftmost first, longest first. Each piece
 * of text between them gets a space in front (add_space_prefix), also after such a token: that is what the tokenizer.json of the
 * published LLaVA-1.5 checkpoints does (its normalizer prepends U+2581 to every fragment), what original LLaVA does with the two
 * sides of "<image>", and what llama.cpp does. transformers' newer rule (legacy=False: only the very first fragment) is that of
 * other checkpoints. No text, no space: nothing stands between two neighbouring special tokens.
 *
 * Then spaces become U+2581, characters become symbols, and the pair of neighbours whose union is the piece of highest score
 * is merged, the leftmost of equal ones, until no pair is a piece. A symbol that is no piece becomes its byte tokens, or one
 * unknown token for a run of them where the vocabulary lacks these bytes.
 *
 * Three decisions of ours:
 *  - U+2581 in the text itself would be a space after the round trip, so it becomes the three byte tokens where there are any.
 *    SentencePiece takes it for a space.
 *  - Bytes that are not UTF-8 become byte tokens; SentencePiece replaces them by U+FFFD.
 *  - Of pieces with the same text the last one wins, as in llama.cpp and transformers; SentencePiece refuses such a vocabulary.
 */
#include "tokenizer.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define BAR "\xE2\x96\x81" /* U+2581, SentencePiece's visible space */
enum { BAR_BYTES = 3 };
enum { MAX_VOCAB = 1 << 24 };
/* Longer control and user-defined tokens are not looked for in text: the search is bounded by this for each byte of it. */
enum { MAX_SPECIAL_BYTES = 1024 };
static const char UNKNOWN_SHOWN[] = " \xE2\x81\x87 "; /* what SentencePiece decodes an unknown token to */

typedef struct piece {
    const char *bytes;
    uint32_t length;
    int32_t id;
} piece;

/* Sorted by bytes, each text once. Sorted, not hashed: a file could be made so that its pieces collide. */
typedef struct piece_set {
    piece *pieces;
    int32_t n;
} piece_set;

typedef struct special_set {
    piece_set set;
    bool starts[256]; /* by first byte: almost all of a text is skipped by this */
} special_set;

struct kvs_tokenizer {
    int32_t n_vocab;
    uint64_t *at;          /* (n_vocab + 1): piece i is text[at[i] .. at[i + 1]) */
    char *text;            /* the pieces as in the file */
    char *shown;           /* what they stand for, at the same offsets: never longer than the piece */
    uint32_t *n_shown;     /* (n_vocab) */
    float *scores;         /* (n_vocab) */
    uint8_t *kinds;        /* (n_vocab), kvs_token_kind */
    piece_set merged;      /* the pieces that merging may form */
    int32_t byte_ids[256]; /* -1 = none */
    special_set user;      /* matched always */
    special_set special;   /* user and control and unknown: matched when special tokens are allowed */
    int32_t bos, eos, unk, pad;
    bool add_bos, add_space_prefix;
    bool bar_as_bytes; /* the three bytes of U+2581 have tokens */
    bool has_unused;
};

static uint64_t piece_length(const kvs_tokenizer *tok, int32_t id) { return tok->at[id + 1] - tok->at[id]; }
static const char *piece_text(const kvs_tokenizer *tok, int32_t id) { return tok->text + tok->at[id]; }

/* ---- pieces by their text ---- */

static int compare_pieces(const void *pa, const void *pb) {
    const piece *a = pa, *b = pb;
    int order = memcmp(a->bytes, b->bytes, KVS_MIN(a->length, b->length));
    if (order) return order;
    return (a->length > b->length) - (a->length < b->length);
}

static int compare_pieces_and_ids(const void *pa, const void *pb) {
    int order = compare_pieces(pa, pb);
    return order ? order : ((const piece *)pa)->id - ((const piece *)pb)->id;
}

static void sort_pieces(piece_set *set) {
    int32_t n = set->n;
    qsort(set->pieces, (size_t)n, sizeof *set->pieces, compare_pieces_and_ids);
    set->n = 0;
    for (int32_t i = 0; i < n; i++) /* of equal ones the last stays */
        if (i + 1 == n || compare_pieces(&set->pieces[i], &set->pieces[i + 1])) set->pieces[set->n++] = set->pieces[i];
}

static int32_t find_piece(const kvs_tokenizer *tok, const char *text, uint64_t length) {
    if (length == 0 || length > UINT32_MAX) return -1;
    piece wanted = {.bytes = text, .length = (uint32_t)length};
    const piece *found = bsearch(&wanted, tok->merged.pieces, (size_t)tok->merged.n, sizeof wanted, compare_pieces);
    return found ? found->id : -1;
}

/* Control, unknown and byte tokens stay out: no text may be merged into them. */
static bool merges_into(int kind) { return kind == KVS_TOKEN_NORMAL || kind == KVS_TOKEN_USER || kind == KVS_TOKEN_UNUSED; }

static int build_merged(kvs_tokenizer *tok, kvs_error *err) {
    piece_set *set = &tok->merged;
    set->pieces = kvs_calloc((uint64_t)tok->n_vocab, sizeof *set->pieces);
    if (!set->pieces) return kvs_fail_memory(err, (uint64_t)tok->n_vocab * sizeof *set->pieces, "the vocabulary");
    for (int32_t id = 0; id < tok->n_vocab; id++) {
        uint64_t length = piece_length(tok, id); /* below 2^31, see copy_pieces */
        if (length && merges_into(tok->kinds[id])) set->pieces[set->n++] = (piece){piece_text(tok, id), (uint32_t)length, id};
    }
    sort_pieces(set);
    return KVS_OK;
}

/* ---- special tokens in text ---- */

static bool is_special(int kind, bool controls) {
    return kind == KVS_TOKEN_USER || (controls && (kind == KVS_TOKEN_CONTROL || kind == KVS_TOKEN_UNKNOWN));
}

static int build_specials(const kvs_tokenizer *tok, bool controls, special_set *special, kvs_error *err) {
    piece_set *set = &special->set;
    uint64_t count = 0;
    for (int32_t id = 0; id < tok->n_vocab; id++) count += is_special(tok->kinds[id], controls);
    set->pieces = kvs_calloc(count, sizeof *set->pieces);
    if (!set->pieces) return kvs_fail_memory(err, count * sizeof *set->pieces, "the special tokens");
    for (int32_t id = 0; id < tok->n_vocab; id++) {
        uint32_t length = tok->n_shown[id];
        if (!is_special(tok->kinds[id], controls) || length == 0 || length > MAX_SPECIAL_BYTES) continue;
        set->pieces[set->n++] = (piece){tok->shown + tok->at[id], length, id};
        special->starts[(uint8_t)tok->shown[tok->at[id]]] = true;
    }
    sort_pieces(set);
    return KVS_OK;
}

/* The first token in [lo, hi), all longer than depth, whose byte at depth is not below byte. */
static int32_t lower_bound(const piece_set *set, int32_t lo, int32_t hi, uint64_t depth, int byte) {
    while (lo < hi) {
        int32_t mid = lo + (hi - lo) / 2;
        if ((uint8_t)set->pieces[mid].bytes[depth] < byte)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

/* The longest special token that text begins with, or NULL: the range of sorted tokens is narrowed byte by byte. */
static const piece *match_special(const special_set *special, const char *text, uint64_t length) {
    const piece *best = NULL;
    const piece_set *set = &special->set;
    if (!special->starts[(uint8_t)text[0]]) return NULL;
    int32_t lo = 0, hi = set->n;
    for (uint64_t depth = 0; lo < hi; depth++) {
        if (set->pieces[lo].length == depth) best = &set->pieces[lo++];
        if (lo == hi || depth == length) break;
        int byte = (uint8_t)text[depth];
        lo = lower_bound(set, lo, hi, depth, byte);
        hi = lower_bound(set, lo, hi, depth, byte + 1);
    }
    return best;
}

/* ---- loading ---- */

static int fail_key(const kvs_gguf *file, const char *key, kvs_error *err, const char *message) {
    return kvs_fail_file(err, KVS_E_FORMAT, kvs_gguf_path(file), key, kvs_gguf_key_offset(file, key), "%s", message);
}

static int check_model(const kvs_gguf *file, kvs_error *err) {
    const char *key = "tokenizer.ggml.model";
    char name[64];
    int rc = kvs_gguf_get_string(file, key, NULL, name, sizeof name, err);
    if (rc) return rc;
    if (!strcmp(name, "llama")) return KVS_OK;
    return kvs_fail_file(err, KVS_E_UNSUPPORTED, kvs_gguf_path(file), key, kvs_gguf_key_offset(file, key),
                         "tokenizer \"%s\" is not supported; what loads: \"llama\" (SentencePiece)", name);
}

static int copy_pieces(const kvs_gguf *file, int64_t index, kvs_tokenizer *tok, kvs_error *err) {
    uint64_t total = 0;
    for (int32_t i = 0; i < tok->n_vocab; i++) {
        int64_t length = 0;
        const char *bytes = kvs_gguf_string(file, index, i, &length);
        if (!bytes || length < 0 || length > INT32_MAX) return fail_key(file, "tokenizer.ggml.tokens", err, "a token can't be read");
        tok->at[i] = total;
        total += (uint64_t)length; /* 2^24 lengths below 2^31: no overflow */
    }
    tok->at[tok->n_vocab] = total;
    tok->text = kvs_calloc(total, 1);
    tok->shown = kvs_calloc(total, 1);
    if (!tok->text || !tok->shown) return kvs_fail_memory(err, 2 * total, "the texts of the vocabulary");
    for (int32_t i = 0; i < tok->n_vocab; i++) {
        int64_t length = 0;
        const char *bytes = kvs_gguf_string(file, index, i, &length);
        if (length) memcpy(tok->text + tok->at[i], bytes, (size_t)length);
    }
    return KVS_OK;
}

static int load_pieces(const kvs_gguf *file, kvs_tokenizer *tok, kvs_error *err) {
    const char *key = "tokenizer.ggml.tokens";
    int64_t index = -1, count = 0;
    int rc = kvs_gguf_get_array(file, key, 's', NULL, &index, &count, err);
    if (rc) return rc;
    if (count < 1 || count > MAX_VOCAB)
        return kvs_fail_file(err, KVS_E_FORMAT, kvs_gguf_path(file), key, kvs_gguf_key_offset(file, key), "%lld tokens; 1 to %d can be",
                             (long long)count, MAX_VOCAB);
    tok->n_vocab = (int32_t)count;
    uint64_t n = (uint64_t)count;
    tok->at = kvs_calloc(n + 1, sizeof *tok->at);
    tok->n_shown = kvs_calloc(n, sizeof *tok->n_shown);
    tok->scores = kvs_calloc(n, sizeof *tok->scores);
    tok->kinds = kvs_calloc(n, sizeof *tok->kinds);
    if (!tok->at || !tok->n_shown || !tok->scores || !tok->kinds) return kvs_fail_memory(err, n * 17, "the vocabulary");
    return copy_pieces(file, index, tok, err);
}

static int check_count(const kvs_gguf *file, const char *key, int64_t count, const kvs_tokenizer *tok, kvs_error *err) {
    if (count == tok->n_vocab) return KVS_OK;
    return kvs_fail_file(err, KVS_E_FORMAT, kvs_gguf_path(file), key, kvs_gguf_key_offset(file, key), "%lld entries for %d tokens",
                         (long long)count, tok->n_vocab);
}

static int load_scores(const kvs_gguf *file, kvs_tokenizer *tok, kvs_error *err) {
    const char *key = "tokenizer.ggml.scores";
    int64_t index = -1, count = 0;
    int rc = kvs_gguf_get_array(file, key, 'f', NULL, &index, &count, err);
    if (!rc) rc = check_count(file, key, count, tok, err);
    for (int32_t i = 0; !rc && i < tok->n_vocab; i++) {
        tok->scores[i] = (float)kvs_gguf_float(file, index, i);
        if (!isfinite(tok->scores[i]))
            rc = kvs_fail_file(err, KVS_E_FORMAT, kvs_gguf_path(file), key, kvs_gguf_key_offset(file, key),
                               "the score of token %d is not a finite number", i);
    }
    return rc;
}

/* "<0xNN>" -> 0xNN, anything else -> -1 */
static int byte_value(const char *text, uint64_t length) {
    if (length != 6 || memcmp(text, "<0x", 3) || text[5] != '>') return -1;
    int value = 0;
    for (int i = 3; i < 5; i++) {
        int c = (uint8_t)text[i];
        int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
        if (digit < 0) return -1;
        value = value * 16 + digit;
    }
    return value;
}

/* A file without types: what can be told from the texts and the ids. */
static void infer_kinds(kvs_tokenizer *tok) {
    for (int32_t i = 0; i < tok->n_vocab; i++)
        tok->kinds[i] = byte_value(piece_text(tok, i), piece_length(tok, i)) >= 0 ? KVS_TOKEN_BYTE : KVS_TOKEN_NORMAL;
    const int32_t controls[] = {tok->bos, tok->eos, tok->pad};
    for (int i = 0; i < 3; i++)
        if (controls[i] >= 0) tok->kinds[controls[i]] = KVS_TOKEN_CONTROL;
    if (tok->unk >= 0) tok->kinds[tok->unk] = KVS_TOKEN_UNKNOWN;
}

static int load_kinds(const kvs_gguf *file, kvs_tokenizer *tok, kvs_error *err) {
    const char *key = "tokenizer.ggml.token_type";
    bool found = false;
    int64_t index = -1, count = 0;
    int rc = kvs_gguf_get_array(file, key, 'i', &found, &index, &count, err);
    if (rc) return rc;
    if (!found) {
        infer_kinds(tok);
        return KVS_OK;
    }
    rc = check_count(file, key, count, tok, err);
    for (int32_t i = 0; !rc && i < tok->n_vocab; i++) {
        int64_t kind = kvs_gguf_int(file, index, i);
        if (kind < 0 || kind > KVS_TOKEN_BYTE)
            return kvs_fail_file(err, KVS_E_FORMAT, kvs_gguf_path(file), key, kvs_gguf_key_offset(file, key),
                                 "token %d has type %lld; 0 to 6 are known", i, (long long)kind);
        if (kind == KVS_TOKEN_BYTE && byte_value(piece_text(tok, i), piece_length(tok, i)) < 0)
            return kvs_fail_file(err, KVS_E_FORMAT, kvs_gguf_path(file), key, kvs_gguf_key_offset(file, key),
                                 "token %d is a byte, but its text is not <0xNN>", i);
        tok->kinds[i] = kind ? (uint8_t)kind : KVS_TOKEN_NORMAL; /* 0: left undefined by the writer */
    }
    return rc;
}

static int load_id(const kvs_gguf *file, const char *key, const kvs_tokenizer *tok, int32_t *id, kvs_error *err) {
    bool found = false;
    uint32_t value = 0;
    int rc = kvs_gguf_get_u32(file, key, 0, (uint32_t)tok->n_vocab - 1, &found, &value, err);
    *id = !rc && found ? (int32_t)value : -1;
    return rc;
}

/* Where a key is absent: the only token of this kind with this text (NULL: any text). */
static int32_t find_kind(const kvs_tokenizer *tok, int kind, const char *text) {
    for (int32_t i = 0; i < tok->n_vocab; i++) {
        if (tok->kinds[i] != kind) continue;
        if (!text || (piece_length(tok, i) == strlen(text) && !memcmp(piece_text(tok, i), text, strlen(text)))) return i;
    }
    return -1;
}

static int load_switch(const kvs_gguf *file, const char *key, bool *value, kvs_error *err) {
    bool found = false, read = false;
    int rc = kvs_gguf_get_bool(file, key, &found, &read, err);
    *value = found ? read : true;
    return rc;
}

static int load_ids(const kvs_gguf *file, kvs_tokenizer *tok, kvs_error *err) {
    int rc = load_id(file, "tokenizer.ggml.bos_token_id", tok, &tok->bos, err);
    if (!rc) rc = load_id(file, "tokenizer.ggml.eos_token_id", tok, &tok->eos, err);
    if (!rc) rc = load_id(file, "tokenizer.ggml.unknown_token_id", tok, &tok->unk, err);
    if (!rc) rc = load_id(file, "tokenizer.ggml.padding_token_id", tok, &tok->pad, err);
    if (!rc) rc = load_switch(file, "tokenizer.ggml.add_bos_token", &tok->add_bos, err);
    if (!rc) rc = load_switch(file, "tokenizer.ggml.add_space_prefix", &tok->add_space_prefix, err);
    return rc;
}

/* text with spaces for U+2581; the length */
static uint32_t show_piece(const char *text, uint64_t length, char *shown) {
    uint32_t n = 0;
    for (uint64_t i = 0; i < length;) {
        bool bar = length - i >= BAR_BYTES && !memcmp(text + i, BAR, BAR_BYTES);
        shown[n++] = bar ? ' ' : text[i];
        i += bar ? BAR_BYTES : 1;
    }
    return n;
}

static void show_pieces(kvs_tokenizer *tok) {
    memset(tok->byte_ids, 0xFF, sizeof tok->byte_ids);
    for (int32_t i = 0; i < tok->n_vocab; i++) {
        char *shown = tok->shown + tok->at[i];
        if (tok->kinds[i] == KVS_TOKEN_BYTE) {
            int value = byte_value(piece_text(tok, i), piece_length(tok, i));
            tok->byte_ids[value] = i;
            shown[0] = (char)value;
            tok->n_shown[i] = 1;
        } else {
            tok->n_shown[i] = show_piece(piece_text(tok, i), piece_length(tok, i), shown);
        }
        tok->has_unused |= tok->kinds[i] == KVS_TOKEN_UNUSED;
    }
}

static bool has_bytes(const kvs_tokenizer *tok, const char *bytes, uint64_t n) {
    for (uint64_t i = 0; i < n; i++)
        if (tok->byte_ids[(uint8_t)bytes[i]] < 0) return false;
    return true;
}

/* Any text must have ids: an unknown token, or a token for every byte. */
static int check_coverage(const kvs_gguf *file, const kvs_tokenizer *tok, kvs_error *err) {
    if (tok->unk >= 0) return KVS_OK;
    for (int i = 0; i < 256; i++)
        if (tok->byte_ids[i] < 0)
            return kvs_fail_file(err, KVS_E_FORMAT, kvs_gguf_path(file), "tokenizer.ggml.tokens",
                                 kvs_gguf_key_offset(file, "tokenizer.ggml.tokens"),
                                 "there is neither an unknown token nor one for byte 0x%02X", i);
    return KVS_OK;
}

static int load_vocabulary(const kvs_gguf *file, kvs_tokenizer *tok, kvs_error *err) {
    int rc = check_model(file, err);
    if (!rc) rc = load_pieces(file, tok, err);
    if (!rc) rc = load_scores(file, tok, err);
    if (!rc) rc = load_ids(file, tok, err);
    if (!rc) rc = load_kinds(file, tok, err);
    if (rc) return rc;
    if (tok->unk < 0) tok->unk = find_kind(tok, KVS_TOKEN_UNKNOWN, NULL);
    if (tok->bos < 0) tok->bos = find_kind(tok, KVS_TOKEN_CONTROL, "<s>");
    if (tok->eos < 0) tok->eos = find_kind(tok, KVS_TOKEN_CONTROL, "</s>");
    show_pieces(tok);
    tok->bar_as_bytes = has_bytes(tok, BAR, BAR_BYTES);
    rc = check_coverage(file, tok, err);
    if (!rc) rc = build_merged(tok, err);
    if (!rc) rc = build_specials(tok, false, &tok->user, err);
    if (!rc) rc = build_specials(tok, true, &tok->special, err);
    return rc;
}

int kvs_tokenizer_load(const kvs_gguf *file, kvs_tokenizer **out, kvs_error *err) {
    *out = NULL;
    kvs_tokenizer *tok = kvs_calloc(1, sizeof *tok);
    if (!tok) return kvs_fail_memory(err, sizeof *tok, "the tokenizer");
    int rc = load_vocabulary(file, tok, err);
    if (rc) {
        kvs_tokenizer_free(tok);
        return rc;
    }
    *out = tok;
    return KVS_OK;
}

uint64_t kvs_tokenizer_identity(const kvs_tokenizer *tok) {
    uint64_t n = (uint64_t)tok->n_vocab, hash = kvs_hash(n, tok->text, tok->at[n]);
    hash = kvs_hash(hash, tok->at, (n + 1) * sizeof *tok->at);
    return kvs_hash(kvs_hash(hash, tok->scores, n * sizeof *tok->scores), tok->kinds, n);
}

void kvs_tokenizer_free(kvs_tokenizer *tok) {
    if (!tok) return;
    free(tok->at);
    free(tok->text);
    free(tok->shown);
    free(tok->n_shown);
    free(tok->scores);
    free(tok->kinds);
    free(tok->merged.pieces);
    free(tok->user.set.pieces);
    free(tok->special.set.pieces);
    free(tok);
}

/* ---- text -> ids ---- */

typedef struct symbol { /* a stretch of the normalised text; length 0: merged into its left neighbour */
    uint32_t at, length;
    int32_t prev, next; /* -1 = none */
} symbol;

typedef struct pair { /* two neighbours whose union is a piece; stale once one of them has changed, which the length tells */
    float score;
    int32_t left, right;
    uint32_t length;
} pair;

typedef struct stretch {
    uint32_t at, length;
} stretch;

typedef struct encoder {
    const kvs_tokenizer *tok;
    int32_t *ids;
    int64_t capacity, n;
    bool last_unknown; /* a run of unknown characters is one token */
    bool failed;       /* out of memory */
    char *text;        /* of the run at work, normalised: at most 3 bytes for 1, and the prefix */
    symbol *symbols;
    pair *heap;
    uint64_t n_heap, heap_room;
    stretch *stack; /* of parts of an unused piece */
    uint64_t n_stack, stack_room;
    uint32_t *splits; /* (n_vocab): bytes of the left part from which an unused piece was merged */
} encoder;

static void emit(encoder *e, int32_t id) {
    if (e->n < e->capacity) e->ids[e->n] = id;
    e->n++;
    e->last_unknown = false;
}

static void emit_bytes(encoder *e, const char *bytes, uint64_t n) {
    if (has_bytes(e->tok, bytes, n)) {
        for (uint64_t i = 0; i < n; i++) emit(e, e->tok->byte_ids[(uint8_t)bytes[i]]);
        return;
    }
    if (!e->last_unknown) emit(e, e->tok->unk); /* check_coverage: it exists */
    e->last_unknown = true;
}

/* Room for one more entry; doubling keeps the whole linear. */
static bool reserve(encoder *e, void **block, uint64_t n, uint64_t *room, size_t size) {
    if (n < *room) return true;
    uint64_t wanted = *room ? *room * 2 : 256;
    void *grown = kvs_realloc(*block, wanted, size);
    e->failed |= !grown;
    if (!grown) return false;
    *block = grown;
    *room = wanted;
    return true;
}

static bool pair_before(const pair *a, const pair *b) { return a->score > b->score || (a->score == b->score && a->left < b->left); }

static void heap_push(encoder *e, pair item) {
    if (!reserve(e, (void **)&e->heap, e->n_heap, &e->heap_room, sizeof *e->heap)) return;
    uint64_t i = e->n_heap++;
    while (i > 0 && pair_before(&item, &e->heap[(i - 1) / 2])) {
        e->heap[i] = e->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    e->heap[i] = item;
}

static pair heap_pop(encoder *e) {
    pair top = e->heap[0], last = e->heap[--e->n_heap];
    uint64_t i = 0;
    for (uint64_t child = 1; child < e->n_heap; child = 2 * i + 1) {
        if (child + 1 < e->n_heap && pair_before(&e->heap[child + 1], &e->heap[child])) child++;
        if (!pair_before(&e->heap[child], &last)) break;
        e->heap[i] = e->heap[child];
        i = child;
    }
    if (e->n_heap) e->heap[i] = last;
    return top;
}

static void try_pair(encoder *e, int32_t left, int32_t right) {
    if (left < 0 || right < 0) return;
    const symbol *a = &e->symbols[left], *b = &e->symbols[right];
    int32_t id = find_piece(e->tok, e->text + a->at, (uint64_t)a->length + b->length);
    if (id < 0) return;
    if (e->splits && e->tok->kinds[id] == KVS_TOKEN_UNUSED) e->splits[id] = a->length;
    heap_push(e, (pair){e->tok->scores[id], left, right, a->length + b->length});
}

static void merge_all(encoder *e, int32_t n_symbols) {
    e->n_heap = 0;
    for (int32_t i = 1; i < n_symbols && !e->failed; i++) try_pair(e, i - 1, i);
    while (e->n_heap && !e->failed) {
        pair top = heap_pop(e);
        symbol *a = &e->symbols[top.left], *b = &e->symbols[top.right];
        if (a->length == 0 || b->length == 0 || a->length + b->length != top.length) continue;
        a->length = top.length;
        b->length = 0;
        a->next = b->next;
        if (b->next >= 0) e->symbols[b->next].prev = top.left;
        try_pair(e, a->prev, top.left);
        try_pair(e, top.left, a->next);
    }
}

/* Unused pieces take part in merging but are no output: they fall apart into what they were merged from. */
static void emit_symbol(encoder *e, stretch whole) {
    e->n_stack = 0;
    for (stretch part = whole;; part = e->stack[--e->n_stack]) {
        const char *text = e->text + part.at;
        int32_t id = find_piece(e->tok, text, part.length);
        uint32_t left = id >= 0 && e->splits && e->tok->kinds[id] == KVS_TOKEN_UNUSED ? e->splits[id] : 0;
        if (left) {
            const stretch halves[] = {{part.at + left, part.length - left}, {part.at, left}};
            for (int i = 0; i < 2; i++) {
                if (!reserve(e, (void **)&e->stack, e->n_stack, &e->stack_room, sizeof *e->stack)) return;
                e->stack[e->n_stack++] = halves[i];
            }
        } else if (id >= 0) {
            emit(e, id);
        } else {
            emit_bytes(e, text, part.length);
        }
        if (e->n_stack == 0) return;
    }
}

/* Bytes of the character at s; 1 for a byte that begins none (cut short, overlong, surrogate, beyond U+10FFFF). */
static uint32_t character_length(const char *s, uint64_t n) {
    uint8_t c = (uint8_t)s[0];
    uint32_t length = c < 0xC2 ? 1 : c < 0xE0 ? 2 : c < 0xF0 ? 3 : c < 0xF5 ? 4 : 1;
    if (length > n) return 1;
    for (uint32_t i = 1; i < length; i++)
        if (((uint8_t)s[i] & 0xC0) != 0x80) return 1;
    uint8_t d = length > 1 ? (uint8_t)s[1] : 0;
    bool bad = (c == 0xE0 && d < 0xA0) || (c == 0xED && d > 0x9F) || (c == 0xF0 && d < 0x90) || (c == 0xF4 && d > 0x8F);
    return bad ? 1 : length;
}

static uint64_t normalise(char *out, const char *text, uint64_t length, bool prefix) {
    uint64_t n = 0;
    if (prefix) memcpy(out, BAR, BAR_BYTES), n = BAR_BYTES;
    for (uint64_t i = 0; i < length; i++) {
        if (text[i] == ' ') {
            memcpy(out + n, BAR, BAR_BYTES);
            n += BAR_BYTES;
        } else {
            out[n++] = text[i];
        }
    }
    return n;
}

/* Text without U+2581 of its own (but see bar_as_bytes). */
static void encode_run(encoder *e, const char *text, uint64_t length, bool prefix) {
    if (length == 0 && !prefix) return;
    uint64_t n = normalise(e->text, text, length, prefix);
    int32_t n_symbols = 0;
    for (uint64_t i = 0; i < n; n_symbols++) {
        uint32_t size = character_length(e->text + i, n - i);
        e->symbols[n_symbols] = (symbol){(uint32_t)i, size, n_symbols - 1, n_symbols + 1};
        i += size;
    }
    e->symbols[n_symbols - 1].next = -1;
    merge_all(e, n_symbols);
    for (int32_t i = 0; i >= 0 && !e->failed; i = e->symbols[i].next) emit_symbol(e, (stretch){e->symbols[i].at, e->symbols[i].length});
}

/* The next U+2581 in text, or its length. */
static uint64_t find_bar(const char *text, uint64_t length) {
    for (uint64_t i = 0; i + BAR_BYTES <= length; i++) {
        const char *hit = memchr(text + i, BAR[0], (size_t)(length - i - (BAR_BYTES - 1)));
        if (!hit) break;
        i = (uint64_t)(hit - text);
        if (!memcmp(hit, BAR, BAR_BYTES)) return i;
    }
    return length;
}

static void encode_fragment(encoder *e, const char *text, uint64_t length) {
    bool prefix = e->tok->add_space_prefix;
    e->last_unknown = false;
    while (length > 0 && !e->failed) {
        uint64_t run = e->tok->bar_as_bytes ? find_bar(text, length) : length;
        encode_run(e, text, run, prefix);
        if (run < length) emit_bytes(e, BAR, BAR_BYTES), run += BAR_BYTES;
        text += run, length -= run;
        prefix = false;
    }
}

static void encode_text(encoder *e, const char *text, uint64_t length, const special_set *set) {
    uint64_t from = 0;
    for (uint64_t i = 0; i < length && !e->failed;) {
        const piece *hit = match_special(set, text + i, length - i);
        if (!hit) {
            i++;
            continue;
        }
        encode_fragment(e, text + from, i - from);
        emit(e, hit->id);
        i += hit->length;
        from = i;
    }
    encode_fragment(e, text + from, length - from);
}

/* Buffers for the longest run there can be: a byte is at most three normalised ones, and one symbol. */
static bool encoder_start(encoder *e, uint64_t length) {
    e->text = kvs_calloc(BAR_BYTES * (length + 1), 1);
    e->symbols = kvs_calloc(length + 1, sizeof *e->symbols);
    if (e->tok->has_unused) e->splits = kvs_calloc((uint64_t)e->tok->n_vocab, sizeof *e->splits);
    return e->text && e->symbols && (e->splits || !e->tok->has_unused);
}

static void encoder_end(encoder *e) {
    free(e->text);
    free(e->symbols);
    free(e->heap);
    free(e->stack);
    free(e->splits);
}

int64_t kvs_tokenizer_encode(const kvs_tokenizer *tok, const char *text, int64_t length, bool add_bos, bool special, int32_t *ids,
                             int64_t capacity) {
    if (length > INT32_MAX / BAR_BYTES - 1) return -1; /* offsets in symbols are 32 bits wide */
    encoder e = {.tok = tok, .ids = ids, .capacity = ids ? capacity : 0};
    if (add_bos && tok->bos >= 0) emit(&e, tok->bos);
    if (length <= 0 || !text) return e.n;
    if (encoder_start(&e, (uint64_t)length))
        encode_text(&e, text, (uint64_t)length, special ? &tok->special : &tok->user);
    else
        e.failed = true;
    encoder_end(&e);
    return e.failed ? -1 : e.n;
}

/* ---- ids -> bytes, and the rest of what is known of a token ---- */

const char *kvs_tokenizer_bytes(const kvs_tokenizer *tok, int32_t id, bool special, int32_t *length) {
    *length = 0;
    if (id < 0 || id >= tok->n_vocab) return NULL;
    if (!special && tok->kinds[id] == KVS_TOKEN_CONTROL) return "";
    if (!special && tok->kinds[id] == KVS_TOKEN_UNKNOWN) {
        *length = sizeof UNKNOWN_SHOWN - 1;
        return UNKNOWN_SHOWN;
    }
    *length = (int32_t)tok->n_shown[id];
    return tok->shown + tok->at[id];
}

int32_t kvs_tokenizer_kind(const kvs_tokenizer *tok, int32_t id) { return id >= 0 && id < tok->n_vocab ? tok->kinds[id] : -1; }
int32_t kvs_tokenizer_n_vocab(const kvs_tokenizer *tok) { return tok->n_vocab; }
int32_t kvs_tokenizer_bos(const kvs_tokenizer *tok) { return tok->bos; }
int32_t kvs_tokenizer_eos(const kvs_tokenizer *tok) { return tok->eos; }
int32_t kvs_tokenizer_unk(const kvs_tokenizer *tok) { return tok->unk; }
int32_t kvs_tokenizer_pad(const kvs_tokenizer *tok) { return tok->pad; }
bool kvs_tokenizer_add_bos(const kvs_tokenizer *tok) { return tok->add_bos; }
bool kvs_tokenizer_add_space_prefix(const kvs_tokenizer *tok) { return tok->add_space_prefix; }
