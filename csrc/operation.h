// The values of sam_kernels/operations and their lists, as the bindings read them: options by the names of fields, lists by their roles.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <vector>

#include "common/random.h"
#include "tensor_list.h"

namespace sam {

class PyOperation {
 public:
  // op: a dataclass; lists: role -> TensorList. Both are read while the object lives, with the interpreter's lock.
  PyOperation(pybind11::handle op, const pybind11::dict& lists) : op_(op), lists_(lists) {}

  // Null for a role that takes no part.
  const PyTensorList* list(const char* role) const;
  template <std::size_t kRoles>
  std::array<const TensorList*, kRoles> lists(const char* const (&roles)[kRoles]) const {
    std::array<const TensorList*, kRoles> found;
    for (std::size_t i = 0; i < kRoles; ++i) found[i] = list(roles[i]);
    return found;
  }

  pybind11::object value(const char* field) const;
  bool is_none(const char* field) const { return value(field).is_none(); }
  bool flag(const char* field) const;
  bool equals(const char* field, const char* text) const;
  RandomSeed seed(const char* field) const;  // 0 for None
  std::vector<int64_t> integers(const char* field) const;

  // A Python number, or what a tensor of one element holds: waits for its device.
  double number(const char* field) const;
  double number_or(const char* field, double otherwise) const;  // for None

  // A number as the module's kernels take it.
  template <class Number>
  Number scalar(const char* field, double otherwise = 0.0) const;  // for None

 private:
  pybind11::handle op_;
  const pybind11::dict& lists_;
};

template <>
inline double PyOperation::scalar<double>(const char* field, double otherwise) const {
  return number_or(field, otherwise);
}

}  // namespace sam
