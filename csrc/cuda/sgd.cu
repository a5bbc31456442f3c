// Restore and torch.optim.SGD in one pass. Reads old_p, g, m; writes p, m: 5 N s bytes. Without old_param the step is made in place.
// to_old: writes old_p too. Where it is skipped parameters are restored and nothing else happens.
#include "cuda/launch.cuh"
#include "cuda/operations.h"
#include "cuda/update.cuh"

namespace sam::cuda {
namespace {

template <class A, bool kVariant>
struct Sgd {
  using Access = A;
  using T = typename A::Arithmetic;
  using Options = SgdOptions<Scalar>;
  static constexpr int kRoles = kSgdRoles;
  // 1536 threads where two results of eight elements are float until they are paired, or the architecture needs more registers for the
  // same: with fewer they would spill. Variants: as perturb_variant.cu.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
  static constexpr int kBlocks = kVariant ? 1 : A::kBlocks == 4 ? 3 : A::kBlocks;
#else
  static constexpr int kBlocks = kVariant ? 1 : A::kWidth == 8 ? 3 : A::kBlocks;
#endif
  static constexpr bool kSums = false, kBackwards = true;

  bool skipped, nesterov, first_step, decays;
  SgdConstants<T> constants;
  UpdateTarget<kVariant> target;

  SAM_INLINE explicit Sgd(const Options& o)
      : skipped(is_skipped(o.update.step)),
        nesterov(o.nesterov),
        first_step(o.first_step),
        decays(o.update.weight_decay != 0.0),
        constants(sgd_constants<T>(o)),
        target(o.update) {}

  SAM_INLINE void apply(const Piece<kRoles>& piece, int thread) const {
    const bool has_buffer = piece.operands[kBuffer].data != nullptr;
    if (skipped) {
      if (piece.operands[kOldParam].data != nullptr) copy_chunk<A>(piece, piece.operands[kOldParam], piece.operands[kParam], thread);
    } else if constexpr (kVariant && A::kHasMasters) {
      const Momentum momentum =
          nesterov ? (first_step ? Momentum::kFirstNesterov : Momentum::kNesterov) : (first_step ? Momentum::kFirst : Momentum::kPlain);
      update(piece, thread, Chosen{has_buffer ? momentum : Momentum::kNone, decays});
    } else if (!has_buffer) {
      choose_decay<Momentum::kNone>(piece, thread);
    } else if (nesterov) {
      first_step ? choose_decay<Momentum::kFirstNesterov>(piece, thread) : choose_decay<Momentum::kNesterov>(piece, thread);
    } else {
      first_step ? choose_decay<Momentum::kFirst>(piece, thread) : choose_decay<Momentum::kPlain>(piece, thread);
    }
  }

 private:
  // The form of the step: compiled in, or, where loops for each form would be more code than nvcc inlines, read at run time.
  template <Momentum kMomentum, bool kDecays>
  struct Fixed {
    static constexpr Momentum momentum = kMomentum;
    static constexpr bool decays = kDecays;
  };
  struct Chosen {
    Momentum momentum;
    bool decays;
  };

  template <class Form>
  struct Step {
    Operand grad, buffer;
    const SgdConstants<T>& constants;
    Form form;

    template <int kCount>
    SAM_INLINE typename A::template Values<kCount> make(const Operand& source, int i) const {
      const auto g = load<A, kCount>(grad, i);
      auto p = load<A, kCount>(source, i);
      typename A::template Values<kCount> m{};
      if (form.momentum == Momentum::kPlain || form.momentum == Momentum::kNesterov) m = load<A, kCount>(buffer, i);
      SAM_UNROLL
      for (int j = 0; j < kCount; ++j) p.data[j] = sgd_step(form.momentum, form.decays, p.data[j], g.data[j], m.data[j], constants);
      if (form.momentum != Momentum::kNone) store<A, kCount>(buffer, i, m);
      return p;
    }
  };

  template <Momentum kMomentum>
  SAM_INLINE void choose_decay(const Piece<kRoles>& piece, int thread) const {
    decays ? update(piece, thread, Fixed<kMomentum, true>{}) : update(piece, thread, Fixed<kMomentum, false>{});
  }

  template <class Form>
  SAM_INLINE void update(const Piece<kRoles>& piece, int thread, Form form) const {
    update_weights<A>(piece, thread, target, Step<Form>{piece.operands[kGrad], piece.operands[kBuffer], constants, form});
  }
};

template <class A>
using Ordinary = Sgd<A, false>;
template <class A>
using Variant = Sgd<A, A::kHasBFloat16>;

}  // namespace

void sgd(const RowLists<kSgdRoles>& lists, const SgdOptions<Scalar>& options, const Place& place) {
  is_variant(options.update) ? run<Variant>(lists, options, place) : run<Ordinary>(lists, options, place);
}

}  // namespace sam::cuda
