// A weighted sum of two or three lists, and the sum of squares of the result before it is rounded to storage. Reads l, r (and o); writes
// out, which may be any of them: 3 N s bytes (4 N s).
#include "cpu/squares.h"

namespace sam::cpu {
inline namespace SAM_ISA {

template <bool kOrigin, class T>
static double combine_chunk(const Row& row, Span span, const Combine& options, bool streams) {
  const CombineWeights<T> weights = combine_weights<T>(options);
  const bool writes = options.found_inf == 0.0;
  const auto is_out = [&](int role) { return row[role].data == row[kCombineOut].data; };
  // What was just read is written where it lies; what was not is staged and streamed.
  const bool was_read = is_out(kCombineLeft) || is_out(kCombineRight) || is_out(kCombineOrigin);
  Lanes lanes;
  for_each_block(span, [&](int64_t begin, int count) {
    Buffer<T> left_buffer, right_buffer, origin_buffer, result_buffer;
    const T* left = load(row[kCombineLeft], begin, count, left_buffer);
    const T* right = load(row[kCombineRight], begin, count, right_buffer);
    T* result = was_read && writes ? target(row[kCombineOut], begin, result_buffer) : result_buffer.data;
    if constexpr (kOrigin) {
      const T* origin = load(row[kCombineOrigin], begin, count, origin_buffer);
#pragma omp simd
      for (int i = 0; i < count; ++i) result[i] = combine<true>(left[i], right[i], origin[i], weights);
    } else {
#pragma omp simd
      for (int i = 0; i < count; ++i) result[i] = combine<false>(left[i], right[i], T(0), weights);
    }
    add_squares(result, count, false, lanes);
    if (writes) store(row[kCombineOut], begin, count, result, streams && !was_read);
  });
  stream_fence();
  return total(lanes);
}

template <class T>
static double choose_combine(const Row& row, Span span, const Combine& options, bool streams) {
  return row[kCombineOrigin].data == nullptr ? combine_chunk<false, T>(row, span, options, streams)
                                             : combine_chunk<true, T>(row, span, options, streams);
}

double combine(const Row& row, Span span, const Combine& options, bool streams) {
  return has_float64(row) ? choose_combine<double>(row, span, options, streams) : choose_combine<float>(row, span, options, streams);
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
