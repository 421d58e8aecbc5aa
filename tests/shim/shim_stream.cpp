/* shim_stream.cpp - see shim_runtime.h: streams that do their work as late as a GPU may, events, graphs. */
#include "shim_inside.h"

#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

typedef std::function<void()> work;
struct kvs_shim_graph {
    std::vector<work> list;
};
struct kvs_shim_exec {
    std::vector<work> list;
};

static std::recursive_mutex turn; /* of what waits, and of who does it */
static std::set<kvs_shim_queue *> queues;
struct kvs_shim_queue {
    std::deque<work> list;
    kvs_shim_queue() {
        std::lock_guard<std::recursive_mutex> hold(turn);
        queues.insert(this);
    }
    ~kvs_shim_queue() {
        std::lock_guard<std::recursive_mutex> hold(turn);
        queues.erase(this);
    }
};
static kvs_shim_queue *queue_of(cudaStream_t stream) {
    static kvs_shim_queue default_stream;
    return stream ? stream->queue : &default_stream;
}

struct moment { /* of the last record that was done */
    std::chrono::steady_clock::time_point time;
    uint64_t asked = 0, done = 0;
    kvs_shim_queue *queue = nullptr; /* it was asked for there */
};
struct kvs_shim_event {
    std::shared_ptr<moment> at = std::make_shared<moment>(); /* queues may outlive an event */
};

static thread_local kvs_shim_stream *capturing; /* by this host thread, which may do nothing that is not safe, whatever the mode */

cudaError_t kvs_shim_enter(const char *name, bool safe) {
    if (cudaError_t error = kvs_shim_asked(name)) return kvs_shim_fail(error);
    if (safe || !capturing) return cudaSuccess;
    capturing->spoilt = true;
    return kvs_shim_fail(cudaErrorStreamCaptureUnsupported);
}

/* ---- what waits ---- */

static bool do_first(kvs_shim_queue *queue) {
    if (queue->list.empty()) return false;
    work first = std::move(queue->list.front());
    queue->list.pop_front();
    if (!kvs_shim_broken()) first();
    return true;
}

static void finish(kvs_shim_queue *queue) {
    std::lock_guard<std::recursive_mutex> hold(turn);
    while (do_first(queue)) {}
}

void kvs_shim_finish(cudaStream_t stream) { finish(queue_of(stream)); }

void kvs_shim_finish_all(void) {
    std::lock_guard<std::recursive_mutex> hold(turn);
    for (kvs_shim_queue *queue : queues) finish(queue);
}

static bool at_once(void) {
    const char *text = getenv("KVS_SHIM_STREAMS");
    if (!text || !*text || !strcmp(text, "late")) return false;
    if (strcmp(text, "early")) kvs_shim_fatal("KVS_SHIM_STREAMS=%s: it can be late or early", text);
    return true;
}

void kvs_shim_do(cudaStream_t stream, work what) {
    if (stream && stream->capture) {
        stream->capture->list.push_back(std::move(what));
        return;
    }
    kvs_shim_queue *queue = queue_of(stream);
    std::lock_guard<std::recursive_mutex> hold(turn);
    queue->list.push_back(std::move(what));
    if (at_once()) finish(queue);
}

/* ---- streams ---- */

