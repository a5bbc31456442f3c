#include "tensor_list.h"

#include <pybind11/stl.h>
#include <structmember.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <utility>

#include "common/dlpack.h"

namespace py = pybind11;

namespace sam {
namespace {

struct Names {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* get_device = PyUnicode_InternFromString("get_device");
  PyObject* grad = PyUnicode_InternFromString("grad");
  PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
  PyObject* local_tensor = PyUnicode_InternFromString("_local_tensor");
  PyObject* numel = PyUnicode_InternFromString("numel");
  PyObject* spec = PyUnicode_InternFromString("_spec");
};

// Never freed: they live as long as the interpreter.
struct Registry {
  Names names;
  PyTypeObject* tensor = nullptr;
  PyTypeObject* parameter = nullptr;
  std::array<PyObject*, 4> dtypes{};
  int32_t device_type = dlpack::kCpu;
  const dlpack::Exchange* exchange = nullptr;  // null: through the tensors' methods
};

Registry& registry() {
  static Registry instance;
  return instance;
}

struct View {
  void* data;
  DType dtype;
  int64_t numel;
  int32_t device_type, device;
  bool contiguous;
};

py::object attribute(PyObject* tensor, PyObject* name) {
  PyObject* result = PyObject_GetAttr(tensor, name);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

py::object call(PyObject* tensor, PyObject* method) {
  PyObject* result = PyObject_VectorcallMethod(method, &tensor, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

[[noreturn]] void throw_no_kernel(PyObject* tensor) {
  const std::string dtype = py::str(attribute(tensor, registry().names.dtype));
  throw py::type_error("dtype " + dtype + " has no kernel");
}

void check_is_tensor(PyObject* object) {
  const Registry& r = registry();
  if (Py_TYPE(object) == r.tensor || Py_TYPE(object) == r.parameter) return;
  if (r.tensor == nullptr || !PyObject_TypeCheck(object, r.tensor)) {
    throw py::type_error("expected a torch.Tensor, got " + std::string(Py_TYPE(object)->tp_name));
  }
}

// ~20 ns: one call, no Python objects made.
View view_through_dlpack(PyObject* object) {
  dlpack::Tensor tensor;
  if (registry().exchange->tensor_from_python(object, &tensor) != 0) throw py::error_already_set();
  View view;
  view.device_type = tensor.device_type;
  view.device = tensor.device_id;
  view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
  if (tensor.lanes == 1 && tensor.type_code == dlpack::kFloat && tensor.bits == 32) {
    view.dtype = DType::kFloat32;
  } else if (tensor.lanes == 1 && tensor.type_code == dlpack::kFloat && tensor.bits == 64) {
    view.dtype = DType::kFloat64;
  } else if (tensor.lanes == 1 && tensor.type_code == dlpack::kBFloat && tensor.bits == 16) {
    view.dtype = DType::kBFloat16;
  } else if (tensor.lanes == 1 && tensor.type_code == dlpack::kFloat && tensor.bits == 16) {
    view.dtype = DType::kFloat16;
  } else {
    throw_no_kernel(object);
  }
  view.numel = 1;
  view.contiguous = true;
  for (int32_t i = tensor.ndim - 1; i >= 0; --i) {
    view.contiguous = view.contiguous && (tensor.strides == nullptr || tensor.shape[i] == 1 || tensor.strides[i] == view.numel);
    view.numel *= tensor.shape[i];
  }
  view.contiguous = view.contiguous || view.numel == 0;
  return view;
}

// A third of a microsecond: five Python calls.
View view_through_methods(PyObject* object) {
  const Registry& r = registry();
  View view;
  view.data = PyLong_AsVoidPtr(call(object, r.names.data_ptr).ptr());
  if (view.data == nullptr && PyErr_Occurred()) throw py::error_already_set();
  view.numel = PyLong_AsLongLong(call(object, r.names.numel).ptr());
  if (view.numel == -1 && PyErr_Occurred()) throw py::error_already_set();
  view.device = static_cast<int32_t>(PyLong_AsLong(call(object, r.names.get_device).ptr()));
  if (view.device == -1 && PyErr_Occurred()) throw py::error_already_set();
  view.device_type = view.device < 0 ? dlpack::kCpu : dlpack::kCuda;
  if (view.device < 0) view.device = 0;
  view.contiguous = call(object, r.names.is_contiguous).ptr() == Py_True;
  const py::object dtype = attribute(object, r.names.dtype);
  for (std::size_t i = 0; i < r.dtypes.size(); ++i) {
    if (dtype.ptr() == r.dtypes[i]) {
      view.dtype = static_cast<DType>(i);
      return view;
    }
  }
  throw_no_kernel(object);
}

View view_of(PyObject* object) {
  check_is_tensor(object);
  return registry().exchange != nullptr ? view_through_dlpack(object) : view_through_methods(object);
}

// An attribute that a class keeps in a slot, read without a look-up where the object is of the class that was asked last.
class Slot {
 public:
  explicit Slot(PyObject* name) : name_(name) {}

  py::object of(PyObject* object) {
    if (Py_TYPE(object) != type_) find(Py_TYPE(object));
    PyObject* value = offset_ > 0 ? *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset_) : nullptr;
    return value != nullptr ? py::reinterpret_borrow<py::object>(value) : attribute(object, name_);
  }

 private:
  void find(PyTypeObject* type) {
    const py::object found = attribute(reinterpret_cast<PyObject*>(type), name_);
    const bool is_slot = Py_IS_TYPE(found.ptr(), &PyMemberDescr_Type);
    const PyMemberDef* member = is_slot ? reinterpret_cast<PyMemberDescrObject*>(found.ptr())->d_member : nullptr;
    type_ = type;
    offset_ = member != nullptr && member->type == T_OBJECT_EX ? member->offset : 0;
  }

  PyObject* name_;
  PyTypeObject* type_ = nullptr;
  Py_ssize_t offset_ = 0;
};

// Where a list's tensors and their gradients are read. An empty object: no gradient, or one that only the slow path can take.
struct FromTensors {
  static PyObject* tensor_of(PyObject* tensor) { return tensor; }

  static py::object grad_of(PyObject* tensor) {
    py::object grad = attribute(tensor, registry().names.grad);
    return grad.is_none() ? py::object() : grad;
  }
};

// DTensors, of which the list has the local parts. Throws AttributeError for any other tensor. Nothing is dispatched.
class FromOwners {
 public:
  py::object tensor_of(PyObject* owner) { return local_.of(owner); }

  py::object grad_of(PyObject* owner) {
    const py::object grad = attribute(owner, registry().names.grad);
    if (grad.is_none()) return {};
    const py::object placed = spec_.of(grad.ptr()), expected = spec_.of(owner);
    const int is_placed_alike = PyObject_RichCompareBool(placed.ptr(), expected.ptr(), Py_EQ);  // the same object, usually
    if (is_placed_alike < 0) throw py::error_already_set();
    if (is_placed_alike == 0) return {};
    py::object local = local_.of(grad.ptr());
    return Py_TYPE(local.ptr()) == Py_TYPE(local_.of(owner).ptr()) ? local : py::object();  // not a collective that is under way
  }

 private:
  Slot local_{registry().names.local_tensor}, spec_{registry().names.spec};
};

const dlpack::Exchange* find_exchange(const py::type& tensor_type) {
  const py::object capsule = py::getattr(tensor_type, "__dlpack_c_exchange_api__", py::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* exchange = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (exchange != nullptr && exchange->major != dlpack::kMajorVersion) exchange = exchange->previous;
  return exchange != nullptr && exchange->tensor_from_python != nullptr ? exchange : nullptr;
}

// torch.Tensor, torch.nn.Parameter and torch.float32, float64, bfloat16, float16 (the order of DType).
void register_types(const py::type& tensor_type, const py::type& parameter_type, const std::array<py::object, 4>& dtypes) {
  Registry& r = registry();
  r.tensor = reinterpret_cast<PyTypeObject*>(tensor_type.inc_ref().ptr());
  r.parameter = reinterpret_cast<PyTypeObject*>(parameter_type.inc_ref().ptr());
  for (std::size_t i = 0; i < dtypes.size(); ++i) r.dtypes[i] = dtypes[i].inc_ref().ptr();
  r.exchange = find_exchange(tensor_type);
}

// A class of lists with what all of them have.
template <class List>
py::class_<List> bind_list(py::module_& module, const char* name) {
  using py::arg;
  return py::class_<List>(module, name, py::module_local())  // each module has its own
      .def(py::init<const py::list&>(), arg("tensors"))
      .def("is_current", &List::is_current, arg("tensors"))
      .def("current_grads", &List::current_grads, arg("tensors"))
      .def("are_locals_of", &List::are_locals_of, arg("owners"))
      .def("current_local_grads", &List::current_local_grads, arg("owners"))
      .def_readonly("has_float64", &List::has_float64)
      .def_readonly("only_float32", &List::only_float32)
      .def_readonly("non_contiguous", &List::non_contiguous);
}

}  // namespace

void bind_tensor_list(py::module_& module, int32_t device_type) {
  using py::arg;
  registry().device_type = device_type;
  module.def("register_types", &register_types, arg("tensor_type"), arg("parameter_type"), arg("dtypes"));
  // Whether tensors are read through torch's DLPack exchange functions (torch >= 2.10) rather than through their Python methods.
  module.def("reads_through_dlpack", [] { return registry().exchange != nullptr; });
  bind_list<PyTensorList>(module, "TensorList");
}

void bind_any_tensor_list(py::module_& module) {
  using py::arg;
  bind_list<AnyTensorList>(module, "AnyTensorList")
      .def("has_kinds_of", &AnyTensorList::has_kinds_of, arg("other"))
      .def("has_pointers_of", &AnyTensorList::has_pointers_of, arg("other"))
      .def("write_pointers", &AnyTensorList::write_pointers, arg("destination"))
      .def_readonly("numels", &AnyTensorList::numels)
      .def_property_readonly("dtypes", [](const AnyTensorList& list) {
        py::tuple dtypes(list.operands.size());
        for (std::size_t i = 0; i < list.operands.size(); ++i) {
          dtypes[i] = py::handle(registry().dtypes[static_cast<std::size_t>(list.operands[i].dtype)]);
        }
        return dtypes;
      });
}

PyTensorList::PyTensorList() : device_type_(registry().device_type) {}

PyTensorList::PyTensorList(const py::list& tensors) : PyTensorList() { read(tensors); }

void PyTensorList::read(const py::list& tensors) {
  reserve(tensors.size());
  for (const py::handle tensor : tensors) append(tensor.ptr());
}

Operand scalar_operand(py::handle tensor) {
  const View view = view_of(tensor.ptr());
  if (view.device_type != registry().device_type) throw py::type_error("a number on another type of device than the kernels'");
  if (view.data == nullptr || view.numel != 1) throw py::type_error("a " + std::string(Py_TYPE(tensor.ptr())->tp_name) + " has no memory");
  if (view.dtype != DType::kFloat32 && view.dtype != DType::kFloat64) throw_no_kernel(tensor.ptr());
  return {view.data, view.dtype};
}

void PyTensorList::reserve(std::size_t count) {
  objects.reserve(count);
  operands.reserve(count);
  numels.reserve(count);
}

void PyTensorList::append(PyObject* tensor) {
  const View view = view_of(tensor);
  // A wrapper (DTensor, FakeTensor), or a tensor whose storage was freed. The kernels would read address 0.
  if (view.data == nullptr && view.numel > 0) {
    const std::string type = Py_TYPE(tensor)->tp_name;
    throw py::type_error("tensor " + std::to_string(objects.size()) + " of the list, a " + type + ", has no memory");
  }
  if (objects.empty()) device = view.device;
  if (device_type_ == kAnyDevice) device_type_ = view.device_type;
  if (view.device_type != device_type_) throw py::type_error("a tensor on another type of device than the kernels'");
  if (view.device != device) throw py::type_error("tensors of several devices in one list");
  objects.push_back(tensor);
  if (!view.contiguous) non_contiguous.push_back(static_cast<int64_t>(numels.size()));
  has_float64 = has_float64 || view.dtype == DType::kFloat64;
  only_float32 = only_float32 && view.dtype == DType::kFloat32;
  operands.push_back({view.data, view.dtype});
  numels.push_back(view.numel);
}

bool PyTensorList::is_unmoved(std::size_t i, PyObject* tensor) const {
  if (tensor != objects[i]) return false;
  const View view = view_of(tensor);
  return view.data == operands[i].data && view.dtype == operands[i].dtype && view.numel == numels[i];
}

bool PyTensorList::is_current(const py::list& tensors) const {
  if (tensors.size() != operands.size()) return false;
  for (std::size_t i = 0; i < operands.size(); ++i) {
    if (!is_unmoved(i, PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i)))) return false;
  }
  return true;
}

bool PyTensorList::are_locals_of(const py::list& owners) const {
  if (owners.size() != operands.size()) return false;
  FromOwners source;
  for (std::size_t i = 0; i < operands.size(); ++i) {
    PyObject* owner = PyList_GET_ITEM(owners.ptr(), static_cast<Py_ssize_t>(i));
    if (!is_unmoved(i, owner == objects[i] ? owner : source.tensor_of(owner).ptr())) return false;
  }
  return true;
}

template <class Source, class List>
py::object PyTensorList::current_grads_as(const py::list& tensors) const {
  if (tensors.size() != operands.size()) return py::none();
  py::list grads(operands.size());
  auto made = std::make_unique<List>();
  PyTensorList* described = made.get();
  described->reserve(operands.size());
  Source source;
  for (std::size_t i = 0; i < operands.size(); ++i) {
    PyObject* tensor = PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
    if (!is_unmoved(i, py::handle(source.tensor_of(tensor)).ptr())) return py::none();
    py::object grad = source.grad_of(tensor);
    if (!grad) return py::none();
    described->append(grad.ptr());
    PyList_SET_ITEM(grads.ptr(), static_cast<Py_ssize_t>(i), grad.release().ptr());
  }
  if (described->numels != numels) return py::none();
  return py::make_tuple(std::move(grads), std::move(made));
}

py::object PyTensorList::current_grads(const py::list& tensors) const { return current_grads_as<FromTensors, PyTensorList>(tensors); }

py::object PyTensorList::current_local_grads(const py::list& owners) const { return current_grads_as<FromOwners, PyTensorList>(owners); }

py::object AnyTensorList::current_grads(const py::list& tensors) const { return current_grads_as<FromTensors, AnyTensorList>(tensors); }

py::object AnyTensorList::current_local_grads(const py::list& owners) const { return current_grads_as<FromOwners, AnyTensorList>(owners); }

bool AnyTensorList::has_kinds_of(const AnyTensorList& other) const {
  const auto same_dtype = [](const Operand& left, const Operand& right) { return left.dtype == right.dtype; };
  return numels == other.numels && std::equal(operands.begin(), operands.end(), other.operands.begin(), same_dtype);
}

bool AnyTensorList::has_pointers_of(const AnyTensorList& other) const {
  const auto same_data = [](const Operand& left, const Operand& right) { return left.data == right.data; };
  return operands.size() == other.operands.size() && std::equal(operands.begin(), operands.end(), other.operands.begin(), same_data);
}

void AnyTensorList::write_pointers(uintptr_t destination) const {
  auto* pointers = reinterpret_cast<int64_t*>(destination);
  for (std::size_t i = 0; i < operands.size(); ++i) pointers[i] = static_cast<int64_t>(reinterpret_cast<uintptr_t>(operands[i].data));
}

}  // namespace sam
