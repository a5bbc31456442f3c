// One tensor as kernels see it.
#pragma once

#include <cstdint>

namespace sam {

enum class DType : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

struct Operand {
  void* data = nullptr;  // null: this operand takes no part
  DType dtype = DType::kFloat32;
};

}  // namespace sam
