// What the threads of one block do together, phase by phase, with what they share: one source for device and host.
#pragma once

#include "common/bits.h"
#include "cuda/config.h"
#include "cuda/device.h"

// Of functions that all threads of a block call, and of what they share.
#if defined(__CUDACC__)
#define SAM_BLOCK __device__ __forceinline__
#define SAM_SHARED __shared__
#else
#define SAM_BLOCK inline
#define SAM_SHARED
#endif

namespace sam::cuda {

SAM_BLOCK bool is_first_thread() {
#if defined(__CUDACC__)
  return threadIdx.x == 0;
#else
  return true;
#endif
}

// body(thread) for every thread of the block. On the host: for those below active, the others having nothing to do, which saves most of the
// time of small tensors.
template <class Body>
SAM_BLOCK void each_thread([[maybe_unused]] int active, Body body) {
#if defined(__CUDACC__)
  body(static_cast<int>(threadIdx.x));
#else
  for (int thread = 0; thread < active; ++thread) body(thread);
#endif
}

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

// Launches blocks that are not over chunks: Kernel::run(options, block), which all threads of a block call.
#if defined(SAM_CUDA_ON_HOST)

template <class Kernel>
void launch_blocks(const typename Kernel::Options& options, int64_t blocks, const Place&) {
  ++on_host().launches;
  for (int64_t block = 0; block < blocks; ++block) Kernel::run(options, block);
}

#else

template <class Kernel>
__global__ void __launch_bounds__(kThreads) block_kernel(const __grid_constant__ typename Kernel::Options options) {
  Kernel::run(options, blockIdx.x);
}

template <class Kernel>
void launch_blocks(const typename Kernel::Options& options, int64_t blocks, const Place& place) {
  void* arguments[] = {const_cast<typename Kernel::Options*>(&options)};
  launch_kernel(reinterpret_cast<const void*>(&block_kernel<Kernel>), static_cast<unsigned>(blocks), kThreads, arguments, place);
}

#endif

}  // namespace sam::cuda
