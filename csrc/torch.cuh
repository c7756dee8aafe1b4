// What the launchers share: type dispatch, argument views, the current stream.
//
// Only header-only and stable-ABI parts of torch are used, so one build serves every torch from 2.11 on, and the
// library loads (its schemas included) under a CPU build of torch.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "common.cuh"

namespace autotool {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The current torch stream. Looked up in the loaded libtorch_cuda when first used: a CPU build of torch has none, and
// torch's libraries are not in the global symbol scope.
inline cudaStream_t current_stream(int32_t device) {
  using Lookup = int32_t (*)(int32_t, void**);
  static void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  STD_TORCH_CHECK(library != nullptr, "this build of torch has no CUDA support");
  static const auto lookup = reinterpret_cast<Lookup>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  STD_TORCH_CHECK(lookup != nullptr, "libtorch_cuda has no aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(lookup(device, &stream) == 0, "torch gave no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, cudaGetErrorString(error)); }

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

inline bool has_clusters(int device) { return attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9; }

// Launches `kernel`; cluster > 0: in clusters of so many blocks; cooperative: all blocks resident together.
template <typename... Parameters, typename... Arguments>
void launch(
    void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, int device, int cluster,
    bool cooperative, Arguments... arguments) {
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "too many rows for one launch");
  cudaLaunchAttribute attributes[1] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = current_stream(device);
  config.attrs = attributes;
  if (cluster > 0) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = static_cast<unsigned>(cluster);
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    config.numAttrs = 1;
  } else if (cooperative) {
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Calls f with a null pointer of the logits' element type.
template <typename F>
void for_float_type(ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::Half: return f(static_cast<__half*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
    default: STD_TORCH_CHECK(false, "logits must be float32, float16 or bfloat16");
  }
}

// Whether rows can be read and written 16 bytes at a time.
inline bool is_wide(const Tensor& rows) {
  const auto address = reinterpret_cast<uintptr_t>(rows.const_data_ptr());
  const int64_t item = static_cast<int64_t>(rows.element_size());
  return rows.stride(1) == 1 && address % 16 == 0 && (rows.size(0) == 1 || rows.stride(0) * item % 16 == 0);
}

inline Scale make_scale(double value, const std::optional<Tensor>& rows) {
  if (!rows.has_value()) return {nullptr, 0, static_cast<float>(value)};
  STD_TORCH_CHECK(rows->scalar_type() == ScalarType::Float, "per-row numbers must be float32");
  return {static_cast<const float*>(rows->const_data_ptr()), rows->stride(0), 1.f};
}

// int64, int32, or one byte; rows of int8, uint8 or bool must hold small numbers.
inline Integers make_integers(const Tensor& t, const char* name) {
  const int bytes = static_cast<int>(t.element_size());
  STD_TORCH_CHECK(bytes == 8 || bytes == 4 || bytes == 1, name, " must be int64, int32 or of one byte");
  return {t.const_data_ptr(), t.stride(0), bytes};
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace autotool
