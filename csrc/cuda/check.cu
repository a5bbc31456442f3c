// Whether every element of the gradients is finite. Reads g: 1 N s bytes.
#include "cuda/launch.cuh"
#include "cuda/operations.h"

namespace sam::cuda {
namespace {

template <class A>
struct CheckFinite {
  using Access = A;
  using T = typename A::Arithmetic;
  using Options = CheckOptions;
  static constexpr int kRoles = 1, kBlocks = A::kBlocks;
  static constexpr bool kSums = false, kBackwards = false;

  float* found_inf;

  SAM_INLINE explicit CheckFinite(const Options& o) : found_inf(o.found_inf) {}

  SAM_INLINE void apply(const Piece<kRoles>& piece, int thread) const {
    constexpr int kWidth = A::kWidth;
    T zeros[kWidth] = {};  // of finite elements; NaN once there was another
    for_each_pack<A, 4>(piece, thread, [&](auto width, int i) {
      constexpr int kCount = decltype(width)::value;
      const auto g = load<A, kCount>(piece.operands[0], i);
      SAM_UNROLL
      for (int j = 0; j < kCount; ++j) zeros[j] += g.data[j] * T(0);
    });
    T sum = 0;
    SAM_UNROLL
    for (int j = 0; j < kWidth; ++j) sum += zeros[j];
    if (sum != T(0)) *found_inf = 1.0f;  // every thread that finds one stores the same
  }
};

}  // namespace

void check_finite(const RowLists<1>& lists, const CheckOptions& options, const Place& place) { run<CheckFinite>(lists, options, place); }

}  // namespace sam::cuda
