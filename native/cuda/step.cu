/* step.cu - steps: what is staged for them, ops launched at once or noted down, graphs, and how a step ends. */
#include "cuda.h"

#include <stdlib.h>
#include <string.h>

enum { CHUNK_BYTES = 1 << 18, REPORT_BYTES = 1 << 14, ALIGN = 256, MARK_EVERY = 4 };

/* Those of which CUDA says "the process must be terminated and relaunched", and 214, of which it says nothing, but the context has lost memory. By
 * number, since not every CUDA 12 knows all names. */
bool kvs_cuda_lasts(cudaError_t error) {
    switch ((int)error) {
    case 214: /* an uncorrectable error of memory */
    case 226:
    case cudaErrorIllegalAddress:
    case 702: /* a kernel took too long */
    case 710: /* an assertion */
    case 714:
    case 715:
    case 716:
    case 717:
    case 718:
    case cudaErrorLaunchFailure:
    case 721:
    case 810:
    case 911: return true;
    default: return false;
    }
}

void kvs_cuda_fail(kvs_cuda *cu, cudaError_t error, const char *what) {
    const bool lasts = kvs_cuda_lasts(error);
    const char *kernel = lasts && !cu->waits ? __atomic_load_n(&cu->last_kernel, __ATOMIC_RELAXED) : NULL;
    char hint[160] = "";
    if (kernel) snprintf(hint, sizeof hint, "; this model's last kernel was %.60s, KVS_CUDA_SYNC=1 names the one that failed", kernel);
    kvs_device_fail(&cu->base, lasts, "%.70s: %s (%s)%s", what, cudaGetErrorString(error), cudaGetErrorName(error), hint);
}

void kvs_cuda_launched(kvs_cuda *cu, const char *kernel) {
    if (cu->waits) kvs_cuda_check(cu, cudaStreamSynchronize(cu->stream), kernel);
    __atomic_store_n(&cu->last_kernel, kernel, __ATOMIC_RELAXED);
}

bool kvs_cuda_check(kvs_cuda *cu, cudaError_t error, const char *what) {
    if (error == cudaSuccess) return true;
    cudaGetLastError(); /* one that does not stick is forgotten */
    if (error == cudaErrorMemoryAllocation) {
        if (!cu->status) cu->status = KVS_E_MEMORY;
        return false;
    }
    kvs_cuda_fail(cu, error, what);
    cu->status = KVS_E_DEVICE;
    return false;
}

/* ---- staging ---- */

static kvs_cuda_chunk *add_chunk(kvs_cuda *cu, kvs_cuda_chunk **last, uint64_t bytes) {
    kvs_cuda_chunk *chunk = (kvs_cuda_chunk *)kvs_calloc(1, sizeof *chunk);
    if (!chunk) {
        cu->status = KVS_E_MEMORY;
        return NULL;
    }
    chunk->bytes = bytes;
    bool ok = kvs_cuda_check(cu, kvs_cuda_malloc_host(&chunk->host, bytes), "cudaMallocHost") &&
              kvs_cuda_check(cu, kvs_cuda_malloc(&chunk->device, bytes), "cudaMalloc") &&
              kvs_cuda_check(cu, cudaMemsetAsync(chunk->device, 0, bytes, cu->stream), "cudaMemsetAsync"); /* whole rooms are copied */
    if (!ok) {
        cudaFreeHost(chunk->host);
        cudaFree(chunk->device);
        free(chunk);
        return NULL;
    }
    return *last = chunk;
}

/* Room in the first chunk that has it. Chunks never move: addresses stand in graphs. */
static kvs_cuda_report take_room(kvs_cuda *cu, kvs_cuda_chunk **chunks, uint64_t bytes, uint64_t least) {
    kvs_cuda_report room = {NULL, NULL};
    bytes = (KVS_MAX(bytes, (uint64_t)1) + ALIGN - 1) / ALIGN * ALIGN;
    while (*chunks && (*chunks)->bytes - (*chunks)->used < bytes) chunks = &(*chunks)->next;
    kvs_cuda_chunk *chunk = *chunks ? *chunks : add_chunk(cu, chunks, KVS_MAX(bytes, least));
    if (!chunk) return room;
    room.host = chunk->host + chunk->used;
    room.device = chunk->device + chunk->used;
    chunk->used += bytes;
    return room;
}

