// Sum of squares of each chunk of a gradient, |g|^2 or |T_w g|^2. Reads g (and p when adaptive): 1 N s bytes.
//
// A thread adds its squares in float32, sums of threads and of chunks are float64. float32 squares overflow above 1.8e19 and vanish below
// 3.7e-23: a thread whose sum leaves [2^-100, 2^100) reads its elements again, in float64 (in practice never). So only a norm that its
// type cannot hold is infinite.
#include "cuda/launch.cuh"
#include "cuda/operations.h"

namespace sam::cuda {
namespace {

template <class A>
struct SumSquares {
  using Access = A;
  using T = typename A::Arithmetic;
  using Options = NormOptions;
  static constexpr int kRoles = kNormRoles, kBlocks = A::kBlocks;
  static constexpr bool kSums = true, kBackwards = false;

  Scaling<double> scaling;
  Scaling<float> rounded;  // once, not in each thread

  SAM_INLINE explicit SumSquares(const Options& o) : scaling(o.options), rounded(o.options.as<float>()) {}

  SAM_INLINE double sum(const Piece<kRoles>& piece, int thread) const {
    return scaling.is_adaptive ? sum_of<true>(piece, thread) : sum_of<false>(piece, thread);
  }

 private:
  struct Sum {
    float total, largest;  // largest: of the magnitudes
  };

  template <bool kAdaptive>
  SAM_INLINE double sum_of(const Piece<kRoles>& piece, int thread) const {
    if constexpr (std::is_same_v<T, double>) {
      return exact_sum<kAdaptive>(piece, thread);
    } else {
      const Sum found = fast_sum<kAdaptive>(piece, thread);
      const bool in_range = found.total >= kLeastSquare && found.total < kMostSquare;
      return in_range || found.largest == 0.0f ? static_cast<double>(found.total) : exact_sum<kAdaptive>(piece, thread);
    }
  }

  template <bool kAdaptive>
  SAM_INLINE Sum fast_sum(const Piece<kRoles>& piece, int thread) const {
    constexpr int kWidth = A::kWidth;
    const Operand grad = piece.operands[kNormGrad], param = piece.operands[kNormParam];
    float sums[kWidth] = {}, largest = 0.0f;
    // Two packs in flight: one would leave the memory idle.
    for_each_pack<A, kAdaptive ? 1 : 2>(piece, thread, [&](auto width, int i) {
      constexpr int kCount = decltype(width)::value;
      const auto g = load<A, kCount>(grad, i);
      typename A::template Values<kCount> p{};
      if constexpr (kAdaptive) p = load<A, kCount>(param, i);
      SAM_UNROLL
      for (int j = 0; j < kCount; ++j) {
        float x = g.data[j];
        if constexpr (kAdaptive) x = rounded.weight(p.data[j]) * x;
        sums[j] = fmaf(x, x, sums[j]);
        largest = fmaxf(largest, fabsf(x));
      }
    });
    SAM_UNROLL
    for (int half = kWidth / 2; half > 0; half /= 2) {
      SAM_UNROLL
      for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
    }
    return {sums[0], largest};
  }

  // The same elements as in fast_sum.
  template <bool kAdaptive>
  SAM_INLINE double exact_sum(const Piece<kRoles>& piece, int thread) const {
    const Operand grad = piece.operands[kNormGrad], param = piece.operands[kNormParam];
    constexpr bool kRescues = !std::is_same_v<T, double>;  // one element at a time: a path for next to never takes no registers
    double total = 0.0;
    for_each_pack<A>(piece, thread, [&](auto width, int i) {
      constexpr int kCount = decltype(width)::value, kTogether = kRescues ? 1 : kCount;
      SAM_NO_UNROLL
      for (int j = i; j < i + kCount; j += kTogether) {
        const auto g = load<A, kTogether>(grad, j);
        typename A::template Values<kTogether> p{};
        if constexpr (kAdaptive) p = load<A, kTogether>(param, j);
        SAM_UNROLL
        for (int k = 0; k < kTogether; ++k) {
          total += kAdaptive ? norm_term_adaptive(p.data[k], g.data[k], scaling) : norm_term(g.data[k]);
        }
      }
    });
    return total;
  }
};

}  // namespace

bool sum_squares(const RowLists<kNormRoles>& lists, const NormOptions& options, const Place& place) {
  return run<SumSquares>(lists, options, place);
}

}  // namespace sam::cuda
