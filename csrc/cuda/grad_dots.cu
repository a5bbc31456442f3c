// Sums of l^2, l d and d^2 of each chunk, d = r - o, or r where there is no o. Reads l, r (and o): 2 N s bytes (3 N s).
//
// As in norm.cu a thread adds in float32, threads and chunks are added in float64, and a thread one of whose two sums of squares leaves
// [2^-100, 2^100) reads its elements again, in float64. The sum of products is then in float32's range too (Cauchy and Schwarz).
#include "cuda/launch.cuh"
#include "cuda/operations.h"

namespace sam::cuda {
namespace {

template <class A>
struct SumDots {
  using Access = A;
  using T = typename A::Arithmetic;
  using Options = DotsOptions;
  static constexpr int kRoles = kDotsRoles, kBlocks = 2;
  static constexpr bool kSums = true, kBackwards = false;

  SAM_INLINE explicit SumDots(const Options&) {}

  SAM_INLINE Dots sum(const Piece<kRoles>& piece, int thread) const {
    return piece.operands[kDotsOrigin].data == nullptr ? sum_of<false>(piece, thread) : sum_of<true>(piece, thread);
  }

 private:
  template <bool kOrigin>
  SAM_INLINE Dots sum_of(const Piece<kRoles>& piece, int thread) const {
    if constexpr (std::is_same_v<T, double>) {
      return exact_sum<kOrigin>(piece, thread);
    } else {
      return fast_sum<kOrigin>(piece, thread);
    }
  }

  // largest: of the magnitudes. All zeros need no second reading.
  SAM_INLINE static bool in_range(float square, float largest) {
    return (square >= kLeastSquare && square < kMostSquare) || largest == 0.0f;
  }

  template <int kCount>
  struct Pair {
    typename A::template Values<kCount> left, right;
  };

  template <bool kOrigin, int kCount>
  SAM_INLINE static Pair<kCount> read_pair(const Piece<kRoles>& piece, int i) {
    Pair<kCount> pair{load<A, kCount>(piece.operands[kDotsLeft], i), load<A, kCount>(piece.operands[kDotsRight], i)};
    if constexpr (kOrigin) {
      const auto origin = load<A, kCount>(piece.operands[kDotsOrigin], i);
      SAM_UNROLL
      for (int j = 0; j < kCount; ++j) pair.right.data[j] = pair.right.data[j] - origin.data[j];
    }
    return pair;
  }

  template <bool kOrigin>
  SAM_INLINE Dots fast_sum(const Piece<kRoles>& piece, int thread) const {
    constexpr int kSets = 4;  // of sums: additions that do not wait for each other
    float lefts[kSets] = {}, products[kSets] = {}, rights[kSets] = {}, largest_left = 0.0f, largest_right = 0.0f;
    for_each_pack<A>(piece, thread, [&](auto width, int i) {
      constexpr int kCount = decltype(width)::value;
      const auto pair = read_pair<kOrigin, kCount>(piece, i);
      SAM_UNROLL
      for (int j = 0; j < kCount; ++j) {
        const float l = pair.left.data[j], d = pair.right.data[j];
        lefts[j % kSets] = fmaf(l, l, lefts[j % kSets]);
        products[j % kSets] = fmaf(l, d, products[j % kSets]);
        rights[j % kSets] = fmaf(d, d, rights[j % kSets]);
        largest_left = fmaxf(largest_left, fabsf(l));
        largest_right = fmaxf(largest_right, fabsf(d));
      }
    });
    const float left = add(lefts), product = add(products), right = add(rights);
    const bool is_good = in_range(left, largest_left) && in_range(right, largest_right);
    return is_good ? Dots{left, product, right} : exact_sum<kOrigin>(piece, thread);
  }

  SAM_INLINE static float add(const float (&sums)[4]) { return (sums[0] + sums[2]) + (sums[1] + sums[3]); }

  // The same elements as in fast_sum.
  template <bool kOrigin>
  SAM_INLINE Dots exact_sum(const Piece<kRoles>& piece, int thread) const {
    constexpr bool kRescues = !std::is_same_v<T, double>;  // one element at a time: a path for next to never takes no registers
    Dots total{0.0, 0.0, 0.0};
    for_each_pack<A>(piece, thread, [&](auto width, int i) {
      constexpr int kCount = decltype(width)::value, kTogether = kRescues ? 1 : kCount;
      SAM_NO_UNROLL
      for (int j = i; j < i + kCount; j += kTogether) {
        const auto pair = read_pair<kOrigin, kTogether>(piece, j);
        SAM_UNROLL
        for (int k = 0; k < kTogether; ++k) {
          const double l = pair.left.data[k], d = pair.right.data[k];
          total += Dots{norm_term(l), dot_term(l, d), norm_term(d)};
        }
      }
    });
    return total;
  }
};

}  // namespace

bool sum_dots(const RowLists<kDotsRoles>& lists, const DotsOptions& options, const Place& place) {
  return run<SumDots>(lists, options, place);
}

}  // namespace sam::cuda
