// The ascent as few ask for it: along a direction made with a moving average m, stored with stochastic rounding, or both. Reads p, g, m;
// writes old_p, p. Beside the ordinary pass, not in it, so that one keeps its registers.
#include "cuda/launch.cuh"
#include "cuda/operations.h"
#include "cuda/stochastic.cuh"

namespace sam::cuda {
namespace {

template <class A>
struct PerturbAlong {
  using Access = A;
  using T = typename A::Arithmetic;
  using Options = PerturbVariantOptions<Scalar>;
  static constexpr int kRoles = kPerturbVariantRoles, kBlocks = A::kHasBFloat16 ? 1 : 2;  // 1: as random.cu
  static constexpr bool kSums = false, kBackwards = true;

  bool skipped, from_old, is_stochastic, uses_grad;
  T scale, direction_scale, grad_weight, ema_weight;  // direction_scale: where there is an m, which is unscaled, and so is its norm
  Scaling<T> scaling;
  RandomSeed seed;

  SAM_INLINE explicit PerturbAlong(const Options& o)
      : skipped(is_skipped(o.ascent.step)),
        from_old(o.ascent.from_old),
        is_stochastic(o.is_stochastic),
        uses_grad(o.grad_weight != 0.0),
        scale(T(perturb_scale(o.ascent, inverse_of(o.ascent.step.grad_scale)))),
        direction_scale(T(perturb_scale(o.ascent, 1.0))),
        grad_weight(T(o.grad_weight * inverse_of(o.ascent.step.grad_scale))),
        ema_weight(T(o.ema_weight)),
        scaling(o.ascent.scaling.as<T>()),
        seed(o.seed) {}

  SAM_INLINE void apply(const Piece<kRoles>& piece, int thread) const {
    const Operand param = piece.operands[kParam], old_param = piece.operands[kOldParam];
    const Operand source = choose(from_old, old_param, param);
    if (skipped) {
      copy_chunk<A>(piece, source, choose(from_old, param, old_param), thread);
    } else if (A::kHasBFloat16 && is_stochastic && param.dtype == DType::kBFloat16) {
      for_each_tile<A>(piece, thread, [&](auto width, int begin, int lane, int count) {
        move_tile<decltype(width)::value>(piece, source, begin, lane, count);
      });
    } else {
      for_each_pack<A>(piece, thread, [&](auto width, int i) {
        constexpr int kCount = decltype(width)::value;
        store<A, kCount>(param, i, moved<kCount>(piece, source, i));
      });
    }
  }

 private:
  // Saves the parameter and returns where it goes.
  template <int kCount>
  SAM_INLINE typename A::template Values<kCount> moved(const Piece<kRoles>& piece, const Operand& source, int i) const {
    const Operand grad = piece.operands[kGrad], ema = piece.operands[kEma];
    typename A::template Values<kCount> d{}, m{};
    const bool has_ema = ema.data != nullptr;
    if (!has_ema || uses_grad) d = load<A, kCount>(grad, i);
    if (has_ema) {
      m = load<A, kCount>(ema, i);
      SAM_UNROLL
      for (int j = 0; j < kCount; ++j) {
        const T along_ema = m.data[j] * ema_weight;
        d.data[j] = uses_grad ? d.data[j] * grad_weight + along_ema : along_ema;  // not multiplied by 0: it may not be finite
      }
    }
    const auto stored = A::template load_raw<kCount>(source, i);
    if (!from_old) A::template copy<kCount>(piece.operands[kParam], piece.operands[kOldParam], i, stored);
    auto p = A::template values<kCount>(stored);
    const T s = has_ema ? direction_scale : scale;
    SAM_UNROLL
    for (int j = 0; j < kCount; ++j) p.data[j] = sam::perturb(p.data[j], d.data[j], s, scaling);
    return p;
  }

  template <int kCount>
  SAM_INLINE void move_tile(const Piece<kRoles>& piece, const Operand& source, int begin, int lane, int count) const {
    const auto words = rounding_words<kCount>(first_counter(piece.begin + begin) + static_cast<uint64_t>(lane), seed, piece.tag);
    SAM_UNROLL
    for (int word = 0; word < kWords; ++word) {
      const int i = begin + lane + word * kTileLanes;
      if (kCount == 1 && i >= count) break;
      store_stochastic<kCount>(piece.operands[kParam], i, moved<kCount>(piece, source, i).data, words.of[word]);
    }
  }
};

}  // namespace

void perturb_variant(const RowLists<kPerturbVariantRoles>& lists, const PerturbVariantOptions<Scalar>& options, const Place& place) {
  run<PerturbAlong>(lists, options, place);
}

}  // namespace sam::cuda
