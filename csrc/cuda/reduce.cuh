// The sum of a block's partial sums, in one order whatever runs it: halves of a warp, then halves of the warps. No atomics.
#pragma once

#include "common/formulas.h"
#include "cuda/block.cuh"

namespace sam::cuda {

constexpr int kWarp = 32, kWarps = kThreads / kWarp;

// A float32 sum of squares between these has lost nothing that counts: other threads read their elements again in float64.
constexpr float kLeastSquare = 0x1p-100f, kMostSquare = 0x1p100f;

#if defined(__CUDACC__)

__device__ inline double shuffle_down(double value, int offset) { return __shfl_down_sync(0xFFFFFFFFu, value, offset); }

__device__ inline Dots shuffle_down(const Dots& dots, int offset) {
  return {shuffle_down(dots.left, offset), shuffle_down(dots.product, offset), shuffle_down(dots.right, offset)};
}

// In thread 0 alone. Two calls may follow each other.
template <class Sum>
__device__ inline Sum block_sum(Sum partial) {
  __shared__ Sum warp_sums[kWarps];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) partial += shuffle_down(partial, offset);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane == 0) warp_sums[warp] = partial;
  __syncthreads();
  Sum sum{};
  if (warp == 0) {
    if (lane < kWarps) sum = warp_sums[lane];
    for (int offset = kWarps / 2; offset > 0; offset /= 2) sum += shuffle_down(sum, offset);
  }
  __syncthreads();  // the next sum writes where this one reads
  return sum;
}

#endif

// The same on the host. partials: (kThreads,), overwritten.
template <class Sum>
Sum block_sum_on_host(Sum* partials) {
  for (int warp = 0; warp < kWarps; ++warp) {
    Sum* lanes = partials + warp * kWarp;
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      for (int lane = 0; lane < offset; ++lane) lanes[lane] += lanes[lane + offset];
    }
    partials[warp] = lanes[0];
  }
  for (int offset = kWarps / 2; offset > 0; offset /= 2) {
    for (int warp = 0; warp < offset; ++warp) partials[warp] += partials[warp + offset];
  }
  return partials[0];
}

// The sum of part(thread), a double or Dots, over the threads of the block, in thread 0 alone. active: as of each_thread.
template <class Part>
SAM_BLOCK auto sum_of_threads(Part part, [[maybe_unused]] int active = kThreads) {
#if defined(__CUDACC__)
  return block_sum(part(static_cast<int>(threadIdx.x)));
#else
  decltype(part(0)) partials[kThreads] = {};
  for (int thread = 0; thread < active; ++thread) partials[thread] = part(thread);
  return block_sum_on_host(partials);
#endif
}

}  // namespace sam::cuda
