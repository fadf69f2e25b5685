// CPU kernels of igla_mega/ops/cross_entropy.py. A thread processes whole rows, so results do not depend on the number
// of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>

#include "cross_entropy_check.h"
#include "vector.h"

namespace igla {
namespace {

constexpr int kUnroll = 4;
constexpr int64_t kStride = kUnroll * kLanes;
// Elements per block: read once for the maximum and again for the sum while they are in the first-level cache.
constexpr int64_t kBlock = 2048;
static_assert(kBlock % kStride == 0);
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Statistics {
  float row_max;
  float sum_exp;
};

template <class T>
float max_of(const T* x, int64_t count) {
  Vec most[kUnroll];
  for (Vec& m : most) m = broadcast(-kInfinity);
  int64_t i = 0;
  for (; i + kStride <= count; i += kStride)
    for (int u = 0; u < kUnroll; ++u) most[u] = maximum(load(x + i + u * kLanes), most[u]);
  for (; i < count; i += kLanes) {
    const int64_t left = count - i;
    const Vec v = left >= kLanes ? load(x + i) : load_part(x + i, left, -kInfinity);
    most[0] = maximum(v, most[0]);
  }
  return max_lanes(maximum(maximum(most[0], most[1]), maximum(most[2], most[3])));
}

template <class T>
float sum_of_exp(const T* x, int64_t count, float shift) {
  Vec sum[kUnroll] = {};
  int64_t i = 0;
  for (; i + kStride <= count; i += kStride)
    for (int u = 0; u < kUnroll; ++u) sum[u] += exp(load(x + i + u * kLanes) - shift);
  for (; i < count; i += kLanes) {
    const int64_t left = count - i;
    const Vec v = left >= kLanes ? load(x + i) : load_part(x + i, left, -kInfinity);
    sum[0] += exp(v - shift);
  }
  return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Reads the row from memory once: block by block, rescaling the running sum whenever a block raises the maximum.
template <class T>
Statistics row_statistics(const T* x, int64_t columns) {
  float most = -kInfinity;
  double sum = 0.0;
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t count = std::min(kBlock, columns - begin);
    const float raised = std::max(most, max_of(x + begin, count));
    // -inf - -inf is NaN: as long as every value is -inf the shift is 0, and each exp is correctly 0.
    const float shift = raised == -kInfinity ? 0.0f : raised;
    if (raised > most) sum *= std::exp(most - shift);
    sum += sum_of_exp(x + begin, count, shift);
    most = raised;
  }
  return {most, static_cast<float>(sum)};
}

template <class T>
void row_gradient(T* x, int64_t columns, float lse, float weight) {
  int64_t i = 0;
  for (; i + kStride <= columns; i += kStride)
    for (int u = 0; u < kUnroll; ++u) {
      T* at = x + i + u * kLanes;
      store(at, exp(load(at) - lse) * weight);
    }
  for (; i < columns; i += kLanes) {
    const int64_t left = columns - i;
    if (left >= kLanes)
      store(x + i, exp(load(x + i) - lse) * weight);
    else
      store_part(x + i, left, exp(load_part(x + i, left, 0.0f) - lse) * weight);
  }
}

// Calls `body` with a null pointer whose type is the element type given by `type`.
template <class Body>
void with_element_type(ScalarType type, const Body& body) {
  if (type == ScalarType::Float)
    body(static_cast<float*>(nullptr));
  else if (type == ScalarType::BFloat16)
    body(static_cast<Bfloat16*>(nullptr));
  else
    body(static_cast<Half*>(nullptr));
}

int64_t rows_per_task(int64_t columns) { return std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, columns)); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> softmax_statistics(const Tensor& logits, const Tensor& labels, int64_t vocab_start,
                                                      int64_t vocab_limit) {
  check_logits(logits);
  check_rows(logits, labels, "labels", ScalarType::Long);
  const int64_t num_rows = logits.size(0), stride = logits.size(1);
  const int64_t columns = real_columns(logits, vocab_start, vocab_limit);
  auto new_row = [&] { return torch::stable::new_empty(logits, {num_rows}, ScalarType::Float); };
  Tensor row_max = new_row(), sum_exp = new_row(), target_logit = new_row();

  auto* max_out = static_cast<float*>(row_max.mutable_data_ptr());
  auto* sum_out = static_cast<float*>(sum_exp.mutable_data_ptr());
  auto* target_out = static_cast<float*>(target_logit.mutable_data_ptr());
  const auto* label = static_cast<const int64_t*>(labels.const_data_ptr());
  with_element_type(logits.scalar_type(), [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const T* data = static_cast<const T*>(logits.const_data_ptr());
    torch::stable::parallel_for(0, num_rows, rows_per_task(columns), [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* x = data + row * stride;
        const Statistics found = row_statistics(x, columns);
        max_out[row] = found.row_max;
        sum_out[row] = found.sum_exp;
        const int64_t target = label[row] - vocab_start;
        target_out[row] = target >= 0 && target < columns ? load_part(x + target, 1, 0.0f)[0] : 0.0f;
      }
    });
  });
  return {row_max, sum_exp, target_logit};
}

void softmax_gradient_(Tensor logits, const Tensor& lse, const Tensor& labels, const Tensor& weight,
                       int64_t vocab_start, int64_t vocab_limit) {
  check_logits(logits);
  check_rows(logits, lse, "lse", ScalarType::Float);
  check_rows(logits, labels, "labels", ScalarType::Long);
  check_rows(logits, weight, "weight", ScalarType::Float);
  const int64_t num_rows = logits.size(0), stride = logits.size(1);
  const int64_t columns = real_columns(logits, vocab_start, vocab_limit);

  const auto* row_lse = static_cast<const float*>(lse.const_data_ptr());
  const auto* label = static_cast<const int64_t*>(labels.const_data_ptr());
  const auto* row_weight = static_cast<const float*>(weight.const_data_ptr());
  with_element_type(logits.scalar_type(), [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    T* data = static_cast<T*>(logits.mutable_data_ptr());
    torch::stable::parallel_for(0, num_rows, rows_per_task(stride), [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T* x = data + row * stride;
        // Zero is all zero bits in every element type.
        const int64_t kept = row_weight[row] == 0.0f ? 0 : columns;
        std::memset(static_cast<void*>(x + kept), 0, static_cast<size_t>(stride - kept) * sizeof(T));
        const int64_t target = label[row] - vocab_start;
        const bool here = target >= 0 && target < kept;
        const Vec logit = here ? load_part(x + target, 1, 0.0f) : Vec{};
        row_gradient(x, kept, row_lse[row], row_weight[row]);
        if (here) store_part(x + target, 1, (exp(logit - row_lse[row]) - 1.0f) * row_weight[row]);
      }
    });
  });
}

}  // namespace igla

STABLE_TORCH_LIBRARY_IMPL(igla, CPU, m) {
  m.impl("softmax_statistics", TORCH_BOX(&igla::softmax_statistics));
  m.impl("softmax_gradient_", TORCH_BOX(&igla::softmax_gradient_));
}
