/* faults.h - what no kernel and no host code may do, and the shim must see. Part of check.cu: `check NAME` must end with abort() and a
 * message that names the kernel, or, where the comment says so, with 0. */

/* ---- threads that wait for ever ---- */

static __global__ void left_kernel(int32_t n) {
    if ((int32_t)threadIdx.x >= n) return;
    __syncthreads();
}
static __global__ void branches_kernel(void) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}
static __global__ void no_lane_kernel(void) {
    if (threadIdx.x != 7) __shfl_xor_sync(KVS_ALL_LANES, 1, 1);
}
static __global__ void short_warp_kernel(void) { kvs_warp_sum(1.0f); }
static __global__ void barrier_lane_kernel(void) {
    if (threadIdx.x == 3) __syncthreads();
    __syncwarp();
    if (threadIdx.x != 3) __syncthreads();
}
static __global__ void two_kinds_kernel(void) {
    if (threadIdx.x < 16)
        __shfl_xor_sync(KVS_ALL_LANES, 1.0f, 1);
    else
        __syncwarp();
}
static __global__ void two_masks_kernel(void) { __ballot_sync(threadIdx.x < 16 ? 0xffffffffu : 0xffff0000u, 1); }
static __global__ void own_lane_kernel(void) { __syncwarp(0xfffffffeu); }
static __global__ void stranger_kernel(void) {
    if (threadIdx.x < 4) __shfl_sync(0xfu, 1, 4);
}
static __global__ void two_products_kernel(void) {
    uint32_t a[4] = {}, b[2] = {};
    float c[4] = {};
    if (threadIdx.x % 2)
        kvs_mma_f16(c, a, b);
    else
        kvs_mma_f16(c, a, b);
}

/* ---- kernels that begin before the one in front has ended ---- */

static __global__ void store_kernel(float *x, int64_t at) { x[at] = 1.0f; }
static __global__ void awaits_kernel(float *x) {
    kvs_await_previous();
    x[threadIdx.x] = 1.0f;
}
static __global__ void never_awaits_kernel(float *x) { x[threadIdx.x] = 1.0f; }
static __global__ void writes_early_kernel(float *x) {
    x[threadIdx.x] = 1.0f;
    kvs_await_previous();
}
static __global__ void reads_early_kernel(float *x) {
    const float before = x[threadIdx.x];
    kvs_await_previous();
    x[threadIdx.x + 32] = before;
}
static void begin_early(const char *name, void (*kernel)(float *)) { /* the third of a chain: it overlaps the first, too */
    device_array<float> x(64), y(64);
    LAUNCH(store_kernel, 1, 1, 0, x.p, 3);
    LAUNCH_EARLY(awaits_kernel, 1, 32, y.p);
    start_early(name, kernel, 1, 32, x.p);
    x.get();
}

/* ---- memory ---- */

static __global__ void load_kernel(const uint8_t *x, uint32_t *out) { *out = kvs_load4(x + 2) + kvs_load16(x).x; }
static __global__ void copy_kernel(const uint8_t *x) {
    __shared__ __align__(16) uint8_t to[32];
    kvs_async16(to, x + 8);
}
static __global__ void matrix_kernel(uint32_t *out) {
    __shared__ __align__(16) uint16_t x[32 * 12];
    uint32_t r[4];
    kvs_ldmatrix_x4(r, x + threadIdx.x * 12); /* 24 bytes apart */
    *out = r[0];
}
static __global__ void behind_kernel(void) {
    KVS_DYNAMIC_SHARED(float, x);
    x[blockDim.x] = 0.0f;
}
static void write_at(int64_t at) {
    device_array<float> x(100);
    LAUNCH(store_kernel, 1, 1, 0, x.p, at);
}

/* ---- what is seen as wrong numbers, and in some orders only ---- */

