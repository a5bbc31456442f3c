// Sum of squares of one chunk of a gradient, |g|^2 or |T_w g|^2. Reads g (and p when adaptive): 1 N s bytes.
// The order of the additions is fixed: kLanes running sums in double, then a pairwise tree. It depends on neither the instruction set nor
// the number of threads.
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
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes.sum[lane] += lanes.sum[lane + width];
  }
  return lanes.sum[0];
}

double norm(const Row& row, Span span, const NormArgs& args) {
  return has_float64(row) ? norm_chunk<double>(row, span, args) : norm_chunk<float>(row, span, args);
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
