// Argument checks shared by the CPU and CUDA bindings of igla_mega/ops/fisher.py.
#pragma once
#include "checks.h"

namespace igla {

inline void check_fisher(const Tensors& fisher, const Tensors& grads) {
  STD_TORCH_CHECK(fisher.size() == grads.size(), "fisher, grads must be of one length, got [", fisher.size(), ", ",
                  grads.size(), "]");
  for (size_t i = 0; i < fisher.size(); ++i) {
    const Name name{"fisher", static_cast<int64_t>(i)}, grad_name{"grads", static_cast<int64_t>(i)};
    check_type(name, fisher[i], {ScalarType::Float, ScalarType::Double});
    if (fisher[i].scalar_type() == ScalarType::Double)
      check_type(grad_name, grads[i], {ScalarType::Double});
    else
      check_type(grad_name, grads[i], {ScalarType::Float, ScalarType::BFloat16});
    check_shape(grad_name, grads[i], fisher[i].sizes(), name);
    check_contiguous(name, fisher[i]);
    check_contiguous(grad_name, grads[i]);
    check_device(name, fisher[i], fisher[0], {"fisher", 0});
    check_device(grad_name, grads[i], fisher[0], {"fisher", 0});
  }
}

}  // namespace igla
