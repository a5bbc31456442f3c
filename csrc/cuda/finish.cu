// The second stage of a norm: a block a norm adds up the sums of its chunks, in a fixed order, and takes the root. And the step's
// beginning: what the last one's found_inf was is counted.
#include "cuda/operations.h"
#include "cuda/reduce.cuh"

namespace sam::cuda {
namespace {

constexpr int kMostNorms = 64;  // of a launch, whose arguments hold their bounds

struct Norms : FinishOptions {
  uint32_t bounds[kMostNorms + 1];
};

SAM_INLINE double sum_of(const Norms& n, int norm, int thread) {
  double sum = 0.0;
  for (uint32_t i = n.bounds[norm] + static_cast<uint32_t>(thread); i < n.bounds[norm + 1]; i += kThreads) sum += n.sums[i];
  return sum;
}

SAM_INLINE void store(const Norms& n, int norm, double sum) {
  const double root = std::sqrt(sum);
  bool finite;
  if (n.is_double) {
    static_cast<double*>(n.norms)[norm] = root;
    finite = is_finite(root);
  } else {
    const float rounded = static_cast<float>(root);
    static_cast<float*>(n.norms)[norm] = rounded;
    finite = is_finite(rounded);
  }
  if (n.found_inf == nullptr) return;
  if (n.skipped != nullptr) {
    *n.skipped += *n.found_inf;
    *n.found_inf = finite ? 0.0f : 1.0f;
  } else if (!finite) {
    *n.found_inf = 1.0f;
  }
}

#if defined(SAM_CUDA_ON_HOST)

void launch_norms(const Norms& norms, unsigned count, const Place&) {
  for (unsigned norm = 0; norm < count; ++norm) {
    double partials[kThreads];
    for (int thread = 0; thread < kThreads; ++thread) partials[thread] = sum_of(norms, static_cast<int>(norm), thread);
    store(norms, static_cast<int>(norm), block_sum_on_host(partials));
  }
}

#else

__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ Norms norms) {
  const int norm = static_cast<int>(blockIdx.x);
  const double sum = block_sum(sum_of(norms, norm, static_cast<int>(threadIdx.x)));
  if (threadIdx.x == 0) store(norms, norm, sum);
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