/* These end with 0 where the sum is not what it would be with the barrier. */
static __global__ void race_kernel(float *out) {
    __shared__ float x[256];
    uint32_t t = threadIdx.x;
    x[t] = -1.0f;
    __syncthreads();
    x[t] = (float)t;
    out[t] = x[(t + 32) % 256]; /* no barrier before it */
}
static void race() {
    bool wrong = false;
    device_array<float> out(256);
    LAUNCH(race_kernel, 1, 256, 0, out.p);
    std::vector<float> got = out.get();
    for (uint32_t t = 0; t < 256; t++) wrong = wrong || got[t] != (float)((t + 32) % 256);
    expect(wrong, "nobody saw it");
}
static __global__ void unwritten_kernel(float *out) {
    KVS_DYNAMIC_SHARED(float, x);
    if (blockIdx.x == 0) x[threadIdx.x] = 1.0f;
    __syncthreads();
    if (!threadIdx.x) out[blockIdx.x] = x[0]; /* block 0 has written its own, not that of block 1 */
}
static void unwritten() {
    device_array<float> out(2);
    LAUNCH(unwritten_kernel, 2, 32, 32 * sizeof(float), out.p);
    expect(out.get()[0] == 1.0f && std::isnan(out.get()[1]), "nobody saw it");
}
static __global__ void unwritten_array_kernel(float *out) {
    __shared__ float x[32];
    if (blockIdx.x == 0) x[threadIdx.x] = 1.0f;
    __syncthreads();
    if (!threadIdx.x) out[blockIdx.x] = x[0];
}
static void unwritten_array() {
    device_array<float> out(2);
    LAUNCH(unwritten_array_kernel, 2, 32, 0, out.p);
    expect(out.get()[0] == 1.0f && std::isnan(out.get()[1]), "nobody saw it");
}
static void early_wait() { expect(!pipeline(pipeline_kernel<STAGES>), "nobody saw it"); }

/* ---- what only a build with KVS_SHIM_RACES sees; elsewhere these end with 0 ---- */

template <class T> static void on_zeros(const char *name, void (*kernel)(T *), size_t n, dim3 grid, dim3 block) {
    device_array<T> x(n);
    start(name, kernel, grid, block, 0, x.p);
}

