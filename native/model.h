/* model.h - the spine: hyperparameters, weights with their shapes, activation buffers. Loaded by model.c (text) and
 * vision_load.c (mmproj), run by llama.c and vision.c. E = n_embd, F = n_ff, H = n_head, G = n_head_kv, D = head_dim, V = n_vocab. */
#ifndef KVS_MODEL_H
#define KVS_MODEL_H
#include "backend.h"
#include "gguf.h"
#include "tokenizer.h"
#include "turns.h"

enum { KVS_BLOCK_ROWS = 512, KVS_MAX_LAYERS = 1024, KVS_MAX_PARTS = 64, KVS_NAME = 64 };

typedef struct kvs_text_layer {
    kvs_weight attn_norm;                      /* (1, E) F32 */
    kvs_weight q, k, v, o;                     /* (H D, E), (G D, E), (G D, E), (E, H D) */
    kvs_weight q_bias, k_bias, v_bias, o_bias; /* (1, rows) F32, or absent */
    kvs_weight ffn_norm;                       /* (1, E) F32 */
    kvs_weight gate, up, down;                 /* (F, E), (F, E), (E, F) */
    kvs_weight gate_bias, up_bias, down_bias;
} kvs_text_layer;

typedef struct kvs_text {
    int32_t n_layer, n_embd, n_ff, n_head, n_head_kv, head_dim, n_vocab, n_ctx_train;
    float rms_eps;
    kvs_rope rope;
    kvs_weight token_embd;  /* (V, E) */
    kvs_weight output_norm; /* (1, E) F32 */
    kvs_weight output;      /* (V, E); the token embedding where it is tied */
    bool tied;
    kvs_text_layer *layers; /* (n_layer) */
} kvs_text;

typedef struct kvs_vision_layer {
    kvs_weight ln1, ln1_bias, ln2, ln2_bias; /* (1, E) F32 */
    kvs_weight q, k, v, o;                   /* (E, E) */
    kvs_weight q_bias, k_bias, v_bias, o_bias;
    kvs_weight up, down; /* (F, E), (E, F): by shape, whatever the file calls them */
    kvs_weight up_bias, down_bias;
} kvs_vision_layer;

typedef struct kvs_vision { /* CLIP tower and two-layer projector; E, F, H here are the tower's */
    int32_t n_layer;        /* blocks that run */
    int32_t n_embd, n_ff, n_head, image_size, patch_size;
    int32_t n_image;  /* patches, and rows of one encoded picture: (image_size / patch_size)^2 */
    int32_t rounding; /* of its products: KVS_ROUND_BF16, or KVS_ROUND_NONE */
    int32_t act;      /* kvs_unary of the tower; the projector's is KVS_GELU (erf), as in transformers */
    float eps, mean[3], std[3];
    kvs_weight patch_embd;          /* (E, 3 patch_size^2): columns ordered channel, row, column */
    kvs_weight patch_bias;          /* (1, E) or absent */
    kvs_weight class_embd;          /* (1, E) F32 or absent */
    kvs_weight position_embd;       /* (n_image + 1, E), class row first */
    kvs_weight pre_ln, pre_ln_bias; /* (1, E) F32 */
    kvs_vision_layer *layers;
    kvs_weight mm0, mm0_bias, mm2, mm2_bias; /* (P, E), (n_embd of the text, P) */
} kvs_vision;

typedef struct kvs_work { /* activation buffers of a pass, [dev], sized for max_rows; guarded by the model's lock */
    int32_t max_rows;
    float *x, *y;     /* (rows, E) residual and normed */
    float *q, *k, *v; /* (rows, H D), (rows, G D), (rows, G D) */
    float *attn;      /* (rows, H D) */
    float *gate, *up; /* (rows, F) */
    kvs_taps taps;    /* (rows, H) each */
    float *logits;    /* (max_logit_rows, V) */
    int32_t max_logit_rows;
} kvs_work;

typedef struct kvs_bound { /* a weight that the files hold, and whose it is: a layer of the text, KVS_OF_TEXT or KVS_OF_TOWER */
    kvs_weight *w;
    int32_t layer;
} kvs_bound;

enum { KVS_OF_TEXT = -1, KVS_OF_TOWER = -2 };

/* Weights that go into memory and order of a backend. What is placed stays so if the rest is cancelled. Guarded by the model's lock. */
typedef struct kvs_placing {
    kvs_weight **matrices; /* (n) of them done */
    int32_t n, done;
    uint8_t *room; /* [dev] of the next, in a block that the model owns */
} kvs_placing;

