// Starting kernels: on a GPU by the CUDA runtime, on the host by the emulation.
#pragma once

#include "device.cuh"

template <int D, int KEYS>
struct Size {};

#ifdef __CUDACC__

#include <cuda_runtime.h>

template <class Kernel, class... Arguments>
int launch(Kernel kernel, int blocks, int threads, int shared, int device, void* stream, Arguments... arguments) {
  cudaError_t status = cudaSetDevice(device);
  // The default limit is 48 KB; the setting belongs to the function on the current device.
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (status != cudaSuccess) return status;
  kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

template <class Kernel>
int resident_blocks(Kernel kernel, int threads, int shared, int device, int* blocks) {
  int processors = 0, each = 0;
  cudaError_t status = cudaSetDevice(device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (status == cudaSuccess)
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared);
  *blocks = processors * each;
  return status;
}

inline const char* error_text(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

#else

#include <string>

namespace emulation {
inline thread_local std::string failure;
constexpr int kFailed = 1;
}  // namespace emulation

template <class Kernel, class... Arguments>
int launch(Kernel kernel, int blocks, int threads, int shared, int, void*, Arguments... arguments) {
  try {
    emulation::run_grid(blocks, threads, shared, [=] { kernel(arguments...); });
    return 0;
  } catch (const std::exception& error) {
    emulation::failure = error.what();
    return emulation::kFailed;
  }
}

template <class Kernel>
int resident_blocks(Kernel, int, int, int, int* blocks) {
  *blocks = 4;
  return 0;
}

inline const char* error_text(int) { return emulation::failure.c_str(); }

#endif
