// Numbers that a kernel needs once: given by the host, or read from the device's memory so that the host need not wait for them and a CUDA
// graph follows them.
#pragma once

#include "common/formulas.h"
#include "cuda/values.cuh"

namespace sam::cuda {

struct Scalar {
  double value = 0;            // where data is null
  const void* data = nullptr;  // () float32, or float64
  bool is_double = false;
};

SAM_INLINE double read(const Scalar& scalar) {
  if (scalar.data == nullptr) return scalar.value;
  return scalar.is_double ? *static_cast<const double*>(scalar.data) : static_cast<double>(*static_cast<const float*>(scalar.data));
}

// The norm is not finite, or somebody found so before. Neither given: both are 0.
SAM_INLINE bool is_skipped(const Scalar& norm, const Scalar& found_inf) { return read(found_inf) != 0.0 || !is_finite(read(norm)); }

// grad_scale: value 1 where there is none.
SAM_INLINE double inverse_of(const Scalar& grad_scale) { return 1.0 / read(grad_scale); }

// What gradients of an update are multiplied by.
struct Multiplier {
  Scalar norm, grad_scale;
  double max_norm;  // negative: no clipping
  bool maximize;
};

SAM_INLINE double read(const Multiplier& m) {
  const double inverse = inverse_of(m.grad_scale);
  const double clip = m.max_norm < 0.0 ? 1.0 : clip_factor<double>(read(m.norm), m.max_norm, inverse);
  return grad_multiplier<double>(m.maximize, inverse, clip);
}

}  // namespace sam::cuda
