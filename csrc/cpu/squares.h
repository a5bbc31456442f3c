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

// A pass that only reads gains another 10 % when the prefetches are spread over the loop instead of coming a block at a time, and as much
// again when they go to the second-level cache: the first-level's few fill buffers stay free for the loads.
template <class T>
static inline void add_squares(const T* grad, int count, bool prefetches, Lanes& lanes) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    if (prefetches) prefetch<2>(reinterpret_cast<const char*>(grad + i), kLanes * sizeof(T));
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) lanes.sum[lane] += norm_term(grad[i + lane]);
  }
  for (int lane = 0; i + lane < count; ++lane) lanes.sum[lane] += norm_term(grad[i + lane]);
}

template <class T>
static inline void add_adaptive_squares(const T* param, const T* grad, int count, double eta, Lanes& lanes) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) lanes.sum[lane] += norm_term_adaptive(param[i + lane], grad[i + lane], eta);
  }
  for (int lane = 0; i + lane < count; ++lane) lanes.sum[lane] += norm_term_adaptive(param[i + lane], grad[i + lane], eta);
}

static inline double total(Lanes& lanes) {
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes.sum[lane] += lanes.sum[lane + width];
  }
  return lanes.sum[0];
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
