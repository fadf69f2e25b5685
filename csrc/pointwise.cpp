// CPU kernels of igla_mega/ops/pointwise.py. Results do not depend on the number of threads. Products and sums are
// rounded one by one (no fused multiply-add), as torch rounds them: logits then differ as little as possible from those
// of other engines.
#pragma GCC optimize("fp-contract=off")

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <bit>
#include <tuple>

#include "checks.h"
#include "vector.h"

namespace igla {
namespace {

// Rows per partial sum of a weight's gradient.
constexpr int64_t kRowsOfSum = 64;

// Calls `body` with a null pointer whose type is the element type given by `type`.
template <class Body>
void with_element_type(ScalarType type, const Body& body) {
  if (type == ScalarType::Float)
    body(static_cast<float*>(nullptr));
  else
    body(static_cast<Bfloat16*>(nullptr));
}

// Calls body(i, lanes) for each vector of a row; `lanes` is smaller for the last vector.
template <class Body>
void for_each_vector(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(i, kLanes);
  if (i < count) body(i, count - i);
}

template <class T>
Vec get(const T* from, int64_t lanes) {
  return lanes == kLanes ? load(from) : load_part(from, lanes, 0.0f);
}

template <class T>
void put(T* to, int64_t lanes, Vec v) {
  lanes == kLanes ? store(to, v) : store_part(to, lanes, v);
}

// Returns the sum of a row's term(i, lanes) in the order of torch's sum: in blocks, whose sums are again summed in
// blocks. An RMSNorm then equals one written in torch bit for bit, and the error hardly grows with the width.
template <class Term>
float sum_row(int64_t count, const Term& term) {
  constexpr int64_t kAcross = 4, kLevels = 4, kStep = kAcross * kLanes;
  const int64_t steps = count / kStep;
  const auto log2_steps = static_cast<int64_t>(std::bit_width(static_cast<uint64_t>(std::max<int64_t>(steps, 1) - 1)));
  const int64_t log2_block = std::max<int64_t>(4, log2_steps / kLevels);
  Vec sums[kLevels][kAcross] = {};
  for (int64_t step = 0; step < steps;) {
    for (int64_t k = 0; k < kAcross; ++k) sums[0][k] += term(step * kStep + k * kLanes, kLanes);
    ++step;
    for (int64_t level = 1; level < kLevels && step % (int64_t{1} << level * log2_block) == 0; ++level)
      for (int64_t k = 0; k < kAcross; ++k) {
        sums[level][k] += sums[level - 1][k];
        sums[level - 1][k] = Vec{};
      }
  }
  for (int64_t level = 1; level < kLevels; ++level)
    for (int64_t k = 0; k < kAcross; ++k) sums[0][k] += sums[level][k];
  int64_t i = steps * kStep;
  for (; i + kLanes <= count; i += kLanes) sums[0][0] += term(i, kLanes);
  for (int64_t k = 1; k < kAcross; ++k) sums[0][0] += sums[0][k];
  float sum = i < count ? sum_lanes(term(i, count - i)) : 0.0f;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[0][0][lane];
  return sum;
}

int64_t rows_per_task(int64_t columns) { return std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, columns)); }

void check_matrix(Name name, const Tensor& tensor) {
  check_type(name, tensor, {ScalarType::Float, ScalarType::BFloat16});
  STD_TORCH_CHECK(tensor.dim() == 2, name, " must be [rows, columns], got ", tensor.dim(), " dimensions");
  check_contiguous(name, tensor);
}

void check_same(Name name, const Tensor& tensor, const Tensor& like, Name like_name) {
  check_type(name, tensor, {like.scalar_type()});
  check_shape(name, tensor, like.sizes(), like_name);
  check_contiguous(name, tensor);
}

