// The ascent: saves the parameter and moves it along its gradient. Reads p, g; writes old_p, p: 4 N s bytes (from_old: reads old_p, g;
// writes p: 3 N s). A skipped one only saves (from_old: restores).
#include "cuda/launch.cuh"
#include "cuda/operations.h"

namespace sam::cuda {
namespace {

template <class A>
struct Perturb {
  using Access = A;
  using T = typename A::Arithmetic;
  using Options = PerturbOptions<Scalar>;
  static constexpr int kRoles = kPerturbRoles, kBlocks = A::kBlocks;
  static constexpr bool kSums = false, kBackwards = true;

  bool skipped, from_old;
  T scale;
  Scaling<T> scaling;

  SAM_INLINE explicit Perturb(const Options& o)
      : skipped(is_skipped(o.step)),
        from_old(o.from_old),
        scale(T(perturb_scale(o, inverse_of(o.step.grad_scale)))),
        scaling(o.scaling.as<T>()) {}

  SAM_INLINE void apply(const Piece<kRoles>& piece, int thread) const {
    const Operand param = piece.operands[kParam], grad = piece.operands[kGrad], old_param = piece.operands[kOldParam];
    const Operand source = choose(from_old, old_param, param);
    if (skipped) {
      copy_chunk<A>(piece, source, choose(from_old, param, old_param), thread);
      return;
    }
    for_each_pack<A>(piece, thread, [&](auto width, int i) {
      constexpr int kCount = decltype(width)::value;
      const auto g = load<A, kCount>(grad, i);
      const auto stored = A::template load_raw<kCount>(source, i);
      if (!from_old) A::template copy<kCount>(param, old_param, i, stored);
      auto p = A::template values<kCount>(stored);
      SAM_UNROLL
      for (int j = 0; j < kCount; ++j) p.data[j] = sam::perturb(p.data[j], g.data[j], scale, scaling);
      store<A, kCount>(param, i, p);
    });
  }
};

}  // namespace

void perturb(const RowLists<kPerturbRoles>& lists, const PerturbOptions<Scalar>& options, const Place& place) {
  run<Perturb>(lists, options, place);
}

}  // namespace sam::cuda
