// CPU kernel of igla_mega/ops/fisher.py.
#include <torch/csrc/stable/library.h>

#include "chunks.h"
#include "fisher_check.h"
#include "vector.h"

namespace igla {
namespace {

template <class F, class G>
void add_squares(void* fisher, void* grads, int64_t begin, int64_t count, double weight, bool zero_grads) {
  F* f = static_cast<F*>(fisher) + begin;
  G* g = static_cast<G*>(grads) + begin;
  const auto w = broadcast(static_cast<F>(weight));
  constexpr int kLength = kLanesOf<F>;
  int64_t i = 0;
  for (; i + kLength <= count; i += kLength) {
    const auto x = load(g + i);
    store(f + i, load(f + i) + w * (x * x));
  }
  if (const int64_t left = count - i; left > 0) {
    const auto x = load_part(g + i, left, 0.0f);
    store_part(f + i, left, load_part(f + i, left, 0.0f) + w * (x * x));
  }
  // Zero is all zero bits in every element type.
  if (zero_grads) std::memset(static_cast<void*>(g), 0, static_cast<size_t>(count) * sizeof(G));
}

struct Pair {
  void* fisher;
  void* grads;
  decltype(&add_squares<float, float>) add;
};

Pair pair_of(const Tensor& fisher, const Tensor& grads) {
  auto* add = &add_squares<float, float>;
  if (grads.scalar_type() == ScalarType::Double) add = &add_squares<double, double>;
  if (grads.scalar_type() == ScalarType::BFloat16) add = &add_squares<float, Bfloat16>;
  return {fisher.mutable_data_ptr(), grads.mutable_data_ptr(), add};
}

}  // namespace

void fisher_accumulate_(Tensors fisher, Tensors grads, double weight, bool zero_grads) {
  check_fisher(fisher, grads);
  std::vector<Pair> pairs;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < fisher.size(); ++i) {
    pairs.push_back(pair_of(fisher[i], grads[i]));
    sizes.push_back(fisher[i].numel());
  }
  Chunks(std::move(sizes)).for_each([&](int64_t, size_t tensor, int64_t begin, int64_t count) {
    const Pair& pair = pairs[tensor];
    pair.add(pair.fisher, pair.grads, begin, count, weight, zero_grads);
  });
}

}  // namespace igla

STABLE_TORCH_LIBRARY_IMPL(igla, CPU, m) { m.impl("fisher_accumulate_", TORCH_BOX(&igla::fisher_accumulate_)); }
