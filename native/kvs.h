/* kvs.h - the public interface of libkvs, the runtime below pykvsmooth.
 *
 *   kvs_error err = {.struct_size = sizeof err};
 *   kvs_model_params mp = {.struct_size = sizeof mp, .text_path = "llava.gguf", .mmproj_path = "mmproj.gguf"};
 *   kvs_model *model;         if (kvs_model_load(&mp, &model, &err)) die(err.message);
 *   kvs_session_params sp = {.struct_size = sizeof sp, .n_ctx = 2048, .kv_type = KVS_TYPE_F16};
 *   kvs_session *session;     if (kvs_session_new(model, &sp, &session, &err)) die(err.message);
 *   kvs_chunk prompt = {.ids = ids, .n = n_ids};
 *   kvs_session_feed(session, &prompt, 1, NULL, &err);
 *   kvs_sampling greedy = {.struct_size = sizeof greedy, .top_p = 1, .repetition_penalty = 1};
 *   kvs_sample token;         kvs_session_sample(session, &greedy, &token, &err);
 *   kvs_sessions_step(&session, &token.id, 1, NULL, &err);       ... and so on; then free both.
 *
 * Status.    Every function that can fail returns 0 or one of KVS_E_*, and then fills *err (err may be NULL).
 * Ownership. What a *_new, *_load, *_open or *_fork returns belongs to the caller and goes back through the matching
 *            *_free, which accepts NULL. A session keeps nothing but a pointer to its model: free sessions first.
 * Threads.   A model may be used from many threads at once. A session belongs to one thread at a time; a second one gets
 *            KVS_E_BUSY. A cancel flag (int32_t, 0 at first) may be set from any thread with kvs_flag_set; long calls
 *            poll it every few milliseconds and return KVS_E_CANCELLED with the session as it was before the call.
 * Output.    Nothing is printed, no file descriptor is kept but those of model files.
 * Signals.   Model files are mapped. So that one that shrinks, or whose disk fails, does not end the process, the first one that is opened
 *            installs a handler for SIGBUS: a missing page of ours becomes zeros, the call that read it ends in KVS_E_FORMAT, and so does
 *            every later one with that file; any other SIGBUS goes on to the handler that was there before. One that is installed
 *            later must pass on what is not its own. Threads that call must not block SIGBUS. KVS_SIGBUS=0 in the environment: no handler.
 */
#ifndef KVS_H
#define KVS_H
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(default)

/* [cffi] everything between the two marks is what the Python package parses: no preprocessor lines here, please */

enum { KVS_ABI_VERSION = 8 };

enum kvs_status {
    KVS_OK = 0,
    KVS_E_FORMAT = 1,      /* a file breaks its format: err.path, err.what, err.offset */
    KVS_E_UNSUPPORTED = 2, /* a sound file that this runtime can't run: architecture, tensor type, projector */
    KVS_E_MISMATCH = 3,    /* text model and mmproj, or session and model, do not belong together */
    KVS_E_CONTEXT = 4,     /* more rows than n_ctx: err.needed, err.available */
    KVS_E_MEMORY = 5,      /* an allocation failed: err.needed, err.available (bytes; 0 = unknown) */
    KVS_E_DEVICE = 6,
    KVS_E_BUSY = 7, /* the session is in use by another thread */
    KVS_E_CANCELLED = 8,
    KVS_E_POLICY = 9, /* parameters of a policy make no sense here, or exact rows for a rewind are gone */
    KVS_E_SESSION_FILE = 10,
    KVS_E_ARGUMENT = 11, /* a value out of range */
    KVS_E_IO = 12,       /* the operating system said no: errno in err.offset */
    KVS_E_NUMERIC = 13,  /* values that are not finite, or more than the cache can hold: err.what says where they began */
    KVS_E_LIMIT = 14     /* more than a limit of kvs_model_params allows: err.what names it, err.needed, err.available (bytes) */
};

typedef struct kvs_error {
    uint32_t struct_size;
    int32_t code;   /* kvs_status */
    int64_t offset; /* byte in the file, or errno; -1 = none */
    uint64_t needed;
    uint64_t available;
    char path[256];    /* the file, cut from the left if it is long */
    char what[128];    /* key, tensor or argument */
    char message[512]; /* one whole sentence, all of the above in it */
} kvs_error;

