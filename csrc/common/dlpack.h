// The part of DLPack's C interface (version 1, https://dmlc.github.io/dlpack) that reads a tensor of another library: its binary layout.
#pragma once

#include <cstdint>

namespace sam::dlpack {

constexpr uint32_t kMajorVersion = 1;   // the layouts below hold for every 1.x
constexpr int32_t kCpu = 1, kCuda = 2;  // device_type
constexpr uint8_t kFloat = 2, kBFloat = 4;

struct Tensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t type_code, bits;
  uint16_t lanes;
  int64_t* shape;    // (ndim,)
  int64_t* strides;  // (ndim,) elements; null: C order
  uint64_t byte_offset;
};

struct Exchange {
  uint32_t major, minor;
  Exchange* previous;
  void* allocate;
  void* managed_from_python;
  void* managed_to_python;
  int (*tensor_from_python)(void* py_object, Tensor* out);  // -1 with a Python error set; may be null
  void* current_work_stream;
};

}  // namespace sam::dlpack
