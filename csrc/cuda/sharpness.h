// Gibbs weights of norms and draws from them, one launch each. None waits for the device.
#pragma once

#include <cstdint>

#include "common/random.h"
#include "cuda/device.h"
#include "cuda/scalars.cuh"

namespace sam::cuda {

struct GibbsOptions {
  const void* norms;  // (count,) float32 or float64
  void* weights;      // (count,), of draws (draws,), of the same dtype
  bool is_double;
  int64_t count;
  Scalar beta;
};
void sharpness_weights(const GibbsOptions& options, const Place& place);

struct DrawOptions : GibbsOptions {
  int64_t* indices;  // (draws,)
  int64_t draws;
  RandomSeed seed;
};
void sharpness_draw(const DrawOptions& options, const Place& place);  // with replacement
void sharpness_rank(const DrawOptions& options, const Place& place);  // without

}  // namespace sam::cuda
