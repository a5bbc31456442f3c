// The Python module sam_kernels._cpu. No torch headers: a tensor is asked for its pointer, size and dtype through its public Python
// methods, from C++, which costs a third of a microsecond a tensor. Arguments are checked in Python (sam_kernels/_validate.py); what is
// checked again here is what would otherwise read or write out of bounds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>

#include "common/formulas.h"
#include "common/work_list.h"
#include "cpu/engine.h"

namespace py = pybind11;

namespace sam::cpu {
namespace {

// torch.float32, float64, bfloat16, float16: the objects themselves, in the order of DType. Set once by the native backend; never freed.
std::array<PyObject*, 4> g_dtypes{};

void register_dtypes(const std::array<py::object, 4>& dtypes) {
  for (std::size_t i = 0; i < dtypes.size(); ++i) g_dtypes[i] = dtypes[i].inc_ref().ptr();
}

struct Names {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
  PyObject* numel = PyUnicode_InternFromString("numel");
};

const Names& names() {
  static const Names interned;
  return interned;
}

py::object call(PyObject* tensor, PyObject* method) {
  PyObject* result = PyObject_VectorcallMethod(method, &tensor, 1 | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
  if (result == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(result);
}

void* data_ptr_of(PyObject* tensor) {
  void* pointer = PyLong_AsVoidPtr(call(tensor, names().data_ptr).ptr());
  if (pointer == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return pointer;
}

int64_t numel_of(PyObject* tensor) {
  const int64_t numel = PyLong_AsLongLong(call(tensor, names().numel).ptr());
  if (numel == -1 && PyErr_Occurred()) throw py::error_already_set();
  return numel;
}

DType dtype_of(PyObject* tensor) {
  const py::object dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, names().dtype));
  if (!dtype) throw py::error_already_set();
  for (std::size_t i = 0; i < g_dtypes.size(); ++i) {
    if (dtype.ptr() == g_dtypes[i]) return static_cast<DType>(i);
  }
  throw py::type_error("dtype " + py::str(dtype).cast<std::string>() + " has no kernel");
}

// The tensors' pointers, sizes and dtypes as they are now. Holds no reference: whoever keeps it keeps the tensors.
struct PyTensorList : TensorList {
  std::vector<int64_t> non_contiguous;  // indices of the tensors that are not in C order; Python looks at their strides

  bool has_float64 = false;

  explicit PyTensorList(const py::list& tensors) {
    const std::size_t count = tensors.size();
    operands.reserve(count);
    numels.reserve(count);
    for (std::size_t i = 0; i < count; ++i) {
      PyObject* tensor = PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i));
      operands.push_back({data_ptr_of(tensor), dtype_of(tensor)});
      has_float64 = has_float64 || operands.back().dtype == DType::kFloat64;
      numels.push_back(numel_of(tensor));
      if (call(tensor, names().is_contiguous).ptr() != Py_True) non_contiguous.push_back(static_cast<int64_t>(i));
    }
  }

  // True while the tensors still lie where they lay.
  bool is_current(const py::list& tensors) const {
    if (tensors.size() != operands.size()) return false;
    for (std::size_t i = 0; i < operands.size(); ++i) {
      if (data_ptr_of(PyList_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i))) != operands[i].data) return false;
    }
    return true;
  }
};

using List = const PyTensorList*;

Lists lists_of(List params, List grads, List old_params, List first_state = nullptr, List second_state = nullptr) {
  return {params, grads, old_params, {first_state, second_state}};
}

// What the gradient is multiplied by before anything else: 1 / grad_scale, the clip factor (with a max_norm) and the sign of maximize.
double grad_multiplier(bool maximize, double inv_grad_scale, double norm, std::optional<double> max_norm) {
  const double clip = max_norm ? clip_factor<double>(norm, *max_norm, inv_grad_scale) : 1.0;
  return (maximize ? -1.0 : 1.0) * inv_grad_scale * clip;
}

}  // namespace
}  // namespace sam::cpu

