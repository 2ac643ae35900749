// Streams, events and stream capture.
//
// The rules that are kept (CUDA programming guide, "Creating a graph using stream capture"):
//   - A capture cannot begin on the legacy stream, and must end on the stream on which it began; in the modes "global"
//     and "thread local" also on the thread that began it.
//   - Another stream joins a capture when it waits for an event that was recorded in it. Every stream that joined must
//     be joined again, by an event, before the capture ends (cudaErrorStreamCaptureUnjoined).
//   - A captured event cannot be queried or synchronised, and no stream may wait for it after the capture has ended.
//   - A captured stream cannot wait for an event from outside (Isolation) or from another capture (Merge).
//   - Calls that may synchronise the device are unsafe: always for captures of mode "global", on the capturing thread
//     for "thread local", never for "relaxed". cudaThreadExchangeStreamCaptureMode changes what a thread may call.
//   - After an offence the capture is invalid; later launches on its streams and its end fail.
//
// What it cannot show: races. Nothing runs at the same time as anything else, so a missing dependency changes no value;
// tests read the recorded dependencies instead. Launches on the legacy stream during a capture are not refused.
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdio>

#include "null_device.h"

namespace null_device {

std::recursive_mutex mutex;

static Stream legacy{0};
static int streams_made = 0;
static unsigned long long captures_made = 0;
static std::set<Capture*> active;
static std::vector<Nodes*> graphs;  // never freed: a graph may be asked for at any time
static thread_local cudaStreamCaptureMode mode_of_thread = cudaStreamCaptureModeGlobal;

static long this_thread() { return syscall(SYS_gettid); }

// The device's clock: each launch outside of captures takes 1 us, and a graph 1 us for each node. So timed choices,
// such as that of a teacher's form, are the same in every run.
static double milliseconds = 0;
constexpr double LAUNCH = 1e-3;

const std::vector<Nodes*>& captured_graphs() { return graphs; }

Stream* stream_of(cudaStream_t handle) {
  bool is_default = handle == nullptr || handle == cudaStreamLegacy || handle == cudaStreamPerThread;
  return is_default ? &legacy : (Stream*)handle;
}

bool is_capturing(cudaStream_t stream) { return stream_of(stream)->capture != nullptr; }

void invalidate(Capture* capture, const std::string& why) {
  if (capture->invalid) return;
  capture->invalid = true;
  capture->why = why;
  fail(cudaErrorStreamCaptureInvalidated, "capture " + std::to_string(capture->id) + ": " + why);
}

cudaError_t unsafe(const char* call) {
  Lock lock(mutex);
  if (mode_of_thread == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (Capture* capture : active) {
    bool own = capture->thread == this_thread(), relaxed = capture->mode == cudaStreamCaptureModeRelaxed;
    bool global = capture->mode == cudaStreamCaptureModeGlobal;
    bool forbidden = mode_of_thread == cudaStreamCaptureModeThreadLocal ? own && !relaxed : global || (own && !relaxed);
    if (!forbidden) continue;
    invalidate(capture, std::string("unsafe call ") + call);
    return fail(cudaErrorStreamCaptureUnsupported, call);
  }
  return cudaSuccess;
}

cudaError_t record(cudaStream_t handle, const std::string& name) {
  Lock lock(mutex);
  Stream* stream = stream_of(handle);
  count(name);
  trace((stream->capture ? "c" : "e") + std::to_string(stream->id) + " " + name);
  Capture* capture = stream->capture;
  if (!capture) {
    milliseconds += LAUNCH;
    return cudaSuccess;
  }
  if (capture->invalid) return fail(cudaErrorStreamCaptureInvalidated, name);
  Nodes& nodes = capture->nodes;
  int number = nodes.names.size();
  nodes.names.push_back(name);
  nodes.labels.push_back(label);
  nodes.streams.push_back(stream->id);
  nodes.dependencies.push_back(stream->frontier);
  stream->frontier = {number};
  return cudaSuccess;
}

// The address of an ended capture may be used again, so its number is compared too.
static bool is_active(const Event* event) {
  return active.count(event->capture) && event->capture->id == event->capture_id;
}

// An event that was recorded outside of captures may be asked unless a capture forbids it.
static cudaError_t ask(cudaEvent_t handle, const char* call) {
  Lock lock(mutex);
  Event* event = (Event*)handle;
  if (!event->capture) return unsafe(call);
  if (is_active(event)) invalidate(event->capture, std::string(call) + " of a captured event");
  return fail(cudaErrorCapturedEvent, call);
}

// The stream waits for an event of a capture: it joins the capture, or gets more dependencies if it is in it.
static cudaError_t join(Stream* stream, Event* event) {
  const char* call = "cudaStreamWaitEvent";
  Capture* capture = event->capture;
  if (!is_active(event)) {
    if (stream->capture) invalidate(stream->capture, "wait for an event of a capture that has ended");
    return fail(cudaErrorCapturedEvent, "cudaStreamWaitEvent: event of an ended capture");
  }
  if (!stream->capture) {
    if (stream == &legacy) {
      invalidate(capture, "the legacy stream would join");
      return fail(cudaErrorStreamCaptureImplicit, call);
    }
    stream->capture = capture;
    stream->frontier = event->frontier;
    capture->streams.insert(stream);
    return cudaSuccess;
  }
  if (stream->capture != capture) {
    invalidate(stream->capture, "merge");
    invalidate(capture, "merge");
    return fail(cudaErrorStreamCaptureMerge, call);
  }
  std::set<int> both(stream->frontier.begin(), stream->frontier.end());
  both.insert(event->frontier.begin(), event->frontier.end());
  stream->frontier.assign(both.begin(), both.end());
  return cudaSuccess;
}

// Success if the last nodes of all streams are ancestors of the origin's last nodes.
static cudaError_t check_joined(const Capture* capture) {
  const Nodes& nodes = capture->nodes;
  std::vector<bool> joined(nodes.names.size());
  std::vector<int> todo(capture->origin->frontier);
  while (!todo.empty()) {
    int node = todo.back();
    todo.pop_back();
    if (joined[node]) continue;
    joined[node] = true;
    todo.insert(todo.end(), nodes.dependencies[node].begin(), nodes.dependencies[node].end());
  }
  for (Stream* stream : capture->streams)
    for (int node : stream->frontier)
      if (!joined[node]) {
        std::string where = "stream " + std::to_string(stream->id) + ", last node " + nodes.names[node];
        return fail(cudaErrorStreamCaptureUnjoined, "EndCapture: unjoined " + where);
      }
  return cudaSuccess;
}

}  // namespace null_device

using namespace null_device;
extern "C" {

double null_clock() { return milliseconds; }

// ---- streams
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  Lock lock(mutex);
  *stream = (cudaStream_t) new Stream{++streams_made};
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) {
  *priority = 0;
  return cudaSuccess;
}

static cudaError_t ask_stream(cudaStream_t handle, const char* call) {
  Lock lock(mutex);
  Capture* capture = stream_of(handle)->capture;
  if (!capture) return unsafe(call);
  invalidate(capture, std::string(call) + " of a capturing stream");
  return fail(cudaErrorStreamCaptureUnsupported, call);
}
cudaError_t cudaStreamQuery(cudaStream_t stream) { return ask_stream(stream, "cudaStreamQuery"); }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  count("SYNC stream");
  return ask_stream(stream, "cudaStreamSynchronize");
}
cudaError_t cudaDeviceSynchronize() {
  count("SYNC device");
  return unsafe("cudaDeviceSynchronize");
}
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void* data, unsigned) {
  callback(stream, cudaSuccess, data);
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  cudaError_t error = record(stream, "hostfunc");
  if (!error && !is_capturing(stream)) function(data);
  return error;
}

