// The second stage of norms in a launch of its own, a block a norm: of several norms, or of lists without elements, which have no last
// block.
#include "cuda/finish.cuh"

namespace sam::cuda {
namespace {

constexpr int kMostNorms = 64;  // of a launch, whose arguments hold their bounds

struct Norms : FinishOptions {
  uint32_t bounds[kMostNorms + 1];
};

struct FinishNorms {
  using Options = Norms;
  static SAM_BLOCK void run(const Norms& norms, int64_t norm) {
    finish_sums(norms, norms.bounds[norm], norms.bounds[norm + 1], static_cast<int>(norm));
  }
};

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
    launch_blocks<FinishNorms>(norms, static_cast<int64_t>(here), place);
  }
}

}  // namespace sam::cuda
