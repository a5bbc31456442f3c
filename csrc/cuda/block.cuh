// What the threads of one block do together, phase by phase, with what they share: one source for device and host.
#pragma once

#include "common/bits.h"
#include "cuda/config.h"

namespace sam::cuda {

// body(thread) for every thread of the block; all are through when this returns.
template <class Body>
SAM_INLINE void all_threads(Body body) {
#if defined(__CUDA_ARCH__)
  body(static_cast<int>(threadIdx.x));
  __syncthreads();
#else
  for (int thread = 0; thread < kThreads; ++thread) body(thread);
#endif
}

using Values = double[kThreads];  // one a thread

// The values put together, halves with halves; known to every thread. They are overwritten.
template <class Combine>
SAM_INLINE double reduce(Values& values, Combine combine) {
  for (int half = kThreads / 2; half > 0; half /= 2) {
    all_threads([&](int thread) {
      if (thread < half) values[thread] = combine(values[thread], values[thread + half]);
    });
  }
  const double result = values[0];
  all_threads([](int) {});  // what comes next may write where this was read
  return result;
}

// Each value becomes the sum of those up to it.
SAM_INLINE void scan(Values& values, Values& scratch) {
  for (int offset = 1; offset < kThreads; offset *= 2) {
    all_threads([&](int thread) { scratch[thread] = thread < offset ? values[thread] : values[thread - offset] + values[thread]; });
    all_threads([&](int thread) { values[thread] = scratch[thread]; });
  }
}

}  // namespace sam::cuda
