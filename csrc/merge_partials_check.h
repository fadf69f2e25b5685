// Argument checks shared by the CPU and CUDA bindings of igla_mega/ops/merge_partials.py.
#pragma once
#include "checks.h"

namespace igla {

inline void check_merge(const Tensors& outs, const Tensors& lses, const Tensor& out, const Tensor& lse) {
  STD_TORCH_CHECK(!outs.empty(), "merge_partials needs at least one partial");
  STD_TORCH_CHECK(outs.size() == lses.size(), "outs, lses must be of one length, got [", outs.size(), ", ",
                  lses.size(), "]");
  STD_TORCH_CHECK(out.dim() == 4, "out must be [B, H, S, D], got ", out.dim(), " dimensions");
  check_type({"lse"}, lse, {ScalarType::Float, ScalarType::Double});
  auto check_out = [&](Name name, const Tensor& tensor) {
    if (lse.scalar_type() == ScalarType::Double)
      check_type(name, tensor, {ScalarType::Double});
    else
      check_type(name, tensor, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
    check_shape(name, tensor, out.sizes(), "out");
    check_rows(name, tensor);
    check_device(name, tensor, out, {"out"});
  };
  auto check_lse = [&](Name name, const Tensor& tensor) {
    check_type(name, tensor, {lse.scalar_type()});
    check_shape(name, tensor, Shape(out.sizes().data(), 3), "the rows of out");
    check_device(name, tensor, out, {"out"});
  };
  check_out({"out"}, out);
  check_lse({"lse"}, lse);
  check_not_expanded({"out"}, out);
  check_not_expanded({"lse"}, lse);
  for (size_t i = 0; i < outs.size(); ++i) {
    check_out({"outs", static_cast<int64_t>(i)}, outs[i]);
    check_lse({"lses", static_cast<int64_t>(i)}, lses[i]);
  }
}

}  // namespace igla