// ---- events
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = (cudaEvent_t) new Event;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete (Event*)event;
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t stream_handle, unsigned) {
  Lock lock(mutex);
  Event* event = (Event*)handle;
  Stream* stream = stream_of(stream_handle);
  event->recorded = true;
  event->at = milliseconds;
  event->capture = stream->capture;
  event->capture_id = stream->capture ? stream->capture->id : 0;
  event->frontier = stream->frontier;
  trace("record s" + std::to_string(stream->id));
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
cudaError_t cudaEventQuery(cudaEvent_t event) { return ask(event, "cudaEventQuery"); }
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  count("SYNC event");
  return ask(event, "cudaEventSynchronize");
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  *ms = ((Event*)end)->at - ((Event*)start)->at;
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream_handle, cudaEvent_t event_handle, unsigned flags) {
  Lock lock(mutex);
  Stream* stream = stream_of(stream_handle);
  Event* event = (Event*)event_handle;
  if (!event->recorded || (flags & cudaEventWaitExternal)) return cudaSuccess;
  trace("wait s" + std::to_string(stream->id));
  if (event->capture) return join(stream, event);
  if (!stream->capture) return cudaSuccess;
  invalidate(stream->capture, "wait for an event that was recorded outside of the capture");
  return fail(cudaErrorStreamCaptureIsolation, "cudaStreamWaitEvent");
}

