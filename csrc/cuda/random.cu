// The random perturbation: saves the parameter and moves it by numbers that are made on the fly and never stored. Reads p; writes old_p, p:
// 3 N s bytes (from_old: reads old_p; writes p: 2 N s).
#include "cuda/launch.cuh"
#include "cuda/operations.h"
#include "cuda/tiles.cuh"

namespace sam::cuda {
namespace {

template <class A, bool kNormal>
struct RandomPerturb {
  using Access = A;
  using T = typename A::Arithmetic;
  using Options = RandomOptions<Scalar>;
  static constexpr int kRoles = kRandomRoles;
  // A thread has the words of 16 or 32 elements at hand: 512 or 1024 threads.
  static constexpr int kBlocks = kNormal || A::kWidth != 4 ? 1 : 2;
  static constexpr bool kSums = false, kBackwards = false;

  RandomSeed seed;
  bool from_old;
  T scale;

  SAM_INLINE explicit RandomPerturb(const Options& o) : seed(o.seed), from_old(o.from_old), scale(T(read(o.scale))) {}

  SAM_INLINE void apply(const Piece<kRoles>& piece, int thread) const {
    const Operand param = piece.operands[kRandomParam], old_param = piece.operands[kRandomOldParam];
    const Operand source = choose(from_old, old_param, param);
    for_each_tile<A>(piece, thread, [&](auto width, int begin, int lane, int count) {
      constexpr int kCount = decltype(width)::value;
      typename A::template Values<kCount> p[kWords] = {};
      SAM_UNROLL
      for (int word = 0; word < kWords; ++word) {
        const int i = begin + lane + word * kTileLanes;
        if (kCount == 1 && i >= count) break;
        const auto stored = A::template load_raw<kCount>(source, i);
        if (!from_old) A::template copy<kCount>(param, old_param, i, stored);
        p[word] = A::template values<kCount>(stored);
      }
      const uint64_t counter = first_counter(piece.begin + begin) + static_cast<uint64_t>(lane);
      SAM_UNROLL
      for (int j = 0; j < kCount; ++j) {
        move(random_words(counter + static_cast<uint64_t>(j), seed, kPerturbationStream, piece.tag), p, j);
      }
      SAM_UNROLL
      for (int word = 0; word < kWords; ++word) {
        const int i = begin + lane + word * kTileLanes;
        if (kCount == 1 && i >= count) break;
        store<A, kCount>(param, i, p[word]);
      }
    });
  }

 private:
  template <class Values>
  SAM_INLINE void move(const Words<uint64_t>& words, Values (&p)[kWords], int j) const {
    SAM_UNROLL
    for (int word = 0; word < kWords; word += 2) {
      const auto first = static_cast<uint32_t>(words.word[word]), second = static_cast<uint32_t>(words.word[word + 1]);
      float z0, z1;
      if constexpr (kNormal) {
        const float radius = box_muller_radius(first);
        const CosineSine direction = box_muller_direction(second);
        z0 = radius * direction.cosine;
        z1 = radius * direction.sine;
      } else {
        z0 = rademacher(first);
        z1 = rademacher(second);
      }
      p[word].data[j] = sam::perturb(p[word].data[j], T(z0), scale);
      p[word + 1].data[j] = sam::perturb(p[word + 1].data[j], T(z1), scale);
    }
  }
};

template <class A>
using Normal = RandomPerturb<A, true>;
template <class A>
using Rademacher = RandomPerturb<A, false>;

}  // namespace

void random_perturb(const RowLists<kRandomRoles>& lists, const RandomOptions<Scalar>& options, const Place& place) {
  options.is_normal ? run<Normal>(lists, options, place) : run<Rademacher>(lists, options, place);
}

}  // namespace sam::cuda
