// Restore and torch.optim.Adam / AdamW in one pass. Reads old_p, g, m, v; writes p, m, v: 7 N s bytes. Without old_param: in place. to_old:
// writes old_p too. Where it is skipped parameters are restored and nothing else happens.
#include "cuda/launch.cuh"
#include "cuda/operations.h"
#include "cuda/update.cuh"

namespace sam::cuda {
namespace {

template <class A, bool kVariant>
struct Adam {
  using Access = A;
  using T = typename A::Arithmetic;
  using Options = AdamLaunch;
  static constexpr int kRoles = kAdamRoles, kBlocks = kVariant || std::is_same_v<T, double> ? 1 : 2;
  static constexpr bool kSums = false, kBackwards = true;

  bool skipped;
  Decay decay;
  const double* corrections;
  AdamConstants<T> constants;  // but for the corrections, which are each row's own
  UpdateTarget<kVariant> target;

  SAM_INLINE explicit Adam(const Options& o)
      : skipped(is_skipped(o.options.update.step)),
        decay(decay_of(o.options)),
        corrections(o.corrections),
        constants(adam_constants<T>(o.options, {})),
        target(o.options.update) {}

  SAM_INLINE void apply(const Piece<kRoles>& piece, int thread) const {
    if (skipped) {
      if (piece.operands[kOldParam].data != nullptr) copy_chunk<A>(piece, piece.operands[kOldParam], piece.operands[kParam], thread);
      return;
    }
    AdamConstants<T> mine = constants;
    mine.step_size = T(corrections[2 * piece.tag]);
    mine.inv_sqrt_correction = T(corrections[2 * piece.tag + 1]);
    switch (decay) {
      case Decay::kNone: update<Decay::kNone>(piece, thread, mine); break;
      case Decay::kL2: update<Decay::kL2>(piece, thread, mine); break;
      case Decay::kDecoupled: update<Decay::kDecoupled>(piece, thread, mine); break;
    }
  }

 private:
  template <Decay kDecay>
  struct Step {
    Operand grad, exp_avg, exp_avg_sq;
    const AdamConstants<T>& constants;

    template <int kCount>
    SAM_INLINE typename A::template Values<kCount> make(const Operand& source, int i) const {
      const auto g = load<A, kCount>(grad, i);
      auto p = load<A, kCount>(source, i), m = load<A, kCount>(exp_avg, i), v = load<A, kCount>(exp_avg_sq, i);
      SAM_UNROLL
      for (int j = 0; j < kCount; ++j) p.data[j] = adamw_step<kDecay>(p.data[j], g.data[j], m.data[j], v.data[j], constants);
      store<A, kCount>(exp_avg, i, m);
      store<A, kCount>(exp_avg_sq, i, v);
      return p;
    }
  };

  template <Decay kDecay>
  SAM_INLINE void update(const Piece<kRoles>& piece, int thread, const AdamConstants<T>& mine) const {
    const Step<kDecay> step{piece.operands[kGrad], piece.operands[kExpAvg], piece.operands[kExpAvgSq], mine};
    update_weights<A>(piece, thread, target, step);
  }
};

template <class A>
using Ordinary = Adam<A, false>;
template <class A>
using Variant = Adam<A, A::kHasBFloat16>;

}  // namespace

void adamw(const RowLists<kAdamRoles>& lists, const AdamLaunch& options, const Place& place) {
  is_variant(options.options.update) ? run<Variant>(lists, options, place) : run<Ordinary>(lists, options, place);
}

}  // namespace sam::cuda
