// CUDA kernels of igla_mega/ops/ewc_penalty.py: a block processes one chunk of a tensor and stores its sums, which a
// single block then adds. No atomics: every sum is computed in the same order each time, so runs repeat bit for bit.
#include "ewc_penalty.cuh"
#include "table_sweep.cuh"

namespace igla {
namespace {

constexpr int kWarp = 32;

// Sums over all threads of the block; the result is valid in thread 0.
__device__ inline void sum_over_block(double (&sums)[kEwcSums]) {
  __shared__ double of_warp[kEwcSums][kSweepThreads / kWarp];
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
  for (int s = 0; s < kEwcSums; ++s) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) sums[s] += __shfl_down_sync(0xffffffffu, sums[s], offset);
    if (lane == 0) of_warp[s][warp] = sums[s];
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int s = 0; s < kEwcSums; ++s) {
    sums[s] = 0.0;
    for (const double sum : of_warp[s]) sums[s] += sum;
  }
}

template <class W, class G>
__global__ void __launch_bounds__(kSweepThreads)
    pull_kernel(const __grid_constant__ TensorTable<4> table, W ewc_lambda, double* __restrict__ partial) {
  const Chunk chunk = chunk_of_block(table);
  auto of = [&]<class T>(int array, T*) { return static_cast<T*>(table.data[array][chunk.tensor]) + chunk.begin; };
  G* grads = of(0, static_cast<G*>(nullptr));
  const W* weights = of(1, static_cast<W*>(nullptr));
  const W* anchors = of(2, static_cast<W*>(nullptr));
  const W* fisher = of(3, static_cast<W*>(nullptr));

  // A thread processes 64 elements of a chunk: few enough to sum in fp32.
  W penalty = 0, grad_squares = 0, pull_squares = 0;
  auto body = [&](int64_t i, auto elements) {
    constexpr int kCount = decltype(elements)::value;
    auto g = read<kCount>(grads + i);
    const auto w = read<kCount>(weights + i);
    const auto a = read<kCount>(anchors + i);
    const auto f = read<kCount>(fisher + i);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const W grad = to_float(g.value[j]);
      const W drift = w.value[j] - a.value[j];
      const W pull = ewc_lambda * (f.value[j] * drift);
      penalty += pull * drift;
      grad_squares += grad * grad;
      pull_squares += pull * pull;
      if constexpr (sizeof(W) == sizeof(G))
        g.value[j] = grad + pull;
      else
        g.value[j] = from_float<G>(grad + pull);
    }
    put(grads + i, g);
  };
  sweep(chunk.count, body, grads, weights, anchors, fisher);

  double sums[kEwcSums] = {penalty, grad_squares, pull_squares};
  sum_over_block(sums);
  if (threadIdx.x == 0)
    for (int s = 0; s < kEwcSums; ++s) partial[blockIdx.x * kEwcSums + s] = sums[s];
}

__global__ void __launch_bounds__(kSweepThreads)
    sums_kernel(const double* __restrict__ partial, int64_t num_chunks, double* __restrict__ result) {
  double sums[kEwcSums] = {};
  for (int64_t chunk = threadIdx.x; chunk < num_chunks; chunk += kSweepThreads)
    for (int s = 0; s < kEwcSums; ++s) sums[s] += partial[chunk * kEwcSums + s];
  sum_over_block(sums);
  if (threadIdx.x != 0) return;
  result[0] = sums[0] / 2;
  result[1] = sums[1];
  result[2] = sums[2];
}

template <class W, class G>
cudaError_t launch(const TensorTable<4>& table, double ewc_lambda, double* partial, cudaStream_t stream) {
  pull_kernel<W, G><<<static_cast<unsigned>(table.num_chunks()), kSweepThreads, 0, stream>>>(
      table, static_cast<W>(ewc_lambda), partial);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_ewc_pull(const TensorTable<4>& table, ElementType type, double ewc_lambda, double* partial,
                            cudaStream_t stream) {
  switch (type) {
    case ElementType::kFloat32: return launch<float, float>(table, ewc_lambda, partial, stream);
    case ElementType::kBfloat16: return launch<float, __nv_bfloat16>(table, ewc_lambda, partial, stream);
    case ElementType::kFloat64: return launch<double, double>(table, ewc_lambda, partial, stream);
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t launch_ewc_sums(const double* partial, int64_t num_chunks, double* sums, cudaStream_t stream) {
  sums_kernel<<<1, kSweepThreads, 0, stream>>>(partial, num_chunks, sums);
  return cudaGetLastError();
}

}  // namespace igla
