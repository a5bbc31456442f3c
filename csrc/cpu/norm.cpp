// Sum of squares of one chunk of a gradient, |g|^2 or |T_w g|^2. Reads g (and p when adaptive): 1 N s bytes.
#include "cpu/squares.h"

namespace sam::cpu {
inline namespace SAM_ISA {

template <class T>
static double norm_chunk(const Row& row, Span span, const Scaling<double>& scaling) {
  const bool in_place = row[kNormGrad].dtype == kArithmetic<T> && !scaling.is_adaptive;
  Lanes lanes;
  for_each_block(span, [&](int64_t begin, int count) {
    Buffer<T> grad_buffer;
    const T* grad = load(row[kNormGrad], begin, count, grad_buffer, !in_place);
    add_scaled_squares(row[kNormParam], begin, grad, count, scaling, in_place, lanes);
  });
  return total(lanes);
}

double norm(const Row& row, Span span, const Scaling<double>& scaling) {
  return has_float64(row) ? norm_chunk<double>(row, span, scaling) : norm_chunk<float>(row, span, scaling);
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
