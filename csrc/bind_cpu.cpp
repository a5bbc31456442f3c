// The Python module sam_kernels._cpu. Arguments are checked in Python (sam_kernels/_validate.py); what is checked again here is what would
// otherwise read or write out of bounds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "common/dlpack.h"
#include "common/formulas.h"
#include "common/random.h"
#include "common/work_list.h"
#include "cpu/engine.h"
#include "tensor_list.h"

namespace py = pybind11;

namespace sam::cpu {
namespace {

using List = const PyTensorList*;

Lists lists_of(List params, List grads, List old_params, List first_state = nullptr, List second_state = nullptr) {
  return {params, grads, old_params, {first_state, second_state}};
}

RandomKey key_of(uint64_t seed, uint32_t stream) { return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), stream}; }

double multiplier_of(bool maximize, double inv_grad_scale, double norm, std::optional<double> max_norm) {
  const double clip = max_norm ? clip_factor<double>(norm, *max_norm, inv_grad_scale) : 1.0;
  return grad_multiplier<double>(maximize, inv_grad_scale, clip);
}

// Adds one to every step counter, float32 or float64 on the CPU, and returns the new values.
std::vector<double> advance_steps(List steps) {
  std::vector<double> values;
  values.reserve(steps->operands.size());
  for (const Operand& step : steps->operands) {
    switch (step.dtype) {
      case DType::kFloat32: values.push_back(*static_cast<float*>(step.data) += 1.0f); break;
      case DType::kFloat64: values.push_back(*static_cast<double*>(step.data) += 1.0); break;
      default: throw py::type_error("state_steps must be float32 or float64");
    }
  }
  return values;
}

}  // namespace
}  // namespace sam::cpu

PYBIND11_MODULE(_cpu, module) {
  using namespace sam;
  using namespace sam::cpu;
  using py::arg;
  module.doc() = "CPU kernels of sam_kernels. Use sam_kernels.functional, which checks its arguments.";

  bind_tensor_list(module, dlpack::kCpu);
  module.def("instruction_set", [] { return kernel_table().name; });
  module.def("grad_multiplier", &multiplier_of, py::kw_only(), arg("maximize"), arg("inv_grad_scale"), arg("norm"), arg("max_norm"));
  module.def("advance_steps", &advance_steps, arg("steps"));
  module.attr("CHUNK_SIZE") = sam::kChunkSize;

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
      "perturb_variant",
      [](List params, List grads, List old_params, List ema, const std::vector<uint32_t>& row_indices, double norm, double rho,
         double lambd, double eps, double eta, double inv_grad_scale, bool adaptive, bool from_old, double grad_weight, double ema_weight,
         std::optional<uint64_t> rounding_seed, int threads) {
        py::gil_scoped_release release;
        perturb_variant(lists_of(params, grads, old_params, ema),
                        {{norm, rho, lambd, eps, eta, inv_grad_scale, adaptive, from_old, false},
                         grad_weight,
                         ema_weight,
                         rounding_seed.has_value(),
                         key_of(rounding_seed.value_or(0), sam::kRoundingStream)},
                        row_indices, threads);
      },
      py::kw_only(), arg("params"), arg("grads"), arg("old_params"), arg("ema"), arg("row_indices"), arg("norm"), arg("rho"), arg("lambd"),
      arg("eps"), arg("eta"), arg("inv_grad_scale"), arg("adaptive"), arg("from_old"), arg("grad_weight"), arg("ema_weight"),
      arg("rounding_seed"), arg("threads"));

  module.def(
      "direction_norm",
      [](List params, List grads, List ema, bool adaptive, bool friendly, bool first_step, double eta, double inv_grad_scale, double decay,
         double gain, double sigma, int threads) {
        py::gil_scoped_release release;
        return direction_norm(lists_of(params, grads, nullptr, ema),
                              {adaptive, friendly, first_step, eta, inv_grad_scale, decay, gain, sigma}, threads);
      },
      py::kw_only(), arg("params"), arg("grads"), arg("ema"), arg("adaptive"), arg("friendly"), arg("first_step"), arg("eta"),
      arg("inv_grad_scale"), arg("decay"), arg("gain"), arg("sigma"), arg("threads"));

  module.def(
      "random_perturb",
      [](List params, List old_params, const std::vector<uint32_t>& row_indices, uint64_t seed, double scale, bool normal, bool from_old,
         int threads) {
        py::gil_scoped_release release;
        random_perturb(lists_of(params, nullptr, old_params), {key_of(seed, sam::kPerturbationStream), scale, normal, from_old, false},
                       row_indices, threads);
      },
      py::kw_only(), arg("params"), arg("old_params"), arg("row_indices"), arg("seed"), arg("scale"), arg("normal"), arg("from_old"),
      arg("threads"));

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
            {{lr, momentum, dampening, weight_decay, grad_multiplier}, nesterov, first_step, false}, threads);
      },
      py::kw_only(), arg("params"), arg("grads"), arg("old_params"), arg("momentum_buffers"), arg("lr"), arg("momentum"), arg("dampening"),
      arg("weight_decay"), arg("grad_multiplier"), arg("nesterov"), arg("first_step"), arg("threads"));

  module.def(
      "adamw",
      [](List params, List grads, List old_params, List exp_avgs, List exp_avg_sqs, const std::vector<double>& steps, double lr,
         double beta1, double beta2, double eps, double weight_decay, double grad_multiplier, bool decoupled, int threads) {
        py::gil_scoped_release release;
        adamw(lists_of(params, grads, old_params, exp_avgs, exp_avg_sqs),
              {{lr, beta1, beta2, eps, weight_decay, grad_multiplier}, decoupled, false}, steps, threads);
      },
      py::kw_only(), arg("params"), arg("grads"), arg("old_params"), arg("exp_avgs"), arg("exp_avg_sqs"), arg("steps"), arg("lr"),
      arg("beta1"), arg("beta2"), arg("eps"), arg("weight_decay"), arg("grad_multiplier"), arg("decoupled"), arg("threads"));
}
