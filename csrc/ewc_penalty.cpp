// CPU kernel of igla_mega/ops/ewc_penalty.py. Sums are computed per chunk and added in the order of the chunks, so
// results do not depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include <array>

#include "chunks.h"
#include "ewc_penalty_check.h"
#include "vector.h"

namespace igla {
namespace {

// Elements whose squares are summed in their own precision before they are added to the fp64 sum.
constexpr int64_t kBlock = 1024;
constexpr int kUnroll = 2;

struct Group {
  void* grads;
  const void* weights;
  const void* anchors;
  const void* fisher;
  std::array<double, 3> (*pull)(const Group&, int64_t begin, int64_t count, double ewc_lambda);
};

template <class V>
double sum_in_double(const V& v) {
  double sum = 0.0;
  for (size_t lane = 0; lane < sizeof(V) / sizeof(v[0]); ++lane) sum += v[lane];
  return sum;
}

// Twice the penalty, and the sums of squares of the original gradients and of the pull.
template <class W, class G>
std::array<double, 3> pull(const Group& group, int64_t begin, int64_t count, double ewc_lambda) {
  G* g = static_cast<G*>(group.grads) + begin;
  const W* w = static_cast<const W*>(group.weights) + begin;
  const W* a = static_cast<const W*>(group.anchors) + begin;
  const W* f = static_cast<const W*>(group.fisher) + begin;
  const auto lambda = broadcast(static_cast<W>(ewc_lambda));
  using V = std::remove_const_t<decltype(lambda)>;
  constexpr int kLength = kLanesOf<W>;
  constexpr int64_t kStride = kUnroll * kLength;
  static_assert(kBlock % kStride == 0 && Chunks::kSize % kBlock == 0);

  std::array<double, 3> sums{};
  for (int64_t block = 0; block < count; block += kBlock) {
    const int64_t end = std::min(count, block + kBlock);
    V penalty[kUnroll]{}, grad_squares[kUnroll]{}, pull_squares[kUnroll]{};
    auto step = [&](int u, V grad, V drift, V stiffness) {
      const V p = lambda * (stiffness * drift);
      penalty[u] += p * drift;
      grad_squares[u] += grad * grad;
      pull_squares[u] += p * p;
      return grad + p;
    };
    int64_t i = block;
    for (; i + kStride <= end; i += kStride)
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t at = i + u * kLength;
        store(g + at, step(u, load(g + at), load(w + at) - load(a + at), load(f + at)));
      }
    for (; i < end; i += kLength) {
      const int64_t left = std::min<int64_t>(kLength, end - i);
      auto part = [&](auto* from) { return left == kLength ? load(from + i) : load_part(from + i, left, 0.0f); };
      const V sum = step(0, part(g), part(w) - part(a), part(f));
      if (left == kLength)
        store(g + i, sum);
      else
        store_part(g + i, left, sum);
    }
    sums[0] += sum_in_double(penalty[0] + penalty[1]);
    sums[1] += sum_in_double(grad_squares[0] + grad_squares[1]);
    sums[2] += sum_in_double(pull_squares[0] + pull_squares[1]);
  }
  return sums;
}

}  // namespace

Tensor ewc_pull_(Tensors grads, Tensors weights, Tensors anchors, Tensors fisher, double ewc_lambda) {
  check_ewc(grads, weights, anchors, fisher);
  std::vector<Group> groups;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < weights.size(); ++i) {
    auto* body = &pull<float, float>;
    if (grads[i].scalar_type() == ScalarType::Double) body = &pull<double, double>;
    if (grads[i].scalar_type() == ScalarType::BFloat16) body = &pull<float, Bfloat16>;
    groups.push_back({grads[i].mutable_data_ptr(), weights[i].const_data_ptr(), anchors[i].const_data_ptr(),
                      fisher[i].const_data_ptr(), body});
    sizes.push_back(weights[i].numel());
  }
  const Chunks chunks(std::move(sizes));
  std::vector<std::array<double, 3>> partial(static_cast<size_t>(chunks.count()));
  chunks.for_each([&](int64_t chunk, size_t tensor, int64_t begin, int64_t count) {
    partial[static_cast<size_t>(chunk)] = groups[tensor].pull(groups[tensor], begin, count, ewc_lambda);
  });

  Tensor result = torch::stable::new_zeros(weights[0], {3}, ScalarType::Double);
  auto* sums = static_cast<double*>(result.mutable_data_ptr());
  for (const auto& part : partial)
    for (size_t i = 0; i < part.size(); ++i) sums[i] += part[i];
  sums[0] /= 2;
  return result;
}

}  // namespace igla

STABLE_TORCH_LIBRARY_IMPL(igla, CPU, m) { m.impl("ewc_pull_", TORCH_BOX(&igla::ewc_pull_)); }
