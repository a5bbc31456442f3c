// Numbers that a kernel needs once: given by the host, or read from the device's memory so that the host need not wait for them and a CUDA
// graph follows them.
#pragma once

#include "common/bits.h"

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

}  // namespace sam::cuda
