// Sums of l^2, l d and d^2 of one chunk, d = r - o, or r where there is no o. Reads l, r (and o): 2 N s bytes (3 N s).
#include "cpu/squares.h"

namespace sam::cpu {
inline namespace SAM_ISA {

struct DotLanes {
  Lanes left, product, right;
};

static inline void add_terms(double left, double right, int lane, DotLanes& lanes) {
  lanes.left.sum[lane] += norm_term(left);
  lanes.product.sum[lane] += dot_term(left, right);
  lanes.right.sum[lane] += norm_term(right);
}

template <class T>
static inline void add_dots(const T* left, const T* right, int count, bool prefetches, DotLanes& lanes) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    if (prefetches) {  // spread over the loop, as those of add_squares
      prefetch<2>(reinterpret_cast<const char*>(left + i), kLanes * sizeof(T));
      prefetch<2>(reinterpret_cast<const char*>(right + i), kLanes * sizeof(T));
    }
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) add_terms(left[i + lane], right[i + lane], lane, lanes);
  }
  for (int lane = 0; i + lane < count; ++lane) add_terms(left[i + lane], right[i + lane], lane, lanes);
}

template <class T>
static Dots dots_chunk(const Row& row, Span span) {
  const bool has_origin = row.old_param.data != nullptr;
  const bool in_place = row.grad.dtype == kArithmetic<T> && row.state[0].dtype == kArithmetic<T> && !has_origin;
  DotLanes lanes;
  for_each_block(span, [&](int64_t begin, int count) {
    Buffer<T> left_buffer, right_buffer, origin_buffer, difference;
    const T* left = load(row.grad, begin, count, left_buffer, !in_place);
    const T* right = load(row.state[0], begin, count, right_buffer, !in_place);
    if (has_origin) {
      const T* origin = load(row.old_param, begin, count, origin_buffer);
#pragma omp simd
      for (int i = 0; i < count; ++i) difference.data[i] = right[i] - origin[i];
      right = difference.data;
    }
    add_dots(left, right, count, in_place, lanes);
  });
  return {total(lanes.left), total(lanes.product), total(lanes.right)};
}

Dots grad_dots(const Row& row, Span span) { return has_float64(row) ? dots_chunk<double>(row, span) : dots_chunk<float>(row, span); }

}  // namespace SAM_ISA
}  // namespace sam::cpu
