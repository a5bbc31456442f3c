// The Python module sam_kernels._cpu. Arguments are checked in Python (sam_kernels/_validate.py); what is checked again here is what would
// otherwise read or write out of bounds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/dlpack.h"
#include "common/formulas.h"
#include "common/random.h"
#include "common/work_list.h"
#include "cpu/engine.h"
#include "cpu/per_sample.h"
#include "cpu/sharpness.h"
#include "operation.h"
#include "tensor_list.h"

namespace py = pybind11;

namespace sam::cpu {
namespace {

using List = const PyTensorList*;

Lists lists_of(const PyOperation& op, const char* params, const char* grads = "", const char* old_params = "", const char* first_state = "",
               const char* second_state = "") {
  const auto list = [&](const char* role) -> List { return *role == 0 ? nullptr : op.list(role); };
  return {list(params), list(grads), list(old_params), {list(first_state), list(second_state)}};
}

RandomKey key_of(uint64_t seed, uint32_t stream) { return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), stream}; }

double inverse_scale(const PyOperation& op) { return 1.0 / op.number_or("grad_scale", 1.0); }

// What the gradients of an update are multiplied by.
double multiplier_of(const PyOperation& op) {
  const double inverse = inverse_scale(op);
  const std::optional<double> max_norm = op.optional_number("max_norm");
  const double clip = max_norm ? clip_factor<double>(op.number("norm"), *max_norm, inverse) : 1.0;
  return grad_multiplier<double>(op.flag("maximize"), inverse, clip);
}

PerturbArgs perturb_args(const PyOperation& op) {
  return {.norm = op.number("norm"),
          .rho = op.number("rho"),
          .lambd = op.number("lambd"),
          .eps = op.number("eps"),
          .eta = op.number("eta"),
          .inv_grad_scale = inverse_scale(op),
          .adaptive = op.flag("adaptive"),
          .from_old = op.flag("from_old"),
          .streaming = false};
}

void perturb_rows(const PyOperation& op, const py::object& indices, int threads) {
  const PerturbArgs args = perturb_args(op);
  const Lists lists = lists_of(op, "params", "grads", "old_params", "ema");
  if (lists.states[0] == nullptr && op.is_none("rounding_seed")) {
    const py::gil_scoped_release release;
    perturb(lists, args, threads);
    return;
  }
  PerturbVariantArgs variant{};
  static_cast<PerturbArgs&>(variant) = args;
  variant.grad_weight = op.number("grad_weight");
  variant.ema_weight = op.number("ema_weight");
  variant.stochastic = !op.is_none("rounding_seed");
  variant.key = key_of(op.seed("rounding_seed"), sam::kRoundingStream);
  const auto rows = indices.cast<std::vector<uint32_t>>();
  const py::gil_scoped_release release;
  perturb_variant(lists, variant, rows, threads);
}

double direction_norm_of(const PyOperation& op, int threads) {
  const Lists lists = lists_of(op, "params", "grads", "", "ema");
  const DirectionArgs args{.adaptive = op.flag("adaptive"),
                           .friendly = op.equals("kind", "friendly"),
                           .first_step = op.flag("first_step"),
                           .eta = op.number("eta"),
                           .inv_grad_scale = inverse_scale(op),
                           .decay = op.number("decay"),
                           .gain = op.number("gain"),
                           .sigma = op.number("sigma")};
  const py::gil_scoped_release release;
  return direction_norm(lists, args, threads);
}

double combine_rows(const PyOperation& op, bool writes, int threads) {
  const Lists lists = lists_of(op, "outs", "lefts", "origins", "rights");
  const CombineArgs args{.left_weight = op.number("left_weight"),
                         .right_weight = op.number("right_weight"),
                         .origin_weight = op.number("origin_weight"),
                         .writes = writes,
                         .streaming = false};
  const py::gil_scoped_release release;
  return combine(lists, args, threads);
}

void random_perturb_rows(const PyOperation& op, const py::object& indices, int threads) {
  const Lists lists = lists_of(op, "params", "", "old_params");
  const RandomPerturbArgs args{.key = key_of(op.seed("seed"), sam::kPerturbationStream),
                               .scale = op.number("scale"),
                               .normal = op.equals("distribution", "normal"),
                               .from_old = op.flag("from_old"),
                               .streaming = false};
  const auto rows = indices.cast<std::vector<uint32_t>>();
  const py::gil_scoped_release release;
  random_perturb(lists, args, rows, threads);
}

void sgd_rows(const PyOperation& op, int threads) {
  const Lists lists = lists_of(op, "params", "grads", "old_params", "momentum_buffers");
  SgdArgs args{};
  static_cast<SgdOptions&>(args) = {.lr = op.number("lr"),
                                    .momentum = op.number("momentum"),
                                    .dampening = op.number("dampening"),
                                    .weight_decay = op.number("weight_decay"),
                                    .grad_multiplier = multiplier_of(op)};
  args.nesterov = op.flag("nesterov");
  args.first_step = op.flag("first_step");
  const py::gil_scoped_release release;
  sgd(lists, args, threads);
}

