// CUDA kernel of igla_mega/ops/fisher.py: one block per chunk of a tensor.
#include "fisher.cuh"
#include "table_sweep.cuh"

namespace igla {
namespace {

template <class F, class G>
__global__ void __launch_bounds__(kSweepThreads)
    fisher_kernel(const __grid_constant__ TensorTable<2> table, F weight, bool zero_grads) {
  const Chunk chunk = chunk_of_block(table);
  F* fisher = static_cast<F*>(table.data[0][chunk.tensor]) + chunk.begin;
  G* grads = static_cast<G*>(table.data[1][chunk.tensor]) + chunk.begin;
  auto body = [=](int64_t i, auto elements) {
    constexpr int kCount = decltype(elements)::value;
    auto f = read<kCount>(fisher + i);
    auto g = read<kCount>(grads + i);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const F x = to_float(g.value[j]);
      f.value[j] += weight * (x * x);
    }
    put(fisher + i, f);
    if (zero_grads) put(grads + i, Pack<G, kCount>{});
  };
  sweep(chunk.count, body, grads, fisher);
}

template <class F, class G>
cudaError_t launch(const TensorTable<2>& table, double weight, bool zero_grads, cudaStream_t stream) {
  fisher_kernel<F, G><<<static_cast<unsigned>(table.num_chunks()), kSweepThreads, 0, stream>>>(
      table, static_cast<F>(weight), zero_grads);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_fisher_accumulate(const TensorTable<2>& table, ElementType type, double weight, bool zero_grads,
                                     cudaStream_t stream) {
  switch (type) {
    case ElementType::kFloat32: return launch<float, float>(table, weight, zero_grads, stream);
    case ElementType::kBfloat16: return launch<float, __nv_bfloat16>(table, weight, zero_grads, stream);
    case ElementType::kFloat64: return launch<double, double>(table, weight, zero_grads, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace igla
