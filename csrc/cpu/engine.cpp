#include "cpu/engine.h"

#include <atomic>
#include <cmath>
#include <stdexcept>

#include "common/random.h"
#include "cpu/parallel.h"

namespace sam::cpu {
namespace {

static_assert(kChunkSize % kTile == 0, "chunks begin where tiles of random numbers do");

// Write-only outputs bypass the caches when what an operation touches is larger than this. Below it the next pass finds them there.
constexpr int64_t kStreamingBytes = int64_t{32} << 20;

Row row_of(const Lists& lists, int64_t row) {
  Row found;
  for (std::size_t role = 0; role < lists.roles.size(); ++role) {
    if (lists.roles[role] != nullptr) found.operands[role] = lists.roles[role]->operands[static_cast<std::size_t>(row)];
  }
  return found;
}

std::vector<int64_t> one_group(const Lists& lists) { return {static_cast<int64_t>(lists.numels().size())}; }
bool streams(const std::vector<Chunk>& chunks, int operands) {
  return count_elements(chunks) * operands * int64_t{sizeof(float)} > kStreamingBytes;
}

// Runs a kernel that writes over every chunk, last first: an elementwise pass follows a norm over the same gradients, which read them
// forwards, so it starts with those still in the caches (measured: 10 % of a whole step). operands: that it touches; values: (n,) each.
template <class Options, class... Values>
void apply(void (*kernel)(const Row&, Span, const Options&, bool, Values...), const Lists& lists, const Options& options, int operands,
           int threads, const std::vector<Values>&... values) {
  check_sizes(lists.roles);
  if (((values.size() != lists.numels().size()) || ...)) throw std::invalid_argument("one value a tensor");
  const std::vector<Chunk> chunks = make_chunks(lists.numels());
  const bool streaming = streams(chunks, operands);
  const int64_t last = static_cast<int64_t>(chunks.size()) - 1;
  for_each_chunk(chunks, threads, [&](int64_t i) {
    const Chunk& chunk = chunks[static_cast<std::size_t>(last - i)];
    kernel(row_of(lists, chunk.tensor), Span{chunk.begin, chunk.end}, options, streaming,
           values[static_cast<std::size_t>(chunk.tensor)]...);
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
  check_sizes(lists.roles);
  const std::vector<Chunk> chunks = make_chunks(lists.numels(), slice_sizes);
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

std::vector<double> grad_norms(const Lists& lists, const std::vector<int64_t>& group_sizes, const Scaling<double>& scaling, int threads) {
  const KernelTable& kernels = kernel_table();
  return norms(lists, group_sizes, threads, [&](const Row& row, Span span, int64_t) { return kernels.norm(row, span, scaling); });
}

bool all_finite(const Lists& lists, int threads) {
  const KernelTable& kernels = kernel_table();
  const std::vector<Chunk> chunks = make_chunks(lists.numels());
  std::atomic<bool> is_finite = true;
  for_each_chunk(chunks, threads, [&](int64_t i) {
    const Chunk& chunk = chunks[static_cast<std::size_t>(i)];
    if (!kernels.finite(row_of(lists, chunk.tensor), Span{chunk.begin, chunk.end})) is_finite.store(false, std::memory_order_relaxed);
  });
  return is_finite;
}

double direction_norm(const Lists& lists, const MovingDirection& options, int threads) {
  const KernelTable& kernels = kernel_table();
  return norms(lists, one_group(lists), threads,
               [&](const Row& row, Span span, int64_t) { return kernels.direction_norm(row, span, options); })[0];
}

double centralize(const Lists& lists, const Scaling<double>& scaling, const std::vector<int64_t>& slice_sizes, int threads) {
  const KernelTable& kernels = kernel_table();
  check_slices(lists.numels(), slice_sizes);
  const auto kernel = [&](const Row& row, Span span, int64_t tensor) {
    const int64_t slice_size = slice_sizes[static_cast<std::size_t>(tensor)];
    return slice_size == 0 ? kernels.norm(row, span, scaling) : kernels.centralize(row, span, scaling, slice_size);
  };
  return norms(lists, one_group(lists), threads, kernel, &slice_sizes)[0];
}

Dots grad_dots(const Lists& lists, int threads) {
  const KernelTable& kernels = kernel_table();
  check_sizes(lists.roles);
  const std::vector<Chunk> chunks = make_chunks(lists.numels());
  const auto kernel = [&](const Row& row, Span span, int64_t) { return kernels.grad_dots(row, span); };
  Dots sum{0, 0, 0};
  for (const Dots& dots : partial_sums<Dots>(lists, chunks, false, threads, kernel)) sum += dots;
  return sum;
}

double combine(const Lists& lists, const Combine& options, int threads) {
  const KernelTable& kernels = kernel_table();
  check_sizes(lists.roles);
  const std::vector<Chunk> chunks = make_chunks(lists.numels());
  const bool streaming = streams(chunks, 4);
  double sum = 0;
  const auto kernel = [&](const Row& row, Span span, int64_t) { return kernels.combine(row, span, options, streaming); };
  for (const double square : partial_sums<double>(lists, chunks, true, threads, kernel)) sum += square;
  return std::sqrt(sum);
}

void perturb(const Lists& lists, const Perturb& options, int threads) { apply(kernel_table().perturb, lists, options, 4, threads); }

void perturb_variant(const Lists& lists, const PerturbVariant& options, const std::vector<uint32_t>& indices, int threads) {
  apply(kernel_table().perturb_variant, lists, options, 5, threads, indices);
}

void random_perturb(const Lists& lists, const RandomPerturb& options, const std::vector<uint32_t>& indices, int threads) {
  apply(kernel_table().random_perturb, lists, options, 3, threads, indices);
}

void copy(const Lists& lists, int threads) { apply(kernel_table().copy, lists, NoOptions{}, 2, threads); }

void sgd(const Lists& lists, const Sgd& options, const std::vector<uint32_t>& indices, int threads) {
  apply(kernel_table().sgd, lists, options, 5, threads, indices);
}

void adamw(const Lists& lists, const Adam& options, const std::vector<double>& steps, const std::vector<uint32_t>& indices, int threads) {
  apply(kernel_table().adamw, lists, options, 7, threads, steps, indices);
}

}  // namespace sam::cpu
