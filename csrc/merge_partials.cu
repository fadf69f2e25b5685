// CUDA kernel of igla_mega/ops/merge_partials.py: a block processes whole rows, a thread some columns of one row.
#include <math.h>

#include <algorithm>

#include "elements.cuh"
#include "merge_partials.cuh"

namespace igla {
namespace {

constexpr int kThreads = 128;

__device__ inline float exp_of(float x) { return expf(x); }
__device__ inline double exp_of(double x) { return exp(x); }
__device__ inline float log_of(float x) { return logf(x); }
__device__ inline double log_of(double x) { return log(x); }

struct Place {
  int64_t index[3];

  __device__ int64_t offset(const int64_t (&stride)[3]) const {
    return index[0] * stride[0] + index[1] * stride[1] + index[2] * stride[2];
  }
};

__device__ inline Place place_of(uint32_t row, const MergeTable& table) {
  const auto inner = static_cast<uint32_t>(table.size[2]), middle = static_cast<uint32_t>(table.size[1]);
  const uint32_t outer = row / inner;
  return {{outer / middle, outer % middle, row % inner}};
}

// Calls body with a pointer to the column of a row, typed by the element type of the rows.
template <class W, class Body>
__device__ inline void with_row(const PartialRows& rows, int64_t offset, const Body& body) {
  if constexpr (sizeof(W) == sizeof(double)) {
    body(static_cast<double*>(rows.out) + offset);
  } else {
    switch (rows.type) {
      case ElementType::kBfloat16: body(static_cast<__nv_bfloat16*>(rows.out) + offset); break;
      case ElementType::kFloat16: body(static_cast<__half*>(rows.out) + offset); break;
      default: body(static_cast<float*>(rows.out) + offset); break;
    }
  }
}

template <class W>
__device__ inline bool all_zero(const PartialRows& rows, int64_t offset, int64_t columns) {
  bool zero = true;
  with_row<W>(rows, offset, [&](const auto* x) {
    for (int64_t i = 0; zero && i < columns; ++i) zero = to_float(x[i]) == 0;
  });
  return zero;
}

// Merges kCount columns at a time. `lses` [rows of the block, partials] is -inf for a row that saw no key.
template <class W, int kCount>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(const __grid_constant__ MergeTable table, int64_t all_rows, int threads_per_row, int rows_per_block) {
  extern __shared__ double shared[];
  W* lses = reinterpret_cast<W*>(shared);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * rows_per_block;
  const int64_t left = all_rows - first_row;
  const int num_rows = left < rows_per_block ? static_cast<int>(left) : rows_per_block;
  for (int i = static_cast<int>(threadIdx.x); i < num_rows * table.num_partials; i += kThreads) {
    const PartialRows& partial = table.partial[i % table.num_partials];
    const Place place = place_of(static_cast<uint32_t>(first_row + i / table.num_partials), table);
    const W lse = static_cast<const W*>(partial.lse)[place.offset(partial.lse_stride)];
    const bool empty = isinf(lse) || (table.zero_means_empty && lse == 0 &&
                                      all_zero<W>(partial, place.offset(partial.out_stride), table.columns));
    lses[i] = empty ? -static_cast<W>(INFINITY) : lse;
  }
  // From here on the result may overwrite a partial: all lses have been read, and a thread reads a column of every
  // partial before it writes that column.
  __syncthreads();
  const int row = static_cast<int>(threadIdx.x) / threads_per_row;
  const int lane = static_cast<int>(threadIdx.x) % threads_per_row;
  if (row >= num_rows) return;
  const Place place = place_of(static_cast<uint32_t>(first_row + row), table);
  const W* row_lses = lses + row * table.num_partials;

  W most = -static_cast<W>(INFINITY);
  for (int g = 0; g < table.num_partials; ++g) most = row_lses[g] > most ? row_lses[g] : most;
  // -inf - -inf is NaN: a row that is empty in every partial is shifted by 0, and its weights are correctly 0.
  const W shift = isinf(most) ? 0 : most;
  W total = 0;
  for (int g = 0; g < table.num_partials; ++g) total += exp_of(row_lses[g] - shift);

  for (int64_t column = static_cast<int64_t>(lane) * kCount; column < table.columns;
       column += static_cast<int64_t>(threads_per_row) * kCount) {
    W sum[kCount] = {};
    for (int g = 0; g < table.num_partials; ++g) {
      const W lse = row_lses[g];
      if (isinf(lse)) continue;
      const W weight = exp_of(lse - shift) / total;
      const PartialRows& partial = table.partial[g];
      with_row<W>(partial, place.offset(partial.out_stride) + column, [&]<class T>(const T* x) {
        const auto pack = *reinterpret_cast<const Pack<T, kCount>*>(x);
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum[i] += weight * to_float(pack.value[i]);
      });
    }
    with_row<W>(table.result, place.offset(table.result.out_stride) + column, [&]<class T>(T* x) {
      Pack<T, kCount> pack;
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if constexpr (sizeof(T) == sizeof(W))
          pack.value[i] = sum[i];
        else
          pack.value[i] = from_float<T>(sum[i]);
      *reinterpret_cast<Pack<T, kCount>*>(x) = pack;
    });
  }
  if (lane == 0) static_cast<W*>(table.result.lse)[place.offset(table.result.lse_stride)] = shift + log_of(total);
}

bool aligned(const PartialRows& rows, const int64_t (&size)[3]) {
  bool fits = reinterpret_cast<uintptr_t>(rows.out) % 16 == 0;
  for (int i = 0; i < 3; ++i) fits = fits && (size[i] == 1 || rows.out_stride[i] * element_bytes(rows.type) % 16 == 0);
  return fits;
}

template <class W, int kCount>
cudaError_t launch(const MergeTable& table, cudaStream_t stream) {
  const int64_t packs = (table.columns + kCount - 1) / kCount;
  const int threads_per_row = static_cast<int>(std::clamp<int64_t>(packs, 1, kThreads));
  const int rows_per_block = kThreads / threads_per_row;
  const int64_t blocks = (table.num_rows() + rows_per_block - 1) / rows_per_block;
  const size_t shared_bytes = sizeof(W) * static_cast<size_t>(rows_per_block) * static_cast<size_t>(table.num_partials);
  merge_kernel<W, kCount><<<static_cast<unsigned>(blocks), kThreads, shared_bytes, stream>>>(
      table, table.num_rows(), threads_per_row, rows_per_block);
  return cudaGetLastError();
}

template <class W, int kPack>
cudaError_t launch_widest(const MergeTable& table, cudaStream_t stream) {
  bool packed = table.columns % kPack == 0 && aligned(table.result, table.size);
  for (int g = 0; g < table.num_partials; ++g) packed = packed && aligned(table.partial[g], table.size);
  return packed ? launch<W, kPack>(table, stream) : launch<W, 1>(table, stream);
}

}  // namespace

cudaError_t launch_merge_partials(const MergeTable& table, bool wide, cudaStream_t stream) {
  if (table.num_rows() == 0) return cudaSuccess;
  return wide ? launch_widest<double, 2>(table, stream) : launch_widest<float, 8>(table, stream);
}

}  // namespace igla
