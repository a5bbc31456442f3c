// The Python module sam_kernels._cpu. Arguments are checked in Python (sam_kernels/_validate.py); what is checked again here is what would
// otherwise read or write out of bounds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <vector>

#include "common/dlpack.h"
#include "common/formulas.h"
#include "common/random.h"
#include "common/work_list.h"
#include "cpu/engine.h"
#include "cpu/per_sample.h"
#include "cpu/sharpness.h"
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

using Sizes = std::array<int64_t, 3>;

void expect(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

void expect_positive(std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes) expect(size > 0, "sizes must be positive");
}

// tensors: square_norms, inputs, grad_outputs and, where they are kept, products.
Layer layer_of(List tensors, int64_t groups, bool gram, bool with_bias, int threads) {
  const std::vector<Operand>& operands = tensors->operands;
  expect(operands.size() == 3 || operands.size() == 4, "three tensors or four");
  expect(operands[0].dtype == DType::kFloat64 && tensors->numels[0] == groups && groups > 0, "square_norms: (groups,) float64");
  const bool is_double = operands[1].dtype == DType::kFloat64 || operands[2].dtype == DType::kFloat64;
  const bool kept = operands.size() == 4;
  expect(!kept || (!gram && operands[3].dtype == (is_double ? DType::kFloat64 : DType::kFloat32)), "products: of the arithmetic type");
  expect(!with_bias || gram, "the direct form has no bias");
  expect(tensors->non_contiguous.empty(), "tensors must be contiguous");
  void* products = kept ? operands[3].data : nullptr;
  return {static_cast<double*>(operands[0].data), operands[1], operands[2], products, is_double, groups, gram, with_bias, threads};
}

void check_numels(List tensors, int64_t inputs, int64_t grads, int64_t products) {
  expect(tensors->numels[1] == inputs && tensors->numels[2] == grads, "inputs or grad_outputs: size");
  expect(tensors->numels.size() == 3 || tensors->numels[3] == products, "products: size");
}

void linear(List tensors, int64_t groups, int64_t tokens, int64_t in_features, int64_t out_features, bool gram, bool with_bias,
            int threads) {
  const Layer layer = layer_of(tensors, groups, gram, with_bias, threads);
  expect_positive({tokens, in_features, out_features});
  check_numels(tensors, groups * tokens * in_features, groups * tokens * out_features, groups * in_features * out_features);
  py::gil_scoped_release release;
  linear_square_norms(layer, tokens, in_features, out_features);
}

// sizes, kernel and so on: of three dimensions, the missing ones first and 1 (padding: 0).
void conv(List tensors, int64_t groups, int64_t samples, int64_t in_channels, int64_t out_channels, int64_t channel_groups,
          const Sizes& sizes, const Sizes& kernel, const Sizes& stride, const Sizes& padding, const Sizes& dilation, bool gram,
          int threads) {
  const Layer layer = layer_of(tensors, groups, gram, false, threads);
  expect_positive({samples, in_channels, out_channels, channel_groups, sizes[0], sizes[1], sizes[2]});
  Convolution c{samples, in_channels, out_channels, channel_groups, {}, {}, {}, {}, {}, {}};
  int64_t inputs = groups * samples * in_channels, grads = groups * samples * out_channels;
  expect(in_channels % channel_groups == 0 && out_channels % channel_groups == 0, "groups of channels");
  int64_t products = groups * out_channels * (in_channels / channel_groups);
  for (std::size_t i = 0; i < 3; ++i) {
    expect(kernel[i] > 0 && stride[i] > 0 && padding[i] >= 0 && dilation[i] > 0, "kernel, stride, padding or dilation");
    c.in[i] = sizes[i], c.kernel[i] = kernel[i], c.stride[i] = stride[i], c.padding[i] = padding[i], c.dilation[i] = dilation[i];
    const int64_t room = sizes[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1;
    expect(room >= 0, "kernel larger than the input");
    c.out[i] = room / stride[i] + 1;
    inputs *= c.in[i], grads *= c.out[i], products *= c.kernel[i];
  }
  check_numels(tensors, inputs, grads, products);
  py::gil_scoped_release release;
  conv_square_norms(layer, c);
}

// tensors: weight_grads and normalized where with_weight, bias_grads where with_bias, grad_outputs.
void affine(List tensors, bool with_weight, bool with_bias, int64_t groups, int64_t samples, int64_t channels, int64_t length,
            int threads) {
  const std::vector<Operand>& operands = tensors->operands;
  const int64_t numel = groups * samples * channels * length;
  expect_positive({groups, samples, channels, length});
  expect(operands.size() == std::size_t{1} + 2 * with_weight + with_bias && tensors->non_contiguous.empty(), "tensors");
  const Operand weight = with_weight ? operands[0] : Operand{}, values = with_weight ? operands[1] : Operand{};
  const Operand bias = with_bias ? operands[with_weight ? 2 : 0] : Operand{}, grads = operands.back();
  const bool is_double = grads.dtype == DType::kFloat64 || (with_weight && values.dtype == DType::kFloat64);
  const DType dtype = is_double ? DType::kFloat64 : DType::kFloat32;
  expect(!with_weight || (weight.dtype == dtype && tensors->numels[0] == groups * channels && tensors->numels[1] == numel), "weight");
  expect(!with_bias || (bias.dtype == dtype && tensors->numels[with_weight ? 2 : 0] == groups * channels), "bias");
  expect(tensors->numels.back() == numel, "grad_outputs: size");
  py::gil_scoped_release release;
  affine_grads(weight.data, bias.data, values, grads, is_double, groups, samples, channels, length, threads);
}

// tensors: square_norms, grad_outputs and the int64 indices under the name of float64, the only ones of 64 bits that a list knows.
void embedding(List tensors, int64_t groups, int64_t tokens, int64_t dim, std::optional<int64_t> padding_idx, int threads) {
  const std::vector<Operand>& operands = tensors->operands;
  expect_positive({groups, tokens, dim});
  expect(operands.size() == 3 && tensors->non_contiguous.empty(), "three tensors");
  expect(operands[0].dtype == DType::kFloat64 && tensors->numels[0] == groups, "square_norms: (groups,) float64");
  expect(tensors->numels[1] == groups * tokens * dim, "grad_outputs: size");
  expect(operands[2].dtype == DType::kFloat64 && tensors->numels[2] == groups * tokens, "indices: (groups, tokens) of 64 bits");
  py::gil_scoped_release release;
  embedding_square_norms(static_cast<double*>(operands[0].data), static_cast<const int64_t*>(operands[2].data), operands[1], groups, tokens,
                         dim, padding_idx ? &*padding_idx : nullptr, threads);
}

// tensors: norms, weights, of one dtype; of draws the int64 indices too, under the name of float64.
void expect_norms(List tensors, std::size_t count) {
  const std::vector<Operand>& operands = tensors->operands;
  expect(operands.size() == count && tensors->non_contiguous.empty() && tensors->numels[0] > 0, "norms and what is written, contiguous");
  expect(operands[0].dtype == operands[1].dtype, "norms and weights: dtype");
  expect(operands[0].dtype == DType::kFloat64 || operands[0].dtype == DType::kFloat32, "norms: float32 or float64");
}

void weights(List tensors, double beta) {
  expect_norms(tensors, 2);
  expect(tensors->numels[1] == tensors->numels[0], "weights: size");
  py::gil_scoped_release release;
  sharpness_weights(tensors->operands[0], tensors->operands[1], tensors->numels[0], beta);
}

void sample(List tensors, double beta, bool replacement, uint64_t seed) {
  expect_norms(tensors, 3);
  const int64_t count = tensors->numels[0], draws = tensors->numels[2];
  expect(tensors->operands[2].dtype == DType::kFloat64, "indices: of 64 bits");
  expect(tensors->numels[1] == draws && draws > 0 && (replacement || draws <= count), "weights and indices: size");
  py::gil_scoped_release release;
  sharpness_sample(tensors->operands[0], tensors->operands[1], static_cast<int64_t*>(tensors->operands[2].data), count, draws, beta,
                   replacement, seed);
}

}  // namespace
}  // namespace sam::cpu

