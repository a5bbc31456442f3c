// A gradient less the means of its slices, in place, and the sum of squares of what is left, |g|^2 or |T_w g|^2. Reads g (and p when
// adaptive), writes g: 2 N s bytes. Sums are float64: what is left is written in the same pass, so no thread could read it again as in
// norm.cu.
//
// A slice is shared by as many threads of the block as have a pack of it, one slice beside the other. It is read twice, the second time
// from the caches.
#include "cuda/block.cuh"
#include "cuda/launch.cuh"
#include "cuda/operations.h"

namespace sam::cuda {
namespace {

template <class A>
struct Centralize {
  using Access = A;
  using T = typename A::Arithmetic;
  using Options = NormOptions;
  using Block = Piece<kNormRoles>;
  static constexpr int kRoles = kNormRoles, kBlocks = 2;
  static constexpr bool kSums = true, kBackwards = false;

  struct Shared {
    Values sums;     // of a thread's part of its slice; after the tree, those of slices lie with their first threads
    Values squares;  // of all that a thread has seen
  };

  Scaling<double> scaling;

  SAM_INLINE explicit Centralize(const Options& o) : scaling(o.options) {}

  SAM_INLINE void together(const Block& piece, Shared& shared) const {
    all_threads([&](int thread) { shared.squares[thread] = 0.0; });
    if (piece.slice_size == 0) {
      all_threads([&](int thread) { shared.squares[thread] = finish_part<false>(piece, thread, kThreads, T(0)); });
      return;
    }
    const int sharing = threads_of(piece.slice_size), beside = kThreads / sharing;
    const int slices = piece.slice_size < kLongest ? piece.count / static_cast<int>(piece.slice_size) : 1;
    SAM_NO_UNROLL
    for (int first = 0; first < slices; first += beside) {
      all_threads([&](int thread) {
        const int slice = first + thread / sharing;
        shared.sums[thread] = slice < slices ? sum_of_slice(piece, slice, thread % sharing, sharing) : 0.0;
      });
      for (int half = sharing / 2; half > 0; half /= 2) {
        all_threads([&](int thread) {
          if (thread % sharing < half) shared.sums[thread] += shared.sums[thread + half];
        });
      }
      all_threads([&](int thread) {
        const int slice = first + thread / sharing;
        if (slice >= slices) return;
        const T mean = static_cast<T>(shared.sums[thread / sharing * sharing] / static_cast<double>(piece.slice_size));
        shared.squares[thread] += finish_slice(piece, slice, thread % sharing, sharing, mean);
      });
    }
  }

 private:
  static constexpr int kLongest = 1 << 30;                        // elements of a slice that shares its chunk: far more than a chunk has
  static constexpr int kPart = static_cast<int>(kChunkSize) / 2;  // elements of a long slice that are numbered in 32 bits

  // A power of two.
  SAM_INLINE static int threads_of(int64_t slice_size) {
    int threads = 1;
    while (threads < kThreads && static_cast<int64_t>(threads) * A::kWidth < slice_size) threads *= 2;
    return threads;
  }

  // body(part) for a slice, part after part.
  template <class Body>
  SAM_INLINE void for_each_part(const Block& piece, int slice, Body body) const {
    SAM_NO_UNROLL
    for (int64_t begin = 0; begin < piece.slice_size; begin += kPart) {
      const int64_t left = piece.slice_size - begin, offset = slice * piece.slice_size + begin;
      Block part = piece;
      SAM_UNROLL
      for (int role = 0; role < kRoles; ++role) {
        char* data = static_cast<char*>(piece.operands[role].data);
        part.operands[role].data = data == nullptr ? nullptr : data + offset * A::size_of(piece.operands[role]);
      }
      part.count = static_cast<int>(left < kPart ? left : kPart);
      body(part);
    }
  }

  SAM_INLINE double sum_of_slice(const Block& piece, int slice, int thread, int sharing) const {
    double total = 0.0;
    for_each_part(piece, slice, [&](const Block& part) {
      const Operand grad = part.operands[kNormGrad];
      for_each_pack<A>(
          part, thread,
          [&](auto width, int i) {
            constexpr int kCount = decltype(width)::value;
            const auto g = load<A, kCount>(grad, i);
            SAM_UNROLL
            for (int j = 0; j < kCount; ++j) total += g.data[j];
          },
          sharing);
    });
    return total;
  }

  SAM_INLINE double finish_slice(const Block& piece, int slice, int thread, int sharing, T mean) const {
    double total = 0.0;
    for_each_part(piece, slice, [&](const Block& part) { total += finish_part<true>(part, thread, sharing, mean); });
    return total;
  }

  template <bool kWrites>
  SAM_INLINE double finish_part(const Block& part, int thread, int sharing, T mean) const {
    const Operand grad = part.operands[kNormGrad], param = part.operands[kNormParam];
    double total = 0.0;
    for_each_pack<A>(
        part, thread,
        [&](auto width, int i) {
          constexpr int kCount = decltype(width)::value;
          auto g = load<A, kCount>(grad, i);
          typename A::template Values<kCount> p{};
          if (scaling.is_adaptive) p = load<A, kCount>(param, i);
          SAM_UNROLL
          for (int j = 0; j < kCount; ++j) {
            if constexpr (kWrites) g.data[j] = centralized(g.data[j], mean);
            total += norm_term(p.data[j], g.data[j], scaling);
          }
          if constexpr (kWrites) store<A, kCount>(grad, i, g);
        },
        sharing);
    return total;
  }
};

}  // namespace

bool centralize(const RowLists<kNormRoles>& lists, const NormOptions& options, const Place& place) {
  return run<Centralize>(lists, options, place);
}

}  // namespace sam::cuda