static void free_chunks(kvs_cuda_chunk *chunk) {
    while (chunk) {
        kvs_cuda_chunk *next = chunk->next;
        cudaFreeHost(chunk->host);
        cudaFree(chunk->device);
        free(chunk);
        chunk = next;
    }
}

void *kvs_cuda_stage(kvs_cuda *cu, const void *host, uint64_t bytes, uint64_t room) {
    if (cu->status) return NULL;
    kvs_cuda_report staged = take_room(cu, &cu->chunks, room, CHUNK_BYTES);
    if (!staged.host) return NULL;
    if (bytes) memcpy(staged.host, host, bytes);
    memset(staged.host + bytes, 0, room - bytes);
    return staged.device;
}

static void send_staged(kvs_cuda *cu) {
    for (kvs_cuda_chunk *chunk = cu->chunks; chunk && !cu->status; chunk = chunk->next) {
        if (chunk->sent == chunk->used) continue;
        uint64_t at = chunk->sent;
        chunk->sent = chunk->used;
        kvs_cuda_check(cu, cudaMemcpyAsync(chunk->device + at, chunk->host + at, chunk->used - at, cudaMemcpyHostToDevice, cu->stream),
                       "cudaMemcpyAsync of a step's rows");
    }
}

static bool remember_kv(kvs_cuda *cu, const kvs_kv *kv, const kvs_kv *device) {
    if (cu->n_kvs == cu->room_kvs) {
        int32_t room = 2 * cu->room_kvs + 8;
        const kvs_kv **grown = (const kvs_kv **)kvs_realloc(cu->kvs, (uint64_t)room, sizeof *grown);
        if (grown) cu->kvs = grown;
        const kvs_kv **grown_too = (const kvs_kv **)kvs_realloc(cu->kvs_device, (uint64_t)room, sizeof *grown_too);
        if (grown_too) cu->kvs_device = grown_too;
        if (!grown || !grown_too) {
            cu->status = KVS_E_MEMORY;
            return false;
        }
        cu->room_kvs = room;
    }
    cu->kvs[cu->n_kvs] = kv;
    cu->kvs_device[cu->n_kvs++] = device;
    return true;
}

const kvs_kv *kvs_cuda_kv(kvs_cuda *cu, const kvs_kv *kv) {
    for (int32_t i = cu->n_kvs - 1; i >= 0; i--) /* rows of one session are neighbours: the last one it is, mostly */
        if (cu->kvs[i] == kv) return cu->kvs_device[i];
    kvs_kv copy = *kv;
    int64_t lists = kv->dropped ? (int64_t)kv->n_layer * kv->n_sets : 1;
    uint64_t bytes = kv->spans ? (uint64_t)lists * (uint64_t)kv->room_spans * sizeof *kv->spans : 0;
    copy.spans = bytes ? (kvs_range *)kvs_cuda_stage(cu, kv->spans, bytes, bytes) : NULL;
    if (kv->dropped)
        copy.dropped = (const int32_t *)kvs_cuda_stage(cu, kv->dropped, (uint64_t)kv->n_layer * sizeof *kv->dropped,
                                                       (uint64_t)kv->n_layer * sizeof *kv->dropped);
    const kvs_kv *device = (const kvs_kv *)kvs_cuda_stage(cu, &copy, sizeof copy, sizeof copy);
    return device && remember_kv(cu, kv, device) ? device : NULL;
}

static void stage_rows(kvs_cuda *cu, const kvs_step *step) {
    cu->rows = NULL;
    if (!step->n) return;
    kvs_row *rows = (kvs_row *)kvs_calloc((uint64_t)step->n, sizeof *rows);
    if (!rows) {
        cu->status = KVS_E_MEMORY;
        return;
    }
    for (int32_t i = 0; i < step->n; i++) {
        rows[i].index = step->rows[i].index;
        rows[i].pos = step->rows[i].pos;
        rows[i].kv = (kvs_kv *)kvs_cuda_kv(cu, step->rows[i].kv);
    }
    uint64_t bytes = (uint64_t)step->n * sizeof *rows;
    cu->rows = (const kvs_row *)kvs_cuda_stage(cu, rows, bytes, bytes);
    free(rows);
}