typedef struct kvs_plan {                         /* bytes of the device that are reckoned with before anything is allocated: split.c */
    int32_t rows;                                 /* of the cache, in F16 */
    uint64_t weights, cache, work, reserve, free; /* reserve: the driver's, graphs'; free: 0 where nobody knows */
} kvs_plan;

struct kvs_model {
    kvs_gguf *parts[KVS_MAX_PARTS]; /* of the text model */
    int32_t n_parts;
    kvs_gguf *mmproj; /* NULL = text only */
    kvs_tokenizer *tokenizer;
    kvs_text text;
    bool has_vision, exact; /* exact: the tower computes in float32 */
    kvs_vision vision;
    kvs_bound *bound; /* (n_bound) while it loads */
    int32_t n_bound, room_bound;
    float **widened; /* (n_widened) vectors of other types than F32; from malloc */
    int32_t n_widened;
    /* First what a device can't read in the file, at load. Then, when a pass first wants them, matrices of the text that the CPU multiplies in
     * an order of its own: a model that is only looked at costs no memory, and one whose first prompt waits is there at once. */
    kvs_placing at_load, at_pass;
    kvs_backend *be;
    kvs_plan plan;
    kvs_work work;
    kvs_turns turns;                      /* one pass at a time: backend step and work buffers */
    float inv_freq[KVS_MAX_HEAD_DIM / 2]; /* of text.rope, where the host finds it */
    void **owned;                         /* (n_owned) [dev] blocks: placed weights, rope.inv_freq; released by kvs_text_unload */
    int32_t n_owned;
    uint64_t weight_bytes, identity, mmproj_identity;
    uint64_t file_bytes, cache_bytes; /* so far; of caches: atomic */
    uint64_t max_file_bytes, max_cache_bytes;
};

/* A weight by name, its type and shape asserted: rows x cols, 0 = any. Absent: optional gives data = NULL, else KVS_E_FORMAT. Looks in all parts.
 * A vector (rows = 1) must be F32 (an F16 or BF16 one is widened to a buffer that the model owns). */
typedef struct kvs_shape {
    int64_t rows, cols;
    bool optional;
} kvs_shape;

/* parts, hyperparameters, tokenizer, weights; cancel may be NULL */
int kvs_text_load(kvs_model *model, const char *path, const int32_t *cancel, kvs_error *err);
/* after kvs_text_load: shapes must fit */
int kvs_vision_load(kvs_model *model, const char *path, const int32_t *cancel, kvs_error *err);
void kvs_vision_unload(kvs_model *model);
void kvs_text_unload(kvs_model *model);

/* place.c: after both files, with the backend that all of it runs on: memory for what it wants in an order of its own, and what a device
 * can't read goes there. kvs_place does the rest, one list of them. KVS_E_MEMORY, KVS_E_CANCELLED, KVS_E_DEVICE. */
int kvs_place_model(kvs_model *model, const int32_t *cancel, kvs_error *err);
int kvs_place(kvs_model *model, kvs_placing *placing, const int32_t *cancel, kvs_error *err);
/* KVS_E_FORMAT once a file of the model has shrunk or changed: what was computed with it since the last call is not to be used. */
int kvs_text_check(const kvs_model *model, kvs_error *err);
int kvs_vision_check(const kvs_model *model, kvs_error *err); /* KVS_OK without an mmproj */
/* Counts a file that was opened, or a cache that was made: KVS_E_LIMIT if that is too much (then it is not counted). */
int kvs_model_count_file(kvs_model *model, const kvs_gguf *file, kvs_error *err);
int kvs_model_count_cache(kvs_model *model, uint64_t bytes, kvs_error *err);
void kvs_model_uncount_cache(kvs_model *model, uint64_t bytes);
/* Room for a pass of rows rows (and logits of logit_rows of them); the lock is held. */
int kvs_work_reserve(kvs_model *model, int32_t rows, int32_t logit_rows, kvs_error *err);
uint64_t kvs_work_bytes(const kvs_model *model, int32_t rows, int32_t logit_rows); /* of such room */
/* Waits for this thread's turn, but not beyond a cancellation: KVS_OK or KVS_E_CANCELLED. */
int kvs_model_lock(kvs_model *model, const int32_t *cancel, kvs_error *err);
void kvs_model_unlock(kvs_model *model);
#endif
