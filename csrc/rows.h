// Iterates over the rows of tensors [.., D] of any strides, in the memory order of one of them.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>

namespace igla {

constexpr int kRowDims = 3;

// Sizes and strides (in elements) of the dimensions that index rows, outermost first.
using RowSizes = std::array<int64_t, kRowDims>;
using RowStrides = std::array<int64_t, kRowDims>;

class RowOrder {
 public:
  // Orders the first `num_dims` <= 3 dimensions of `lead`; missing ones have size 1.
  RowOrder(const torch::stable::Tensor& lead, int64_t num_dims) : num_dims_(num_dims) {
    // A dimension of size 1 is ordered outermost, because its stride is arbitrary.
    RowStrides steps{};
    for (int64_t dim = 0; dim < num_dims; ++dim) {
      dims_[static_cast<size_t>(dim)] = static_cast<size_t>(dim);
      steps[static_cast<size_t>(dim)] = lead.size(dim) == 1 ? INT64_MAX : lead.stride(dim);
    }
    std::stable_sort(dims_.begin(), dims_.begin() + num_dims,
                     [&](size_t a, size_t b) { return steps[a] > steps[b]; });
    sizes.fill(1);
    for (size_t i = 0; i < static_cast<size_t>(num_dims); ++i)
      sizes[place(i)] = lead.size(static_cast<int64_t>(dims_[i]));
  }

  RowStrides strides(const torch::stable::Tensor& tensor) const {
    RowStrides strides{};
    for (size_t i = 0; i < static_cast<size_t>(num_dims_); ++i)
      strides[place(i)] = tensor.stride(static_cast<int64_t>(dims_[i]));
    return strides;
  }

  RowSizes sizes;

 private:
  size_t place(size_t i) const { return i + kRowDims - static_cast<size_t>(num_dims_); }

  int64_t num_dims_;
  std::array<size_t, kRowDims> dims_{};
};

// Extends rows by dimensions that follow without a gap in both tensors, so that fewer and longer rows remain.
inline void join_rows(RowSizes& sizes, int64_t& columns, RowStrides& a, RowStrides& b) {
  for (int step = 0; step < kRowDims; ++step) {
    if (sizes[2] != 1 && (a[2] != columns || b[2] != columns)) return;
    columns *= sizes[2];
    sizes = {1, sizes[0], sizes[1]};
    a = {0, a[0], a[1]};
    b = {0, b[0], b[1]};
  }
}

template <size_t kDims>
int64_t offset_of(const std::array<int64_t, kDims>& place, const std::array<int64_t, kDims>& strides) {
  int64_t sum = 0;
  for (size_t dim = 0; dim < kDims; ++dim) sum += place[dim] * strides[dim];
  return sum;
}

// Walks over the cells of a grid, starting at cell `start`; the last dimension changes fastest.
template <size_t kDims>
class Walk {
 public:
  Walk(const std::array<int64_t, kDims>& sizes, int64_t start) : sizes_(sizes) {
    for (size_t dim = kDims; dim-- > 0; start /= sizes[dim]) at[dim] = start % sizes[dim];
  }

  void step() {
    for (size_t dim = kDims; dim-- > 0;) {
      if (++at[dim] < sizes_[dim]) return;
      at[dim] = 0;
    }
  }

  std::array<int64_t, kDims> at;

 private:
  std::array<int64_t, kDims> sizes_;
};

}  // namespace igla