/* ---- reports ---- */

kvs_cuda_report kvs_cuda_reserve_report(kvs_cuda *cu, uint64_t bytes) {
    kvs_cuda_report none = {NULL, NULL};
    return cu->status ? none : take_room(cu, &cu->reports, bytes, REPORT_BYTES);
}

void kvs_cuda_deliver(kvs_cuda *cu, void *to, const uint8_t *from, uint64_t bytes) {
    if (cu->status) return;
    if (cu->n_deliveries == cu->room_deliveries) {
        int32_t room = 2 * cu->room_deliveries + 8;
        kvs_cuda_delivery *grown = (kvs_cuda_delivery *)kvs_realloc(cu->deliveries, (uint64_t)room, sizeof *grown);
        if (!grown) {
            cu->status = KVS_E_MEMORY;
            return;
        }
        cu->deliveries = grown;
        cu->room_deliveries = room;
    }
    cu->deliveries[cu->n_deliveries++] = {to, from, bytes};
}

/* On their way behind all that was launched. */
static void send_reports(kvs_cuda *cu) {
    for (kvs_cuda_chunk *chunk = cu->reports; chunk && !cu->status; chunk = chunk->next)
        if (chunk->used)
            kvs_cuda_check(cu, cudaMemcpyAsync(chunk->host, chunk->device, chunk->used, cudaMemcpyDeviceToHost, cu->stream),
                           "cudaMemcpyAsync of what a step tells");
}

static void deliver_all(const kvs_cuda *cu) {
    for (int32_t i = 0; i < cu->n_deliveries; i++) memcpy(cu->deliveries[i].to, cu->deliveries[i].from, cu->deliveries[i].bytes);
}

/* ---- scratch ---- */

uint8_t *kvs_cuda_scratch(kvs_cuda *cu, int32_t which, uint64_t bytes) {
    kvs_cuda_scratch_block *scratch = &cu->scratch[which];
    if (cu->status) return NULL;
    if (bytes <= scratch->bytes) return scratch->p;
    void **grown = (void **)kvs_realloc(cu->retired, (uint64_t)cu->n_retired + 1, sizeof *grown);
    if (!grown) {
        cu->status = KVS_E_MEMORY;
        return NULL;
    }
    cu->retired = grown;
    uint8_t *block = NULL;
    if (!kvs_cuda_check(cu, kvs_cuda_malloc(&block, bytes), "cudaMalloc of working space")) return NULL;
    if (!kvs_cuda_check(cu, cudaMemsetAsync(block, 0, bytes, cu->stream), "cudaMemsetAsync")) { /* kernels read the rests of tiles, too */
        cudaFree(block);
        return NULL;
    }
    if (scratch->p) cu->retired[cu->n_retired++] = scratch->p;
    *scratch = {block, bytes};
    return block;
}

static void free_retired(kvs_cuda *cu) {
    for (int32_t i = 0; i < cu->n_retired; i++) cudaFree(cu->retired[i]);
    cu->n_retired = 0;
}

/* ---- ops: noted down or launched ---- */

static void note(kvs_cuda *cu, int32_t kind, kvs_cuda_launch launch, const void *args, uint64_t bytes) {
    kvs_cuda_list *list = &cu->list;
    uint64_t padded = (bytes + 7) / 8 * 8, need = list->used + sizeof(kvs_cuda_noted) + padded;
    if (need > list->room) {
        uint8_t *grown = (uint8_t *)kvs_realloc(list->bytes, 2 * need, 1);
        if (!grown) {
            cu->status = KVS_E_MEMORY;
            return;
        }
        list->bytes = grown;
        list->room = 2 * need;
    }
    kvs_cuda_noted *op = (kvs_cuda_noted *)(list->bytes + list->used);
    memset(op, 0, sizeof *op + padded);
    op->launch = launch;
    op->kind = kind;
    op->bytes = (int32_t)padded;
    memcpy(op + 1, args, bytes);
    list->used = need;
}

