// Argument checks shared by the CPU and CUDA bindings of igla_mega/ops/ewc_penalty.py.
#pragma once
#include "checks.h"

namespace igla {

inline void check_ewc(const Tensors& grads, const Tensors& weights, const Tensors& anchors, const Tensors& fisher) {
  STD_TORCH_CHECK(grads.size() == weights.size() && anchors.size() == weights.size() && fisher.size() == weights.size(),
                  "grads, weights, anchors, fisher must be of one length, got [", grads.size(), ", ", weights.size(),
                  ", ", anchors.size(), ", ", fisher.size(), "]");
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto index = static_cast<int64_t>(i);
    const Name like{"weights", index};
    check_type(like, weights[i], {ScalarType::Float, ScalarType::Double});
    const ScalarType type = weights[i].scalar_type();
    if (type == ScalarType::Float)
      check_type({"grads", index}, grads[i], {type, ScalarType::BFloat16});
    else
      check_type({"grads", index}, grads[i], {type});
    check_type({"anchors", index}, anchors[i], {type});
    check_type({"fisher", index}, fisher[i], {type});
    auto check_kin = [&](Name name, const Tensor& tensor) {
      check_shape(name, tensor, weights[i].sizes(), like);
      check_contiguous(name, tensor);
      check_device(name, tensor, weights[0], {"weights", 0});
    };
    check_kin(like, weights[i]);
    check_kin({"grads", index}, grads[i]);
    check_kin({"anchors", index}, anchors[i]);
    check_kin({"fisher", index}, fisher[i]);
  }
}

}  // namespace igla
