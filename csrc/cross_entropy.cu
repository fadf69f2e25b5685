// CUDA kernels of igla_mega/ops/cross_entropy.py: one block per row, 16 bytes per thread and load.
#include <math.h>

#include "cross_entropy.cuh"
#include "elements.cuh"

namespace igla {
namespace {

constexpr int kThreads = 512;
constexpr int kWarp = 32;

// Running sum of exp(x), stored as sum * exp(max), of a thread, a warp or a block.
struct Seen {
  float max = -INFINITY;
  float sum = 0.0f;
};

// -inf - -inf is NaN: as long as every value is -inf the shift is 0, and each exp is correctly 0.
__device__ inline float shift_of(float max) { return max == -INFINITY ? 0.0f : max; }

__device__ inline Seen join(Seen a, Seen b) {
  const float max = fmaxf(a.max, b.max);
  const float shift = shift_of(max);
  return {max, a.sum * __expf(a.max - shift) + b.sum * __expf(b.max - shift)};
}

template <int kCount>
__device__ inline void see(Seen& seen, const float (&x)[kCount]) {
  float max = seen.max;
#pragma unroll
  for (int i = 0; i < kCount; ++i) max = fmaxf(max, x[i]);
  const float shift = shift_of(max);
  float sum = seen.sum * __expf(seen.max - shift);
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += __expf(x[i] - shift);
  seen = {max, sum};
}

template <class T>
__device__ inline void see_one(Seen& seen, T x) {
  const float value[1] = {to_float(x)};
  see(seen, value);
}

__device__ inline Seen join_warp(Seen seen) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Seen other{__shfl_xor_sync(0xffffffffu, seen.max, offset), __shfl_xor_sync(0xffffffffu, seen.sum, offset)};
    seen = join(seen, other);
  }
  return seen;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    statistics_kernel(const T* __restrict__ logits, const int64_t* __restrict__ labels, Shard shard,
                      float* __restrict__ row_max, float* __restrict__ sum_exp, float* __restrict__ target_logit) {
  const int64_t row = blockIdx.x;
  const T* x = logits + row * shard.stride;
  const Split<T> split(x, shard.columns);
  const auto* packs = reinterpret_cast<const Pack<T>*>(x + split.head);

  Seen seen;
  for (int64_t i = threadIdx.x; i < split.head; i += kThreads) see_one(seen, x[i]);
  for (int64_t i = threadIdx.x; i < split.packs; i += kThreads) {
    const Pack<T> pack = packs[i];
    float value[Pack<T>::kSize];
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) value[j] = to_float(pack.value[j]);
    see(seen, value);
  }
  for (int64_t i = split.tail() + threadIdx.x; i < shard.columns; i += kThreads) see_one(seen, x[i]);

  __shared__ float max_of_warp[kThreads / kWarp];
  __shared__ float sum_of_warp[kThreads / kWarp];
  seen = join_warp(seen);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane == 0) {
    max_of_warp[warp] = seen.max;
    sum_of_warp[warp] = seen.sum;
  }
  __syncthreads();
  if (warp != 0) return;
  seen = lane < kThreads / kWarp ? Seen{max_of_warp[lane], sum_of_warp[lane]} : Seen{};
  seen = join_warp(seen);
  if (lane != 0) return;

  row_max[row] = seen.max;
  sum_exp[row] = seen.sum;
  const int64_t target = labels[row] - shard.vocab_start;
  target_logit[row] = target >= 0 && target < shard.columns ? to_float(x[target]) : 0.0f;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(T* __restrict__ logits, const float* __restrict__ lse, const int64_t* __restrict__ labels,
                    const float* __restrict__ weight, Shard shard) {
  const int64_t row = blockIdx.x;
  T* x = logits + row * shard.stride;
  const float row_lse = lse[row], row_weight = weight[row];
  const int64_t target = labels[row] - shard.vocab_start;
  // A masked row is set to zeros without being read: its lse need not be finite.
  const int64_t columns = row_weight == 0.0f ? 0 : shard.columns;
  auto gradient = [&](int64_t column, T logit) {
    const float p = column < columns ? __expf(to_float(logit) - row_lse) : 0.0f;
    const float hit = column == target && column < columns ? 1.0f : 0.0f;
    return from_float<T>(column < columns ? (p - hit) * row_weight : 0.0f);
  };

  const Split<T> split(x, shard.stride);
  auto* packs = reinterpret_cast<Pack<T>*>(x + split.head);
  for (int64_t i = threadIdx.x; i < split.head; i += kThreads) x[i] = gradient(i, x[i]);
  for (int64_t i = threadIdx.x; i < split.packs; i += kThreads) {
    Pack<T> pack = packs[i];
    const int64_t column = split.head + i * Pack<T>::kSize;
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) pack.value[j] = gradient(column + j, pack.value[j]);
    packs[i] = pack;
  }
  for (int64_t i = split.tail() + threadIdx.x; i < shard.stride; i += kThreads) x[i] = gradient(i, x[i]);
}

template <class Body>
cudaError_t with_element_type(ElementType type, const Body& body) {
  switch (type) {
    case ElementType::kFloat32: body(static_cast<float*>(nullptr)); break;
    case ElementType::kBfloat16: body(static_cast<__nv_bfloat16*>(nullptr)); break;
    case ElementType::kFloat16: body(static_cast<__half*>(nullptr)); break;
    case ElementType::kFloat64: return cudaErrorInvalidValue;  // rejected by the binding
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_softmax_statistics(const void* logits, ElementType type, const int64_t* labels, const Shard& shard,
                                      float* row_max, float* sum_exp, float* target_logit, cudaStream_t stream) {
  if (shard.num_rows == 0) return cudaSuccess;
  return with_element_type(type, [&]<class T>(T*) {
    statistics_kernel<T><<<static_cast<unsigned>(shard.num_rows), kThreads, 0, stream>>>(
        static_cast<const T*>(logits), labels, shard, row_max, sum_exp, target_logit);
  });
}

cudaError_t launch_softmax_gradient(void* logits, ElementType type, const float* lse, const int64_t* labels,
                                    const float* weight, const Shard& shard, cudaStream_t stream) {
  if (shard.num_rows == 0 || shard.stride == 0) return cudaSuccess;
  return with_element_type(type, [&]<class T>(T*) {
    gradient_kernel<T><<<static_cast<unsigned>(shard.num_rows), kThreads, 0, stream>>>(static_cast<T*>(logits), lse,
                                                                                       labels, weight, shard);
  });
}

}  // namespace igla
