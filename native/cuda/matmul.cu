/* matmul.cu - y = x W^T + bias: by which kernels. */
#include "cuda.h"

enum { FEW_ROWS = 8 }; /* so many activation rows at most wait for weights, not for arithmetic */

void kvs_cuda_matmul(kvs_backend *be, const kvs_matmul *jobs, int32_t n_jobs, const float *x, int32_t n) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (n_jobs < 1 || n < 1 || kvs_cuda_stopped(cu)) return;
    for (int32_t i = 0; i < n_jobs; i++)
        if (!kvs_cuda_placed(cu, jobs[i].w)) return;
    if (n <= FEW_ROWS)
        kvs_cuda_matvec(cu, jobs, n_jobs, x, n);
    else
        kvs_cuda_gemm(cu, jobs, n_jobs, x, n);
}
