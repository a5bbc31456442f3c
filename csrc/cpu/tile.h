// The random words of one tile of a row: kTile elements, of which each block of kBlock takes one of the four words of the same counters.
// Included only by files compiled once per instruction set.
#pragma once

#include <cstdint>

#include "common/random.h"
#include "cpu/block.h"

namespace sam::cpu {
inline namespace SAM_ISA {

static_assert(kTileLanes == kBlock, "a block of a tile takes one word of consecutive counters");

// 64-bit lanes, and the product of their lower halves, for which compilers have no pattern: twice as fast as what they make of 32-bit
// lanes.
#if defined(__AVX512F__)
typedef unsigned long long Wide __attribute__((vector_size(64)));
static inline Wide wide_product(Wide a, uint32_t b) { return (Wide)_mm512_maskz_mul_epu32(0xFF, (__m512i)a, _mm512_set1_epi64(b)); }
#elif defined(__AVX2__)
typedef unsigned long long Wide __attribute__((vector_size(32)));
static inline Wide wide_product(Wide a, uint32_t b) { return (Wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b)); }
#elif defined(__SSE2__)
typedef unsigned long long Wide __attribute__((vector_size(16)));
static inline Wide wide_product(Wide a, uint32_t b) { return (Wide)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b)); }
#else
typedef unsigned long long Wide __attribute__((vector_size(8)));
static inline Wide wide_product(Wide a, uint32_t b) { return (a & 0xFFFFFFFFull) * uint64_t{b}; }
#endif

constexpr int kStep = 16;  // counters at a time, on every instruction set

struct Tile {
  alignas(64) uint32_t word[kWords][kTileLanes];
};

// The words of the first `lanes` counters, a multiple of kStep, of the tile that begins at an element. Out of line: one copy an operation.
static __attribute__((noinline)) void fill(Tile& tile, int64_t begin, int lanes, const RandomSeed& seed, uint32_t stream, uint32_t row) {
  constexpr int kWidth = sizeof(Wide) / sizeof(uint64_t);
  const uint64_t first = static_cast<uint64_t>(begin) / kTile * kTileLanes;
  Wide even = {};  // counters 2 i in one vector, 2 i + 1 in another: a pair's words lie side by side when one is shifted up
  for (int i = 0; i < kWidth; ++i) even[i] = (first & 0xFFFFFFFFu) + 2 * i;
  const Wide none = {}, high = none + (first >> 32);  // a tile's counters share the upper word
  const Wide rows = none + uint64_t{row}, streams = none + uint64_t{stream};
  for (int lane = 0; lane < lanes; lane += 2 * kWidth, even += 2 * kWidth) {
    const Words<Wide> evens = philox(Words<Wide>{{even, high, rows, streams}}, seed, wide_product);
    const Words<Wide> odds = philox(Words<Wide>{{even + 1, high, rows, streams}}, seed, wide_product);
    for (int i = 0; i < kWords; ++i) {
      const Wide pairs = (evens.word[i] & 0xFFFFFFFFull) | (odds.word[i] << 32);  // little-endian, as every processor this is built for
      std::memcpy(&tile.word[i][lane], &pairs, sizeof pairs);
    }
  }
}

// Calls start(begin, lanes) for each tile of the span, lanes rounded up to a multiple of kStep, then body(begin, count, word) for each of
// its blocks. Spans begin where tiles do.
template <class Start, class Body>
static inline void for_each_tile(Span span, Start start, Body body) {
  for (int64_t tile = span.begin; tile < span.end; tile += kTile) {
    const Span inside{tile, tile + kTile < span.end ? tile + kTile : span.end};
    const int64_t count = inside.end - tile;
    start(tile, count < kTileLanes ? static_cast<int>((count + kStep - 1) / kStep * kStep) : kTileLanes);
    for_each_block(inside, [&](int64_t begin, int count) { body(begin, count, static_cast<int>((begin - tile) / kTileLanes)); });
  }
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
