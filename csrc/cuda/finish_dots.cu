// The second stage of inner products: one block adds up what its chunks have, in a fixed order.
#include "cuda/operations.h"
#include "cuda/reduce.cuh"

namespace sam::cuda {
namespace {

SAM_INLINE Dots sum_of(const FinishDotsOptions& o, int thread) {
  Dots sum{0.0, 0.0, 0.0};
  for (uint32_t i = static_cast<uint32_t>(thread); i < o.count; i += kThreads) sum += o.sums[i];
  return sum;
}

SAM_INLINE void store(const FinishDotsOptions& o, const Dots& sum) {
  *o.dots = sum;
  const bool finite = is_finite(sum.left) && is_finite(sum.product) && is_finite(sum.right);
  if (o.found_inf != nullptr && !finite) *o.found_inf = 1.0f;
}

}  // namespace

#if defined(SAM_CUDA_ON_HOST)

void finish_dots(const FinishDotsOptions& options, const Place&) {
  Dots partials[kThreads];
  for (int thread = 0; thread < kThreads; ++thread) partials[thread] = sum_of(options, thread);
  store(options, block_sum_on_host(partials));
}

#else

namespace {

__global__ void __launch_bounds__(kThreads) finish_dots_kernel(const __grid_constant__ FinishDotsOptions options) {
  const Dots sum = block_sum(sum_of(options, static_cast<int>(threadIdx.x)));
  if (threadIdx.x == 0) store(options, sum);
}

}  // namespace

void finish_dots(const FinishDotsOptions& options, const Place& place) {
  void* arguments[] = {const_cast<FinishDotsOptions*>(&options)};
  launch_kernel(reinterpret_cast<const void*>(&finish_dots_kernel), 1, kThreads, arguments, place);
}

#endif

}  // namespace sam::cuda