template <class T> static T *made(T *object) {
    kvs_shim_so_far[OBJECTS]++;
    return object;
}
template <class T> static cudaError_t destroy(T *object, cudaError_t error) {
    if (!object || !kvs_shim_gives_back(error)) return error;
    kvs_shim_so_far[OBJECTS]--;
    delete object;
    return error;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    *stream = nullptr;
    ENTER(true);
    if (flags != cudaStreamNonBlocking) return kvs_shim_fail(cudaErrorInvalidValue); /* the others wait for the default stream */
    *stream = made(new kvs_shim_stream());
    (*stream)->queue = new kvs_shim_queue();
    (*stream)->device = kvs_shim_device();
    return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    cudaError_t error = kvs_shim_enter(__func__, true);
    if (!stream) return kvs_shim_fail(cudaErrorInvalidResourceHandle);
    if (!kvs_shim_gives_back(error)) return error;
    kvs_shim_finish(stream);
    if (capturing == stream) capturing = nullptr;
    delete stream->capture;
    delete stream->queue;
    return destroy(stream, error);
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    ENTER(stream != nullptr);
    kvs_shim_so_far[WAITS]++;
    if (stream && stream->capture) { /* no stream allows that while it is captured */
        stream->spoilt = true;
        return kvs_shim_fail(cudaErrorStreamCaptureUnsupported);
    }
    kvs_shim_finish(stream);
    return kvs_shim_fail(kvs_shim_broken());
}

/* ---- events ---- */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
    *event = nullptr;
    ENTER(true);
    *event = made(new kvs_shim_event());
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { return destroy(event, kvs_shim_enter(__func__, true)); }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    ENTER(true);
    if (!event) return kvs_shim_fail(cudaErrorInvalidResourceHandle);
    if (stream && stream->capture) return cudaSuccess;
    std::lock_guard<std::recursive_mutex> hold(turn);
    std::shared_ptr<moment> at = event->at;
    uint64_t n = ++at->asked;
    at->queue = queue_of(stream);
    kvs_shim_do(stream, [=]() {
        at->done = n;
        at->time = std::chrono::steady_clock::now();
    });
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    ENTER(false);
    kvs_shim_so_far[WAITS]++;
    if (!event) return kvs_shim_fail(cudaErrorInvalidResourceHandle);
    std::lock_guard<std::recursive_mutex> hold(turn);
    moment *at = event->at.get();
    while (at->done < at->asked && do_first(at->queue)) {} /* what comes after it in the stream need not be done */
    return kvs_shim_fail(kvs_shim_broken());
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t from, cudaEvent_t to) {
    ENTER(true);
    if (!from || !to) return kvs_shim_fail(cudaErrorInvalidResourceHandle);
    std::lock_guard<std::recursive_mutex> hold(turn);
    if (from->at->done < from->at->asked || to->at->done < to->at->asked) return kvs_shim_fail(cudaErrorNotReady);
    *milliseconds = std::chrono::duration<float, std::milli>(to->at->time - from->at->time).count();
    return cudaSuccess;
}

/* ---- graphs: lists of what was to be done ---- */

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
    ENTER(true);
    if (!stream || stream->capture || capturing) return kvs_shim_fail(cudaErrorStreamCaptureUnsupported);
    stream->capture = new kvs_shim_graph();
    stream->spoilt = false;
    kvs_shim_so_far[CAPTURES]++;
    capturing = stream;
    return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    *graph = nullptr;
    cudaError_t asked = kvs_shim_asked(__func__);
    if (!stream || !stream->capture) return kvs_shim_fail(cudaErrorInvalidValue);
    kvs_shim_graph *captured = stream->capture;
    stream->capture = nullptr;
    if (capturing == stream) capturing = nullptr;
    if (!asked && !stream->spoilt)
        *graph = made(captured);
    else
        delete captured;
    return kvs_shim_fail(asked ? asked : stream->spoilt ? cudaErrorStreamCaptureInvalidated : cudaSuccess);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long) {
    *exec = nullptr;
    ENTER(true);
    if (!graph) return kvs_shim_fail(cudaErrorInvalidValue);
    *exec = made(new kvs_shim_exec{graph->list});
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
    ENTER(true);
    if (!exec || (stream && stream->capture)) return kvs_shim_fail(cudaErrorInvalidValue);
    kvs_shim_so_far[GRAPHS]++;
    for (const work &node : exec->list) kvs_shim_do(stream, node);
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return destroy(exec, kvs_shim_enter(__func__, true)); }
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return destroy(graph, kvs_shim_enter(__func__, true)); }
