// Gibbs weights of norms and draws from them. One thread: there are as many norms as a batch has samples.
#pragma once

#include <cstdint>

#include "common/operand.h"
#include "common/random.h"

namespace sam::cpu {

// norms, weights (count,), of one dtype: float32 or float64
void sharpness_weights(Operand norms, Operand weights, int64_t count, double beta);

// indices, weights (draws,)
void sharpness_sample(Operand norms, Operand weights, int64_t* indices, int64_t count, int64_t draws, double beta, bool replacement,
                      const RandomSeed& seed);

}  // namespace sam::cpu