// Adds one to every step counter, float32 or float64, and returns the new values.
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

void adamw_rows(const PyOperation& op, int threads) {
  const Lists lists = lists_of(op, "params", "grads", "old_params", "exp_avgs", "exp_avg_sqs");
  const auto betas = op.value("betas").cast<std::pair<double, double>>();
  AdamArgs args{};
  static_cast<AdamOptions&>(args) = {.lr = op.number("lr"),
                                     .beta1 = betas.first,
                                     .beta2 = betas.second,
                                     .eps = op.number("eps"),
                                     .weight_decay = op.number("weight_decay"),
                                     .grad_multiplier = multiplier_of(op)};
  args.decoupled = op.flag("decoupled");
  lists.check();
  const std::vector<double> steps = advance_steps(op.list("state_steps"));
  const py::gil_scoped_release release;
  adamw(lists, args, steps, threads);
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
  module.attr("CHUNK_SIZE") = sam::kChunkSize;

  // Operations over lists: op is a value of sam_kernels/operations, lists holds a TensorList a role.
  module.def(
      "grad_norms",
      [](const py::object& value, const py::dict& given, int threads) {
        const PyOperation op(value, given);
        const Lists lists = lists_of(op, "params", "grads");
        const NormArgs args{.adaptive = op.flag("adaptive"), .eta = op.number("eta")};
        const std::vector<int64_t> group_sizes = op.integers("group_sizes");
        const py::gil_scoped_release release;
        return grad_norms(lists, group_sizes, args, threads);
      },
      arg("op"), arg("lists"), arg("threads"));
  module.def(
      "norm",
      [](List grads, int threads) {  // of all tensors together
        const py::gil_scoped_release release;
        return grad_norms({nullptr, grads}, {static_cast<int64_t>(grads->numels.size())}, {false, 0.0}, threads).front();
      },
      arg("grads"), arg("threads"));
  module.def(
      "perturb",
      [](const py::object& op, const py::dict& lists, const py::object& indices, int threads) {
        perturb_rows({op, lists}, indices, threads);
      },
      arg("op"), arg("lists"), arg("indices"), arg("threads"));
  module.def(
      "direction_norm", [](const py::object& op, const py::dict& lists, int threads) { return direction_norm_of({op, lists}, threads); },
      arg("op"), arg("lists"), arg("threads"));
  module.def(
      "centralize",
      [](const py::object& value, const py::dict& given, const std::vector<int64_t>& slice_sizes, int threads) {
        const PyOperation op(value, given);
        const Lists lists = lists_of(op, "params", "grads");
        const NormArgs args{.adaptive = op.flag("adaptive"), .eta = op.number("eta")};
        const py::gil_scoped_release release;
        return centralize(lists, args, slice_sizes, threads);
      },
      arg("op"), arg("lists"), arg("slice_sizes"), arg("threads"));
  module.def(
      "grad_dots",
      [](const py::object& value, const py::dict& given, int threads) {
        const Lists lists = lists_of({value, given}, "", "lefts", "origins", "rights");
        const py::gil_scoped_release release;
        const Dots dots = grad_dots(lists, threads);
        return std::array<double, 3>{dots.left, dots.product, dots.right};
      },
      arg("op"), arg("lists"), arg("threads"));
  module.def(
      "combine",
      [](const py::object& op, const py::dict& lists, bool writes, int threads) { return combine_rows({op, lists}, writes, threads); },
      arg("op"), arg("lists"), arg("writes"), arg("threads"));
  module.def(
      "random_perturb",
      [](const py::object& op, const py::dict& lists, const py::object& indices, int threads) {
        random_perturb_rows({op, lists}, indices, threads);
      },
      arg("op"), arg("lists"), arg("indices"), arg("threads"));
  // save: old_params <- params, otherwise params <- old_params.
  module.def(
      "copy",
      [](List params, List old_params, bool save, int threads) {
        const py::gil_scoped_release release;
        copy({params, nullptr, old_params}, {.save = save, .streaming = false}, threads);
      },
      arg("params"), arg("old_params"), arg("save"), arg("threads"));
  module.def(
      "sgd", [](const py::object& op, const py::dict& lists, int threads) { sgd_rows({op, lists}, threads); }, arg("op"), arg("lists"),
      arg("threads"));
  module.def(
      "adamw", [](const py::object& op, const py::dict& lists, int threads) { adamw_rows({op, lists}, threads); }, arg("op"), arg("lists"),
      arg("threads"));

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
