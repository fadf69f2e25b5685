// Element access of CUDA kernels: arithmetic in fp32 (fp64 for fp64), loads and stores of up to 16 bytes.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "element_type.h"

namespace igla {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline double to_float(double x) { return x; }

template <class T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) { return x; }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline __half from_float<__half>(float x) { return __float2half_rn(x); }

// kCount elements that are moved with as few loads or stores of up to 16 bytes as possible.
template <class T, int kCount = 16 / static_cast<int>(sizeof(T))>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Pack {
  static constexpr int kSize = kCount;
  T value[kCount];
};

// Partition of a row: single elements up to the first 16-byte boundary, whole packs, and the remaining elements.
template <class T>
struct Split {
  int64_t head;
  int64_t packs;

  __device__ Split(const T* row, int64_t count) {
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    const int64_t to_boundary = (Pack<T>::kSize - past) % Pack<T>::kSize;
    head = to_boundary < count ? to_boundary : count;
    packs = (count - head) / Pack<T>::kSize;
  }
  __device__ int64_t tail() const { return head + packs * Pack<T>::kSize; }
};

}  // namespace igla