/* tensor types, numbered as in GGUF */
enum kvs_type {
    KVS_TYPE_F32 = 0,
    KVS_TYPE_F16 = 1,
    KVS_TYPE_Q4_0 = 2,
    KVS_TYPE_Q4_1 = 3,
    KVS_TYPE_Q5_0 = 6,
    KVS_TYPE_Q5_1 = 7,
    KVS_TYPE_Q8_0 = 8,
    KVS_TYPE_Q2_K = 10,
    KVS_TYPE_Q3_K = 11,
    KVS_TYPE_Q4_K = 12,
    KVS_TYPE_Q5_K = 13,
    KVS_TYPE_Q6_K = 14,
    KVS_TYPE_IQ4_NL = 20,
    KVS_TYPE_IQ4_XS = 23,
    KVS_TYPE_BF16 = 30
};

/* ---- library ---- */
int32_t kvs_abi_version(void);
const char *kvs_version(void);
int32_t kvs_struct_size(const char *name);       /* sizeof of a public struct by its name, -1 if unknown: the binding compares */
void kvs_flag_set(int32_t *flag, int32_t value); /* atomic store, for cancel flags */
int32_t kvs_cpu_info(char *text, int32_t size);  /* "NAME; features: ...; kernels: avx2 (why)": length needed, cut to size */
int32_t kvs_cuda_info(char *text, int32_t size); /* "archs 75 80 ...; available: ..." or "...; unavailable: reason", the same */
const char *kvs_type_name(int32_t type);         /* "Q4_K"; NULL for a type that does not load */
int64_t kvs_row_bytes(int32_t type, int64_t n);  /* bytes of n elements, -1 if n does not fit whole blocks */

/* ---- tensor data ---- */
/* values (rows, cols) to rows of blocks, rows * kvs_row_bytes(type, cols) bytes: all types but IQ4_NL and IQ4_XS. KVS_E_ARGUMENT: cols is
 * no whole blocks, or a value is not finite or beyond the type's range (err.offset: its index in values; nothing is written then).
 * The scales of every block are searched for the least squared error; the same bits on every machine and however rows are split over calls.
 * One thread's work: split rows over threads as you like. */
int32_t kvs_encode(int32_t type, const float *values, int64_t rows, int64_t cols, void *out, kvs_error *err);
int32_t kvs_decode(int32_t type, const void *blocks, int64_t n, float *out); /* n values; all types */

/* ---- GGUF files, for inspection ---- */
typedef struct kvs_gguf kvs_gguf;
/* metadata value types, numbered as in the file */
enum kvs_gguf_value {
    KVS_GGUF_U8 = 0,
    KVS_GGUF_I8,
    KVS_GGUF_U16,
    KVS_GGUF_I16,
    KVS_GGUF_U32,
    KVS_GGUF_I32,
    KVS_GGUF_F32,
    KVS_GGUF_BOOL,
    KVS_GGUF_STRING,
    KVS_GGUF_ARRAY,
    KVS_GGUF_U64,
    KVS_GGUF_I64,
    KVS_GGUF_F64
};
typedef struct kvs_gguf_key {
    const char *name;     /* zero-terminated, lives as long as the file */
    int32_t type;         /* kvs_gguf_value */
    int32_t element_type; /* of an array; -1 otherwise */
    int64_t count;        /* elements of an array, 1 otherwise */
} kvs_gguf_key;
typedef struct kvs_gguf_tensor {
    const char *name;
    int32_t type; /* as in the file, also when it does not load */
    int32_t n_dims;
    int64_t dims[4]; /* dims[0] is the row length; 1 beyond n_dims */
    int64_t offset;  /* in the file */
    int64_t bytes;   /* -1 for an unknown type */
} kvs_gguf_tensor;
int32_t kvs_gguf_open(const char *path, kvs_gguf **out, kvs_error *err); /* one file; parts of a split model one by one */
/* KVS_E_FORMAT: the file has shrunk, changed, or could not be read since it was opened; what it gave may be zeros. */
int32_t kvs_gguf_check(const kvs_gguf *file, kvs_error *err);
void kvs_gguf_free(kvs_gguf *file);
int32_t kvs_gguf_version(const kvs_gguf *file);
int64_t kvs_gguf_n_keys(const kvs_gguf *file);
int64_t kvs_gguf_n_tensors(const kvs_gguf *file);
int32_t kvs_gguf_key_at(const kvs_gguf *file, int64_t i, kvs_gguf_key *key);
int32_t kvs_gguf_tensor_at(const kvs_gguf *file, int64_t i, kvs_gguf_tensor *tensor);
int64_t kvs_gguf_int(const kvs_gguf *file, int64_t i, int64_t j); /* element j of key i; bool as 0 or 1 */
double kvs_gguf_float(const kvs_gguf *file, int64_t i, int64_t j);
const char *kvs_gguf_string(const kvs_gguf *file, int64_t i, int64_t j, int64_t *length); /* not zero-terminated */

