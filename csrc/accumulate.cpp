// CPU kernel of igla_mega/ops/accumulate.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "accumulate_check.h"
#include "rows.h"
#include "vector.h"

namespace igla {
namespace {

// Elements that one thread processes at a time: part of a long row, or several short rows.
constexpr int64_t kPiece = 16384;

double wide(double x) { return x; }
double wide(float x) { return x; }
double wide(Half x) { return static_cast<float>(x); }
double wide(Bfloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

template <class S, class T>
void add(void* sums, const void* terms, int64_t sum_at, int64_t term_at, int64_t count) {
  S* s = static_cast<S*>(sums) + sum_at;
  const T* t = static_cast<const T*>(terms) + term_at;
  if constexpr (std::is_same_v<S, Wide<T>>) {
    constexpr int kLength = kLanesOf<S>;
    int64_t i = 0;
    for (; i + kLength <= count; i += kLength) store(s + i, load(s + i) + load(t + i));
    if (const int64_t left = count - i; left > 0)
      store_part(s + i, left, load_part(s + i, left, 0.0f) + load_part(t + i, left, 0.0f));
  } else {
    for (int64_t i = 0; i < count; ++i) s[i] = static_cast<S>(static_cast<double>(s[i]) + wide(t[i]));
  }
}

template <class S>
decltype(&add<S, float>) add_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return &add<S, double>;
    case ScalarType::BFloat16: return &add<S, Bfloat16>;
    case ScalarType::Half: return &add<S, Half>;
    default: return &add<S, float>;
  }
}

void accumulate_one(const Tensor& sum, const Tensor& term) {
  const int64_t row_dims = sum.dim() - 1;
  int64_t columns = sum.size(row_dims);
  const RowOrder order(sum, row_dims);
  RowSizes sizes = order.sizes;
  RowStrides sum_strides = order.strides(sum), term_strides = order.strides(term);
  join_rows(sizes, columns, sum_strides, term_strides);

  const int64_t pieces = (columns + kPiece - 1) / kPiece;
  const std::array<int64_t, 4> grid{sizes[0], sizes[1], sizes[2], pieces};
  const std::array<int64_t, 4> sum_steps{sum_strides[0], sum_strides[1], sum_strides[2], kPiece};
  const std::array<int64_t, 4> term_steps{term_strides[0], term_strides[1], term_strides[2], kPiece};
  void* sum_data = sum.mutable_data_ptr();
  const void* term_data = term.const_data_ptr();
  const auto add = sum.scalar_type() == ScalarType::Double ? add_of<double>(term.scalar_type())
                                                           : add_of<float>(term.scalar_type());
  const int64_t grain = std::max<int64_t>(1, 2 * kPiece / std::max<int64_t>(1, std::min(columns, kPiece)));
  torch::stable::parallel_for(0, grid[0] * grid[1] * grid[2] * grid[3], grain, [&](int64_t begin, int64_t end) {
    Walk walk(grid, begin);
    for (int64_t cell = begin; cell < end; ++cell, walk.step())
      add(sum_data, term_data, offset_of(walk.at, sum_steps), offset_of(walk.at, term_steps),
          std::min(kPiece, columns - walk.at[3] * kPiece));
  });
}

}  // namespace

void accumulate_(Tensors sums, Tensors terms) {
  check_accumulate(sums, terms);
  for (size_t i = 0; i < sums.size(); ++i) accumulate_one(sums[i], terms[i]);
}

}  // namespace igla

STABLE_TORCH_LIBRARY_IMPL(igla, CPU, m) { m.impl("accumulate_", TORCH_BOX(&igla::accumulate_)); }
