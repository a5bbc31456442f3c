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

// Adds the class AnyTensorList, for kernels that are launched from Python and read addresses out of a table. Needs bind_tensor_list.
void bind_any_tensor_list(pybind11::module_& module);

constexpr int32_t kAnyDevice = 0;

// The memory of a tensor of one element, float32 or float64, on the module's type of device. Throws TypeError for any other.
Operand scalar_operand(pybind11::handle tensor);

// The tensors' pointers, sizes and dtypes as they are now. Holds no reference: whoever keeps it keeps the tensors.
struct PyTensorList : TensorList {
  std::vector<const PyObject*> objects;  // (n,) which tensors they were; only compared
  std::vector<int64_t> non_contiguous;   // indices of the tensors that are not in C order; Python looks at their strides
  bool has_float64 = false, only_float32 = true;

  PyTensorList();                                        // of the module's type of device
  explicit PyTensorList(const pybind11::list& tensors);  // throws TypeError: a dtype without kernels, no memory, several devices

  // Whether these are the same tensors, still where they lay.
  bool is_current(const pybind11::list& tensors) const;

  // The gradients of these tensors and their description, in one pass over the list: (list, TensorList). None when they are not the same
  // tensors where they lay, or when one has no gradient or one of another size.
  pybind11::object current_grads(const pybind11::list& tensors) const;

  // The same two of DTensors whose local parts these tensors are, and of the local parts of their gradients. None as well when a gradient
  // is not placed as its owner, or is the result of a collective that is under way. Both throw AttributeError for what is no DTensor.
  bool are_locals_of(const pybind11::list& owners) const;  // an owner may be the tensor itself
  pybind11::object current_local_grads(const pybind11::list& owners) const;

 protected:
  explicit PyTensorList(int32_t device_type) : device_type_(device_type) {}

  void read(const pybind11::list& tensors);
  template <class Source, class List>
  pybind11::object current_grads_as(const pybind11::list& tensors) const;

 private:
  void reserve(std::size_t count);
  void append(PyObject* tensor);
  bool is_unmoved(std::size_t i, PyObject* tensor) const;

  int32_t device_type_;  // a number of dlpack.h; kAnyDevice until the first tensor
};

// On one device of any type. Not a PyTensorList to Python: no kernel of a compiled module takes one.
struct AnyTensorList : PyTensorList {
  AnyTensorList() : PyTensorList(kAnyDevice) {}
  explicit AnyTensorList(const pybind11::list& tensors) : AnyTensorList() { read(tensors); }

  pybind11::object current_grads(const pybind11::list& tensors) const;
  pybind11::object current_local_grads(const pybind11::list& owners) const;
  bool has_kinds_of(const AnyTensorList& other) const;  // the same sizes and dtypes
  bool has_pointers_of(const AnyTensorList& other) const;
  void write_pointers(uintptr_t destination) const;  // (n,) int64, in memory of the host
};

}  // namespace sam