PYBIND11_MODULE(_cpu, module) {
  using namespace sam;
  using namespace sam::cpu;
  using py::arg;
  module.doc() = "CPU kernels of sam_kernels. Use sam_kernels.functional, which checks its arguments.";

  bind_tensor_list(module, dlpack::kCpu);
  bind_any_tensor_list(module);
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
      "centralize",
      [](List params, List grads, const std::vector<int64_t>& slice_sizes, bool adaptive, double eta, int threads) {
        py::gil_scoped_release release;
        return centralize(lists_of(params, grads, nullptr), {adaptive, eta}, slice_sizes, threads);
      },
      py::kw_only(), arg("params"), arg("grads"), arg("slice_sizes"), arg("adaptive"), arg("eta"), arg("threads"));

  module.def(
      "grad_dots",
      [](List lefts, List rights, List origins, int threads) {
        py::gil_scoped_release release;
        const Dots dots = grad_dots(lists_of(nullptr, lefts, origins, rights), threads);
        return std::array<double, 3>{dots.left, dots.product, dots.right};
      },
      py::kw_only(), arg("lefts"), arg("rights"), arg("origins"), arg("threads"));

  module.def(
      "combine",
      [](List outs, List lefts, List rights, List origins, double left_weight, double right_weight, double origin_weight, bool writes,
         int threads) {
        py::gil_scoped_release release;
        return combine(lists_of(outs, lefts, origins, rights), {left_weight, right_weight, origin_weight, writes, false}, threads);
      },
      py::kw_only(), arg("outs"), arg("lefts"), arg("rights"), arg("origins"), arg("left_weight"), arg("right_weight"),
      arg("origin_weight"), arg("writes"), arg("threads"));

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

  module.def("linear_square_norms", &linear, arg("tensors"), arg("groups"), arg("tokens"), arg("in_features"), arg("out_features"),
             arg("gram"), arg("with_bias"), arg("threads"));
  module.def("conv_square_norms", &conv, arg("tensors"), arg("groups"), arg("samples"), arg("in_channels"), arg("out_channels"),
             arg("channel_groups"), arg("sizes"), arg("kernel"), arg("stride"), arg("padding"), arg("dilation"), arg("gram"),
             arg("threads"));
  module.def("affine_grads", &affine, arg("tensors"), arg("with_weight"), arg("with_bias"), arg("groups"), arg("samples"), arg("channels"),
             arg("length"), arg("threads"));
  module.def("embedding_square_norms", &embedding, arg("tensors"), arg("groups"), arg("tokens"), arg("dim"), arg("padding_idx"),
             arg("threads"));

  module.def("sharpness_weights", &weights, py::kw_only(), arg("tensors"), arg("beta"));
  module.def("sharpness_sample", &sample, py::kw_only(), arg("tensors"), arg("beta"), arg("replacement"), arg("seed"));
}
