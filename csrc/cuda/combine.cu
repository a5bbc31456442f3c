// A weighted sum of two or three lists, and the sum of squares of each chunk of the result before it is rounded to storage. Reads l, r (and
// o); writes out, which may be any of them: 3 N s bytes (4 N s). Sums are float64: what was read may be written over in the same pass, so
// no thread could read its elements again as in norm.cu.
#include "cuda/launch.cuh"
#include "cuda/operations.h"

namespace sam::cuda {
namespace {

template <class A>
struct Combine {
  using Access = A;
  using T = typename A::Arithmetic;
  using Options = CombineLaunch;
  static constexpr int kRoles = kCombineRoles, kBlocks = 2;
  static constexpr bool kSums = true, kBackwards = true;

  bool writes;
  CombineWeights<T> weights;

  SAM_INLINE explicit Combine(const Options& o) : writes(read(o.options.found_inf) == 0.0), weights(combine_weights<T>(o.options)) {}

  SAM_INLINE double sum(const Piece<kRoles>& piece, int thread) const {
    return piece.operands[kCombineOrigin].data == nullptr ? sum_of<false>(piece, thread) : sum_of<true>(piece, thread);
  }

 private:
  template <bool kOrigin>
  SAM_INLINE double sum_of(const Piece<kRoles>& piece, int thread) const {
    const Operand out = piece.operands[kCombineOut], left = piece.operands[kCombineLeft];
    const Operand right = piece.operands[kCombineRight], origin = piece.operands[kCombineOrigin];
    double total = 0.0;
    for_each_pack<A>(piece, thread, [&](auto width, int i) {
      constexpr int kCount = decltype(width)::value;
      auto values = load<A, kCount>(left, i);
      const auto r = load<A, kCount>(right, i);
      typename A::template Values<kCount> o{};
      if constexpr (kOrigin) o = load<A, kCount>(origin, i);
      SAM_UNROLL
      for (int j = 0; j < kCount; ++j) {
        values.data[j] = sam::combine<kOrigin>(values.data[j], r.data[j], o.data[j], weights);
        total += norm_term(values.data[j]);
      }
      if (writes) store<A, kCount>(out, i, values);
    });
    return total;
  }
};

}  // namespace

bool combine(const RowLists<kCombineRoles>& lists, const CombineLaunch& options, const Place& place) {
  return run<Combine>(lists, options, place);
}

}  // namespace sam::cuda
