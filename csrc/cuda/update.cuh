// Where the new weights of an update go: to param; with to_old to old_param too; rounded to nearest, or stochastically. What goes beyond
// the ordinary update has kernels of its own (kVariant), so that one keeps its registers: where a row may have bfloat16 parameters, or
// float32 masters beside parameters of 16 bits.
#pragma once

#include "common/options.h"
#include "common/roles.h"
#include "cuda/scalars.cuh"
#include "cuda/stochastic.cuh"

namespace sam::cuda {

template <bool kVariant>
struct UpdateTarget {
  SAM_INLINE explicit UpdateTarget(const UpdateOptions<Scalar>&) {}
};

template <>
struct UpdateTarget<true> {
  bool to_old, is_stochastic;
  RandomSeed seed;

  SAM_INLINE explicit UpdateTarget(const UpdateOptions<Scalar>& o) : to_old(o.to_old), is_stochastic(o.is_stochastic), seed(o.seed) {}
};

// Where the weights come from that an update starts at.
template <int kRoles>
SAM_INLINE Operand source_of(const Piece<kRoles>& piece) {
  return choose(piece.operands[kOldParam].data != nullptr, piece.operands[kOldParam], piece.operands[kParam]);
}

// Calls make.make<n>(source, i) for this thread's elements of the chunk, which returns their new weights, and stores these.
template <class A, int kRoles, class Make>
SAM_INLINE void update_weights(const Piece<kRoles>& piece, int thread, const UpdateTarget<false>&, Make make) {
  const Operand source = source_of(piece), param = piece.operands[kParam];
  for_each_pack<A>(piece, thread, [&](auto width, int i) {
    store<A, decltype(width)::value>(param, i, make.template make<decltype(width)::value>(source, i));
  });
}

template <class A, int kRoles, class Make>
SAM_INLINE void update_weights(const Piece<kRoles>& piece, int thread, const UpdateTarget<true>& target, Make make) {
  const Operand source = source_of(piece), param = piece.operands[kParam], old_param = piece.operands[kOldParam];
  if (!target.is_stochastic || param.dtype != DType::kBFloat16) {
    for_each_pack<A>(piece, thread, [&](auto width, int i) {
      const auto p = make.template make<decltype(width)::value>(source, i);
      if (A::kHasMasters && target.to_old) store<A, decltype(width)::value>(old_param, i, p);
      store<A, decltype(width)::value>(param, i, p);
    });
    return;
  }
  for_each_tile<A>(piece, thread, [&](auto width, int begin, int lane, int count) {
    constexpr int kCount = decltype(width)::value;
    const auto words = rounding_words<kCount>(first_counter(piece.begin + begin) + static_cast<uint64_t>(lane), target.seed, piece.tag);
    SAM_UNROLL
    for (int word = 0; word < kWords; ++word) {
      const int i = begin + lane + word * kTileLanes;
      if (kCount == 1 && i >= count) break;
      const auto p = make.template make<decltype(width)::value>(source, i);
      if (A::kHasMasters && target.to_old) store<A, kCount>(old_param, i, p);
      store_stochastic<kCount>(param, i, p.data, words.of[word]);
    }
  });
}

}  // namespace sam::cuda