/* ---- model ---- */
typedef struct kvs_model kvs_model;
/* Of the vision tower; sums are float32 always. The text model does not heed it. */
enum kvs_precision {
    KVS_PRECISION_AUTO = 0, /* unless weights are F32: operands in bf16 on CPUs that multiply it faster, in halves on GPUs */
    KVS_PRECISION_EXACT     /* float32 */
};
/* Layers of the text model that a GPU computes, the last so many; the CPU computes those before. The output is the GPU's, and the vision
 * tower if there is room. */
enum kvs_gpu_layers {
    KVS_GPU_LAYERS_NONE = -1, /* no layer, but the output */
    KVS_GPU_LAYERS_AUTO = 0   /* as many as fit */
};
typedef struct kvs_model_params {
    uint32_t struct_size;
    int32_t threads;         /* 0 = the processors that affinity and cgroup quota allow */
    const char *text_path;   /* the first part of a split model stands for all */
    const char *mmproj_path; /* NULL = text only */
    const char *device;      /* NULL or "auto" | "cpu" | "cuda" | "cuda:N" */
    int32_t *cancel;         /* may be NULL */
    int32_t *progress;       /* may be NULL; set to 0..1000 while loading */
    uint64_t model_bytes;    /* limit of all its files together; 0 = none */
    uint64_t cache_bytes;    /* limit of the caches of all its sessions together; 0 = the memory of the machine */
    int32_t precision;       /* kvs_precision */
    int32_t gpu_layers;      /* kvs_gpu_layers, or how many: they must fit, and a GPU must be there */
} kvs_model_params;
typedef struct kvs_model_info {
    uint32_t struct_size;
    int32_t n_ctx_train, n_layer, n_embd, n_ff, n_head, n_head_kv, head_dim, n_vocab;
    int32_t has_vision, image_size, patch_size, n_image, n_vision_layer; /* n_image: rows of one encoded picture */
    int32_t bos, eos, unk, pad, add_bos, add_space_prefix;               /* ids; -1 = none */
    int32_t n_gpu_layers;                                                /* of n_layer, on a GPU */
    int32_t vision_rounding; /* the tower rounds operands to: 0 float32, 1 bf16, 2 halves (kvs_precision) */
    float image_mean[3], image_std[3];
    int32_t threads, threads_missing; /* missing: of the default number, the system did not let them start */
    uint64_t weight_bytes;
    /* Bytes of the device that were reckoned with before anything was allocated there: weights, a cache of plan_rows rows in F16, work buffers,
     * what the device takes for itself; and what was free (0: not known, as on the CPU). Where a GPU and the CPU share layers: the GPU's. */
    uint64_t plan_weights, plan_cache, plan_work, plan_reserve, plan_free;
    int32_t plan_rows;
    uint64_t identity; /* hash of hyperparameters, tensor table and a sample of the weights; what a saved session is tied to */
    uint64_t mmproj_identity;
    char device[32];
    char device_reason[224];
} kvs_model_info;
int32_t kvs_model_load(const kvs_model_params *params, kvs_model **out, kvs_error *err);
void kvs_model_free(kvs_model *model);
void kvs_model_get_info(const kvs_model *model, kvs_model_info *info);
/* Text (UTF-8, length bytes) to ids. Returns the number of ids; if it exceeds capacity, only capacity are written.
 * special: the text may name control tokens ("</s>"). Bytes that are not UTF-8 become byte tokens, nothing is dropped.
 * -1: out of memory. */
int64_t kvs_tokenize(const kvs_model *model, const char *text, int64_t length, int32_t add_bos, int32_t special, int32_t *ids,
                     int64_t capacity);
/* The bytes that token id stands for (U+2581 turned into spaces); control tokens give zero bytes unless special.
 * NULL for an id out of range. Lives as long as the model. */
const char *kvs_token_bytes(const kvs_model *model, int32_t id, int32_t special, int32_t *length);
int32_t kvs_token_type(const kvs_model *model, int32_t id); /* 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte; -1 */
/* pixels (n_pictures, 3, image_size, image_size) float32, normalised -> embeddings (n_pictures, n_image, n_embd) float32 */
int32_t kvs_encode_image(kvs_model *model, const float *pixels, int32_t n_pictures, float *embeddings, int32_t *cancel, kvs_error *err);

