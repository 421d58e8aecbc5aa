/* todo.cu - ops that are not written yet; goes when all are. */
#include "cuda.h"
#define W __attribute__((weak))
W void kvs_cuda_norm(kvs_backend *, float *, const float *, const float *, const float *, float, int32_t, int32_t) {}
W void kvs_cuda_angles(kvs_backend *, const kvs_rope *) {}
W void kvs_cuda_rope(kvs_backend *, float *, const kvs_rope *, int32_t, int32_t, int32_t) {}
W void kvs_cuda_add(kvs_backend *, float *, const float *, int64_t) {}
W void kvs_cuda_gate(kvs_backend *, float *, const float *, int64_t) {}
W void kvs_cuda_unary(kvs_backend *, int32_t, float *, int64_t) {}
W void kvs_cuda_finite(kvs_backend *, const float *, int32_t, int32_t, float, int32_t) {}
W uint64_t kvs_cuda_weight_room(kvs_backend *, const kvs_weight *) { return 0; }
W bool kvs_cuda_place(kvs_backend *, kvs_weight *, void *, const int32_t *) { return false; }
W void kvs_cuda_free_pieces(kvs_cuda *) {}
W void kvs_cuda_rows(kvs_backend *, float *, const kvs_weight *, const int32_t *, int32_t) {}
W void kvs_cuda_matmul(kvs_backend *, const kvs_matmul *, int32_t, const float *, int32_t) {}
W void kvs_cuda_matvec(kvs_cuda *, const kvs_matmul *, int32_t, const float *, int32_t) {}
W void kvs_cuda_gemm(kvs_cuda *, const kvs_matmul *, int32_t, const float *, int32_t) {}
W void kvs_cuda_attn(kvs_backend *, int32_t, const float *, float *, const kvs_taps *) {}
W void kvs_cuda_attn_full(kvs_backend *, const float *, const float *, const float *, float *, int32_t, int32_t, int32_t, int32_t) {}
W void kvs_cuda_kv_put(kvs_backend *, int32_t, const float *, const float *) {}
W void kvs_cuda_kv_record(kvs_backend *, int32_t, const float *, const kvs_taps *) {}
W void kvs_cuda_kv_smooth(kvs_backend *, int32_t, const kvs_smooth_job *, int32_t, const kvs_rope *, float *) {}
W void kvs_cuda_kv_put_out(kvs_backend *, int32_t, const float *) {}
W void kvs_cuda_kv_mix(kvs_backend *, int32_t, const kvs_mix_job *, const kvs_rope *) {}
W void kvs_cuda_kv_score(kvs_backend *, const kvs_kv *, int32_t, int32_t, float *) {}
W void kvs_cuda_kv_gather(kvs_backend *, const kvs_kv *, const kvs_move *, int32_t) {}
W void kvs_cuda_kv_scatter(kvs_backend *, const kvs_kv *, const kvs_move *, int32_t) {}
W void kvs_cuda_kv_trim(kvs_backend *, const kvs_kv *, int32_t, int32_t) {}
