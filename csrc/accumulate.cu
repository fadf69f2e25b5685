// CUDA kernel of igla_mega/ops/accumulate.py: one grid column of blocks per tensor, 8 elements per thread and step.
#include <algorithm>

#include "accumulate.cuh"
#include "elements.cuh"

namespace igla {
namespace {

constexpr int kThreads = 256;
constexpr int kPack = 8;
constexpr int64_t kMaxBlocks = 1 << 20;

// Adds kCount elements per step. Index is wide enough for the element count of every tensor in the table: 32-bit
// division is several times faster than 64-bit.
template <class S, class T, int kCount, class Index>
__global__ void __launch_bounds__(kThreads) add_kernel(const __grid_constant__ AdditionTable table) {
  const Addition& a = table.addition[blockIdx.y];
  const Index packs = static_cast<Index>(a.columns / kCount);  // per row
  const Index inner = static_cast<Index>(a.size[2]), middle = static_cast<Index>(a.size[1]);
  const Index all = packs * inner * middle * static_cast<Index>(a.size[0]);
  const Index step = static_cast<Index>(gridDim.x) * kThreads;
  for (Index at = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x; at < all; at += step) {
    const Index row = at / packs, place = row / inner;
    const int64_t column = static_cast<int64_t>(at - row * packs) * kCount;
    const int64_t i = place / middle, j = place % middle, k = row % inner;
    const int64_t sum_at = i * a.sum_stride[0] + j * a.sum_stride[1] + k * a.sum_stride[2] + column;
    const int64_t term_at = i * a.term_stride[0] + j * a.term_stride[1] + k * a.term_stride[2] + column;
    auto* to = reinterpret_cast<Pack<S, kCount>*>(static_cast<S*>(a.sum) + sum_at);
    Pack<S, kCount> sum = *to;
    const auto term = *reinterpret_cast<const Pack<T, kCount>*>(static_cast<const T*>(a.term) + term_at);
#pragma unroll
    for (int e = 0; e < kCount; ++e) sum.value[e] = static_cast<S>(sum.value[e] + to_float(term.value[e]));
    *to = sum;
  }
}

bool fits_packs(const Addition& a, int sum_bytes, int term_bytes) {
  if (a.columns % kPack != 0) return false;
  auto aligned = [](const void* data, const int64_t (&stride)[3], const int64_t (&size)[3], int bytes) {
    bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0;
    for (int i = 0; i < 3; ++i) fits = fits && (size[i] == 1 || stride[i] * bytes % 16 == 0);
    return fits;
  };
  return aligned(a.sum, a.sum_stride, a.size, sum_bytes) && aligned(a.term, a.term_stride, a.size, term_bytes);
}

template <class S, class T>
cudaError_t launch(const AdditionTable& table, cudaStream_t stream) {
  int64_t most = 0;
  bool packed = true;
  for (int i = 0; i < table.num_additions; ++i) {
    const Addition& a = table.addition[i];
    most = std::max(most, a.columns * a.size[0] * a.size[1] * a.size[2]);
    packed = packed && fits_packs(a, sizeof(S), sizeof(T));
  }
  if (most == 0) return cudaSuccess;
  const int64_t threads = packed ? most / kPack : most;
  const int64_t blocks = std::min(kMaxBlocks, (threads + kThreads - 1) / kThreads);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(table.num_additions));
  // 32-bit indices only if the last step of the grid-stride loop, past the end, cannot wrap around.
  const bool narrow = threads + kMaxBlocks * kThreads < (int64_t{1} << 32);
  auto* kernel = packed ? (narrow ? &add_kernel<S, T, kPack, uint32_t> : &add_kernel<S, T, kPack, uint64_t>)
                        : (narrow ? &add_kernel<S, T, 1, uint32_t> : &add_kernel<S, T, 1, uint64_t>);
  kernel<<<grid, kThreads, 0, stream>>>(table);
  return cudaGetLastError();
}

template <class S>
cudaError_t launch_terms(const AdditionTable& table, ElementType term_type, cudaStream_t stream) {
  switch (term_type) {
    case ElementType::kFloat32: return launch<S, float>(table, stream);
    case ElementType::kBfloat16: return launch<S, __nv_bfloat16>(table, stream);
    case ElementType::kFloat16: return launch<S, __half>(table, stream);
    case ElementType::kFloat64: return launch<S, double>(table, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_accumulate(const AdditionTable& table, ElementType sum_type, ElementType term_type,
                              cudaStream_t stream) {
  if (sum_type == ElementType::kFloat64) return launch_terms<double>(table, term_type, stream);
  return launch_terms<float>(table, term_type, stream);
}

}  // namespace igla
