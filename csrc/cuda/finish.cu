// The second stage of norms in a launch of its own, a block a norm: of several norms, or of lists without elements, which have no last
// block.
#include "cuda/finish.cuh"

namespace sam::cuda {
namespace {

constexpr int kMostNorms = 64;  // of a launch, whose arguments hold their bounds

struct Norms : FinishOptions {
  uint32_t bounds[kMostNorms + 1];
};

#if defined(SAM_CUDA_ON_HOST)

void launch_norms(const Norms& norms, unsigned count, const Place&) {
  ++on_host().launches;
  for (unsigned norm = 0; norm < count; ++norm) {
    double partials[kThreads];
    for (int thread = 0; thread < kThreads; ++thread) {
      partials[thread] = sum_of(norms.sums, norms.bounds[norm], norms.bounds[norm + 1], thread);
    }
    store_result(norms, block_sum_on_host(partials), static_cast<int>(norm));
  }
}

#else

__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ Norms norms) {
  const int norm = static_cast<int>(blockIdx.x);
  const double sum = block_sum(sum_of(norms.sums, norms.bounds[norm], norms.bounds[norm + 1], static_cast<int>(threadIdx.x)));
  if (threadIdx.x == 0) store_result(norms, sum, norm);
}

void launch_norms(const Norms& norms, unsigned count, const Place& place) {
  void* arguments[] = {const_cast<Norms*>(&norms)};
  launch_kernel(reinterpret_cast<const void*>(&finish_kernel), count, kThreads, arguments, place);
}

#endif

}  // namespace

std::vector<uint32_t> chunk_counts(const std::vector<int64_t>& numels, const std::vector<int64_t>* slice_sizes) {
  if (slice_sizes != nullptr) check_slices(numels, *slice_sizes);
  const int most = chunk_size_of(numels);
  std::vector<uint32_t> counts;
  counts.reserve(numels.size());
  for (std::size_t i = 0; i < numels.size(); ++i) {
    const int64_t chunk_size = whole_slices(slice_sizes == nullptr ? 0 : (*slice_sizes)[i], most);
    counts.push_back(static_cast<uint32_t>((numels[i] + chunk_size - 1) / chunk_size));
  }
  return counts;
}

void finish_norms(const FinishOptions& options, const std::vector<uint32_t>& bounds, const Place& place) {
  Norms norms{options, {}};
  const std::size_t count = bounds.size() - 1;
  for (std::size_t first = 0; first < count; first += kMostNorms) {
    const std::size_t here = count - first < kMostNorms ? count - first : kMostNorms;
    for (std::size_t i = 0; i <= here; ++i) norms.bounds[i] = bounds[first + i];
    norms.norms = static_cast<char*>(options.norms) + first * (options.is_double ? sizeof(double) : sizeof(float));
    launch_norms(norms, static_cast<unsigned>(here), place);
  }
}

}  // namespace sam::cuda