/* ---- policy: KVSmooth, docs/methods.md (arXiv 2602.04268, eq. 5 and 13-15) ---- */
enum { KVS_TARGET_K = 1, KVS_TARGET_V = 2, KVS_TARGET_O = 4 };
typedef struct kvs_smooth_params {
    uint32_t struct_size;
    float lambda_ref, half_width, lambda_max;
    float lambda_fixed;         /* mode fixed: used as it is; NaN = adaptive */
    int32_t window;             /* M, 1..1024 */
    int32_t target;             /* KVS_TARGET_* or-ed */
    int32_t den_capacity;       /* 0: rank / entries in the queue ("fill"); 1: rank / window */
    int32_t rope_relative;      /* 1: the previous key is rotated by the step between the two positions first */
    int32_t skip_first;         /* 1: the first generated token of a turn is not mixed with the prompt */
    int32_t warm_start;         /* so many last prompt rows enter the queue first; 0 = none */
    int32_t smooth_last_prompt; /* 1: the last prompt row of a turn is smoothed, too */
    int32_t norm_log_len;       /* 1: entropies are divided by ln(rows seen) before they are ranked */
    int32_t per_kv_head;        /* 1: one strength per KV head from its own query heads */
    int32_t exclude_self;       /* 1: the entropy leaves the newest key out */
    int32_t midrank;            /* 1: ties count one half */
    int32_t scope_session;      /* 1: the queue outlives a turn */
    int32_t ema_one_step;       /* 1: the previous row enters unsmoothed */
    int32_t damp;               /* 1: rows are scaled by 1 - lambda and nothing is mixed in: an ablation of ours */
    int32_t n_layers;           /* of the list below */
    const int32_t *layers;      /* 0-based, each once */
    int32_t n_skip_ids;
    const int32_t *skip_ids; /* tokens that are never smoothed (their entropies do enter the queue) */
} kvs_smooth_params;

/* ---- policy: DSCR, docs/methods.md (ICLR 2026): K and V of a picture's patches become weighted sums of those of its other patches ---- */
enum kvs_dscr_kernel { KVS_DSCR_SUM = 0, KVS_DSCR_PRODUCT = 1 }; /* f_d^alpha + f_s^beta | f_d^alpha f_s^beta */
enum kvs_dscr_phase {
    KVS_DSCR_BEFORE_QUESTION = 0, /* right behind the picture's rows: what follows sees the refined ones */
    KVS_DSCR_AFTER_PREFILL = 1,   /* once, at the end of the prompt */
    KVS_DSCR_IN_LAYER = 2         /* in each layer before its attention: deeper layers change, too */
};
typedef struct kvs_dscr_params {
    uint32_t struct_size;
    float sigma_d, sigma_s, alpha, beta;
    float gamma;            /* x <- (1 - gamma) x + gamma x_hat; 0 touches nothing */
    float cut;              /* so much of a column, at most, is left out where weights vanish; what is left sums to one */
    int32_t kernel, phase;  /* kvs_dscr_kernel, kvs_dscr_phase */
    int32_t target;         /* KVS_TARGET_K | KVS_TARGET_V */
    int32_t rope_pre;       /* 1: keys are mixed as they were before rotary embedding */
    int32_t grid_w, grid_h; /* patches of a picture, row by row */
    float step_x, step_y;   /* coordinates of neighbouring patches differ by so much */
    int32_t n_layers;       /* of the list below */
    const int32_t *layers;  /* 0-based, each once */
} kvs_dscr_params;
/* ---- policy: PruneHal, docs/methods.md (arXiv 2510.19183) ---- */
enum { KVS_REFERENCE_RUNNING_MEAN_RESET = 0, KVS_REFERENCE_RUNNING_MEAN, KVS_REFERENCE_LAST_PRUNE, KVS_REFERENCE_FIRST };
enum { KVS_SCOPE_LAYER = 0, KVS_SCOPE_GLOBAL, KVS_SCOPE_KV_HEAD };
typedef struct kvs_prune_params {
    uint32_t struct_size;
    int32_t times;           /* prunings of an answer at most */
    double keep;             /* share of the live rows of pictures that stays; unused with top_k */
    double vote_fraction;    /* of the layers below */
    int32_t vote_at_least;   /* 0: more of them than that must vote; 1: so many are enough */
    int32_t force_step;      /* m of the step that prunes without a vote; 0 = none. m = 1 is the last prompt row */
    int32_t reference;       /* KVS_REFERENCE_*: what a layer's attention is held against */
    int32_t scope;           /* KVS_SCOPE_*: heads and layers that keep the same rows */
    int32_t reduction_max;   /* scores of single keys over query heads: 0 mean, 1 maximum */
    int32_t per_image_quota; /* 0: pictures compete, one row of each stays; 1: each keeps its own share */
    int32_t reversible;      /* dropped rows are kept in host memory and can come back */
    int32_t n_top_k;         /* of the list below; 0 = keep shares */
    const int32_t *top_k;    /* rows that stay after the first, second, ... pruning: there are no more than entries */
    int32_t n_layers;
    const int32_t *layers; /* 0-based, each once: those that vote and lose rows */
} kvs_prune_params;