void check_norm(const Tensor& x, const Tensor& weight) {
  check_matrix({"x"}, x);
  check_type({"weight"}, weight, {x.scalar_type()});
  STD_TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(1), "weight must have one entry for each of the ",
                  x.size(1), " columns of x");
  check_contiguous({"weight"}, weight);
}

}  // namespace

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double epsilon) {
  check_norm(x, weight);
  const int64_t rows = x.size(0), columns = x.size(1);
  Tensor out = torch::stable::new_empty(x, {rows, columns});
  Tensor scale = torch::stable::new_empty(x, {rows}, ScalarType::Float);
  auto* row_scale = static_cast<float*>(scale.mutable_data_ptr());
  with_element_type(x.scalar_type(), [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const T* in = static_cast<const T*>(x.const_data_ptr());
    const T* w = static_cast<const T*>(weight.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, rows, rows_per_task(columns), [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* from = in + row * columns;
        const float squares = sum_row(columns, [&](int64_t i, int64_t lanes) {
          const Vec v = get(from + i, lanes);
          return v * v;
        });
        const float s = 1.0f / std::sqrt(squares / static_cast<float>(columns) + static_cast<float>(epsilon));
        row_scale[row] = s;
        for_each_vector(columns, [&](int64_t i, int64_t lanes) {
          put(to + row * columns + i, lanes, get(from + i, lanes) * s * get(w + i, lanes));
        });
      }
    });
  });
  return {out, scale};
}

std::tuple<Tensor, Tensor> rms_norm_gradient(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             const Tensor& scale) {
  check_norm(x, weight);
  check_same({"grad"}, grad, x, {"x"});
  const int64_t rows = x.size(0), columns = x.size(1), sums = (rows + kRowsOfSum - 1) / kRowsOfSum;
  check_type({"scale"}, scale, {ScalarType::Float});
  STD_TORCH_CHECK(scale.dim() == 1 && scale.size(0) == rows && scale.is_contiguous(),
                  "scale must have one entry for each of the ", rows, " rows of x");
  Tensor grad_x = torch::stable::new_empty(x, {rows, columns});
  Tensor grad_weight = torch::stable::new_empty(x, {columns});
  Tensor partial = torch::stable::new_empty(x, {sums, columns}, ScalarType::Float);
  const auto* row_scale = static_cast<const float*>(scale.const_data_ptr());
  auto* parts = static_cast<float*>(partial.mutable_data_ptr());
  with_element_type(x.scalar_type(), [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const T* g = static_cast<const T*>(grad.const_data_ptr());
    const T* in = static_cast<const T*>(x.const_data_ptr());
    const T* w = static_cast<const T*>(weight.const_data_ptr());
    T* to = static_cast<T*>(grad_x.mutable_data_ptr());
    torch::stable::parallel_for(0, sums, 1, [=](int64_t begin, int64_t end) {
      for (int64_t sum = begin; sum < end; ++sum) {
        float* part = parts + sum * columns;
        std::memset(part, 0, static_cast<size_t>(columns) * sizeof(float));
        for (int64_t row = sum * kRowsOfSum; row < std::min(rows, (sum + 1) * kRowsOfSum); ++row) {
          const int64_t at = row * columns;
          const float s = row_scale[row];
          const float dots = sum_row(columns, [&](int64_t i, int64_t lanes) {
            return get(g + at + i, lanes) * get(w + i, lanes) * get(in + at + i, lanes);
          });
          const float back = s * s * s * dots / static_cast<float>(columns);
          for_each_vector(columns, [&](int64_t i, int64_t lanes) {
            const Vec upstream = get(g + at + i, lanes), v = get(in + at + i, lanes);
            put(part + i, lanes, get(part + i, lanes) + upstream * v * s);
            put(to + at + i, lanes, upstream * get(w + i, lanes) * s - v * back);
          });
        }
      }
    });
    T* total = static_cast<T*>(grad_weight.mutable_data_ptr());
    for_each_vector(columns, [&](int64_t i, int64_t lanes) {
      Vec v{};
      for (int64_t sum = 0; sum < sums; ++sum) v += get(parts + sum * columns + i, lanes);
      put(total + i, lanes, v);
    });
  });
  return {grad_x, grad_weight};
}

Tensor swiglu(const Tensor& x) {
  check_matrix({"x"}, x);
  STD_TORCH_CHECK(x.size(1) % 2 == 0, "x must have an even number of columns, got ", x.size(1));
  const int64_t rows = x.size(0), columns = x.size(1) / 2;
  Tensor out = torch::stable::new_empty(x, {rows, columns});
  with_element_type(x.scalar_type(), [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const T* in = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, rows, rows_per_task(columns), [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T *gate = in + row * 2 * columns, *up = gate + columns;
        for_each_vector(columns, [&](int64_t i, int64_t lanes) {
          const Vec a = get(gate + i, lanes);
          put(to + row * columns + i, lanes, a / (exp(-a) + 1.0f) * get(up + i, lanes));
        });
      }
    });
  });
  return out;
}

