// Python lists of tensors as pointers, sizes and dtypes, without torch's headers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "common/work_list.h"

namespace sam {

// Adds the class TensorList to a module whose tensors lie on devices of one type (a number of dlpack.h), and the function register_types,
// which that module's Python side calls once, before it makes a list.
void bind_tensor_list(pybind11::module_& module, int32_t device_type);

// The tensors' pointers, sizes and dtypes as they are now. Holds no reference: whoever keeps it keeps the tensors.
struct PyTensorList : TensorList {
  std::vector<const PyObject*> objects;  // (n,) which tensors they were; only compared
  std::vector<int64_t> non_contiguous;   // indices of the tensors that are not in C order; Python looks at their strides
  bool has_float64 = false, only_float32 = true;
  int32_t device = 0;  // which one of its type; 0 for the CPU

  PyTensorList() = default;
  explicit PyTensorList(const pybind11::list& tensors);  // throws TypeError: a dtype without kernels, no memory, several devices

  // Whether these are the same tensors, still where they lay.
  bool is_current(const pybind11::list& tensors) const;

  // The gradients of these tensors and their description, in one pass over the list: (list, TensorList). None when they are not the same
  // tensors where they lay, or when one has no gradient or one of another size.
  pybind11::object current_grads(const pybind11::list& tensors) const;

 private:
  void reserve(std::size_t count);
  void append(PyObject* tensor);
  bool is_unmoved(std::size_t i, PyObject* tensor) const;
};

}  // namespace sam
