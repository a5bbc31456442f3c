// The Python module sam_kernels._cuda (for the tests: _cuda_on_host). Arguments are checked in Python (sam_kernels/_validate.py); what is
// checked again here is what would otherwise read or write out of bounds.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind_cuda_operations.h"
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

GibbsOptions gibbs_of(List tensors, const py::object& beta) {
  const std::vector<Operand>& operands = tensors->operands;
  return {operands[0].data, operands[1].data, operands[0].dtype == DType::kFloat64, tensors->numels[0], scalar_of(beta)};
}

void weights(List tensors, const py::object& beta, uintptr_t stream) {
  expect_weights(tensors);
  const GibbsOptions options = gibbs_of(tensors, beta);
  const Launch launch("sharpness_weights", tensors, stream);
  sharpness_weights(options, launch.place);
}

void sample(List tensors, const py::object& beta, bool replacement, uint64_t seed, uintptr_t stream) {
  const int64_t draws = expect_draws(tensors, replacement);
  const DrawOptions options{gibbs_of(tensors, beta), static_cast<int64_t*>(tensors->operands[2].data), draws, seed_of(seed)};
  const Launch launch("sharpness_sample", tensors, stream);
  replacement ? sharpness_draw(options, launch.place) : sharpness_rank(options, launch.place);
}

void copy_rows(List destination, List source, uintptr_t stream) {
  const Launch launch("restore_", destination, stream);
  copy({{destination, source}}, {}, launch.place);
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

  // Operations over lists: op is a value of sam_kernels/operations, lists holds a TensorList a role.
  using Op = const py::object&;
  using Given = const py::dict&;
  const auto def = [&](const char* name, auto function) {
    module.def(
        name, [function](Op op, Given lists, uintptr_t stream) { function({op, lists}, stream); }, arg("op"), arg("lists"), arg("stream"));
  };
  const auto def_rows = [&](const char* name, auto function) {
    module.def(
        name, [function](Op op, Given lists, Op indices, uintptr_t stream) { function({op, lists}, indices, stream); }, arg("op"),
        arg("lists"), arg("indices"), arg("stream"));
  };
  // sums: the address of as many float64 as count_sums says (of inner products three times as many), result: of what is made of them.
  const auto def_sums = [&](const char* name, auto function) {
    module.def(
        name,
        [function](Op op, Given lists, uintptr_t sums, uintptr_t result, bool is_double, uintptr_t stream) {
          function({op, lists}, {sums, result, is_double}, stream);
        },
        arg("op"), arg("lists"), arg("sums"), arg("result"), arg("is_double"), arg("stream"));
  };
  def_sums("grad_norms", grad_norms);
  def_sums("direction_norm", direction_norm);
  def_sums("grad_dots", grad_dots);
  def_sums("combine", combine_rows);
  module.def(
      "centralize",
      [](Op op, Given lists, const std::vector<int64_t>& slice_sizes, uintptr_t sums, uintptr_t result, bool is_double, uintptr_t stream) {
        centralize_rows({op, lists}, slice_sizes, {sums, result, is_double}, stream);
      },
      arg("op"), arg("lists"), arg("slice_sizes"), arg("sums"), arg("result"), arg("is_double"), arg("stream"));
  def("check_finite", check_finite_rows);
  def_rows("perturb", perturb_rows);
  def_rows("random_perturb", random_perturb_rows);
  def_rows("sgd", sgd_rows);
  module.def(
      "adamw",
      [](Op op, Given lists, Op indices, uintptr_t corrections, uintptr_t stream) {
        adamw_rows({op, lists}, indices, corrections, stream);
      },
      arg("op"), arg("lists"), arg("indices"), arg("corrections"), arg("stream"));
  module.def("copy", &copy_rows, arg("destination"), arg("source"), arg("stream"));

  module.def("sharpness_weights", &weights, py::kw_only(), arg("tensors"), arg("beta"), arg("stream"));
  module.def("sharpness_sample", &sample, py::kw_only(), arg("tensors"), arg("beta"), arg("replacement"), arg("seed"), arg("stream"));
}
