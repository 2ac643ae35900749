// cuBLAS and cuDNN: a handle is its stream, each call that computes is one launch, everything else succeeds.
//
// Creating a handle allocates, so captures forbid it: a library must have been used once before.
//
// What it cannot show: how many kernels a call really launches (often more than one), workspaces, which algorithm is
// chosen, shapes or formats that the library would refuse.
#include <cstdlib>
#include <cstring>

#include "null_device.h"

using namespace null_device;

namespace {
struct Handle {
  cudaStream_t stream = nullptr;
  int math_mode = 0, pointer_mode = 0;
};
enum { CUBLAS_FAILED = 14, CUDNN_FAILED = 1 };  // CUBLAS_STATUS_INTERNAL_ERROR, CUDNN_STATUS_NOT_INITIALIZED
constexpr size_t DESCRIPTOR = 512;              // bytes, larger than any
}  // namespace

extern "C" {

// ---- cuBLAS
int cublasCreate_v2(void** handle) {
  if (unsafe("cublasCreate")) return 1;
  *handle = new Handle;
  return 0;
}
int cublasDestroy_v2(void*) { return 0; }
int cublasSetStream_v2(Handle* handle, cudaStream_t stream) {
  handle->stream = stream;
  return 0;
}
int cublasSetWorkspace_v2(Handle*, void*, size_t) { return 0; }
int cublasSetMathMode(Handle* handle, int mode) {
  handle->math_mode = mode;
  return 0;
}
int cublasGetMathMode(Handle* handle, int* mode) {
  *mode = handle->math_mode;
  return 0;
}
int cublasSetPointerMode_v2(Handle* handle, int mode) {
  handle->pointer_mode = mode;
  return 0;
}
int cublasGetPointerMode_v2(Handle* handle, int* mode) {
  *mode = handle->pointer_mode;
  return 0;
}
int cublasSetSmCountTarget(Handle*, int) { return 0; }

#define GEMM(name) \
  int name(Handle* handle, ...) { return record(handle->stream, #name) ? CUBLAS_FAILED : 0; }
GEMM(cublasGemmEx)
GEMM(cublasSgemm_v2)
GEMM(cublasDgemm_v2)
GEMM(cublasSgemmEx)
GEMM(cublasGemmStridedBatchedEx)
GEMM(cublasSgemmStridedBatched)
GEMM(cublasDgemmStridedBatched)
GEMM(cublasSgemv_v2)
GEMM(cublasDgemv_v2)
GEMM(cublasSdot_v2)
GEMM(cublasDdot_v2)
GEMM(cublasDotEx)

// ---- cuBLASLt
#define DESCRIPTOR_OF(create, destroy)   \
  int create(void** descriptor, ...) {   \
    *descriptor = calloc(1, DESCRIPTOR); \
    return 0;                            \
  }                                      \
  int destroy(void* descriptor) {        \
    free(descriptor);                    \
    return 0;                            \
  }
DESCRIPTOR_OF(cublasLtMatmulDescCreate, cublasLtMatmulDescDestroy)
DESCRIPTOR_OF(cublasLtMatmulPreferenceCreate, cublasLtMatmulPreferenceDestroy)
DESCRIPTOR_OF(cublasLtMatrixLayoutCreate, cublasLtMatrixLayoutDestroy)
#define SUCCEED(name) \
  int name(...) { return 0; }
SUCCEED(cublasLtMatmulDescSetAttribute)
SUCCEED(cublasLtMatmulPreferenceSetAttribute)
SUCCEED(cublasLtMatrixLayoutSetAttribute)

struct HeuristicResult {
  unsigned long long algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int wanted, HeuristicResult* result,
                                   int* found) {
  memset(result, 0, sizeof *result);
  *found = wanted ? 1 : 0;
  return 0;
}
int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*,
                   void*, void*, const void*, void*, size_t, cudaStream_t stream) {
  return record(stream, "cublasLtMatmul") ? CUBLAS_FAILED : 0;
}

// ---- cuDNN
int cudnnCreate(void** handle) {
  if (unsafe("cudnnCreate")) return 1;
  *handle = new Handle;
  return 0;
}
int cudnnDestroy(void*) { return 0; }
int cudnnSetStream(Handle* handle, cudaStream_t stream) {
  handle->stream = stream;
  return 0;
}
int cudnnGetStream(Handle* handle, cudaStream_t* stream) {
  *stream = handle->stream;
  return 0;
}

// ---- cuDNN's backend API, through which convolutions run: one engine with one plan for everything
enum { INT64 = 3, BOOLEAN = 2, BACKEND_DESCRIPTOR = 15 };  // cudnnBackendAttributeType_t
enum { ENGINEHEUR_RESULTS = 202, ENGINECFG_ENGINE = 300, ENGINE_OPERATION_GRAPH = 1300 };  // attribute names
int cudnnBackendCreateDescriptor(int, void** descriptor) {
  *descriptor = calloc(1, DESCRIPTOR);
  return 0;
}
int cudnnBackendDestroyDescriptor(void* descriptor) {
  free(descriptor);
  return 0;
}
SUCCEED(cudnnBackendFinalize)
SUCCEED(cudnnBackendSetAttribute)
int cudnnBackendGetAttribute(void*, int name, int type, long wanted, long* count, void* values) {
  bool is_descriptor = name == ENGINEHEUR_RESULTS || name == ENGINECFG_ENGINE || type == BACKEND_DESCRIPTOR;
  bool is_number = name == ENGINE_OPERATION_GRAPH || type == INT64 || type == BOOLEAN;
  if (is_number && !is_descriptor && values && wanted >= 1) *(long*)values = name == ENGINE_OPERATION_GRAPH ? 1 : 0;
  if (count) *count = is_descriptor || is_number ? 1 : 0;
  return 0;
}
int cudnnBackendExecute(Handle* handle, void*, void*) {
  return record(handle->stream, "cudnnBackendExecute") ? CUDNN_FAILED : 0;
}

// ---- cuDNN's older API: BatchNorm
#define CREATE(name)                     \
  int name(void** descriptor) {          \
    *descriptor = calloc(1, DESCRIPTOR); \
    return 0;                            \
  }
CREATE(cudnnCreateTensorDescriptor)
CREATE(cudnnCreateActivationDescriptor)
CREATE(cudnnCreateFilterDescriptor)
CREATE(cudnnCreateConvolutionDescriptor)
CREATE(cudnnCreatePoolingDescriptor)
SUCCEED(cudnnDestroyTensorDescriptor)
SUCCEED(cudnnDestroyActivationDescriptor)
SUCCEED(cudnnDestroyFilterDescriptor)
SUCCEED(cudnnDestroyConvolutionDescriptor)
SUCCEED(cudnnSetTensorNdDescriptor)
SUCCEED(cudnnSetActivationDescriptor)
SUCCEED(cudnnSetFilterNdDescriptor)
SUCCEED(cudnnSetConvolutionNdDescriptor)
SUCCEED(cudnnSetConvolutionGroupCount)
SUCCEED(cudnnSetConvolutionMathType)
SUCCEED(cudnnSetPooling2dDescriptor)

constexpr size_t WORKSPACE = 4096;
int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*,
                                                             size_t* size) {
  *size = WORKSPACE;
  return 0;
}
int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*, void*, void*,
                                                      size_t* size) {
  *size = WORKSPACE;
  return 0;
}
int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void*, int, int, void*, void*, size_t* size) {
  *size = WORKSPACE;
  return 0;
}
#define BATCH_NORM(name) \
  int name(Handle* handle, ...) { return record(handle->stream, #name) ? CUDNN_FAILED : 0; }
BATCH_NORM(cudnnBatchNormalizationForwardTrainingEx)
BATCH_NORM(cudnnBatchNormalizationBackwardEx)
BATCH_NORM(cudnnBatchNormalizationForwardInference)
}
