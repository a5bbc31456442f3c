// The second stage of inner products in a launch of its own, of one block: of lists without elements, which have no last block.
#include "cuda/finish.cuh"

namespace sam::cuda {
#if defined(SAM_CUDA_ON_HOST)

void finish_dots(const FinishDotsOptions& options, const Place&) {
  ++on_host().launches;
  Dots partials[kThreads];
  for (int thread = 0; thread < kThreads; ++thread) partials[thread] = sum_of(options.sums, 0, options.count, thread);
  store_result(options, block_sum_on_host(partials));
}

#else

namespace {

__global__ void __launch_bounds__(kThreads) finish_dots_kernel(const __grid_constant__ FinishDotsOptions options) {
  const Dots sum = block_sum(sum_of(options.sums, 0, options.count, static_cast<int>(threadIdx.x)));
  if (threadIdx.x == 0) store_result(options, sum);
}

}  // namespace

void finish_dots(const FinishDotsOptions& options, const Place& place) {
  void* arguments[] = {const_cast<FinishDotsOptions*>(&options)};
  launch_kernel(reinterpret_cast<const void*>(&finish_dots_kernel), 1, kThreads, arguments, place);
}

#endif

}  // namespace sam::cuda