/* Not too far ahead of the device: what is launched can't be taken back, and a cancellation is to be obeyed soon. */
static void keep_close(kvs_cuda *cu) {
    int32_t mark = cu->n_launched / MARK_EVERY;
    if (cu->n_launched++ % MARK_EVERY || cu->status) return;
    if (mark >= 2) kvs_cuda_check(cu, cudaEventSynchronize(cu->marks[mark % 2]), "cudaEventSynchronize");
    kvs_cuda_check(cu, cudaEventRecord(cu->marks[mark % 2], cu->stream), "cudaEventRecord");
}

void kvs_cuda_do(kvs_cuda *cu, int32_t kind, kvs_cuda_launch launch, const void *args, uint64_t bytes) {
    if (cu->status) return;
    if (cu->noting) {
        note(cu, kind, launch, args, bytes);
        return;
    }
    send_staged(cu);
    if (cu->status) return;
    launch(cu, args);
    keep_close(cu);
}

void kvs_cuda_flush(kvs_cuda *cu) {
    if (!cu->noting) return;
    cu->noting = false;
    send_staged(cu);
    kvs_cuda_launch_noted(cu);
    cu->list.used = 0;
}

void kvs_cuda_wait(kvs_cuda *cu) {
    kvs_cuda_flush(cu);
    if (!kvs_cuda_failed(cu))
        kvs_cuda_check(cu, cudaStreamSynchronize(cu->stream), "cudaStreamSynchronize");
    else if (!cu->status) /* a copy between two ops, or another thread's */
        cu->status = KVS_E_DEVICE;
}

/* ---- graphs ---- */

static kvs_cuda_graph *known_graph(kvs_cuda *cu) {
    for (int i = 0; i < KVS_CUDA_GRAPHS; i++) {
        kvs_cuda_graph *graph = &cu->graphs[i];
        if (graph->exec && graph->list.used == cu->list.used && !memcmp(graph->list.bytes, cu->list.bytes, cu->list.used)) return graph;
    }
    return NULL;
}

static void forget_graph(kvs_cuda_graph *graph) {
    if (graph->exec) cudaGraphExecDestroy(graph->exec);
    graph->exec = NULL;
}

/* What is noted down becomes a graph in the place that was not used for longest; its list changes places with ours. */
static kvs_cuda_graph *capture(kvs_cuda *cu) {
    kvs_cuda_graph *graph = cu->graphs;
    for (int i = 1; i < KVS_CUDA_GRAPHS; i++)
        if (cu->graphs[i].last_use < graph->last_use) graph = &cu->graphs[i];
    forget_graph(graph);
    cudaGraph_t captured = NULL;
    /* Relaxed: a kernel that is met for the first time is loaded now, by calls of the driver's own */
    if (!kvs_cuda_check(cu, cudaStreamBeginCapture(cu->stream, cudaStreamCaptureModeRelaxed), "cudaStreamBeginCapture")) return NULL;
    cu->capturing = cu->overlaps;
    kvs_cuda_launch_noted(cu);
    cu->capturing = cu->behind_kernel = false;
    bool ok = kvs_cuda_check(cu, cudaStreamEndCapture(cu->stream, &captured), "cudaStreamEndCapture") && !cu->status &&
              kvs_cuda_check(cu, cudaGraphInstantiate(&graph->exec, captured, 0), "cudaGraphInstantiate");
    if (captured) cudaGraphDestroy(captured);
    graph->last_kernel = cu->last_kernel;
    if (!ok) {
        graph->exec = NULL;
        return NULL;
    }
    kvs_cuda_list old = graph->list;
    graph->list = cu->list;
    cu->list = old;
    return graph;
}

static void run_noted(kvs_cuda *cu) {
    if (!cu->list.used || kvs_cuda_stopped(cu)) return;
    send_staged(cu);
    if (cu->status) return; /* the graph would run on rows of an earlier step */
    if (cu->waits) {        /* the kernels of the graph, one by one */
        kvs_cuda_launch_noted(cu);
        return;
    }
    kvs_cuda_graph *graph = known_graph(cu);
    if (!graph) graph = capture(cu);
    if (!graph) return;
    graph->last_use = cu->n_steps;
    if (kvs_cuda_check(cu, cudaGraphLaunch(graph->exec, cu->stream), "cudaGraphLaunch")) kvs_cuda_launched(cu, graph->last_kernel);
}

