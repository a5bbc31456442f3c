// Gibbs weights of norms and draws from them: every formula once, for host and device, in double. Norms that are not finite make weights
// NaN, and indices stay inside.
#pragma once

#include <cfloat>
#include <cmath>

#include "common/random.h"

namespace sam {

// In (0, 1), exact: 52 random bits and a half.
SAM_INLINE double sampling_uniform(int64_t index, const RandomSeed& seed) {
  const auto product = [](uint64_t value, uint32_t factor) { return static_cast<uint64_t>(static_cast<uint32_t>(value)) * factor; };
  const auto counter = static_cast<uint64_t>(index);
  const Words<uint64_t> words = philox<uint64_t>({{counter, counter >> 32, 0, kSamplingStream}}, seed, product);
  const uint64_t upper = static_cast<uint32_t>(words.word[0]), lower = static_cast<uint32_t>(words.word[1]);
  return (static_cast<double>(static_cast<int64_t>(upper << 20 | lower >> 12)) + 0.5) * 0x1p-52;
}

// beta (n - max n). A difference that leaves the range is the lowest number: it would be NaN times a beta of 0.
SAM_INLINE double gibbs_exponent(double norm, double largest, double beta) {
  const double below = norm - largest;
  return beta * (below < -DBL_MAX ? -DBL_MAX : below);
}

// p times a constant; NaN for a norm that is not finite, with a beta of 0 too.
SAM_INLINE double gibbs_term(double norm, double exponent) { return std::exp(exponent) + norm * 0.0; }

// Items in the order of these keys, the largest first, are successive draws without replacement (Gumbel). Never NaN: they have an order.
SAM_INLINE double gumbel_key(double exponent, double uniform) {
  const double key = exponent - std::log(-std::log(uniform));
  return key == key ? key : -HUGE_VAL;
}

// 1 / (k B p). places: k B.
SAM_INLINE double replacement_weight(double term, double total, double places) { return total / term / places; }

// Des Raj's: (rest / p + later) / (k B). rest: of all that were not drawn before; later: draws that follow. Where all of them vanish it is
// infinite, not 0 / 0.
SAM_INLINE double ordered_weight(double term, double rest, double later, double places) {
  return ((rest == 0.0 ? HUGE_VAL : rest / term) + later) / places;
}

}  // namespace sam