// ---- capture
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(mode_of_thread, *mode);
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Lock lock(mutex);
  Stream* stream = stream_of(handle);
  if (stream == &legacy) return fail(cudaErrorStreamCaptureUnsupported, "BeginCapture on the legacy stream");
  if (stream->capture) return fail(cudaErrorIllegalState, "BeginCapture of a stream that captures already");
  auto* capture = new Capture{++captures_made, stream, this_thread(), mode};
  capture->streams = {stream};
  stream->capture = capture;
  stream->frontier.clear();
  active.insert(capture);
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t, cudaGraph_t, const cudaGraphNode_t*, const cudaGraphEdgeData*,
                                          size_t, cudaStreamCaptureMode) {
  return fail(cudaErrorNotSupported, "BeginCaptureToGraph");
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  Lock lock(mutex);
  Stream* stream = stream_of(handle);
  Capture* capture = stream->capture;
  *graph = nullptr;
  if (!capture) return fail(cudaErrorIllegalState, "EndCapture of a stream that does not capture");
  if (capture->origin != stream) {
    invalidate(capture, "ended on another stream");
    return fail(cudaErrorStreamCaptureUnmatched, "EndCapture");
  }
  if (capture->thread != this_thread() && capture->mode != cudaStreamCaptureModeRelaxed) {
    invalidate(capture, "ended by another thread");
    return fail(cudaErrorStreamCaptureWrongThread, "EndCapture");
  }
  cudaError_t error =
      capture->invalid ? fail(cudaErrorStreamCaptureInvalidated, "EndCapture: " + capture->why) : check_joined(capture);
  for (Stream* each : capture->streams) {
    each->capture = nullptr;
    each->frontier.clear();
  }
  active.erase(capture);
  if (!error) {
    graphs.push_back(new Nodes(std::move(capture->nodes)));
    *graph = (cudaGraph_t)graphs.back();
  }
  delete capture;
  return error;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  Lock lock(mutex);
  Capture* capture = stream_of(handle)->capture;
  *status = !capture           ? cudaStreamCaptureStatusNone
            : capture->invalid ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  Lock lock(mutex);
  cudaStreamIsCapturing(handle, status);
  Capture* capture = stream_of(handle)->capture;
  if (!capture) return cudaSuccess;
  if (id) *id = capture->id;
  if (graph) *graph = (cudaGraph_t)capture;
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t, cudaGraphNode_t*, const cudaGraphEdgeData*, size_t,
                                                unsigned) {
  return cudaSuccess;
}

// ---- graphs: an executable graph is its nodes
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = (cudaGraphExec_t)graph;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  Lock lock(mutex);
  milliseconds += LAUNCH * ((Nodes*)graph)->names.size();
  return record(stream, "GRAPH of " + std::to_string(((Nodes*)graph)->names.size()));
}
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = ((Nodes*)graph)->names.size();
  return cudaSuccess;
}
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*, size_t* count) {
  *count = 0;
  return cudaSuccess;
}
cudaError_t cudaGraphAddNode(cudaGraphNode_t*, cudaGraph_t, const cudaGraphNode_t*, const cudaGraphEdgeData*, size_t,
                             cudaGraphNodeParams*) {
  return cudaErrorNotSupported;
}
cudaError_t cudaGraphConditionalHandleCreate(cudaGraphConditionalHandle*, cudaGraph_t, unsigned, unsigned) {
  return cudaErrorNotSupported;
}
cudaError_t cudaGraphRetainUserObject(cudaGraph_t, cudaUserObject_t, unsigned, unsigned) { return cudaSuccess; }
cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }
cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void*, cudaHostFn_t, unsigned, unsigned) {
  *object = (cudaUserObject_t)8;
  return cudaSuccess;
}
cudaError_t cudaUserObjectRelease(cudaUserObject_t, unsigned) { return cudaSuccess; }
}
