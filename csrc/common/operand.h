// One tensor as kernels see it.
#pragma once

#include <cstdint>

#include "common/bits.h"

namespace sam {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct Operand {
  void* data = nullptr;  // null: this operand takes no part
  DType dtype = DType::kFloat32;
};

SAM_INLINE int element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

SAM_INLINE char* address(const Operand& operand, int64_t index) {
  return static_cast<char*>(operand.data) + index * element_size(operand.dtype);
}

}  // namespace sam
