// The device's properties (those of an H100, on which torch, Inductor and fastkd base their choices), and errors.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "null_device.h"

namespace null_device {

constexpr int PROCESSORS = 132, CAPABILITY = 9, WARP = 32, THREADS_PER_BLOCK = 1024, THREADS_PER_PROCESSOR = 2048;
constexpr int SHARED_PER_BLOCK = 48 << 10, SHARED_OPTIN = 227 << 10, SHARED_PER_PROCESSOR = 228 << 10;
constexpr int REGISTERS = 65536, L2 = 50 << 20, BLOCKS_PER_PROCESSOR = 32, VERSION = 13000;

static thread_local cudaError_t last = cudaSuccess;
static const bool is_quiet = getenv("NULL_QUIET") != nullptr;

cudaError_t fail(cudaError_t error, const std::string& what) {
  last = error;
  if (!is_quiet) fprintf(stderr, "[null device] %s: %s\n", what.c_str(), cudaGetErrorName(error));
  return error;
}

}  // namespace null_device

using namespace null_device;
extern "C" {

// ---- errors
const char* cudaGetErrorName(cudaError_t error) {
  static thread_local char other[32];
  switch (error) {
#define NAME(error) \
  case error:       \
    return #error;
    NAME(cudaSuccess)
    NAME(cudaErrorInvalidDevice)
    NAME(cudaErrorNotReady)
    NAME(cudaErrorNotSupported)
    NAME(cudaErrorIllegalState)
    NAME(cudaErrorCapturedEvent)
    NAME(cudaErrorStreamCaptureUnsupported)
    NAME(cudaErrorStreamCaptureInvalidated)
    NAME(cudaErrorStreamCaptureMerge)
    NAME(cudaErrorStreamCaptureUnmatched)
    NAME(cudaErrorStreamCaptureUnjoined)
    NAME(cudaErrorStreamCaptureIsolation)
    NAME(cudaErrorStreamCaptureImplicit)
    NAME(cudaErrorStreamCaptureWrongThread)
#undef NAME
    default:
      snprintf(other, sizeof other, "cudaError %d", (int)error);
      return other;
  }
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
cudaError_t cudaGetLastError() {
  cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last; }

// ---- the device
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device ? fail(cudaErrorInvalidDevice, "cudaSetDevice") : cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "NVIDIA H100 NULL");
  p->totalGlobalMem = MEMORY;
  p->major = CAPABILITY;
  p->multiProcessorCount = PROCESSORS;
  p->warpSize = WARP;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = THREADS_PER_BLOCK;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 0x7fffffff;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsPerMultiProcessor = THREADS_PER_PROCESSOR;
  p->maxBlocksPerMultiProcessor = BLOCKS_PER_PROCESSOR;
  p->sharedMemPerBlock = SHARED_PER_BLOCK;
  p->sharedMemPerBlockOptin = SHARED_OPTIN;
  p->sharedMemPerMultiprocessor = SHARED_PER_PROCESSOR;
  p->regsPerBlock = p->regsPerMultiprocessor = REGISTERS;
  p->l2CacheSize = L2;
  p->memoryBusWidth = 5120;
  p->asyncEngineCount = 3;
  p->unifiedAddressing = p->concurrentKernels = 1;
  p->textureAlignment = 512;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<int, int> values = {
      {cudaDevAttrMultiProcessorCount, PROCESSORS},
      {cudaDevAttrComputeCapabilityMajor, CAPABILITY},
      {cudaDevAttrComputeCapabilityMinor, 0},
      {cudaDevAttrMaxSharedMemoryPerBlock, SHARED_PER_BLOCK},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, SHARED_OPTIN},
      {cudaDevAttrWarpSize, WARP},
      {cudaDevAttrMaxThreadsPerBlock, THREADS_PER_BLOCK},
      {cudaDevAttrMaxThreadsPerMultiProcessor, THREADS_PER_PROCESSOR},
      {cudaDevAttrL2CacheSize, L2},
  };
  auto found = values.find(attribute);
  *value = found == values.end() ? 0 : found->second;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int) {
  snprintf(text, size, "0000:00:00.0");
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = VERSION;
  return cudaSuccess;
}

// ---- kernels' attributes
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  memset(attributes, 0, sizeof *attributes);
  attributes->maxThreadsPerBlock = THREADS_PER_BLOCK;
  attributes->numRegs = 32;
  attributes->binaryVersion = attributes->ptxVersion = 10 * CAPABILITY;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t, cudaFuncAttribute, int, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 8;
  return cudaSuccess;
}

// ---- functions of the driver that torch asks for by name; driver.c has those that it links
static int succeed(...) { return 0; }
static int error_text(int, const char** text) {
  *text = "null device";
  return 0;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = !strcmp(name, "cuGetErrorString") ? (void*)error_text : (void*)succeed;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
cudaError_t cudaProfilerStart() { return cudaSuccess; }
cudaError_t cudaProfilerStop() { return cudaSuccess; }
}
