// The second stage of inner products in a launch of its own, of one block: of lists without elements, which have no last block.
#include "cuda/finish.cuh"

namespace sam::cuda {
namespace {

struct FinishDots {
  using Options = FinishDotsOptions;
  static SAM_BLOCK void run(const Options& options, int64_t) { finish_sums(options, 0, options.count, 0); }
};

}  // namespace

void finish_dots(const FinishDotsOptions& options, const Place& place) { launch_blocks<FinishDots>(options, 1, place); }

}  // namespace sam::cuda
