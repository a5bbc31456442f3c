// Lists of tensors, and how they are cut into pieces of work. That depends on the sizes alone, never on the number of threads: it is what
// makes the bits of a norm independent of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "common/bits.h"
#include "common/operand.h"

namespace sam {

struct TensorList {
  std::vector<Operand> operands;  // (n,)
  std::vector<int64_t> numels;    // (n,)
  int32_t device = 0;             // which one of its type; 0 for the CPU
};

// Throws std::invalid_argument unless every list that takes part (is not null) has the sizes of the first. Called before any memory is
// touched. roles: an array of const TensorList*.
template <class Roles>
void check_sizes(const Roles& roles) {
  for (const TensorList* list : roles) {
    if (list != nullptr && list->numels != roles[0]->numels) throw std::invalid_argument("tensor lists of different sizes");
  }
}

// Elements a chunk: 256 KiB of float32, several of which fit a core's L2 cache, and a few thousand chunks for a model of 10^8 parameters.
constexpr int64_t kChunkSize = 65536;

struct Chunk {
  int64_t tensor;      // index into the list
  int64_t begin, end;  // elements of that tensor, end - begin <= chunk size
};

// Elements a chunk of a tensor whose slices must not be cut: as many of them as fit, at least one. 0: a tensor without slices.
SAM_INLINE int64_t whole_slices(int64_t slice_size, int64_t chunk_size) {
  if (slice_size == 0) return chunk_size;
  return slice_size < chunk_size ? chunk_size / slice_size * slice_size : slice_size;
}

// Throws std::invalid_argument unless every tensor is made of whole slices.
inline void check_slices(const std::vector<int64_t>& numels, const std::vector<int64_t>& slice_sizes) {
  if (slice_sizes.size() != numels.size()) throw std::invalid_argument("one size of slices a tensor");
  for (std::size_t i = 0; i < numels.size(); ++i) {
    const int64_t size = slice_sizes[i];
    if (size < 0 || (size > 0 && numels[i] % size != 0)) throw std::invalid_argument("slices that do not divide their tensor");
  }
}

// Chunks of every tensor, in order; empty tensors have none. numels: (n,); slice_sizes: (n,), null where tensors may be cut anywhere.
inline std::vector<Chunk> make_chunks(const std::vector<int64_t>& numels, const std::vector<int64_t>* slice_sizes = nullptr) {
  const auto chunk_size_of = [&](std::size_t i) { return whole_slices(slice_sizes == nullptr ? 0 : (*slice_sizes)[i], kChunkSize); };
  std::size_t count = 0;
  for (std::size_t i = 0; i < numels.size(); ++i) count += static_cast<std::size_t>((numels[i] + chunk_size_of(i) - 1) / chunk_size_of(i));
  std::vector<Chunk> chunks;
  chunks.reserve(count);
  for (std::size_t tensor = 0; tensor < numels.size(); ++tensor) {
    const int64_t chunk_size = chunk_size_of(tensor);
    for (int64_t begin = 0; begin < numels[tensor]; begin += chunk_size) {
      const int64_t left = numels[tensor] - begin;
      chunks.push_back({static_cast<int64_t>(tensor), begin, begin + (left < chunk_size ? left : chunk_size)});
    }
  }
  return chunks;
}

}  // namespace sam
