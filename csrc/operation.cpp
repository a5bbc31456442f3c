#include "operation.h"

#include <pybind11/stl.h>

#include <string>
#include <unordered_map>

namespace py = pybind11;

namespace sam {
namespace {

// Interned once a literal, by its address: attributes and keys are then found without hashing a string. Never freed.
PyObject* interned(const char* name) {
  static std::unordered_map<const char*, PyObject*> names;
  PyObject*& found = names[name];
  if (found == nullptr) found = PyUnicode_InternFromString(name);
  return found;
}

double number_of(const py::object& value) {
  if (PyFloat_CheckExact(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
  if (PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr())) return value.cast<double>();
  return value.attr("item")().cast<double>();
}

}  // namespace

const PyTensorList* PyOperation::list(const char* role) const {
  PyObject* found = PyDict_GetItemWithError(lists_.ptr(), interned(role));
  if (found == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return found == nullptr ? nullptr : py::handle(found).cast<const PyTensorList*>();
}

py::object PyOperation::value(const char* field) const {
  PyObject* found = PyObject_GetAttr(op_.ptr(), interned(field));
  if (found == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(found);
}

bool PyOperation::flag(const char* field) const { return value(field).cast<bool>(); }

bool PyOperation::equals(const char* field, const char* text) const { return value(field).cast<std::string>() == text; }

RandomSeed PyOperation::seed(const char* field) const {
  const py::object seed = value(field);
  return seed_of(seed.is_none() ? 0 : seed.cast<uint64_t>());
}

std::vector<int64_t> PyOperation::integers(const char* field) const { return value(field).cast<std::vector<int64_t>>(); }

double PyOperation::number(const char* field) const { return number_of(value(field)); }

double PyOperation::number_or(const char* field, double otherwise) const {
  const py::object found = value(field);
  return found.is_none() ? otherwise : number_of(found);
}

}  // namespace sam
