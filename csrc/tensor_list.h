// Python lists of tensors as pointers, sizes and dtypes, without torch's headers.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <vector>

#include "cpu/engine.h"

namespace sam::cpu {

// torch.Tensor, torch.nn.Parameter and torch.float32, float64, bfloat16, float16 (the order of DType). To be called once, before any list.
void register_types(const pybind11::type& tensor_type, const pybind11::type& parameter_type, const std::array<pybind11::object, 4>& dtypes);

// Whether tensors are read through torch's DLPack exchange functions (torch >= 2.10) rather than through their Python methods.
bool reads_through_dlpack();

// The tensors' pointers, sizes and dtypes as they are now. Holds no reference: whoever keeps it keeps the tensors.
struct PyTensorList : TensorList {
  std::vector<const PyObject*> objects;  // (n,) which tensors they were; only compared
  std::vector<int64_t> non_contiguous;   // indices of the tensors that are not in C order; Python looks at their strides
  bool has_float64 = false;

  PyTensorList() = default;
  explicit PyTensorList(const pybind11::list& tensors);  // throws TypeError for a dtype without kernels, what torch throws for no storage

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

}  // namespace sam::cpu
