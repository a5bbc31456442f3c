// Tiles of 1,024 elements whose random numbers share counters (common/random.h): a thread takes a few lanes of a tile, whose four words
// each go to elements 256 apart.
#pragma once

#include "common/random.h"
#include "cuda/access.cuh"

namespace sam::cuda {

// The words of one counter.
SAM_INLINE Words<uint64_t> random_words(uint64_t counter, const RandomSeed& seed, uint32_t stream, uint32_t row) {
  const auto product = [](uint64_t value, uint32_t factor) { return static_cast<uint64_t>(static_cast<uint32_t>(value)) * factor; };
  return philox<uint64_t>({{counter, counter >> 32, row, stream}}, seed, product);
}

// The counter of lane 0 of the tile that begins at an element of the row.
SAM_INLINE uint64_t first_counter(int64_t element) { return static_cast<uint64_t>(element / kTile) * kTileLanes; }

// Calls body(Width<n>, begin, lane, count) for lanes [lane, lane + n) of each tile of the chunk: elements begin + lane + 256 w + j for
// words w and j < n, as far as they are below count (for n > 1: all are). Chunks begin where tiles do.
template <class Access, int kRoles, class Body>
SAM_INLINE void for_each_tile(const Piece<kRoles>& piece, int thread, Body body) {
  constexpr int kWidth = Access::kWidth, kTakers = kTileLanes / kWidth;
  const int whole = is_aligned<Access>(piece) ? piece.count / kTile : 0;
  SAM_NO_UNROLL
  for (int unit = thread; unit < whole * kTakers; unit += kThreads) {
    body(Width<kWidth>{}, unit / kTakers * kTile, unit % kTakers * kWidth, piece.count);
  }
  const int tiles = (piece.count + kTile - 1) / kTile;
  SAM_NO_UNROLL
  for (int unit = whole * kTileLanes + thread; unit < tiles * kTileLanes; unit += kThreads) {
    body(Width<1>{}, unit / kTileLanes * kTile, unit % kTileLanes, piece.count);
  }
}

}  // namespace sam::cuda