void kvs_cuda_free_steps(kvs_cuda *cu) {
    for (int i = 0; i < KVS_CUDA_GRAPHS; i++) {
        forget_graph(&cu->graphs[i]);
        free(cu->graphs[i].list.bytes);
    }
    free_chunks(cu->chunks);
    free_chunks(cu->reports);
    free(cu->deliveries);
    free_retired(cu);
    free(cu->retired);
    for (const kvs_cuda_scratch_block &scratch : cu->scratch) cudaFree(scratch.p);
    free(cu->list.bytes);
    free(cu->kvs);
    free(cu->kvs_device);
}

/* ---- begin and end ---- */

static void reset_fault(kvs_cuda *cu) {
    cu->fault = kvs_cuda_reserve_report(cu, sizeof(kvs_cuda_fault)); /* the first report: it is always there */
    if (cu->fault.device)
        kvs_cuda_check(cu, cudaMemsetAsync(cu->fault.device, 0xff, sizeof(kvs_cuda_fault), cu->stream), "cudaMemsetAsync");
}

static bool worth_a_graph(const kvs_step *step) {
    if (step->n <= KVS_GRAPH_PROMPT_ROWS) return step->n > 0;
    for (int32_t i = 1; i < step->n; i++)
        if (step->rows[i].kv == step->rows[i - 1].kv) return false;
    return step->n <= KVS_GRAPH_ROWS;
}

void kvs_cuda_begin(kvs_backend *be, const kvs_step *step) {
    kvs_cuda *cu = (kvs_cuda *)be;
    cu->step = step;
    cu->cancel = step->cancel;
    cu->status = kvs_cuda_failed(cu) ? KVS_E_DEVICE : KVS_OK;
    cu->noting = worth_a_graph(step);
    cu->list.used = 0;
    cu->n_kvs = 0;
    cu->n_once = 0;
    cu->n_launched = 0;
    cu->n_steps++;
    cu->n_deliveries = 0;
    for (kvs_cuda_chunk *chunk = cu->chunks; chunk; chunk = chunk->next) chunk->used = chunk->sent = 0;
    for (kvs_cuda_chunk *chunk = cu->reports; chunk; chunk = chunk->next) chunk->used = 0;
    if (cu->status || !kvs_cuda_check(cu, cudaSetDevice(cu->device), "cudaSetDevice")) return;
    free_retired(cu);
    reset_fault(cu);
    stage_rows(cu, step);
}

static void read_fault(kvs_cuda *cu) {
    const kvs_cuda_fault found = *(const kvs_cuda_fault *)cu->fault.host;
    if (found == ~(kvs_cuda_fault)0) return;
    cu->status = KVS_E_NUMERIC;
    if (!cu->step->fault) return;
    uint32_t bits = (uint32_t)found;
    cu->step->fault->place = (int32_t)(found >> 52);
    cu->step->fault->row = (int32_t)(found >> 32) & (KVS_CUDA_FAULT_ROWS - 1);
    memcpy(&cu->step->fault->value, &bits, sizeof bits);
}

/* The one wait of a step. */
static void read_reports(kvs_cuda *cu) {
    if (!cu->status) send_reports(cu);
    if (!cu->status) kvs_cuda_wait(cu);
    if (!cu->status) read_fault(cu);
    if (!cu->status) deliver_all(cu);
}

int kvs_cuda_end(kvs_backend *be, kvs_error *err) {
    kvs_cuda *cu = (kvs_cuda *)be;
    if (cu->noting) run_noted(cu);
    cu->noting = false;
    read_reports(cu);
    if (cu->status && !kvs_cuda_failed(cu)) cudaStreamSynchronize(cu->stream); /* what was launched still reads what the caller owns */
    int status = cu->status;
    cu->step = NULL;
    cu->rows = NULL;
    cu->cancel = NULL;
    cu->status = KVS_OK;
    if (status == KVS_E_CANCELLED) return kvs_fail(err, status, "cancelled");
    if (status == KVS_E_MEMORY) return kvs_fail(err, status, "out of memory on %s: no room for the working space of a step", cu->base.name);
    if (status == KVS_E_NUMERIC) return kvs_fail(err, status, "values that are not finite");
    return status ? kvs_device_check(be, err) : KVS_OK;
}
