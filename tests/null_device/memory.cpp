// Memory: the host's, so copies and pointers are real. Fresh memory is zero. Kernels write nothing into it.
// A page that no copy has written takes nothing of the host, so tensors of many GB can be had here.
//
// cudaMalloc, cudaFree and page-locked allocations may synchronise, so captures forbid them (see unsafe).
// torch's caching allocator works on top as usual: its statistics show how memory is held.
//
// What it cannot show: running out of memory, copies that overlap with kernels, the wait of a copy from pageable
// memory, what a kernel leaves uninitialised.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>

#include "null_device.h"

namespace null_device {

static size_t held = 0;
static std::map<char*, size_t> blocks;

size_t bytes_held() { return held; }

static void* allocate(size_t size) {
  size += !size;
  void* block = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (block == MAP_FAILED) return nullptr;
  Lock lock(mutex);
  held += size;
  blocks[(char*)block] = size;
  return block;
}

static void release(void* block) {
  Lock lock(mutex);
  auto found = blocks.find((char*)block);
  if (found == blocks.end()) return;
  held -= found->second;
  munmap(block, found->second);
  blocks.erase(found);
}

static bool is_on_device(const void* pointer) {
  Lock lock(mutex);
  auto next = blocks.upper_bound((char*)pointer);
  if (next == blocks.begin()) return false;
  auto block = std::prev(next);
  return (char*)pointer < block->first + block->second;
}

static const char* direction(cudaMemcpyKind kind) {
  return kind == cudaMemcpyHostToDevice   ? "memcpy HtoD"
         : kind == cudaMemcpyDeviceToHost ? "memcpy DtoH"
                                          : "memcpy DtoD";
}

}  // namespace null_device

using namespace null_device;
extern "C" {

// ---- allocations
cudaError_t cudaMalloc(void** block, size_t size) {
  count("cudaMalloc");
  if (auto error = unsafe("cudaMalloc")) return error;
  *block = allocate(size);
  return cudaSuccess;
}
cudaError_t cudaFree(void* block) {
  if (block) count("cudaFree");
  if (auto error = unsafe("cudaFree")) return error;
  release(block);
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void** block, size_t size, cudaStream_t) {
  *block = allocate(size);
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* block, cudaStream_t) {
  release(block);
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void** block, size_t size, unsigned) {
  count("cudaHostAlloc");
  if (auto error = unsafe("cudaHostAlloc")) return error;
  *block = malloc(size);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* block) {
  if (auto error = unsafe("cudaFreeHost")) return error;
  free(block);
  return cudaSuccess;
}
cudaError_t cudaHostRegister(void*, size_t, unsigned) { return unsafe("cudaHostRegister"); }
cudaError_t cudaHostUnregister(void*) { return unsafe("cudaHostUnregister"); }
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
  *total = MEMORY;
  *free_bytes = MEMORY - held;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  memset(attributes, 0, sizeof *attributes);
  attributes->type = is_on_device(pointer) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  attributes->devicePointer = (void*)pointer;
  return cudaSuccess;
}

// ---- copies: done at once; a captured one is only a node, and no replay repeats it
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t stream) {
  cudaError_t error = record(stream, direction(kind));
  if (!error && !is_capturing(stream)) memcpy(to, from, size);
  return error;
}
cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size, cudaStream_t stream) {
  cudaError_t error = record(stream, "memcpy peer");
  if (!error && !is_capturing(stream)) memcpy(to, from, size);
  return error;
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  count("SYNC memcpy");
  if (auto error = unsafe("cudaMemcpy")) return error;
  memcpy(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* block, int value, size_t size) {
  if (auto error = unsafe("cudaMemset")) return error;
  memset(block, value, size);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* block, int value, size_t size, cudaStream_t stream) {
  cudaError_t error = record(stream, "memset");
  if (!error && !is_capturing(stream)) memset(block, value, size);
  return error;
}
cudaError_t cudaGetSymbolAddress(void** pointer, const void*) {
  static char room[1 << 20];  // for any variable of a kernel
  *pointer = room;
  return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }

// ---- CUDA's own pools: torch asks, but uses its caching allocator
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  *pool = nullptr;
  return cudaSuccess;
}
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
  *(unsigned long long*)value = 0;
  return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) { return cudaSuccess; }
cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
cudaError_t cudaDeviceGetGraphMemAttribute(int, cudaGraphMemAttributeType, void* value) {
  *(unsigned long long*)value = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceSetGraphMemAttribute(int, cudaGraphMemAttributeType, void*) { return cudaSuccess; }
}
