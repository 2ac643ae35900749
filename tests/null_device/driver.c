/* The CUDA driver, as far as torch, its nvrtc stub and Triton's launcher ask it. Built as libcuda.so.1.

   A kernel is its name. Launches go to libnull.so, which counts and records them. Attributes are those of an H100. */
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void* const SOME = (void*)8; /* any context or module */

static CUresult launch(CUfunction kernel, CUstream stream) {
  static int (*record)(void*, const char*);
  if (!record) record = (int (*)(void*, const char*))dlsym(RTLD_DEFAULT, "null_launch");
  return record ? (CUresult)record(stream, kernel ? (const char*)kernel : "triton") : CUDA_SUCCESS;
}

/* device */
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int* count) {
  *count = 1;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char* name, int size, CUdevice device) {
  snprintf(name, size, "NVIDIA H100 NULL");
  return CUDA_SUCCESS;
}
CUresult cuDeviceTotalMem_v2(size_t* bytes, CUdevice device) {
  *bytes = 80ull << 30;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = 132;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = 9;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK:
      *value = 48 << 10;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = 227 << 10;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = 228 << 10;
      break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      *value = 65536;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR:
      *value = 2048;
      break;
    default:
      *value = 0;
  }
  return CUDA_SUCCESS;
}

/* contexts */
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  *context = SOME;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = SOME;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxPushCurrent_v2(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxPopCurrent_v2(CUcontext* context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) {
  *device = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  *value = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

/* errors and look-up */
CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = "null device";
  return CUDA_SUCCESS;
}
CUresult cuGetErrorName(CUresult error, const char** text) { return cuGetErrorString(error, text); }
CUresult cuGetProcAddress_v2(const char* name, void** function, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult* status) {
  *function = dlsym(RTLD_DEFAULT, name);
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

/* modules and kernels */
CUresult cuModuleLoad(CUmodule* module, const char* path) {
  *module = SOME;
  return CUDA_SUCCESS;
}
CUresult cuModuleLoadData(CUmodule* module, const void* image) { return cuModuleLoad(module, ""); }
CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned count, CUjit_option* options, void** values) {
  return cuModuleLoad(module, "");
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* kernel, CUmodule module, const char* name) {
  *kernel = (CUfunction)strdup(name);
  return CUDA_SUCCESS;
}
CUresult cuModuleGetGlobal_v2(CUdeviceptr* pointer, size_t* size, CUmodule module, const char* name) {
  return CUDA_SUCCESS;
}
CUresult cuLinkCreate_v2(unsigned count, CUjit_option* options, void** values, CUlinkState* state) {
  return CUDA_SUCCESS;
}
CUresult cuLinkAddData_v2(CUlinkState state, CUjitInputType type, void* data, size_t size, const char* name,
                          unsigned count, CUjit_option* options, void** values) {
  return CUDA_SUCCESS;
}
CUresult cuLinkComplete(CUlinkState state, void** image, size_t* size) { return CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction kernel) {
  *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS                ? 32
           : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
                                                                  : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction kernel, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction kernel, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction kernel, int threads, size_t shared) {
  *blocks = 8;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction kernel, const CUlaunchConfig* config) {
  *clusters = 8;
  return CUDA_SUCCESS;
}

/* launches */
CUresult cuLaunchKernel(CUfunction kernel, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                        unsigned block_z, unsigned shared, CUstream stream, void** arguments, void** extra) {
  return launch(kernel, stream);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction kernel, void** arguments, void** extra) {
  return launch(kernel, config->hStream);
}
CUresult cuLaunchCooperativeKernel(CUfunction kernel, unsigned x, unsigned y, unsigned z, unsigned block_x,
                                   unsigned block_y, unsigned block_z, unsigned shared, CUstream stream,
                                   void** arguments) {
  return launch(kernel, stream);
}
CUresult cuStreamSynchronize(CUstream stream) { return CUDA_SUCCESS; }
CUresult capture_info(void) __asm__("cuStreamGetCaptureInfo_v2"); /* its parameters differ between headers */
CUresult capture_info(void) { return CUDA_SUCCESS; }

/* memory */
CUresult cuMemAlloc_v2(CUdeviceptr* pointer, size_t size) {
  *pointer = (CUdeviceptr)malloc(size);
  return CUDA_SUCCESS;
}
CUresult cuMemFree_v2(CUdeviceptr pointer) { return CUDA_SUCCESS; }
CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, size_t size) {
  memcpy(to, (void*)from, size);
  return CUDA_SUCCESS;
}
CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, size_t size) {
  memcpy((void*)to, from, size);
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute == CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    *(CUdeviceptr*)value = pointer;
  else
    *(int*)value = 0;
  return CUDA_SUCCESS;
}
/* of more parameters than it pays to repeat */
CUresult encode_tiled(void) __asm__("cuTensorMapEncodeTiled");
CUresult encode_tiled(void) { return CUDA_SUCCESS; }
CUresult encode_im2col(void) __asm__("cuTensorMapEncodeIm2col");
CUresult encode_im2col(void) { return CUDA_SUCCESS; }
