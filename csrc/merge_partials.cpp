// CPU kernel of igla_mega/ops/merge_partials.py. Every row is computed independently by one thread, so results do not
// depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "merge_partials_check.h"
#include "rows.h"
#include "vector.h"

namespace igla {
namespace {

// Rows whose weights are computed together, one lane per row.
constexpr int64_t kRun = 64;
// Vectors of a row that are summed together in registers.
constexpr int kUnroll = 4;

// Calls `body` with a null pointer whose type is the element type given by `type`, one of those computed in W.
template <class W, class Body>
auto with_element_type(ScalarType type, const Body& body) {
  if constexpr (std::is_same_v<W, double>) {
    return body(static_cast<double*>(nullptr));
  } else {
    if (type == ScalarType::BFloat16) return body(static_cast<Bfloat16*>(nullptr));
    if (type == ScalarType::Half) return body(static_cast<Half*>(nullptr));
    return body(static_cast<float*>(nullptr));
  }
}

template <class T>
auto load_up_to(const T* from, int64_t count) {
  return count >= kLanesOf<T> ? load(from) : load_part(from, count, 0.0f);
}

template <class T, class V>
void store_up_to(T* to, int64_t count, V v) {
  if (count >= kLanesOf<T>)
    store(to, v);
  else
    store_part(to, count, v);
}

// Row of one partial, and its weight.
template <class W>
struct Term {
  const void* row;
  W weight;
  ScalarType type;
};

// Computes to[begin:] = sum of weight * row[begin:], kCount vectors at a time, as long as they fit; with kCount 1 also
// the last, partial vector. Returns the first element that was not computed.
template <int kCount, class W>
int64_t add_vectors(const Term<W>* terms, size_t num_terms, void* to, ScalarType type, int64_t begin, int64_t columns) {
  constexpr int kLength = kLanesOf<W>;
  for (; kCount == 1 ? begin < columns : begin + kCount * kLength <= columns; begin += kCount * kLength) {
    decltype(broadcast(W{})) sum[kCount]{};
    for (size_t t = 0; t < num_terms; ++t)
      with_element_type<W>(terms[t].type, [&]<class T>(T*) {
        const T* x = static_cast<const T*>(terms[t].row) + begin;
        for (int u = 0; u < kCount; ++u)
          sum[u] += terms[t].weight * (kCount == 1 ? load_up_to(x, columns - begin) : load(x + u * kLength));
      });
    // Every partial is read before the result is written, because the result may share memory with one of them.
    with_element_type<W>(type, [&]<class T>(T*) {
      T* x = static_cast<T*>(to) + begin;
      for (int u = 0; u < kCount; ++u)
        if constexpr (kCount == 1)
          store_up_to(x, columns - begin, sum[u]);
        else
          store(x + u * kLength, sum[u]);
    });
  }
  return begin;
}

bool all_zero(const void* row, ScalarType type, int64_t columns) {
  auto check = [&]<class T>(T*) {
    const T* x = static_cast<const T*>(row);
    for (int64_t i = 0; i < columns; i += kLanesOf<T>) {
      const auto v = load_up_to(x + i, columns - i);
      for (int lane = 0; lane < kLanesOf<T>; ++lane)
        if (v[lane] != 0) return false;
    }
    return true;
  };
  return type == ScalarType::Double ? check(static_cast<double*>(nullptr)) : with_element_type<float>(type, check);
}

// Rows of one out tensor, and their lses.
template <class W>
struct Rows {
  char* out;  // written only in the result
  W* lse;
  RowStrides out_strides;
  RowStrides lse_strides;
  ScalarType type;
  int64_t element_bytes;

  Rows(void* out_data, void* lse_data, const Tensor& out_tensor, const Tensor& lse_tensor, const RowOrder& order)
      : out(static_cast<char*>(out_data)),
        lse(static_cast<W*>(lse_data)),
        out_strides(order.strides(out_tensor)),
        lse_strides(order.strides(lse_tensor)),
        type(out_tensor.scalar_type()),
        element_bytes(static_cast<int64_t>(out_tensor.element_size())) {}

