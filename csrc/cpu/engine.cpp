#include "cpu/engine.h"

#include <cmath>
#include <initializer_list>
#include <stdexcept>

#include "common/random.h"
#include "cpu/parallel.h"

namespace sam::cpu {
namespace {

static_assert(kChunkSize % kTile == 0, "chunks begin where tiles of random numbers do");

// Write-only outputs bypass the caches when what an operation touches is larger than this. Below it the next pass finds them there.
constexpr int64_t kStreamingBytes = int64_t{32} << 20;

Operand operand_of(const TensorList* list, int64_t row) { return list ? list->operands[static_cast<std::size_t>(row)] : Operand{}; }

Row row_of(const Lists& lists, int64_t row) {
  return {operand_of(lists.params, row),
          operand_of(lists.grads, row),
          operand_of(lists.old_params, row),
          {operand_of(lists.states[0], row), operand_of(lists.states[1], row)}};
}

const std::vector<int64_t>& numels_of(const Lists& lists) { return lists.grads ? lists.grads->numels : lists.params->numels; }

std::vector<int64_t> one_group(const Lists& lists) { return {static_cast<int64_t>(numels_of(lists).size())}; }
bool streams(const std::vector<Chunk>& chunks, int operands) {
  return count_elements(chunks) * operands * int64_t{sizeof(float)} > kStreamingBytes;
}

// Applies kernel(row, span, args) to every chunk, last first: an elementwise pass follows a norm over the same gradients, which read them
// forwards, so it starts with those still in the caches (measured: 10 % of a whole step).
template <class Args, class Kernel>
void apply(const Lists& lists, Args args, int operands, int threads, Kernel kernel) {
  lists.check();
  const std::vector<Chunk> chunks = make_chunks(numels_of(lists));
  args.streaming = streams(chunks, operands);
  const int64_t last = static_cast<int64_t>(chunks.size()) - 1;
  for_each_chunk(chunks, threads, [&](int64_t i) {
    const Chunk& chunk = chunks[static_cast<std::size_t>(last - i)];
    kernel(row_of(lists, chunk.tensor), Span{chunk.begin, chunk.end}, args, chunk.tensor);
  });
}

// kernel(row, span, tensor) of every chunk, in the order of the chunks. What follows a pass over the same tensors begins with the last.
template <class Sum, class Kernel>
std::vector<Sum> partial_sums(const Lists& lists, const std::vector<Chunk>& chunks, bool last_first, int threads, Kernel kernel) {
  std::vector<Sum> sums(chunks.size());
  const int64_t last = static_cast<int64_t>(chunks.size()) - 1;
  for_each_chunk(chunks, threads, [&](int64_t i) {
    const std::size_t at = static_cast<std::size_t>(last_first ? last - i : i);
    sums[at] = kernel(row_of(lists, chunks[at].tensor), Span{chunks[at].begin, chunks[at].end}, chunks[at].tensor);
  });
  return sums;
}

// The roots of the groups' sums of squares, kernel(row, span, tensor) for each chunk, added in the order of the chunks.
template <class Kernel>
std::vector<double> norms(const Lists& lists, const std::vector<int64_t>& group_sizes, int threads, Kernel kernel,
                          const std::vector<int64_t>* slice_sizes = nullptr) {
  lists.check();
  const std::vector<Chunk> chunks = make_chunks(numels_of(lists), slice_sizes);
  const std::vector<double> sums = partial_sums<double>(lists, chunks, false, threads, kernel);
  std::vector<double> roots;
  std::size_t i = 0;
  int64_t rows_end = 0;
  for (const int64_t group_size : group_sizes) {
    rows_end += group_size;
    double sum = 0;
    for (; i < chunks.size() && chunks[i].tensor < rows_end; ++i) sum += sums[i];
    roots.push_back(std::sqrt(sum));
  }
  return roots;
}

}  // namespace

void Lists::check() const {
  const std::vector<int64_t>& numels = numels_of(*this);
  for (const TensorList* list : {params, grads, old_params, states[0], states[1]}) {
    if (list != nullptr && list->numels != numels) throw std::invalid_argument("tensor lists of different sizes");
  }
}

std::vector<double> grad_norms(const Lists& lists, const std::vector<int64_t>& group_sizes, const NormArgs& args, int threads) {
  const KernelTable& kernels = kernel_table();
  return norms(lists, group_sizes, threads, [&](const Row& row, Span span, int64_t) { return kernels.norm(row, span, args); });
}

double direction_norm(const Lists& lists, const DirectionArgs& args, int threads) {
  const KernelTable& kernels = kernel_table();
  return norms(lists, one_group(lists), threads,
               [&](const Row& row, Span span, int64_t) { return kernels.direction_norm(row, span, args); })[0];
}

double centralize(const Lists& lists, const NormArgs& args, const std::vector<int64_t>& slice_sizes, int threads) {
  const KernelTable& kernels = kernel_table();
  check_slices(numels_of(lists), slice_sizes);
  const auto kernel = [&](const Row& row, Span span, int64_t tensor) {
    const int64_t slice_size = slice_sizes[static_cast<std::size_t>(tensor)];
    return slice_size == 0 ? kernels.norm(row, span, args) : kernels.centralize(row, span, {args, slice_size});
  };
  return norms(lists, one_group(lists), threads, kernel, &slice_sizes)[0];
}

Dots grad_dots(const Lists& lists, int threads) {
  const KernelTable& kernels = kernel_table();
  lists.check();
  const std::vector<Chunk> chunks = make_chunks(numels_of(lists));
  const auto kernel = [&](const Row& row, Span span, int64_t) { return kernels.grad_dots(row, span); };
  Dots sum{0, 0, 0};
  for (const Dots& dots : partial_sums<Dots>(lists, chunks, false, threads, kernel)) sum += dots;
  return sum;
}

double combine(const Lists& lists, CombineArgs args, int threads) {
  const KernelTable& kernels = kernel_table();
  lists.check();
  const std::vector<Chunk> chunks = make_chunks(numels_of(lists));
  args.streaming = streams(chunks, 4);
  double sum = 0;
  const auto kernel = [&](const Row& row, Span span, int64_t) { return kernels.combine(row, span, args); };
  for (const double square : partial_sums<double>(lists, chunks, true, threads, kernel)) sum += square;
  return std::sqrt(sum);
}

void perturb(const Lists& lists, PerturbArgs args, int threads) {
  const KernelTable& kernels = kernel_table();
  apply(lists, args, 4, threads, [&](const Row& row, Span span, const PerturbArgs& a, int64_t) { kernels.perturb(row, span, a); });
}

void perturb_variant(const Lists& lists, PerturbVariantArgs args, const std::vector<uint32_t>& indices, int threads) {
  const KernelTable& kernels = kernel_table();
  if (indices.size() != numels_of(lists).size()) throw std::invalid_argument("one index a tensor");
  apply(lists, args, 5, threads, [&](const Row& row, Span span, const PerturbVariantArgs& a, int64_t tensor) {
    kernels.perturb_variant(row, span, a, indices[static_cast<std::size_t>(tensor)]);
  });
}

void random_perturb(const Lists& lists, RandomPerturbArgs args, const std::vector<uint32_t>& indices, int threads) {
  const KernelTable& kernels = kernel_table();
  if (indices.size() != numels_of(lists).size()) throw std::invalid_argument("one index a tensor");
  apply(lists, args, 3, threads, [&](const Row& row, Span span, const RandomPerturbArgs& a, int64_t tensor) {
    kernels.random_perturb(row, span, a, indices[static_cast<std::size_t>(tensor)]);
  });
}

void copy(const Lists& lists, CopyArgs args, int threads) {
  const KernelTable& kernels = kernel_table();
  apply(lists, args, 2, threads, [&](const Row& row, Span span, const CopyArgs& a, int64_t) { kernels.copy(row, span, a); });
}

void sgd(const Lists& lists, SgdArgs args, int threads) {
  const KernelTable& kernels = kernel_table();
  apply(lists, args, 5, threads, [&](const Row& row, Span span, const SgdArgs& a, int64_t) { kernels.sgd(row, span, a); });
}

void adamw(const Lists& lists, AdamArgs args, const std::vector<double>& steps, int threads) {
  const KernelTable& kernels = kernel_table();
  if (steps.size() != numels_of(lists).size()) throw std::invalid_argument("one step a tensor");
  apply(lists, args, 7, threads, [&](const Row& row, Span span, const AdamArgs& a, int64_t tensor) {
    kernels.adamw(row, span, a, steps[static_cast<std::size_t>(tensor)]);
  });
}

}  // namespace sam::cpu
