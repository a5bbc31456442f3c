// A gradient less the means of its slices, in place, and the sum of squares of what is left, |g|^2 or |T_w g|^2. Reads g (and p when
// adaptive), writes g: 2 N s bytes.
//
// Centred first, squared then: the difference of two large sums would cancel. A slice longer than a block is read twice, the second time
// from the caches: a chunk of 65,536 elements fits the second level.
#include "cpu/squares.h"

namespace sam::cpu {
inline namespace SAM_ISA {

template <class T>
static inline void add_terms(const T* grad, int count, Lanes& lanes) {
  for_each_lane(count, nothing, [&](int i, int lane) { lanes.sum[lane] += grad[i]; });
}

// In double, of elements in one block. Fewer than kLanes are added one after the other: most of a tree would be zeros.
template <class T>
static inline T mean_of(const T* grad, int count) {
  if (count < kLanes) {
    double sum = 0;
    for (int i = 0; i < count; ++i) sum += grad[i];
    return static_cast<T>(sum / count);
  }
  Lanes lanes;
  add_terms(grad, count, lanes);
  return static_cast<T>(total(lanes) / count);
}

template <class T>
static inline void subtract(const T* grad, int count, T mean, T* target) {
#pragma omp simd
  for (int i = 0; i < count; ++i) target[i] = centralized(grad[i], mean);
}

// As many whole slices as fit a block at a time.
template <class T>
static void centralize_short(const Row& row, Span span, const Scaling<double>& scaling, int64_t slice_size, Lanes& lanes) {
  const int size = static_cast<int>(slice_size), together = kBlock / size * size;
  for (int64_t begin = span.begin; begin < span.end; begin += together) {
    const int count = static_cast<int>(span.end - begin < together ? span.end - begin : together);
    Buffer<T> buffer;
    const T* grad = load(row[kNormGrad], begin, count, buffer);
    T* centred = target(row[kNormGrad], begin, buffer);
    for (int i = 0; i < count; i += size) subtract(grad + i, size, mean_of(grad + i, size), centred + i);
    store(row[kNormGrad], begin, count, centred);
    add_scaled_squares(row[kNormParam], begin, centred, count, scaling, false, lanes);
  }
}

template <class T>
static void centralize_long(const Row& row, Span slice, const Scaling<double>& scaling, int64_t slice_size, Lanes& lanes) {
  Lanes sums;
  Buffer<T> buffer;
  for_each_block(slice, [&](int64_t begin, int count) { add_terms(load(row[kNormGrad], begin, count, buffer), count, sums); });
  const T mean = static_cast<T>(total(sums) / static_cast<double>(slice_size));
  for_each_block(slice, [&](int64_t begin, int count) {
    const T* grad = load(row[kNormGrad], begin, count, buffer, false);
    T* centred = target(row[kNormGrad], begin, buffer);
    subtract(grad, count, mean, centred);
    store(row[kNormGrad], begin, count, centred);
    add_scaled_squares(row[kNormParam], begin, centred, count, scaling, false, lanes);
  });
}

template <class T>
static double centralize_chunk(const Row& row, Span span, const Scaling<double>& scaling, int64_t slice_size) {
  Lanes lanes;
  if (slice_size <= kBlock) {
    centralize_short<T>(row, span, scaling, slice_size, lanes);
  } else {
    for (int64_t begin = span.begin; begin < span.end; begin += slice_size) {
      centralize_long<T>(row, {begin, begin + slice_size}, scaling, slice_size, lanes);
    }
  }
  return total(lanes);
}

double centralize(const Row& row, Span span, const Scaling<double>& scaling, int64_t slice_size) {
  return has_float64(row) ? centralize_chunk<double>(row, span, scaling, slice_size)
                          : centralize_chunk<float>(row, span, scaling, slice_size);
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