PYBIND11_MODULE(_cpu, module) {
  using namespace sam::cpu;
  using py::arg;
  module.doc() = "CPU kernels of sam_kernels. Use sam_kernels.functional, which checks its arguments.";

  module.def("register_dtypes", &register_dtypes, arg("dtypes"));
  module.def("instruction_set", [] { return kernel_table().name; });
  module.def("grad_multiplier", &grad_multiplier, py::kw_only(), arg("maximize"), arg("inv_grad_scale"), arg("norm"), arg("max_norm"));
  module.attr("CHUNK_SIZE") = sam::kChunkSize;

  py::class_<PyTensorList>(module, "TensorList")
      .def(py::init<const py::list&>(), arg("tensors"))
      .def("is_current", &PyTensorList::is_current, arg("tensors"))
      .def_readonly("has_float64", &PyTensorList::has_float64)
      .def_readonly("non_contiguous", &PyTensorList::non_contiguous);

  module.def(
      "grad_norms",
      [](List grads, List params, const std::vector<int64_t>& group_sizes, bool adaptive, double eta, int threads) {
        py::gil_scoped_release release;
        return grad_norms(lists_of(params, grads, nullptr), group_sizes, {adaptive, eta}, threads);
      },
      py::kw_only(), arg("grads"), arg("params"), arg("group_sizes"), arg("adaptive"), arg("eta"), arg("threads"));

  module.def(
      "perturb",
      [](List params, List grads, List old_params, double norm, double rho, double lambd, double eps, double eta, double inv_grad_scale,
         bool adaptive, bool from_old, int threads) {
        py::gil_scoped_release release;
        perturb(lists_of(params, grads, old_params), {norm, rho, lambd, eps, eta, inv_grad_scale, adaptive, from_old, false}, threads);
      },
      py::kw_only(), arg("params"), arg("grads"), arg("old_params"), arg("norm"), arg("rho"), arg("lambd"), arg("eps"), arg("eta"),
      arg("inv_grad_scale"), arg("adaptive"), arg("from_old"), arg("threads"));

  module.def(
      "copy",
      [](List params, List old_params, bool save, int threads) {
        py::gil_scoped_release release;
        copy(lists_of(params, nullptr, old_params), {save, false}, threads);
      },
      py::kw_only(), arg("params"), arg("old_params"), arg("save"), arg("threads"));

  module.def(
      "sgd",
      [](List params, List grads, List old_params, List momentum_buffers, double lr, double momentum, double dampening, double weight_decay,
         double grad_multiplier, bool nesterov, bool first_step, int threads) {
        py::gil_scoped_release release;
        sgd(lists_of(params, grads, old_params, momentum_buffers),
            {lr, momentum, dampening, weight_decay, grad_multiplier, nesterov, first_step, false}, threads);
      },
      py::kw_only(), arg("params"), arg("grads"), arg("old_params"), arg("momentum_buffers"), arg("lr"), arg("momentum"), arg("dampening"),
      arg("weight_decay"), arg("grad_multiplier"), arg("nesterov"), arg("first_step"), arg("threads"));

  module.def(
      "adamw",
      [](List params, List grads, List old_params, List exp_avgs, List exp_avg_sqs, const std::vector<double>& steps, double lr,
         double beta1, double beta2, double eps, double weight_decay, double grad_multiplier, bool decoupled, int threads) {
        py::gil_scoped_release release;
        adamw(lists_of(params, grads, old_params, exp_avgs, exp_avg_sqs),
              {lr, beta1, beta2, eps, weight_decay, grad_multiplier, decoupled, false}, steps, threads);
      },
      py::kw_only(), arg("params"), arg("grads"), arg("old_params"), arg("exp_avgs"), arg("exp_avg_sqs"), arg("steps"), arg("lr"),
      arg("beta1"), arg("beta2"), arg("eps"), arg("weight_decay"), arg("grad_multiplier"), arg("decoupled"), arg("threads"));
}
