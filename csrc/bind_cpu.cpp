// The Python module sam_kernels._cpu. Arguments are checked in Python (sam_kernels/_validate.py); what is checked again here is what would
// otherwise read or write out of bounds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "bind_common.h"
#include "common/dlpack.h"
#include "common/work_list.h"
#include "cpu/engine.h"
#include "cpu/per_sample.h"
#include "cpu/sharpness.h"

namespace py = pybind11;

namespace sam::cpu {
namespace {

std::vector<double> norms_of(const PyOperation& op, int threads) {
  const Lists lists = op.lists(kNormLists);
  const Scaling<double> scaling = read_scaling(op);
  const std::vector<int64_t> group_sizes = op.integers("group_sizes");
  const py::gil_scoped_release release;
  return grad_norms(lists, group_sizes, scaling, threads);
}

double direction_norm_of(const PyOperation& op, int threads) {
  const Lists lists = op.lists(kDirectionLists);
  const MovingDirection options = read_direction<double>(op);
  const py::gil_scoped_release release;
  return direction_norm(lists, options, threads);
}

double centralize_rows(const PyOperation& op, const py::object& sizes, int threads) {
  const Lists lists = op.lists(kNormLists);
  const Scaling<double> scaling = read_scaling(op);
  const auto slice_sizes = sizes.cast<std::vector<int64_t>>();
  const py::gil_scoped_release release;
  return centralize(lists, scaling, slice_sizes, threads);
}

std::array<double, 3> dots_of(const PyOperation& op, int threads) {
  const Lists lists = op.lists(kDotsLists);
  const py::gil_scoped_release release;
  const Dots dots = grad_dots(lists, threads);
  return {dots.left, dots.product, dots.right};
}

double combine_rows(const PyOperation& op, int threads) {
  const Lists lists = op.lists(kCombineLists);
  const Combine options = read_combine<double>(op);
  const py::gil_scoped_release release;
  return combine(lists, options, threads);
}

void copy_rows(const TensorList* destination, const TensorList* source, int threads) {
  const py::gil_scoped_release release;
  copy(std::array{destination, source}, threads);
}

// What a skipped ascent leaves: a backup, or with from_old the parameters as they were.
void save_rows(const PyOperation& op, bool from_old, int threads) {
  const List params = op.list("params"), old_params = op.list("old_params");
  from_old ? copy_rows(params, old_params, threads) : copy_rows(old_params, params, threads);
}

void perturb_rows(const PyOperation& op, const py::object& indices, int threads) {
  if (is_variant(op)) {
    const Lists lists = op.lists(kPerturbVariantLists);
    const PerturbVariant options = read_perturb_variant<double>(op);
    if (is_skipped(options.ascent.step)) return save_rows(op, options.ascent.from_old, threads);
    const auto rows = indices.cast<std::vector<uint32_t>>();
    const py::gil_scoped_release release;
    perturb_variant(lists, options, rows, threads);
  } else {
    const Lists lists = op.lists(kPerturbLists);
    const Perturb options = read_perturb<double>(op);
    if (is_skipped(options.step)) return save_rows(op, options.from_old, threads);
    const py::gil_scoped_release release;
    perturb(lists, options, threads);
  }
}

void random_perturb_rows(const PyOperation& op, const py::object& indices, int threads) {
  const Lists lists = op.lists(kRandomLists);
  const RandomPerturb options = read_random<double>(op);
  const auto rows = indices.cast<std::vector<uint32_t>>();
  const py::gil_scoped_release release;
  random_perturb(lists, options, rows, threads);
}

// A skipped update restores parameters, where there is something to restore them from. Both return whether the step was made.
bool skip_update(const PyOperation& op, int threads) {
  if (const List old_params = op.list("old_params")) copy_rows(op.list("params"), old_params, threads);
  return false;
}

// The rows' numbers in the caller's list, where an update makes random numbers of them.
std::vector<uint32_t> rows_of(const UpdateOptions<double>& options, const Lists& lists, const py::object& indices) {
  return options.is_stochastic ? indices.cast<std::vector<uint32_t>>() : std::vector<uint32_t>(lists.numels().size());
}

bool sgd_rows(const PyOperation& op, const py::object& indices, int threads) {
  const Sgd options = read_sgd<double>(op);
  if (is_skipped(options.update.step)) return skip_update(op, threads);
  const Lists lists = op.lists(kSgdLists);
  const std::vector<uint32_t> rows = rows_of(options.update, lists, indices);
  const py::gil_scoped_release release;
  sgd(lists, options, rows, threads);
  return true;
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

bool adamw_rows(const PyOperation& op, const py::object& indices, int threads) {
  const Adam options = read_adam<double>(op);
  if (is_skipped(options.update.step)) return skip_update(op, threads);
  const Lists lists = op.lists(kAdamLists);
  const std::vector<uint32_t> rows = rows_of(options.update, lists, indices);
  check_sizes(lists.roles);
  const std::vector<double> steps = advance_steps(op.list("state_steps"));
  const py::gil_scoped_release release;
  adamw(lists, options, steps, rows, threads);
  return true;
}

using Sizes = std::array<int64_t, 3>;

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

void weights(List tensors, double beta) {
  expect_weights(tensors);
  py::gil_scoped_release release;
  sharpness_weights(tensors->operands[0], tensors->operands[1], tensors->numels[0], beta);
}

void sample(List tensors, double beta, bool replacement, uint64_t seed) {
  const int64_t count = tensors->numels[0], draws = expect_draws(tensors, replacement);
  py::gil_scoped_release release;
  sharpness_sample(tensors->operands[0], tensors->operands[1], static_cast<int64_t*>(tensors->operands[2].data), count, draws, beta,
                   replacement, seed_of(seed));
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
  using Op = const py::object&;
  using Given = const py::dict&;
  const auto def = [&](const char* name, auto function) {
    module.def(
        name, [function](Op op, Given lists, int threads) { return function({op, lists}, threads); }, arg("op"), arg("lists"),
        arg("threads"));
  };
  // With an integer for each row.
  const auto def_rows = [&](const char* name, const char* integers, auto function) {
    module.def(
        name, [function](Op op, Given lists, Op values, int threads) { return function({op, lists}, values, threads); }, arg("op"),
        arg("lists"), arg(integers), arg("threads"));
  };
  def("grad_norms", norms_of);
  def("direction_norm", direction_norm_of);
  def_rows("centralize", "slice_sizes", centralize_rows);
  def("grad_dots", dots_of);
  def("combine", combine_rows);
  def_rows("perturb", "indices", perturb_rows);
  def_rows("random_perturb", "indices", random_perturb_rows);
  def_rows("sgd", "indices", sgd_rows);
  def_rows("adamw", "indices", adamw_rows);
  module.def(
      "copy", [](List destination, List source, int threads) { copy_rows(destination, source, threads); }, arg("destination"),
      arg("source"), arg("threads"));
  module.def(
      "all_finite",
      [](List grads, int threads) {
        const py::gil_scoped_release release;
        return all_finite(std::array<const TensorList*, 1>{grads}, threads);
      },
      arg("grads"), arg("threads"));

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
