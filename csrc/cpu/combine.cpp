// A weighted sum of two or three lists, and the sum of squares of the result before it is rounded to storage. Reads l, r (and o); writes
// out, which may be any of them: 3 N s bytes (4 N s).
#include "cpu/squares.h"

namespace sam::cpu {
inline namespace SAM_ISA {

template <bool kOrigin, class T>
static double combine_chunk(const Row& row, Span span, const CombineArgs& args) {
  const CombineWeights<T> weights{T(args.left_weight), T(args.right_weight), T(args.origin_weight)};
  const Operand &out = row.param, &left_operand = row.grad, &right_operand = row.state[0], &origin_operand = row.old_param;
  // What was just read is written where it lies; what was not is staged and streamed.
  const bool was_read = out.data == left_operand.data || out.data == right_operand.data || out.data == origin_operand.data;
  Lanes lanes;
  for_each_block(span, [&](int64_t begin, int count) {
    Buffer<T> left_buffer, right_buffer, origin_buffer, result_buffer;
    const T* left = load(left_operand, begin, count, left_buffer);
    const T* right = load(right_operand, begin, count, right_buffer);
    T* result = was_read && args.writes ? target(out, begin, result_buffer) : result_buffer.data;
    if constexpr (kOrigin) {
      const T* origin = load(origin_operand, begin, count, origin_buffer);
#pragma omp simd
      for (int i = 0; i < count; ++i) result[i] = combine<true>(left[i], right[i], origin[i], weights);
    } else {
#pragma omp simd
      for (int i = 0; i < count; ++i) result[i] = combine<false>(left[i], right[i], T(0), weights);
    }
    add_squares(result, count, false, lanes);
    if (args.writes) store(out, begin, count, result, args.streaming && !was_read);
  });
  stream_fence();
  return total(lanes);
}

template <class T>
static double choose_combine(const Row& row, Span span, const CombineArgs& args) {
  return row.old_param.data == nullptr ? combine_chunk<false, T>(row, span, args) : combine_chunk<true, T>(row, span, args);
}

double combine(const Row& row, Span span, const CombineArgs& args) {
  return has_float64(row) ? choose_combine<double>(row, span, args) : choose_combine<float>(row, span, args);
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
