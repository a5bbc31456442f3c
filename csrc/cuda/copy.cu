// One list to another, bit for bit where the types agree. Reads one, writes the other: 2 N s bytes.
#include "cuda/launch.cuh"
#include "cuda/operations.h"

namespace sam::cuda {
namespace {

template <class A>
struct Copy {
  using Access = A;
  using Options = NoOptions;
  static constexpr int kRoles = kCopyRoles, kBlocks = A::kBlocks;
  static constexpr bool kSums = false, kBackwards = false;

  SAM_INLINE explicit Copy(const Options&) {}

  SAM_INLINE void apply(const Piece<kRoles>& piece, int thread) const {
    copy_chunk<A>(piece, piece.operands[kSource], piece.operands[kDestination], thread);
  }
};

}  // namespace

void copy(const RowLists<kCopyRoles>& lists, const NoOptions& options, const Place& place) { run<Copy>(lists, options, place); }

}  // namespace sam::cuda