/* ---- session ---- */
typedef struct kvs_session kvs_session;
typedef struct kvs_session_params {
    uint32_t struct_size;
    int32_t n_ctx;
    int32_t kv_type;    /* KVS_TYPE_F16 | KVS_TYPE_F32 | KVS_TYPE_Q8_0 */
    int32_t exact_rows; /* rows of float32 history kept for rewind under smoothing; 0 = 32 */
    uint64_t seed;
    const kvs_smooth_params *smooth; /* NULL = off; copied */
    const kvs_dscr_params *dscr;     /* NULL = off; copied */
    const kvs_prune_params *prune;   /* NULL = off; copied */
} kvs_session_params;
typedef struct kvs_pruning {         /* one that has happened */
    int32_t row;                     /* index of the generated row behind which it happened */
    int32_t forced;                  /* 1: force_step, 0: votes */
    int32_t rows_before, rows_after; /* of pictures, in a pruned layer */
} kvs_pruning;
typedef struct kvs_chunk { /* a run of rows: either ids or embeddings */
    const int32_t *ids;    /* (n) */
    const float *embd;     /* (n, n_embd), when ids is NULL */
    int32_t n;
    uint64_t hash;      /* of the picture behind embd, and of its depth; what the timeline remembers of it */
    const float *depth; /* (n) of each patch, for policies that use it; NaN = padding; NULL = unknown. Copied */
} kvs_chunk;
typedef struct kvs_sampling {
    uint32_t struct_size;
    float temperature;        /* 0 = greedy */
    int32_t top_k;            /* 0 = all */
    float top_p, min_p;       /* 1 and 0 = off */
    float repetition_penalty; /* 1 = off; over all ids of the timeline, as in transformers */
    int32_t n_top;            /* how many top_* entries are wanted, 0..20 */
} kvs_sampling;
typedef struct kvs_sample {
    int32_t id;
    float logprob; /* natural log, of the raw logits: before temperature and cuts */
    int32_t n_top;
    int32_t top_ids[20];
    float top_logprobs[20];
} kvs_sample;
int32_t kvs_session_new(kvs_model *model, const kvs_session_params *params, kvs_session **out, kvs_error *err);
void kvs_session_free(kvs_session *session);
uint64_t kvs_session_bytes(const kvs_session *session); /* of the cache; room of dropped rows is not counted, kept ones are */
/* Prompt rows: all chunks, in passes of up to 512 rows or as policies need pictures. All or nothing: on failure no row has been added. */
int32_t kvs_session_feed(kvs_session *session, const kvs_chunk *chunks, int32_t n_chunks, int32_t *cancel, kvs_error *err);
/* One generated token for each of n different sessions of one model, in one pass over the weights; policies act. */
int32_t kvs_sessions_step(kvs_session *const *sessions, const int32_t *ids, int32_t n, int32_t *cancel, kvs_error *err);
/* What policies do after the prompt, once; idempotent. This and the next two may have to run rows again after a rewind. */
int32_t kvs_session_end_prefill(kvs_session *session, int32_t *cancel, kvs_error *err);
int32_t kvs_session_logits(kvs_session *session, float *logits, int32_t *cancel, kvs_error *err); /* (n_vocab) of the last row */
int32_t kvs_session_sample(kvs_session *session, const kvs_sampling *params, kvs_sample *out, int32_t *cancel, kvs_error *err);
/* The same for each of n different sessions of one model, at once. All or nothing: on failure no session has used up a random number. */
int32_t kvs_sessions_sample(kvs_session *const *sessions, const kvs_sampling *const *params, int32_t n, kvs_sample *const *out,
                            int32_t *cancel, kvs_error *err);
