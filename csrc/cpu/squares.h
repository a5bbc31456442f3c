// Sums of squares. The order of the additions is fixed: kLanes running sums in double, then a pairwise tree. It depends on neither the
// instruction set nor the number of threads. Included only by files compiled once per instruction set.
#pragma once

#include "cpu/block.h"

namespace sam::cpu {
inline namespace SAM_ISA {

constexpr int kLanes = 32;  // four vectors of eight doubles: enough independent additions to hide their latency

struct Lanes {
  alignas(64) double sum[kLanes] = {};
};

// Calls add(i, lane) for every i < count, in groups of kLanes, and begin(i) before each whole group.
template <class Begin, class Add>
static inline void for_each_lane(int count, Begin begin, Add add) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    begin(i);
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
  }
  for (int lane = 0; i + lane < count; ++lane) add(i + lane, lane);
}

// For for_each_lane. A pass that only reads gains another 10 % when the prefetches are spread over the loop instead of coming a block at a
// time, and as much again when they go to the second-level cache: the first-level's few fill buffers stay free for the loads.
template <class T>
static inline void prefetch_lanes(const T* values) {
  prefetch<2>(reinterpret_cast<const char*>(values), kLanes * sizeof(T));
}

static inline void nothing(int) {}

template <class T>
static inline void add_squares(const T* grad, int count, bool prefetches, Lanes& lanes) {
  const auto begin = [&](int i) {
    if (prefetches) prefetch_lanes(grad + i);
  };
  for_each_lane(count, begin, [&](int i, int lane) { lanes.sum[lane] += norm_term(grad[i]); });
}

// Of g, or of T_w g, w being elements of param from begin on. scaling by value: a sum that is stored cannot change it.
template <class T>
static inline void add_scaled_squares(const Operand& param, int64_t begin, const T* grad, int count, Scaling<double> scaling,
                                      bool prefetches, Lanes& lanes) {
  if (!scaling.is_adaptive) return add_squares(grad, count, prefetches, lanes);
  Buffer<T> buffer;
  const T* values = load(param, begin, count, buffer);
  for_each_lane(count, nothing, [&](int i, int lane) { lanes.sum[lane] += norm_term_adaptive(values[i], grad[i], scaling); });
}

static inline double total(Lanes& lanes) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes.sum[lane] += lanes.sum[lane + width];
  }
  return lanes.sum[0];
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
