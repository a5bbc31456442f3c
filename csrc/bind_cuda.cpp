// The Python module sam_kernels._cuda (for the tests: _cuda_on_host). Arguments are checked in Python (sam_kernels/_validate.py); what is
// checked again here is what would otherwise read or write out of bounds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <variant>
#include <vector>

#include "common/dlpack.h"
#include "cuda/config.h"
#include "cuda/operations.h"
#include "cuda/sharpness.h"
#include "tensor_list.h"

namespace py = pybind11;

namespace sam::cuda {
namespace {

#if defined(SAM_CUDA_ON_HOST)
constexpr bool kOnHost = true;
constexpr int32_t kDeviceType = dlpack::kCpu;
constexpr const char* kArchitectures = "";
#else
constexpr bool kOnHost = false;
constexpr int32_t kDeviceType = dlpack::kCuda;
constexpr const char* kArchitectures = SAM_CUDA_ARCHITECTURES;
#endif

using List = const PyTensorList*;
// A number, or (address, whether it is float64) of one on the device.
using Number = std::variant<double, std::pair<uintptr_t, bool>>;
using OptionalNumber = std::optional<Number>;

Scalar scalar_of(const OptionalNumber& number, double otherwise = 0.0) {
  if (!number) return {otherwise};
  if (const double* value = std::get_if<double>(&*number)) return {*value};
  const auto& [address, is_double] = std::get<std::pair<uintptr_t, bool>>(*number);
  return {0.0, reinterpret_cast<const void*>(address), is_double};
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void* stream_of(uintptr_t stream) { return pointer<void>(stream); }

// The place of an operation on the list's device, made the current one; other threads may run while the launch waits for room.
struct Launch {
  Launch(const char* op, List list, uintptr_t stream) : place{op, list->device, stream_of(stream)}, guard(place) {}

  Place place;
  py::gil_scoped_release release;
  DeviceGuard guard;
};

Multiplier multiplier_of(const OptionalNumber& norm, const OptionalNumber& grad_scale, std::optional<double> max_norm, bool maximize) {
  return {scalar_of(norm), scalar_of(grad_scale, 1.0), max_norm.value_or(-1.0), maximize};
}

uint32_t low(uint64_t seed) { return static_cast<uint32_t>(seed); }
uint32_t high(uint64_t seed) { return static_cast<uint32_t>(seed >> 32); }

// The first of each row's partial sums, and how many there are.
std::pair<std::vector<uint32_t>, uint32_t> first_sums(List list, const std::vector<int64_t>* slice_sizes = nullptr) {
  std::vector<uint32_t> firsts = chunk_counts(list->numels, slice_sizes);
  uint32_t total = 0;
  for (uint32_t& first : firsts) {
    const uint32_t count = first;
    first = total;
    total += count;
  }
  return {std::move(firsts), total};
}

// The sums of each group of consecutive rows. group_sizes: (M,) rows.
std::vector<uint32_t> bounds_of(const std::vector<uint32_t>& firsts, uint32_t total, const std::vector<std::size_t>& group_sizes) {
  std::vector<uint32_t> bounds = {0};
  std::size_t row = 0;
  for (const std::size_t size : group_sizes) {
    row += size;
    if (row > firsts.size()) throw std::invalid_argument("groups of more rows than there are");
    bounds.push_back(row == firsts.size() ? total : firsts[row]);
  }
  return bounds;
}

// One norm is finished by the launch that makes its sums, several by one of their own.
FinishOptions finish_of(uintptr_t sums, uintptr_t norms, bool is_double, uintptr_t found_inf, uintptr_t skipped,
                        const std::vector<uint32_t>& bounds, const Place& place) {
  uint32_t* counter = bounds.size() == 2 ? counter_of(place) : nullptr;
  return {pointer<double>(sums),   pointer<void>(norms), is_double, pointer<float>(found_inf),
          pointer<float>(skipped), bounds.back(),        counter};
}

void expect(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// tensors: norms, weights, of one dtype.
GibbsOptions gibbs_of(List tensors, const Number& beta) {
  const std::vector<Operand>& operands = tensors->operands;
  expect(operands.size() >= 2 && tensors->non_contiguous.empty() && tensors->numels[0] > 0, "norms and weights, contiguous");
  const bool is_double = operands[0].dtype == DType::kFloat64;
  expect(operands[0].dtype == operands[1].dtype && (is_double || operands[0].dtype == DType::kFloat32), "norms and weights: dtype");
  return {operands[0].data, operands[1].data, is_double, tensors->numels[0], scalar_of(beta)};
}

#if defined(SAM_CUDA_ON_HOST)

// The launches of a list of these sizes, for the tests: no pointer is ever read.
template <int kBytes>
struct Split {
  using Launch = Table<kSgdRoles, kBytes>;

  Split(std::vector<int64_t> numels, int chunk_size) {
    TensorList list{std::vector<Operand>(numels.size()), std::move(numels)};
    for (std::size_t i = 0; i < list.operands.size(); ++i) list.operands[i].data = pointer<void>(16 * (i + 1));
    for_each_table<Launch>(RowLists<kSgdRoles>{{&list, &list, &list, &list}}, nullptr, chunk_size, false,
                           [&](const Launch& launch, bool) { launches.push_back(launch); });
  }

  // (row, first element, elements) of one chunk of one launch.
  std::tuple<uint32_t, int64_t, int> locate(std::size_t launch, uint32_t chunk) const {
    const Location found = launches.at(launch).locate(chunk);
    return {launches[launch].tags[found.row], found.begin, found.count};
  }

  std::vector<uint32_t> chunks() const {
    std::vector<uint32_t> counts;
    for (const Launch& launch : launches) counts.push_back(launch.chunks());
    return counts;
  }

  std::vector<Launch> launches;
};

template <int kBytes>
void bind_split(py::module_& module, const char* name) {
  using Splitting = Split<kBytes>;
  py::class_<Splitting>(module, name)
      .def(py::init<std::vector<int64_t>, int>(), py::arg("numels"), py::arg("chunk_size"))
      .def("locate", &Splitting::locate)
      .def("chunks", &Splitting::chunks)
      .def_property_readonly_static("CAPACITY", [](const py::object&) { return Splitting::Launch::kCapacity; });
}

#endif

}  // namespace
}  // namespace sam::cuda

PYBIND11_MODULE(SAM_CUDA_MODULE, module) {
  using namespace sam;
  using namespace sam::cuda;
  using py::arg;
  module.doc() = "CUDA kernels of sam_kernels. Use sam_kernels.functional, which checks its arguments.";

  bind_tensor_list(module, kDeviceType);
  module.attr("ON_HOST") = kOnHost;
  module.attr("ARCHITECTURES") = kArchitectures;
  module.attr("THREADS") = kThreads;
#if defined(SAM_CUDA_ON_HOST)
  bind_split<kSmallArguments>(module, "SmallSplit");
  bind_split<kLargeArguments>(module, "LargeSplit");
  module.def("launches", [] { return on_host().launches; });
  module.def(
      "set_blocks", [](uint32_t most, uint32_t first) { on_host().blocks = most, on_host().first = first; }, py::kw_only(),
      arg("most") = OnHost{}.blocks, arg("first") = OnHost{}.first);
  module.def("set_runs_launches", [](bool runs) { on_host().runs = runs; }, arg("runs"));
#endif
  module.def("reason_missing", &reason_missing);
  module.def("capability", &capability, arg("device"));
  module.def("usual_chunk_size", &usual_chunk_size, arg("numels"));
  module.def("longest_chunk", [] { return cut().chunk_size > 0 ? cut().chunk_size : static_cast<int>(kChunkSize); });
  // For benchmarks that look for the best cut; without arguments: the usual one. The bits of a norm depend on the size of chunks.
  module.def(
      "set_cut",
      [](int chunk_size, int blocks_per_processor, bool backwards) {
        if (chunk_size < 0 || chunk_size % 1024 != 0) throw py::value_error("chunk_size must be a multiple of 1024, or 0: by the sizes");
        if (blocks_per_processor < 0) throw py::value_error("blocks_per_processor must not be negative");
        cut() = {chunk_size, blocks_per_processor, backwards};
      },
      py::kw_only(), arg("chunk_size") = 0, arg("blocks_per_processor") = 0, arg("backwards") = true);

  // Partial sums a list needs: float64 numbers.
  module.def(
      "count_sums",
      [](List list, const std::optional<std::vector<int64_t>>& slice_sizes) {
        return first_sums(list, slice_sizes ? &*slice_sizes : nullptr).second;
      },
      arg("list"), arg("slice_sizes") = std::nullopt);

  module.def(
      "grad_norms",
      [](List grads, List params, const std::vector<std::size_t>& group_sizes, bool adaptive, double eta, uintptr_t sums, uintptr_t norms,
         bool is_double, uintptr_t found_inf, uintptr_t skipped, uintptr_t stream) {
        const auto [firsts, total] = first_sums(grads);
        const auto bounds = bounds_of(firsts, total, group_sizes);
        const Launch launch("grad_norms", grads, stream);
        const auto finish = finish_of(sums, norms, is_double, found_inf, skipped, bounds, launch.place);
        if (!sum_squares({{grads, params}, &firsts}, {eta, adaptive, pointer<double>(sums), finish}, launch.place)) {
          finish_norms(finish, bounds, launch.place);
        }
      },
      py::kw_only(), arg("grads"), arg("params"), arg("group_sizes"), arg("adaptive"), arg("eta"), arg("sums"), arg("norms"),
      arg("is_double"), arg("found_inf"), arg("skipped"), arg("stream"));

  module.def(
      "direction_norm",
      [](List grads, List ema, List params, bool adaptive, bool friendly, bool first_step, double eta, const OptionalNumber& grad_scale,
         double decay, double gain, double sigma, uintptr_t sums, uintptr_t norm, uintptr_t stream) {
        const auto [firsts, total] = first_sums(grads);
        const auto bounds = bounds_of(firsts, total, {firsts.size()});
        const Launch launch("direction_norm_", grads, stream);
        const auto finish = finish_of(sums, norm, true, 0, 0, bounds, launch.place);
        const DirectionOptions options{scalar_of(grad_scale, 1.0), decay, gain, sigma, eta, adaptive, friendly, first_step,
                                       pointer<double>(sums),      finish};
        if (!sum_direction({{grads, ema, params}, &firsts}, options, launch.place)) finish_norms(finish, bounds, launch.place);
      },
      py::kw_only(), arg("grads"), arg("ema"), arg("params"), arg("adaptive"), arg("friendly"), arg("first_step"), arg("eta"),
      arg("grad_scale"), arg("decay"), arg("gain"), arg("sigma"), arg("sums"), arg("norm"), arg("stream"));

  // sums: the address of as many times three float64 as count_sums says. dots: of three.
  module.def(
      "grad_dots",
      [](List lefts, List rights, List origins, uintptr_t sums, uintptr_t dots, uintptr_t found_inf, uintptr_t stream) {
        const auto [firsts, total] = first_sums(lefts);
        const Launch launch("grad_dots", lefts, stream);
        const FinishDotsOptions finish{pointer<Dots>(sums), total, pointer<Dots>(dots), pointer<float>(found_inf),
                                       counter_of(launch.place)};
        if (!sum_dots({{lefts, rights, origins}, &firsts}, {pointer<Dots>(sums), finish}, launch.place)) finish_dots(finish, launch.place);
      },
      py::kw_only(), arg("lefts"), arg("rights"), arg("origins"), arg("sums"), arg("dots"), arg("found_inf"), arg("stream"));

  // found_inf: the address of a float32, read first and set last.
  module.def(
      "combine",
      [](List outs, List lefts, List rights, List origins, const Number& left_weight, const Number& right_weight,
         const Number& origin_weight, uintptr_t sums, uintptr_t norm, bool is_double, uintptr_t found_inf, uintptr_t stream) {
        const auto [firsts, total] = first_sums(outs);
        const auto bounds = bounds_of(firsts, total, {firsts.size()});
        const Scalar flag{0.0, pointer<void>(found_inf), false};
        const Launch launch("combine_", outs, stream);
        const auto finish = finish_of(sums, norm, is_double, found_inf, 0, bounds, launch.place);
        const CombineOptions options{
            scalar_of(left_weight), scalar_of(right_weight), scalar_of(origin_weight), flag, pointer<double>(sums), finish};
        if (!combine({{outs, lefts, rights, origins}, &firsts}, options, launch.place)) finish_norms(finish, bounds, launch.place);
      },
      py::kw_only(), arg("outs"), arg("lefts"), arg("rights"), arg("origins"), arg("left_weight"), arg("right_weight"),
      arg("origin_weight"), arg("sums"), arg("norm"), arg("is_double"), arg("found_inf"), arg("stream"));

  module.def(
      "centralize",
      [](List grads, List params, const std::vector<int64_t>& slice_sizes, bool adaptive, double eta, uintptr_t sums, uintptr_t norm,
         bool is_double, uintptr_t found_inf, uintptr_t stream) {
        const auto [firsts, total] = first_sums(grads, &slice_sizes);
        const auto bounds = bounds_of(firsts, total, {firsts.size()});
        const Launch launch("centralize_", grads, stream);
        const auto finish = finish_of(sums, norm, is_double, found_inf, 0, bounds, launch.place);
        if (!centralize({{grads, params}, &firsts, &slice_sizes}, {eta, adaptive, pointer<double>(sums), finish}, launch.place)) {
          finish_norms(finish, bounds, launch.place);
        }
      },
      py::kw_only(), arg("grads"), arg("params"), arg("slice_sizes"), arg("adaptive"), arg("eta"), arg("sums"), arg("norm"),
      arg("is_double"), arg("found_inf"), arg("stream"));

  module.def(
      "check_finite",
      [](List grads, uintptr_t found_inf, uintptr_t stream) {
        const Launch launch("check_finite_", grads, stream);
        check_finite({{grads}}, {pointer<float>(found_inf)}, launch.place);
      },
      py::kw_only(), arg("grads"), arg("found_inf"), arg("stream"));

  module.def(
      "perturb",
      [](List params, List grads, List old_params, List ema, const std::optional<std::vector<uint32_t>>& row_indices, const Number& norm,
         const Number& rho, const Number& lambd, double eps, double eta, const OptionalNumber& grad_scale, const OptionalNumber& found_inf,
         bool adaptive, bool from_old, double grad_weight, double ema_weight, std::optional<uint64_t> rounding_seed, uintptr_t stream) {
        const PerturbOptions options{
            scalar_of(norm), scalar_of(rho), scalar_of(lambd), scalar_of(grad_scale, 1.0), scalar_of(found_inf), eps, eta,
            adaptive,        from_old};
        const Launch launch("perturb_", params, stream);
        if (ema == nullptr && !rounding_seed) {
          perturb({{params, grads, old_params}}, options, launch.place);
          return;
        }
        const uint64_t seed = rounding_seed.value_or(0);
        perturb_variant({{params, grads, old_params, ema}, row_indices ? &*row_indices : nullptr},
                        {options, grad_weight, ema_weight, rounding_seed.has_value(), low(seed), high(seed)}, launch.place);
      },
      py::kw_only(), arg("params"), arg("grads"), arg("old_params"), arg("ema"), arg("row_indices"), arg("norm"), arg("rho"), arg("lambd"),
      arg("eps"), arg("eta"), arg("grad_scale"), arg("found_inf"), arg("adaptive"), arg("from_old"), arg("grad_weight"), arg("ema_weight"),
      arg("rounding_seed"), arg("stream"));

  module.def(
      "random_perturb",
      [](List params, List old_params, const std::vector<uint32_t>& row_indices, uint64_t seed, const Number& scale, bool normal,
         bool from_old, uintptr_t stream) {
        const Launch launch("random_perturb_", params, stream);
        random_perturb({{params, old_params}, &row_indices}, {scalar_of(scale), low(seed), high(seed), normal, from_old}, launch.place);
      },
      py::kw_only(), arg("params"), arg("old_params"), arg("row_indices"), arg("seed"), arg("scale"), arg("normal"), arg("from_old"),
      arg("stream"));

  module.def(
      "copy",
      [](List destination, List source, uintptr_t stream) {
        const Launch launch("restore_", destination, stream);
        copy({{destination, source}}, {}, launch.place);
      },
      py::kw_only(), arg("destination"), arg("source"), arg("stream"));

  module.def(
      "sgd",
      [](List params, List grads, List old_params, List momentum_buffers, const Number& lr, double momentum, double dampening,
         double weight_decay, bool nesterov, bool maximize, bool first_step, const OptionalNumber& grad_scale,
         const OptionalNumber& found_inf, const OptionalNumber& norm, std::optional<double> max_norm, uintptr_t stream) {
        const Launch launch("sgd_step_", params, stream);
        sgd({{params, grads, old_params, momentum_buffers}},
            {scalar_of(lr), scalar_of(found_inf), multiplier_of(norm, grad_scale, max_norm, maximize), momentum, dampening, weight_decay,
             nesterov, first_step},
            launch.place);
      },
      py::kw_only(), arg("params"), arg("grads"), arg("old_params"), arg("momentum_buffers"), arg("lr"), arg("momentum"), arg("dampening"),
      arg("weight_decay"), arg("nesterov"), arg("maximize"), arg("first_step"), arg("grad_scale"), arg("found_inf"), arg("norm"),
      arg("max_norm"), arg("stream"));

  // corrections: the address of (n, 2) float64. state_steps: float32, advanced here.
  module.def(
      "adamw",
      [](List params, List grads, List old_params, List exp_avgs, List exp_avg_sqs, List state_steps, uintptr_t corrections,
         const Number& lr, double beta1, double beta2, double eps, double weight_decay, bool decoupled, bool maximize,
         const OptionalNumber& grad_scale, const OptionalNumber& found_inf, const OptionalNumber& norm, std::optional<double> max_norm,
         uintptr_t stream) {
        if (state_steps->operands.size() != params->operands.size()) throw std::invalid_argument("one step counter a tensor");
        if (!state_steps->only_float32) throw py::type_error("step counters must be float32");
        const RowLists<kAdamRoles> lists{{params, grads, old_params, exp_avgs, exp_avg_sqs}};
        const Launch launch("adamw_step_", params, stream);
        lists.check();
        advance({{state_steps}}, {scalar_of(lr), scalar_of(norm), scalar_of(found_inf), beta1, beta2, pointer<double>(corrections)},
                launch.place);
        adamw(lists,
              {scalar_of(lr), scalar_of(found_inf), multiplier_of(norm, grad_scale, max_norm, maximize), beta1, beta2, eps, weight_decay,
               decoupled, pointer<double>(corrections)},
              launch.place);
      },
      py::kw_only(), arg("params"), arg("grads"), arg("old_params"), arg("exp_avgs"), arg("exp_avg_sqs"), arg("state_steps"),
      arg("corrections"), arg("lr"), arg("beta1"), arg("beta2"), arg("eps"), arg("weight_decay"), arg("decoupled"), arg("maximize"),
      arg("grad_scale"), arg("found_inf"), arg("norm"), arg("max_norm"), arg("stream"));

  module.def(
      "sharpness_weights",
      [](List tensors, const Number& beta, uintptr_t stream) {
        const GibbsOptions options = gibbs_of(tensors, beta);
        expect(tensors->numels[1] == options.count, "weights: size");
        const Launch launch("sharpness_weights", tensors, stream);
        sharpness_weights(options, launch.place);
      },
      py::kw_only(), arg("tensors"), arg("beta"), arg("stream"));

  // tensors: norms, weights and the int64 indices under the name of float64, the only ones of 64 bits that a list knows.
  module.def(
      "sharpness_sample",
      [](List tensors, const Number& beta, bool replacement, uint64_t seed, uintptr_t stream) {
        const GibbsOptions gibbs = gibbs_of(tensors, beta);
        expect(tensors->operands.size() == 3 && tensors->operands[2].dtype == DType::kFloat64, "indices: of 64 bits");
        const int64_t draws = tensors->numels[2];
        expect(tensors->numels[1] == draws && draws > 0 && (replacement || draws <= gibbs.count), "weights and indices: size");
        const Launch launch("sharpness_sample", tensors, stream);
        const DrawOptions options{gibbs, static_cast<int64_t*>(tensors->operands[2].data), draws, low(seed), high(seed)};
        replacement ? sharpness_draw(options, launch.place) : sharpness_rank(options, launch.place);
      },
      py::kw_only(), arg("tensors"), arg("beta"), arg("replacement"), arg("seed"), arg("stream"));
}