Tensor swiglu_gradient(const Tensor& grad, const Tensor& x) {
  check_matrix({"x"}, x);
  check_matrix({"grad"}, grad);
  check_type({"grad"}, grad, {x.scalar_type()});
  const int64_t rows = x.size(0), columns = grad.size(1);
  STD_TORCH_CHECK(grad.size(0) == rows && x.size(1) == 2 * columns, "grad must be [", rows, ", ", x.size(1) / 2,
                  "], half as wide as x, got [", grad.size(0), ", ", columns, "]");
  Tensor out = torch::stable::new_empty(x, {rows, 2 * columns});
  with_element_type(x.scalar_type(), [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const T* g = static_cast<const T*>(grad.const_data_ptr());
    const T* in = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, rows, rows_per_task(columns), [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T *gate = in + row * 2 * columns, *up = gate + columns;
        T *to_gate = to + row * 2 * columns, *to_up = to_gate + columns;
        for_each_vector(columns, [&](int64_t i, int64_t lanes) {
          const Vec a = get(gate + i, lanes), upstream = get(g + row * columns + i, lanes);
          const Vec sigmoid = 1.0f / (exp(-a) + 1.0f);
          put(to_gate + i, lanes, upstream * get(up + i, lanes) * sigmoid * (a * (1.0f - sigmoid) + 1.0f));
          put(to_up + i, lanes, upstream * a * sigmoid);
        });
      }
    });
  });
  return out;
}

Tensor rotate(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  check_type({"x"}, x, {ScalarType::Float, ScalarType::BFloat16});
  STD_TORCH_CHECK(x.dim() == 4 && x.size(3) % 2 == 0, "x must be [S, B, H, D] with D even");
  check_rows({"x"}, x);
  const int64_t length = x.size(0), batch = x.size(1), heads = x.size(2), half = x.size(3) / 2;
  for (const Tensor* table : {&cos, &sin}) {
    check_type({"cos and sin"}, *table, {ScalarType::Float});
    check_contiguous({"cos and sin"}, *table);
    STD_TORCH_CHECK(table->dim() == 4 && table->size(0) == length && (table->size(1) == 1 || table->size(1) == batch) &&
                        table->size(2) == 1 && table->size(3) == half && table->size(1) == cos.size(1),
                    "cos and sin must be [", length, ", 1 or ", batch, ", 1, ", half, "]");
  }
  Tensor out = torch::stable::new_empty(x, {length, batch, heads, 2 * half});
  const int64_t per_position = cos.size(1), step_s = x.stride(0), step_b = x.stride(1), step_h = x.stride(2);
  const auto* c = static_cast<const float*>(cos.const_data_ptr());
  const auto* s = static_cast<const float*>(sin.const_data_ptr());
  with_element_type(x.scalar_type(), [&](auto* element) {
    using T = std::remove_pointer_t<decltype(element)>;
    const T* in = static_cast<const T*>(x.const_data_ptr());
    T* to = static_cast<T*>(out.mutable_data_ptr());
    torch::stable::parallel_for(0, length * batch, rows_per_task(heads * 2 * half), [=](int64_t begin, int64_t end) {
      for (int64_t cell = begin; cell < end; ++cell) {
        const int64_t position = cell / batch, row = cell % batch;
        const int64_t table = (position * per_position + (per_position == 1 ? 0 : row)) * half;
        for (int64_t head = 0; head < heads; ++head) {
          const T* from = in + position * step_s + row * step_b + head * step_h;
          T* turned = to + (cell * heads + head) * 2 * half;
          for_each_vector(half, [&](int64_t i, int64_t lanes) {
            const Vec a = get(from + i, lanes), b = get(from + half + i, lanes);
            const Vec cosine = get(c + table + i, lanes), sine = get(s + table + i, lanes);
            put(turned + i, lanes, a * cosine - b * sine);
            put(turned + half + i, lanes, b * cosine + a * sine);
          });
        }
      }
    });
  });
  return out;
}

}  // namespace igla

STABLE_TORCH_LIBRARY_IMPL(igla, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&igla::rms_norm));
  m.impl("rms_norm_gradient", TORCH_BOX(&igla::rms_norm_gradient));
  m.impl("swiglu", TORCH_BOX(&igla::swiglu));
  m.impl("swiglu_gradient", TORCH_BOX(&igla::swiglu_gradient));
  m.impl("rotate", TORCH_BOX(&igla::rotate));
}