int32_t kvs_session_reseed(kvs_session *session, uint64_t seed, kvs_error *err);
int32_t kvs_session_n_ctx(const kvs_session *session);
int32_t kvs_session_kv_type(const kvs_session *session);
int32_t kvs_session_n_past(const kvs_session *session);                /* rows of the timeline, pruned ones included */
int32_t kvs_session_n_rows(const kvs_session *session, int32_t layer); /* physical rows of a layer */
int32_t kvs_session_n_generated(const kvs_session *session);
int32_t kvs_session_n_exact(const kvs_session *session); /* rows that rewind can drop exactly, now */
/* The timeline, n = n_past entries: ids (an image row: -1), for image rows the hash of the picture (0 otherwise), 1 where generated. */
int32_t kvs_session_timeline(kvs_session *session, int32_t n, int32_t *ids, uint64_t *hashes, int32_t *generated, kvs_error *err);
/* n must be n_rows: positions (n_sets, n), k and v (n_kv_head, n, head_dim). n_sets: 1, or n_kv_head where heads keep different rows */
int32_t kvs_session_n_sets(const kvs_session *session);
int32_t kvs_session_positions(kvs_session *session, int32_t layer, int32_t n, int32_t *positions, kvs_error *err);
int32_t kvs_session_kv(kvs_session *session, int32_t layer, int32_t n, float *k, float *v, kvs_error *err);
/* Of the newest n generated rows, oldest first, (n, n_layer) each: row entropies (nats, mean over heads), strengths (NaN where not
 * smoothed), masses (share of attention on rows of pictures, mean over heads). */
int32_t kvs_session_telemetry(kvs_session *session, int32_t n, float *entropies, float *strengths, float *masses, kvs_error *err);
int32_t kvs_session_n_pictures(const kvs_session *session);
int32_t kvs_session_n_prunings(const kvs_session *session);
int32_t kvs_session_prunings(kvs_session *session, int32_t n, kvs_pruning *prunings, kvs_error *err); /* the first n, oldest first */
int32_t kvs_session_n_whole(const kvs_session *session); /* rows before the first that is gone for good; n_past without */
/* Brings all dropped rows back; the answer under way is not pruned any more. KVS_E_POLICY where they were not kept. */
int32_t kvs_session_restore(kvs_session *session, int32_t *cancel, kvs_error *err);
int32_t kvs_session_new_turn(kvs_session *session, kvs_error *err); /* policies with queue scope "turn" start afresh */
int32_t kvs_session_fork(kvs_session *session, kvs_session **out, int32_t *cancel, kvs_error *err);
/* Drops the newest n rows. KVS_E_POLICY where exact rows are gone (err.needed, err.available): nothing has changed then. */
int32_t kvs_session_rewind(kvs_session *session, int32_t n, int32_t *cancel, kvs_error *err);
/* temporary name, flush, rename; only the flush can't be cancelled */
int32_t kvs_session_save(kvs_session *session, const char *path, int32_t *cancel, kvs_error *err);
/* The file decides n_ctx and kv_type; the policies must equal those it was saved with (KVS_E_SESSION_FILE names the difference). */
int32_t kvs_session_load(kvs_model *model, const char *path, const kvs_session_params *params, kvs_session **out, int32_t *cancel,
                         kvs_error *err);

/* ---- want of memory and cancellations, for tests: util.c; only in a build with KVS_INJECT ---- */
/* From now on the n-th allocation, mapping, stream, lock or thread of the library (all threads counted together) is refused, once or
 * with all behind it; 0 = none. */
void kvs_test_fail_after(int64_t n, int32_t and_all_behind);
int64_t kvs_test_calls(void); /* of them, since then */
/* From now on whoever looks at a cancel flag for the n-th time, or later, finds it set; 0 = none. */
void kvs_test_cancel_after(int64_t n);
int64_t kvs_test_looks(void);  /* at flags, since then */
int64_t kvs_test_blocks(void); /* of memory that are there now */

