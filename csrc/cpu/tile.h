// The random words of one tile of a row: kTile elements, of which each block of kBlock takes one of the four words of the same counters.
// Included only by files compiled once per instruction set.
#pragma once

#include <cstdint>

#include "common/random.h"
#include "cpu/block.h"

namespace sam::cpu {
inline namespace SAM_ISA {

static_assert(kLanes == kBlock, "a block of a tile takes one word of consecutive counters");

struct Tile {
  alignas(64) uint32_t word[kWords][kLanes];
};

// The words of the first `lanes` counters of the tile that begins at an element. Out of line: one copy, whatever is made of the words.
static __attribute__((noinline)) void fill(Tile& tile, int64_t begin, int lanes, const RandomKey& key, uint32_t row) {
  const uint64_t first = static_cast<uint64_t>(begin) / kTile * kLanes;
  const uint32_t low = static_cast<uint32_t>(first), high = static_cast<uint32_t>(first >> 32);  // a tile's counters share the high word
#pragma omp simd
  for (int lane = 0; lane < lanes; ++lane) {
    const Words words = philox({{low + static_cast<uint32_t>(lane), high, row, key.stream}}, key.low, key.high);
    tile.word[0][lane] = words.word[0];
    tile.word[1][lane] = words.word[1];
    tile.word[2][lane] = words.word[2];
    tile.word[3][lane] = words.word[3];
  }
}

// Calls start(begin, lanes) for each tile of the span, then body(begin, count, word) for each of its blocks. Spans begin where tiles do.
template <class Start, class Body>
static inline void for_each_tile(Span span, Start start, Body body) {
  for (int64_t tile = span.begin; tile < span.end; tile += kTile) {
    const Span inside{tile, tile + kTile < span.end ? tile + kTile : span.end};
    start(tile, inside.end - tile < kLanes ? static_cast<int>(inside.end - tile) : kLanes);
    for_each_block(inside, [&](int64_t begin, int count) { body(begin, count, static_cast<int>((begin - tile) / kLanes)); });
  }
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
