// The sum of a block's partial sums, in one order whatever runs it: halves of a warp, then halves of the warps. No atomics.
#pragma once

#include "cuda/config.h"

namespace sam::cuda {

constexpr int kWarp = 32, kWarps = kThreads / kWarp;

#if defined(__CUDACC__)

// The sum, in thread 0 alone. All threads of the block call it; two calls may follow each other.
__device__ inline double block_sum(double partial) {
  __shared__ double warp_sums[kWarps];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) partial += __shfl_down_sync(0xFFFFFFFFu, partial, offset);
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  if (lane == 0) warp_sums[warp] = partial;
  __syncthreads();
  double sum = 0;
  if (warp == 0) {
    sum = lane < kWarps ? warp_sums[lane] : 0.0;
    for (int offset = kWarps / 2; offset > 0; offset /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, offset);
  }
  __syncthreads();  // the next sum writes where this one reads
  return sum;
}

#endif

// The same on the host. partials: (kThreads,), overwritten.
inline double block_sum_on_host(double* partials) {
  for (int warp = 0; warp < kWarps; ++warp) {
    double* lanes = partials + warp * kWarp;
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

}  // namespace sam::cuda
