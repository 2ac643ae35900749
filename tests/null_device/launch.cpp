// Kernel launches, and what tests call by ctypes.
//
// nvcc's generated code registers each kernel with the address of its host stub and its mangled name. A launch names
// the stub; here it is counted under the demangled name and computes nothing.
//
// What it cannot show: values, errors of a kernel's own (a grid too large, shared memory, misaligned accesses), time.
#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "null_device.h"

namespace null_device {

constexpr size_t LONGEST_NAME = 400;  // ATen's templates are long

std::string label;  // of the nodes that are recorded now
static std::map<std::string, long> counts;
static std::vector<std::string> lines;
static bool is_tracing = false;
static std::map<const void*, std::string> kernels;  // by host stub: mangled name
static thread_local struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} configuration;  // of a <<<...>>> launch, between its two halves

void count(const std::string& name) {
  Lock lock(mutex);
  counts[name]++;
}

void trace(const std::string& line) {
  Lock lock(mutex);
  if (is_tracing) lines.push_back(line);
}

static std::string name_of(const void* kernel) {
  Lock lock(mutex);
  auto found = kernels.find(kernel);
  if (found == kernels.end()) return "kernel?";
  int status;
  char* demangled = abi::__cxa_demangle(found->second.c_str(), nullptr, nullptr, &status);
  std::string name = demangled ? demangled : found->second;
  free(demangled);
  return name.substr(0, LONGEST_NAME);
}

}  // namespace null_device

using namespace null_device;
extern "C" {

// ---- control
void null_reset() {  // counts and trace; graphs stay
  Lock lock(mutex);
  counts.clear();
  lines.clear();
}
long null_total() {  // everything that was counted since the last reset: launches, copies, allocations,
                     // synchronisations
  Lock lock(mutex);
  long total = 0;
  for (auto& each : counts) total += each.second;
  return total;
}
void null_report(const char* path) {  // a line for each name: count, tab, name
  Lock lock(mutex);
  FILE* file = fopen(path, "w");
  for (auto& each : counts) fprintf(file, "%ld\t%s\n", each.second, each.first.c_str());
  fclose(file);
}
void null_trace(int on) { is_tracing = on; }
void null_trace_to(const char* path) {  // in order: "e3 kernel" eagerly on stream 3, "c3 kernel" captured; events
  Lock lock(mutex);
  FILE* file = fopen(path, "w");
  for (auto& line : lines) fprintf(file, "%s\n", line.c_str());
  fclose(file);
}
void null_label(const char* text) {  // nodes that are recorded from now on have this label
  Lock lock(mutex);
  label = text;
}
void null_graphs_to(const char* path) {  // a line for each node: graph, stream, label, dependencies, name; by tabs
  Lock lock(mutex);
  FILE* file = fopen(path, "w");
  int number = 0;
  for (const Nodes* graph : captured_graphs()) {
    for (size_t node = 0; node < graph->names.size(); node++) {
      fprintf(file, "%d\t%d\t%s\t", number, graph->streams[node], graph->labels[node].c_str());
      for (int other : graph->dependencies[node]) fprintf(file, "%d ", other);
      fprintf(file, "\t%s\n", graph->names[node].c_str());
    }
    number++;
  }
  fclose(file);
}
long null_graphs() { return captured_graphs().size(); }
long null_graph_nodes() { return captured_graphs().empty() ? -1 : captured_graphs().back()->names.size(); }
long null_bytes() { return bytes_held(); }
int null_launch(void* stream, const char* name) { return record((cudaStream_t)stream, name); }  // for driver.c

// ---- registration
void** __cudaRegisterFatBinary(void*) {
  static void* handle[8];
  return handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, void*, void*, void*, void*, int*) {
  Lock lock(mutex);
  kernels[stub] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
cudaError_t cudaLibraryLoadData(cudaLibrary_t* library, const void*, cudaJitOption*, void**, unsigned,
                                cudaLibraryOption*, void**, unsigned) {
  *library = (cudaLibrary_t)8;
  return cudaSuccess;
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t, const char* name) {
  Lock lock(mutex);
  char* stub = strdup(name);
  kernels[stub] = name;
  *kernel = (cudaKernel_t)stub;
  return cudaSuccess;
}
cudaError_t cudaLibraryUnload(cudaLibrary_t) { return cudaSuccess; }

// ---- launches
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *(cudaStream_t*)stream = configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = (cudaKernel_t)stub;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void* stub, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return record(stream, name_of(stub));
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return record(stream, name_of((const void*)kernel));
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void**) {
  return record(config->stream, name_of(stub));
}
}