  char* row_at(const RowSizes& place) const { return out + offset_of(place, out_strides) * element_bytes; }
  int64_t row_bytes() const { return out_strides[2] * element_bytes; }
  W* lse_at(const RowSizes& place) const { return lse + offset_of(place, lse_strides); }
};

// Memory of a run of rows in one partial.
template <class W>
struct Weights {
  alignas(kVectorBytes) W weight[kRun]{};
  bool seen[kRun]{};
};

// Computes the weights of `num_rows` rows starting at `place` in every partial, and the lse of their sum.
template <class W>
void weigh(const std::vector<Rows<W>>& partials, const RowSizes& place, int64_t num_rows, int64_t columns,
           bool zero_means_empty, std::vector<Weights<W>>& weights, W* lse) {
  constexpr W kInfinity = std::numeric_limits<W>::infinity();
  constexpr int kLength = kLanesOf<W>;
  W shift[kRun], total[kRun]{};
  std::fill_n(shift, kRun, -kInfinity);
  for (size_t g = 0; g < partials.size(); ++g) {
    const Rows<W>& partial = partials[g];
    const W* x = partial.lse_at(place);
    const char* row = partial.row_at(place);
    for (int64_t r = 0; r < num_rows; ++r, x += partial.lse_strides[2], row += partial.row_bytes()) {
      const bool empty = std::isinf(*x) || (zero_means_empty && *x == 0 && all_zero(row, partial.type, columns));
      weights[g].seen[r] = !empty;
      weights[g].weight[r] = empty ? -kInfinity : *x;
      if (!empty && *x > shift[r]) shift[r] = *x;
    }
  }
  // -inf - -inf is NaN: a row that is empty in every partial is shifted by 0, and its weights are correctly 0.
  for (W& s : shift) s = s == -kInfinity ? 0 : s;

  for (int64_t r = 0; r < num_rows; r += kLength) {
    auto sum = load(total + r);
    for (Weights<W>& w : weights) {
      const auto e = exp(load(w.weight + r) - load(shift + r));
      store(w.weight + r, e);
      sum += e;
    }
    store(total + r, sum);
    const auto divisor = sum == 0 ? broadcast(W{1}) : sum;
    for (Weights<W>& w : weights) store(w.weight + r, load(w.weight + r) / divisor);
  }
  for (int64_t r = 0; r < num_rows; ++r) lse[r] = shift[r] + std::log(total[r]);
}

template <class W>
void merge(const Tensors& outs, const Tensors& lses, const Tensor& out, const Tensor& lse, bool zero_means_empty) {
  const RowOrder order(out, kRowDims);
  const Rows<W> result(out.mutable_data_ptr(), lse.mutable_data_ptr(), out, lse, order);
  std::vector<Rows<W>> partials;
  for (size_t g = 0; g < outs.size(); ++g)
    partials.emplace_back(const_cast<void*>(outs[g].const_data_ptr()), const_cast<void*>(lses[g].const_data_ptr()),
                          outs[g], lses[g], order);

  const int64_t columns = out.size(3);
  const RowSizes runs{order.sizes[0], order.sizes[1], (order.sizes[2] + kRun - 1) / kRun};
  const int64_t run_elements = std::max<int64_t>(1, std::min(order.sizes[2], kRun) * columns);
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / run_elements);
  torch::stable::parallel_for(0, runs[0] * runs[1] * runs[2], grain, [&](int64_t begin, int64_t end) {
    std::vector<Weights<W>> weights(partials.size());
    std::vector<Term<W>> terms(partials.size());
    W merged_lse[kRun];
    Walk walk(runs, begin);
    for (int64_t run = begin; run < end; ++run, walk.step()) {
      const RowSizes place{walk.at[0], walk.at[1], walk.at[2] * kRun};
      const int64_t num_rows = std::min(kRun, order.sizes[2] - place[2]);
      weigh(partials, place, num_rows, columns, zero_means_empty, weights, merged_lse);
      char* to = result.row_at(place);
      W* lse_to = result.lse_at(place);
      for (int64_t r = 0; r < num_rows; ++r, to += result.row_bytes(), lse_to += result.lse_strides[2]) {
        size_t num_terms = 0;
        for (size_t g = 0; g < partials.size(); ++g)
          if (weights[g].seen[r])
            terms[num_terms++] = {partials[g].row_at(place) + r * partials[g].row_bytes(), weights[g].weight[r],
                                  partials[g].type};
        const int64_t done = add_vectors<kUnroll>(terms.data(), num_terms, to, result.type, 0, columns);
        add_vectors<1>(terms.data(), num_terms, to, result.type, done, columns);
        *lse_to = merged_lse[r];
      }
    }
  });
}

}  // namespace

void merge_partials(Tensors outs, Tensors lses, Tensor out, Tensor lse, bool zero_means_empty) {
  check_merge(outs, lses, out, lse);
  if (lse.scalar_type() == ScalarType::Double)
    merge<double>(outs, lses, out, lse, zero_means_empty);
  else
    merge<float>(outs, lses, out, lse, zero_means_empty);
}

}  // namespace igla

STABLE_TORCH_LIBRARY_IMPL(igla, CPU, m) { m.impl("merge_partials", TORCH_BOX(&igla::merge_partials)); }
