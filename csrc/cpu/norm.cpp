// Sum of squares of one chunk of a gradient, |g|^2 or |T_w g|^2. Reads g (and p when adaptive): 1 N s bytes.
#include "cpu/squares.h"

namespace sam::cpu {
inline namespace SAM_ISA {

template <class T>
static double norm_chunk(const Row& row, Span span, const NormArgs& args) {
  Lanes lanes;
  for_each_block(span, [&](int64_t begin, int count) {
    Buffer<T> grad_buffer, param_buffer;
    const bool in_place = row.grad.dtype == kArithmetic<T> && !args.adaptive;
    const T* grad = load(row.grad, begin, count, grad_buffer, !in_place);
    if (args.adaptive) {
      add_adaptive_squares(load(row.param, begin, count, param_buffer), grad, count, args.eta, lanes);
    } else {
      add_squares(grad, count, in_place, lanes);
    }
  });
  return total(lanes);
}

double norm(const Row& row, Span span, const NormArgs& args) {
  return has_float64(row) ? norm_chunk<double>(row, span, args) : norm_chunk<float>(row, span, args);
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
