// A moving average of gradients and the sum of squares of the direction made with it, |d|^2 or |T_w d|^2. Reads g, m (and p when adaptive);
// writes m: 3 N s bytes. Sums are float64: m is written in the same pass, so no thread could read its elements again as in norm.cu.
#include "cuda/launch.cuh"
#include "cuda/operations.h"

namespace sam::cuda {
namespace {

template <class A>
struct SumDirection {
  using Access = A;
  using T = typename A::Arithmetic;
  using Options = DirectionLaunch;
  static constexpr int kRoles = kDirectionRoles, kBlocks = 2;
  static constexpr bool kSums = true, kBackwards = false;

  bool is_friendly, first_step;
  Scaling<double> scaling;
  DirectionConstants<T> constants;

  SAM_INLINE explicit SumDirection(const Options& o)
      : is_friendly(o.options.is_friendly),
        first_step(o.options.first_step),
        scaling(o.options.scaling),
        constants(direction_constants<T>(o.options)) {}

  SAM_INLINE double sum(const Piece<kRoles>& piece, int thread) const {
    if (first_step) return sum_of<Direction::kVasso, true>(piece, thread);  // the gradient itself, for both
    return is_friendly ? sum_of<Direction::kFriendly, false>(piece, thread) : sum_of<Direction::kVasso, false>(piece, thread);
  }

 private:
  template <Direction kDirection, bool kFirst>
  SAM_INLINE double sum_of(const Piece<kRoles>& piece, int thread) const {
    const Operand grad = piece.operands[kDirectionGrad], ema = piece.operands[kDirectionEma], param = piece.operands[kDirectionParam];
    double total = 0.0;
    for_each_pack<A>(piece, thread, [&](auto width, int i) {
      constexpr int kCount = decltype(width)::value;
      const auto g = load<A, kCount>(grad, i);
      typename A::template Values<kCount> m{}, p{};
      if constexpr (!kFirst) m = load<A, kCount>(ema, i);
      if (scaling.is_adaptive) p = load<A, kCount>(param, i);
      SAM_UNROLL
      for (int j = 0; j < kCount; ++j) {
        const double d = update_direction<kDirection, kFirst>(g.data[j], m.data[j], constants);
        total += norm_term(p.data[j], d, scaling);
      }
      store<A, kCount>(ema, i, m);
    });
    return total;
  }
};

}  // namespace

bool sum_direction(const RowLists<kDirectionRoles>& lists, const DirectionLaunch& options, const Place& place) {
  return run<SumDirection>(lists, options, place);
}

}  // namespace sam::cuda
