// Argument checks shared by the CPU and CUDA bindings of igla_mega/ops/accumulate.py.
#pragma once
#include "checks.h"

namespace igla {

inline void check_accumulate(const Tensors& sums, const Tensors& terms) {
  STD_TORCH_CHECK(sums.size() == terms.size(), "sums, terms must be of one length, got [", sums.size(), ", ",
                  terms.size(), "]");
  for (size_t i = 0; i < sums.size(); ++i) {
    const Name name{"sums", static_cast<int64_t>(i)}, term_name{"terms", static_cast<int64_t>(i)};
    check_type(name, sums[i], {ScalarType::Float, ScalarType::Double});
    check_type(term_name, terms[i],
               {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
    check_shape(term_name, terms[i], sums[i].sizes(), name);
    auto check_kin = [&](Name which, const Tensor& tensor) {
      STD_TORCH_CHECK(tensor.dim() >= 1 && tensor.dim() <= 4, which, " must have 1 to 4 dimensions, got ",
                      tensor.dim());
      check_rows(which, tensor);
      check_device(which, tensor, sums[0], {"sums", 0});
    };
    check_kin(name, sums[i]);
    check_kin(term_name, terms[i]);
    check_not_expanded(name, sums[i]);
  }
}

}  // namespace igla
