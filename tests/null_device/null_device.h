// A CUDA runtime with one device on which nothing runs. What the files of this folder share.
//
//   device.cpp     the device's properties, errors, and everything that only has to succeed
//   launch.cpp     kernels: registered by name, counted, recorded; the functions that tests call by ctypes
//   memory.cpp     allocations on the host, copies that really copy
//   capture.cpp    streams, events, stream capture, graphs
//   libraries.cpp  cuBLAS and cuDNN: each call is one launch
//   driver.c       the driver's API as Triton and nvrtc use it (a library of its own, libcuda.so.1)
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace null_device {

constexpr size_t MEMORY = 80ull << 30;  // of the device; a H100 has as much

struct Stream;

// What a capture has recorded, in order. A node depends on earlier nodes only.
struct Nodes {
  std::vector<std::string> names, labels;  // label: null_label's text at that time
  std::vector<int> streams;
  std::vector<std::vector<int>> dependencies;
};

struct Capture {
  unsigned long long id;
  Stream* origin;              // it must end there
  long thread;                 // of the call that began it
  cudaStreamCaptureMode mode;  // which calls of which threads are unsafe
  bool invalid = false;
  std::string why;  // it is invalid
  Nodes nodes;
  std::set<Stream*> streams;  // origin, and those that joined by waiting for an event
};

struct Stream {
  int id;
  Capture* capture = nullptr;
  std::vector<int> frontier;  // nodes that the stream's next node will depend on
};

struct Event {
  Capture* capture = nullptr;  // in which it was recorded; may have ended since: see is_active
  unsigned long long capture_id = 0;
  std::vector<int> frontier;
  bool recorded = false;
  double at = 0;  // the device's clock, in ms
};

// All state below belongs to this lock. It is recursive: entry points call each other.
extern std::recursive_mutex mutex;
using Lock = std::lock_guard<std::recursive_mutex>;
extern std::string label;  // of the nodes that are recorded now

// The stream of a handle; null and the two special handles are the legacy default stream.
Stream* stream_of(cudaStream_t handle);
// Remember `error` for cudaGetLastError, and report it on stderr unless NULL_QUIET is set.
cudaError_t fail(cudaError_t error, const std::string& what);
// A launch or copy on a stream: counted, traced, and a node of the stream's capture if there is one.
cudaError_t record(cudaStream_t stream, const std::string& name);
// Count something that is not a node, such as an allocation or a synchronisation.
void count(const std::string& name);
// A line of the trace without a node, such as an event.
void trace(const std::string& line);
// Mark a capture as invalid, as CUDA does: it goes on, but every later call and its end fail.
void invalidate(Capture* capture, const std::string& why);
// A call that CUDA does not allow while a capture is active, such as cudaMalloc. Success if no capture forbids it.
cudaError_t unsafe(const char* call);
bool is_capturing(cudaStream_t stream);
size_t bytes_held();
// Nodes of all graphs that were captured, in order.
const std::vector<Nodes*>& captured_graphs();

}  // namespace null_device