static __global__ void blocks_kernel(float *x) {
    if (!threadIdx.x) x[blockIdx.x / 2] = 1.0f;
}
static __global__ void read_blocks_kernel(float *x) {
    if (!threadIdx.x) x[blockIdx.x] = x[blockIdx.x ? blockIdx.x - 1 : 0];
}
static __global__ void lanes_kernel(float *out) {
    __shared__ float x[32];
    x[threadIdx.x] = 0.0f;
    __syncthreads();
    x[threadIdx.x] = 1.0f;
    out[threadIdx.x] = x[(threadIdx.x + 1) % 32]; /* no __syncwarp before it: other lanes may be elsewhere */
}
static __global__ void mixed_kernel(uint32_t *x) {
    if (threadIdx.x) atomicAdd(x, 1u);
    if (!threadIdx.x) *x = 3;
}
static __global__ void read_kernel(float *to, const float *from) { to[threadIdx.x] = from[threadIdx.x]; }
static void unwritten_device() {
    float *p;
    device_array<float> to(32);
    call(cudaMalloc((void **)&p, 32 * sizeof *p), "cudaMalloc");
    call(cudaMemset(p, 0, 31 * sizeof *p), "cudaMemset");
    call(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    LAUNCH(read_kernel, 1, 32, 0, to.p, (const float *)p);
    call(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    call(cudaFree(p), "cudaFree");
}

/* What is put into a stream waits until somebody waits for it. */
struct pinned_number {
    float *p;
    explicit pinned_number(float x) {
        call(cudaMallocHost(&p, sizeof *p), "cudaMallocHost");
        *p = x;
    }
    ~pinned_number() { call(cudaFreeHost(p), "cudaFreeHost"); }
};
static void copy_number(void *to, const void *from, cudaMemcpyKind kind) {
    call(cudaMemcpyAsync(to, from, sizeof(float), kind, the_stream()), "cudaMemcpyAsync");
}
static void written_too_soon() { /* into what is still to be copied */
    device_array<float> x(1);
    pinned_number from(1.0f);
    float pageable = 2.0f;
    copy_number(x.p, from.p, cudaMemcpyHostToDevice);
    *from.p = 3.0f;
    expect(x.get()[0] == 3.0f, "nobody saw it");
    copy_number(x.p, &pageable, cudaMemcpyHostToDevice);
    pageable = 4.0f;
    expect(x.get()[0] == 2.0f, "pageable memory is read by the call");
}
static void read_too_soon() { /* what nobody waited for */
    device_array<float> x(std::vector<float>{1.0f});
    pinned_number to(0.0f);
    float pageable = 0.0f;
    copy_number(to.p, x.p, cudaMemcpyDeviceToHost);
    expect(*to.p == 0.0f, "nobody saw it");
    copy_number(&pageable, x.p, cudaMemcpyDeviceToHost);
    expect(pageable == 1.0f && *to.p == 1.0f, "pageable memory is written when the call returns, after what came before");
}
static void freed_too_soon() {
    device_array<float> x(1);
    {
        pinned_number from(1.0f);
        copy_number(x.p, from.p, cudaMemcpyHostToDevice);
    }
    expect(x.get()[0] != 1.0f, "nobody saw it");
}
static void not_waited_for() { /* the default stream's, by another one */
    device_array<float> x(1);
    pinned_number to(0.0f);
    std::vector<float> one{1.0f};
    call(cudaMemcpy(x.p, one.data(), sizeof(float), cudaMemcpyHostToDevice), "cudaMemcpy");
    copy_number(to.p, x.p, cudaMemcpyDeviceToHost);
    call(cudaStreamSynchronize(the_stream()), "cudaStreamSynchronize");
    expect(*to.p == 0.0f, "nobody saw it");
}
static void events_wait() { /* for what came before them, and no more */
    device_array<float> x(std::vector<float>{1.0f});
    pinned_number first(0.0f), second(0.0f);
    cudaEvent_t event, later;
    float ms;
    call(cudaEventCreateWithFlags(&event, cudaEventDefault), "cudaEventCreateWithFlags");
    call(cudaEventCreateWithFlags(&later, cudaEventDefault), "cudaEventCreateWithFlags");
    copy_number(first.p, x.p, cudaMemcpyDeviceToHost);
    call(cudaEventRecord(event, the_stream()), "cudaEventRecord");
    copy_number(second.p, x.p, cudaMemcpyDeviceToHost);
    call(cudaEventRecord(later, the_stream()), "cudaEventRecord");
    expect(*first.p == 0.0f, "done too soon");
    call(cudaEventSynchronize(event), "cudaEventSynchronize");
    expect(*first.p == 1.0f && *second.p == 0.0f, "%g %g", *first.p, *second.p);
    expect(cudaEventElapsedTime(&ms, event, later) == cudaErrorNotReady, "an event that has not come");
    call(cudaStreamSynchronize(the_stream()), "cudaStreamSynchronize");
    call(cudaEventElapsedTime(&ms, event, later), "cudaEventElapsedTime");
    expect(*second.p == 1.0f && ms >= 0.0f, "%g, %g ms", *second.p, ms);
    call(cudaEventDestroy(event), "cudaEventDestroy");
    call(cudaEventDestroy(later), "cudaEventDestroy");
}

/* ---- the runtime ---- */

/* Ends with 0 where the errors are those of a GPU. */
static void errors() {
    void *p, *q;
    float host[4];
    call(cudaMalloc(&p, 1000), "cudaMalloc");
    expect(cudaMalloc(&q, (size_t)1 << 60) == cudaErrorMemoryAllocation && !q, "so much memory");
    expect(cudaGetLastError() == cudaErrorMemoryAllocation && cudaGetLastError() == cudaSuccess, "the last error");
    expect(cudaMemcpy(p, host, 16, cudaMemcpyDeviceToHost) == cudaErrorInvalidValue, "the wrong way");
    expect(cudaMemcpy(p, host, 16, cudaMemcpyDeviceToDevice) == cudaErrorInvalidValue, "not on the device");
    expect(cudaMemcpy((uint8_t *)p + 996, host, 8, cudaMemcpyHostToDevice) == cudaErrorInvalidValue, "beyond the end");
    expect(cudaSetDevice(1) == cudaErrorInvalidDevice, "no such device");
    cudaGraph_t graph;
    call(cudaStreamBeginCapture(the_stream(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    expect(cudaMalloc(&q, 16) == cudaErrorStreamCaptureUnsupported, "an allocation while a stream is captured");
    expect(cudaStreamEndCapture(the_stream(), &graph) == cudaErrorStreamCaptureInvalidated && !graph, "the capture goes on");
    call(cudaFree(p), "cudaFree");
    size_t available, total;
    call(cudaMemGetInfo(&available, &total), "cudaMemGetInfo");
    expect(available == total, "%zu of %zu bytes are free", available, total);
}
/* KVS_SHIM_FAIL=cudaMalloc:2 */
static void second_fails() {
    void *p, *q, *r;
    call(cudaMalloc(&p, 16), "cudaMalloc");
    expect(cudaMalloc(&q, 16) == cudaErrorMemoryAllocation, "KVS_SHIM_FAIL");
    call(cudaMalloc(&r, 16), "cudaMalloc");
}
/* KVS_SHIM_FAIL=cudaStreamSynchronize:1 */
static void stays_broken() {
    void *p;
    call(cudaMalloc(&p, 16), "cudaMalloc");
    expect(cudaStreamSynchronize(the_stream()) == cudaErrorIllegalAddress && cudaMalloc(&p, 16) == cudaErrorIllegalAddress,
           "KVS_SHIM_FAIL");
}
/* KVS_SHIM_MEMORY=1000000 */
static void little_memory() {
    void *p, *q;
    call(cudaMalloc(&p, 600000), "cudaMalloc");
    expect(cudaMalloc(&q, 600000) == cudaErrorMemoryAllocation, "KVS_SHIM_MEMORY");
    call(cudaFree(p), "cudaFree");
    call(cudaMalloc(&q, 600000), "cudaMalloc");
}
/* KVS_SHIM_SM=75 */
static void turing() {
    int major, minor, bytes;
    call(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "cudaDeviceGetAttribute");
    call(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "cudaDeviceGetAttribute");
    call(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0), "cudaDeviceGetAttribute");
    expect(major == 7 && minor == 5 && bytes == 64 * 1024, "KVS_SHIM_SM");
}
/* KVS_SHIM_DEVICES=0 */
static void no_device() {
    int n = 7;
    expect(cudaGetDeviceCount(&n) == cudaErrorNoDevice && n == 0, "KVS_SHIM_DEVICES");
}

static const named_check faults[] = {
    {"left_kernel", [] { LAUNCH(left_kernel, 2, 64, 0, 40); }},
    {"branches_kernel", [] { start("branches_kernel", branches_kernel, 1, 64, 0); }},
    {"no_lane_kernel", [] { start("no_lane_kernel", no_lane_kernel, 1, 32, 0); }},
    {"short_warp_kernel", [] { start("short_warp_kernel", short_warp_kernel, 1, 40, 0); }},
    {"barrier_lane_kernel", [] { start("barrier_lane_kernel", barrier_lane_kernel, 1, 32, 0); }},
    {"two_kinds_kernel", [] { start("two_kinds_kernel", two_kinds_kernel, 1, 32, 0); }},
    {"two_masks_kernel", [] { start("two_masks_kernel", two_masks_kernel, 1, 32, 0); }},
    {"own_lane_kernel", [] { start("own_lane_kernel", own_lane_kernel, 1, 32, 0); }},
    {"stranger_kernel", [] { start("stranger_kernel", stranger_kernel, 1, 32, 0); }},
    {"two_products_kernel", [] { start("two_products_kernel", two_products_kernel, 1, 32, 0); }},
    {"load_kernel",
     [] {
         device_array<uint8_t> x(64);
         LAUNCH(load_kernel, 1, 1, 0, (const uint8_t *)x.p, (uint32_t *)(void *)x.p);
     }},
    {"copy_kernel",
     [] {
         device_array<uint8_t> x(64);
         LAUNCH(copy_kernel, 1, 1, 0, (const uint8_t *)x.p);
     }},
    {"matrix_kernel",
     [] {
         device_array<uint32_t> x(1);
         LAUNCH(matrix_kernel, 1, 32, 0, x.p);
     }},
    {"behind_kernel", [] { start("behind_kernel", behind_kernel, 1, 32, 32 * sizeof(float)); }},
    {"behind_device", [] { write_at(100); }},
    {"before_device", [] { write_at(-1); }},
    {"freed_twice",
     [] {
         void *p;
         call(cudaMalloc(&p, 4), "");
         call(cudaFree(p), "");
         call(cudaFree(p), "");
     }},
    {"many_threads", [] { LAUNCH(store_kernel, 1, dim3(32, 33), 0, nullptr, 0); }},
    {"no_blocks", [] { LAUNCH(store_kernel, 0, 32, 0, nullptr, 0); }},
    {"many_blocks", [] { LAUNCH(store_kernel, dim3(1, 65536), 32, 0, nullptr, 0); }},
    {"much_shared", [] { LAUNCH(store_kernel, 1, 32, 100 * 1024, nullptr, 0); }},
    {"never_awaits_kernel", [] { begin_early("never_awaits_kernel", never_awaits_kernel); }},
    {"writes_early_kernel", [] { begin_early("writes_early_kernel", writes_early_kernel); }},
    {"reads_early_kernel", [] { begin_early("reads_early_kernel", reads_early_kernel); }},
    {"race", race},
    {"unwritten", unwritten},
    {"unwritten_array", unwritten_array},
    {"blocks_kernel", [] { on_zeros("blocks_kernel", blocks_kernel, 2, 4, 32); }},
    {"read_blocks_kernel", [] { on_zeros("read_blocks_kernel", read_blocks_kernel, 4, 4, 32); }},
    {"lanes_kernel", [] { on_zeros("lanes_kernel", lanes_kernel, 32, 1, 32); }},
    {"mixed_kernel", [] { on_zeros("mixed_kernel", mixed_kernel, 1, 1, 64); }},
    {"unwritten_device", unwritten_device},
    {"written_too_soon", written_too_soon},
    {"read_too_soon", read_too_soon},
    {"freed_too_soon", freed_too_soon},
    {"not_waited_for", not_waited_for},
    {"events_wait", events_wait},
    {"early_wait", early_wait},
    {"errors", errors},
    {"second_fails", second_fails},
    {"stays_broken", stays_broken},
    {"little_memory", little_memory},
    {"turing", turing},
    {"no_device", no_device},
};