/* ---- what this machine can do at best, to hold speeds against: measure.h ---- */
enum kvs_roof {
    KVS_ROOF_READ = 0,  /* bytes read from memory, in pages of the ordinary size where there are several */
    KVS_ROOF_READ_HUGE, /* in huge pages, where the kernel has them */
    KVS_ROOF_F32,       /* operations; a multiply-add is two */
    KVS_ROOF_INT8,      /* of a GPU: four products at a time, dp4a */
    KVS_ROOF_BF16,      /* AVX512-BF16 */
    KVS_ROOF_AMX_INT8,
    KVS_ROOF_AMX_BF16,
    KVS_ROOF_COPY,    /* of a GPU: bytes read and bytes written, as many of both */
    KVS_ROOF_F16_MMA, /* of a GPU: its tensor cores by mma.sync, halves summed in float32 */
    KVS_ROOF_KINDS
};
typedef struct kvs_roofs kvs_roofs;
/* device "cpu": loops of the kernels that KVS_CPU chooses, on a pool of threads (0: as many as are allowed); "cuda", "cuda:N": of that GPU.
 * bytes: of the buffer that is read, from 1 to 2^40: several times the cache, to which a GPU's grows; an eighth of its free memory at most. It is there from the
 * first measurement of its kind until the end. One thread at a time. */
int32_t kvs_roofs_open(const char *device, int32_t threads, int64_t bytes, kvs_roofs **out, kvs_error *err);
void kvs_roofs_free(kvs_roofs *roofs);
/* Runs for so long, up to 10 seconds: bytes or operations per second, of all threads. KVS_E_DEVICE: this machine has no such unit. */
int32_t kvs_roofs_measure(kvs_roofs *roofs, int32_t kind, double seconds, double *per_second, kvs_error *err);

/* ---- single ops and kernels, for tests: selftest*.c; not part of the stable interface ---- */
/* The limit of control groups, bytes or (0) processors, by the list of groups in this file in the trees below this folder; 0 = none */
double kvs_test_cgroup(int32_t bytes, const char *list, const char *trees);
int32_t kvs_test_isa(const char *isa); /* 1 if these kernels can be run here: base, avx2, avx512, amx; cuda: those of the first GPU */
int32_t kvs_test_matmul(const char *isa, int32_t threads, int32_t type, const void *w, int64_t rows, int64_t cols, const float *x,
                        int32_t n, const float *bias, int32_t rounding, float *y); /* rounding: kvs_rounding of backend.h */
/* The tiles, 128 or 64, or 0 for slices, that a GPU of n_sm multiprocessors takes for n rows by matrices of rows (n_jobs, up to 4); less
 * than 0: this build has no CUDA backend. */
int32_t kvs_test_tile(int32_t n_sm, int32_t n, const int32_t *rows, int32_t n_jobs);
int32_t kvs_test_norm(const char *isa, const float *x, const float *w, const float *b, float eps, int32_t n, int32_t cols,
                      float *y); /* b NULL: RMS */
int32_t kvs_test_rope(const char *isa, float *x, const int32_t *pos, int32_t n, int32_t n_head, int32_t head_dim, const float *inv_freq,
                      int32_t n_rot);
int32_t kvs_test_unary(const char *isa, const char *op, float *x, const float *y,
                       int64_t n); /* silu_mul, gelu, gelu_tanh, gelu_quick, add */
/* x (n, cols): KVS_OK, or KVS_E_NUMERIC with the first row that has a value beyond limit, and that value */
int32_t kvs_test_finite(const char *isa, int32_t threads, const float *x, int32_t n, int32_t cols, float limit, int32_t *row, float *value);
/* q (n_q, n_head, head_dim) at positions n_kv - n_q + i against k, v (n_kv, n_head_kv, head_dim) stored as kv_type; causal */
int32_t kvs_test_attn(const char *isa, int32_t threads, int32_t kv_type, const float *q, const float *k, const float *v, int32_t n_q,
                      int32_t n_kv, int32_t n_head, int32_t n_head_kv, int32_t head_dim, int32_t exclude_self, float *out, float *entropy);
/* The same with rows of pictures in spans (n_spans, 2: first, n); mass, lse (n_q, n_head). */
int32_t kvs_test_taps(const char *isa, int32_t threads, int32_t kv_type, const float *q, const float *k, const float *v, int32_t n_q,
                      int32_t n_kv, int32_t n_head, int32_t n_head_kv, int32_t head_dim, int32_t exclude_self, const int32_t *spans,
                      int32_t n_spans, float *out, float *entropy, float *mass, float *lse);
/* The same for the last rows of up to 8 sessions in one step: sessions (n_sessions, 3: kv_type, n_kv, n_q); q, k, v and what comes out hold
 * the rows of one session behind those of another, spans are the same in all. */
