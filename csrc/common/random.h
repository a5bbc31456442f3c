// Random numbers that are a function of (seed, row, element): Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
// SC 2011) and standard normals from its words.
//
// Plain float32 additions, products and a square root, integer bit operations, no table, no branch and no library: whatever does the same
// operations in the same order has the same bits, and a compiler can vectorise it.
//
// Element i of a row (in memory order) takes output word (i % kTile) / kTileLanes of the counter (c & 0xffffffff, c >> 32, row, stream)
// with c = (i / kTile) * kTileLanes + i % kTileLanes. So a counter serves four elements, and each run of kTileLanes elements takes
// consecutive counters.
#pragma once

#include <cmath>

#include "common/bits.h"

namespace sam {

constexpr int kTileLanes = 256;
constexpr int kWords = 4;
constexpr int kTile = kWords * kTileLanes;
// What the words are for: the counter's last word. One seed may serve all.
constexpr uint32_t kPerturbationStream = 0, kRoundingStream = 1, kSamplingStream = 2;

// A seed as the two words of Philox's key.
struct RandomSeed {
  uint32_t low, high;
};

SAM_INLINE RandomSeed seed_of(uint64_t seed) { return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)}; }

// 32-bit numbers in the lower halves of 64-bit lanes; whatever is in the upper halves is ignored. V is uint64_t or a vector of it.
template <class V>
struct Words {
  V word[kWords];
};

// product(V, uint32_t): the 64-bit product of each lane's lower half. That is one instruction where vectors are multiplied this way, and no
// half of it is computed twice.
template <class V, class Product>
SAM_INLINE Words<V> philox(const Words<V>& counter, const RandomSeed& seed, Product product) {
  V c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  SAM_UNROLL
  for (uint32_t round = 0; round < 10; ++round) {
    const V product0 = product(c0, 0xD2511F53u), product1 = product(c2, 0xCD9E8D57u);
    c0 = (product1 >> 32) ^ c1 ^ uint64_t{seed.low + round * 0x9E3779B9u};
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ uint64_t{seed.high + round * 0xBB67AE85u};
    c3 = product0;
  }
  return {{c0, c1, c2, c3}};
}

// -1 where bit 31 is set, else +1.
SAM_INLINE float rademacher(uint32_t word) { return bits_float(0x3F800000u | (word & 0x80000000u)); }

// sqrt(-2 log u), u = ((word >> 8) + 1) 2^-24 in (0, 1]. Off by less than 3.6e-7 for each of the 2^24 values.
SAM_INLINE float box_muller_radius(uint32_t word) {
  // u = 2^e m with m in [sqrt(1/2), sqrt(2)), all exact; f = m - 1 is exact too.
  const uint32_t bits = float_bits(static_cast<float>(static_cast<int32_t>(word >> 8) + 1) * 0x1p-24f);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3F3504F3u) >> 23;
  const float f = bits_float(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  const float e = static_cast<float>(exponent);
  // -2 log(1 + f) = -2 f + f^2 + f^3 q(f), minimax relative to f on the interval: 6e-9.
  float q = 0x1.41ee0ep-3f;
  q = q * f + -0x1.07d0f2p-2f;
  q = q * f + 0x1.0ce07cp-2f;
  q = q * f + -0x1.226e4ap-2f;
  q = q * f + 0x1.54788ap-2f;
  q = q * f + -0x1.99a596p-2f;
  q = q * f + 0x1.000220p-1f;
  q = q * f + -0x1.55554ap-1f;
  const float square = f * f;
  // -2 log(2) in two parts, of which the first has 15 bits: its product with e is exact. Smallest terms first.
  const float sum = ((f * square) * q + e * -0x1.2fefa2p-16f) + square;
  return std::sqrt((sum + -2.0f * f) + e * -0x1.62e300p+0f);
}

struct CosineSine {
  float cosine, sine;
};

// cos and sin of 2 pi u, u = (word >> 8) 2^-24 in [0, 1). Off by less than 7e-8 for each of the 2^24 values.
SAM_INLINE CosineSine box_muller_direction(uint32_t word) {
  // 4 u = quadrant + t with t in [-1/2, 1/2), exact.
  const int32_t turn = static_cast<int32_t>(word >> 8);
  const int32_t quadrant = (turn + (1 << 21)) >> 22;
  const float t = static_cast<float>(turn - quadrant * (1 << 22)) * 0x1p-22f;
  const float square = t * t;
  float sine = -0x1.2ef84ap-8f;  // sin(pi t / 2) = t s(t^2), minimax: 5e-9
  sine = sine * square + 0x1.4668e6p-4f;
  sine = sine * square + -0x1.4abbe6p-1f;
  sine = sine * square + 0x1.921fb6p+0f;
  sine = sine * t;
  float cosine = 0x1.d47918p-11f;  // cos(pi t / 2) = c(t^2), minimax: 5e-10
  cosine = cosine * square + -0x1.55b142p-6f;
  cosine = cosine * square + 0x1.03c1aep-2f;
  cosine = cosine * square + -0x1.3bd3ccp+0f;
  cosine = cosine * square + 1.0f;
  // Odd quadrants exchange the two; the cosine is negative in quadrants 1 and 2, the sine in 2 and 3.
  const uint32_t odd = 0u - static_cast<uint32_t>(quadrant & 1);
  const uint32_t exchange = (float_bits(sine) ^ float_bits(cosine)) & odd;
  const uint32_t cosine_sign = static_cast<uint32_t>((quadrant + 1) & 2) << 30;
  const uint32_t sine_sign = static_cast<uint32_t>(quadrant & 2) << 30;
  return {bits_float((float_bits(cosine) ^ exchange) ^ cosine_sign), bits_float((float_bits(sine) ^ exchange) ^ sine_sign)};
}

}  // namespace sam
