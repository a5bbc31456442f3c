// Sums of l^2, l d and d^2 of one chunk, d = r - o, or r where there is no o. Reads l, r (and o): 2 N s bytes (3 N s).
#include "cpu/squares.h"

namespace sam::cpu {
inline namespace SAM_ISA {

struct DotLanes {
  Lanes left, product, right;
};

template <class T>
static inline void add_dots(const T* left, const T* right, int count, bool prefetches, DotLanes& lanes) {
  const auto begin = [&](int i) {
    if (prefetches) prefetch_lanes(left + i), prefetch_lanes(right + i);
  };
  for_each_lane(count, begin, [&](int i, int lane) {
    lanes.left.sum[lane] += norm_term(left[i]);
    lanes.product.sum[lane] += dot_term(left[i], right[i]);
    lanes.right.sum[lane] += norm_term(right[i]);
  });
}

template <class T>
static Dots dots_chunk(const Row& row, Span span) {
  const bool has_origin = row[kDotsOrigin].data != nullptr;
  const bool in_place = row[kDotsLeft].dtype == kArithmetic<T> && row[kDotsRight].dtype == kArithmetic<T> && !has_origin;
  DotLanes lanes;
  for_each_block(span, [&](int64_t begin, int count) {
    Buffer<T> left_buffer, right_buffer, origin_buffer, difference;
    const T* left = load(row[kDotsLeft], begin, count, left_buffer, !in_place);
    const T* right = load(row[kDotsRight], begin, count, right_buffer, !in_place);
    if (has_origin) {
      const T* origin = load(row[kDotsOrigin], begin, count, origin_buffer);
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