int32_t kvs_test_attn_step(const char *isa, int32_t threads, const int32_t *sessions, int32_t n_sessions, const float *q, const float *k,
                           const float *v, int32_t n_head, int32_t n_head_kv, int32_t head_dim, int32_t exclude_self, const int32_t *spans,
                           int32_t n_spans, float *out, float *entropy, float *mass, float *lse);
/* scores of the keys in spans against one query q (n_head, head_dim), which sees all: (n_head_kv, rows of spans) */
int32_t kvs_test_score(const char *isa, int32_t threads, int32_t kv_type, const float *q, const float *k, int32_t n_kv, int32_t n_head,
                       int32_t n_head_kv, int32_t head_dim, const int32_t *spans, int32_t n_spans, int32_t maximum, float *scores);
/* rows at places (n_head_kv, n) leave a cache of n_kv rows (n_kv, n_head_kv, head_dim), which is trimmed; k_left, v_left (n_head_kv,
 * n_kv - n, head_dim); then, in k_back, v_back (n_head_kv, n_kv, head_dim), they have come back */
int32_t kvs_test_gather(const char *isa, int32_t threads, int32_t kv_type, const float *k, const float *v, int32_t n_kv, int32_t n_head_kv,
                        int32_t head_dim, int32_t n_ctx, const int32_t *places, int32_t n, float *k_left, float *v_left, float *k_back,
                        float *v_back);
int32_t kvs_test_attn_full(const char *isa, int32_t threads, const float *q, const float *k, const float *v, int32_t n, int32_t n_head,
                           int32_t head_dim, int32_t rounding, float *out); /* not causal */
int32_t kvs_test_bf16(const char *isa); /* 1 if these kernels and this device multiply bf16, which rounding then asks for */

/* n rows one after the other; rows 1.. are generated and smoothed against the row before. k, v, k_out, v_out (n, n_kv_head, head_dim),
 * entropy (n, n_kv_head), strength (n, groups). */
int32_t kvs_test_smooth(const char *isa, const kvs_smooth_params *p, int32_t kv_type, int32_t n_kv_head, int32_t head_dim, int32_t n,
                        const float *k, const float *v, const float *entropy, float *k_out, float *v_out, float *strength);
/* w (n, n), column j the weights of row j: DSCR's for one picture of n = grid_w grid_h patches; depth (n) or NULL */
int32_t kvs_test_dscr_weights(const kvs_dscr_params *p, const float *depth, float *w);
/* Rows first..first+n of n_rows are mixed with w (n, n), a column for each; a column of zeros leaves its row. k, v, k_out, v_out (n_rows,
 * n_kv_head, head_dim); exact_k, exact_v (n_exact, n_kv_head, head_dim): the ring of exact rows, slot = row % n_exact, or NULL.
 * n_rot and inv_freq (n_rot / 2) turn keys by their rows' numbers; without rope_pre they are not used. */
int32_t kvs_test_mix(const char *isa, int32_t threads, int32_t kv_type, int32_t n_kv_head, int32_t head_dim, int32_t n_rows, int32_t first,
                     int32_t n, const float *w, float gamma, int32_t target, int32_t rope_pre, int32_t n_rot, const float *inv_freq,
                     const float *k, const float *v, int32_t n_exact, float *k_out, float *v_out, float *exact_k, float *exact_v);
/* Rows of a cache of n_rows are multiplied in one step after the other: in step i the first counts[i] of indices (room) and of each list of
 * places (n_sets, room), less than 0: of none; n_sets 1 or n_kv_head. Cache and rings as above. */
int32_t kvs_test_scale(const char *isa, int32_t threads, int32_t kv_type, int32_t n_kv_head, int32_t head_dim, int32_t n_rows,
                       const int32_t *indices, const int32_t *places, int32_t n_sets, int32_t room, const int32_t *counts, int32_t n_steps,
                       float factor, int32_t target, const float *k, const float *v, int32_t n_exact, float *k_out, float *v_out,
                       float *exact_k, float *exact_v);
/* draws ids from one row of logits, the first alone, the others up to 64 at once; last: the whole sample of the last draw. KVS_E_NUMERIC: its id is that of the first logit that is not
 * finite, its n_top their number */
int32_t kvs_test_sample(const char *isa, const float *logits, int32_t n_vocab, const int32_t *seen, int64_t n_seen,
                        const kvs_sampling *params, uint64_t seed, int32_t draws, int32_t *ids, kvs_sample *last);

/* [cffi] end */

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
#endif
